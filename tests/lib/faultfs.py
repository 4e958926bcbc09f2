"""A file system whose device fails when a test says so: files in memory behind /dev/fuse, served by the test's thread.

The kernel's own file system code, page cache and io_uring are in between, so that what fails, fails as on a bad disk:
each operation can be answered with an errno (`fail`), held back (`hold`), or the whole device be gone. It speaks the
kernel's FUSE protocol (include/uapi/linux/fuse.h), as much of it as single files in one folder need. Needs root.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import stat
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.lib.procs import short_dir

_KINDS = {"read": 15, "write": 16, "sync": 20, "allocate": 43, "change": 4}
_FORGET, _BATCH_FORGET, _READDIR = 2, 42, 28
_INIT_FLAGS = 1 << 0 | 1 << 5 | 1 << 15
"""ASYNC_READ, BIG_WRITES, ASYNC_DIO."""
_ROOT = 1
_MAX_WRITE = 128 << 10
_ATTR_SIZE = 1 << 3
_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


def _mount(source: bytes, target: bytes, kind: bytes, flags: int, options: bytes) -> None:
    if _libc.mount(source, target, kind, flags, options) != 0:
        raise OSError(ctypes.get_errno(), f"mount {target!r}: {os.strerror(ctypes.get_errno())}")


def _unmount(target: bytes) -> None:
    if _libc.umount2(target, _MNT_DETACH) != 0:
        raise OSError(ctypes.get_errno(), f"umount {target!r}: {os.strerror(ctypes.get_errno())}")


@dataclass
class Fault:
    """How operations on some bytes end, so many times."""

    errno: int
    begin: int
    end: int
    times: int

    def hits(self, offset: int, length: int) -> bool:
        """Whether it is one of them; it counts."""
        if self.times == 0 or offset >= self.end or offset + length <= self.begin:
            return False
        self.times -= 1
        return True


class _Request:
    """One of the kernel's."""

    def __init__(self, raw: bytes) -> None:
        _, self.kind, self.unique, self.node, *_ = _IN.unpack_from(raw)
        self.body = raw[_IN.size :]

    def name(self, at: int = 0) -> str:
        return self.body[at:].split(b"\0")[0].decode()

    def range(self) -> tuple[int, int]:
        """The bytes that it is about: all, where it does not say."""
        if self.kind == _KINDS["allocate"]:
            _, offset, length = struct.unpack_from("<QQQ", self.body)
        elif self.kind in (_KINDS["read"], _KINDS["write"], _READDIR):
            _, offset, length = struct.unpack_from("<QQI", self.body)
        else:
            return 0, 1 << 62
        return offset, length


class FaultFs:
    """The file system, mounted on `folder`."""

    def __init__(self, folder: Path, room: int = 1 << 30) -> None:
        self.folder = folder
        self.room = room
        """Bytes that all files may have together."""
        self.files: dict[str, bytearray] = {}
        self._nodes: dict[int, str] = {}
        self._faults: dict[int, Fault] = {}
        self._holding: set[int] = set()
        self._within = 0, 1 << 62
        self._held: list[_Request] = []
        self._lock = threading.Lock()
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        self._stop, self._stopper = os.pipe()
        options = f"fd={self._fd},rootmode=40755,user_id=0,group_id=0,allow_other,default_permissions"
        _mount(b"faultfs", bytes(folder), b"fuse", 0, options.encode())
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    # ---- what tests say ----

    def fail(self, kind: str, number: int, offset: int = 0, length: int = 1 << 62, times: int = 1 << 62) -> None:
        """Answer such operations that touch these bytes with an errno, so often; a sync touches all bytes."""
        self._faults[_KINDS[kind]] = Fault(number, offset, offset + length, times)

    def mend(self) -> None:
        """Nothing fails any more."""
        self._faults.clear()

    def hold(self, *kinds: str, offset: int = 0, length: int = 1 << 62) -> None:
        """Answer such operations that touch these bytes only when they are released."""
        with self._lock:
            self._holding = {_KINDS[kind] for kind in kinds}
            self._within = offset, offset + length

    def held(self) -> int:
        """How many wait."""
        with self._lock:
            return len(self._held)

    def release(self) -> None:
        """Carry out what was held, and hold nothing back any more."""
        with self._lock:
            self._holding, held, self._held = set(), self._held, []
        for one in held:
            self._answer(one)

    def gone(self) -> None:
        """The device is pulled out: whoever has a file open gets errors from now on."""
        if not self._thread.is_alive():
            return
        os.write(self._stopper, b"x")
        self._thread.join(10)
        os.close(self._fd)

    def close(self) -> None:
        """Unmount it, whoever still uses it."""
        self.gone()
        _unmount(bytes(self.folder))
        os.close(self._stop)
        os.close(self._stopper)

    # ---- the kernel's side ----

    def _serve(self) -> None:
        poll = select.poll()
        for fd in (self._fd, self._stop):
            poll.register(fd, select.POLLIN)
        while True:
            ready = dict(poll.poll())
            if self._stop in ready or ready.get(self._fd, 0) & (select.POLLERR | select.POLLHUP):
                return
            with contextlib.suppress(BlockingIOError, InterruptedError, FileNotFoundError):
                self._take(_Request(os.read(self._fd, _MAX_WRITE + 8192)))

    def _take(self, request: _Request) -> None:
        with self._lock:
            begin, end = self._within
            offset, length = request.range()
            if request.kind in self._holding and offset < end and offset + length > begin:
                self._held.append(request)
                return
        self._answer(request)

    def _answer(self, request: _Request) -> None:
        if request.kind in (_FORGET, _BATCH_FORGET):
            return
        try:
            error, body = 0, self._do(request)
        except OSError as failed:
            error, body = failed.errno or errno.EIO, b""
        with contextlib.suppress(OSError):  # nobody waits for it any more
            os.write(self._fd, _OUT.pack(_OUT.size + len(body), -error, request.unique) + body)

    def _do(self, request: _Request) -> bytes:
        offset, length = request.range()
        fault = self._faults.get(request.kind)
        if fault is not None and fault.hits(offset, length):
            raise OSError(fault.errno, "as the test has it")
        match request.kind:
            case 26:
                return struct.pack("<IIIIHHIIHHI28x", 7, 31, 0, _INIT_FLAGS, 64, 48, _MAX_WRITE, 1, 32, 0, 0)
            case 1:
                return self._entry(request.name())
            case 35:
                self.files.setdefault(request.name(16), bytearray())
                return self._entry(request.name(16)) + struct.pack("<QIi", 0, 0, 0)
            case 10:
                del self.files[request.name()]
                return b""
            case 3 | 4:
                return self._attributes(request)
            case 14 | 27:
                return struct.pack("<QIi", 0, 0, 0)
            case 15:
                return bytes(self._file(request)[offset : offset + length])
            case 16:
                self._write(self._file(request), offset, request.body[40 : 40 + length])
                return struct.pack("<II", length, 0)
            case 43:
                file = self._file(request)
                self._write(file, len(file), bytes(max(offset + length - len(file), 0)))
                return b""
            case 28:
                return self._listing(offset)
            case 17:
                free = (self.room - sum(map(len, self.files.values()))) // 4096
                return struct.pack("<QQQQQIIII24x", self.room // 4096, free, free, 1000, 1000, 4096, 255, 4096, 0)
            case 18 | 20 | 25 | 29 | 30:
                return b""
            case _:
                raise OSError(errno.ENOSYS, f"operation {request.kind}")

    def _write(self, file: bytearray, offset: int, data: bytes) -> None:
        grows = max(offset + len(data) - len(file), 0)
        if sum(map(len, self.files.values())) + grows > self.room:
            raise OSError(errno.ENOSPC, "no room")
        file.extend(bytes(grows))
        file[offset : offset + len(data)] = data

    def _file(self, request: _Request) -> bytearray:
        return self.files.get(self._nodes[request.node], bytearray())

    def _node(self, name: str) -> int:
        for node, known in self._nodes.items():
            if known == name:
                return node
        node = 2 + len(self._nodes)
        self._nodes[node] = name
        return node

    def _entry(self, name: str) -> bytes:
        if name not in self.files:
            raise OSError(errno.ENOENT, name)
        node = self._node(name)
        return struct.pack("<QQQQII", node, 0, 0, 0, 0, 0) + self._stat(node)

    def _attributes(self, request: _Request) -> bytes:
        if request.kind == _KINDS["change"] and struct.unpack_from("<I", request.body)[0] & _ATTR_SIZE:
            file, size = self._file(request), struct.unpack_from("<Q", request.body, 16)[0]
            self._write(file, len(file), bytes(max(size - len(file), 0)))
            del file[size:]
        return struct.pack("<QII", 0, 0, 0) + self._stat(request.node)

    def _stat(self, node: int) -> bytes:
        if node == _ROOT:
            size, mode, links = 0, stat.S_IFDIR | 0o755, 2
        else:
            name = self._nodes[node]
            size, mode, links = len(self.files.get(name, b"")), stat.S_IFREG | 0o600, int(name in self.files)
        times = (0,) * 6
        return struct.pack(
            "<QQQQQQIIIIIIIIII", node, size, (size + 511) // 512, *times[:3], *times[3:], mode, links, 0, 0, 0, 4096, 0
        )

    def _listing(self, offset: int) -> bytes:
        names = list(self.files)
        out = b""
        for index in range(offset, len(names)):
            name = names[index].encode()
            one = struct.pack("<QQII", self._node(names[index]), index + 1, len(name), stat.S_IFREG >> 12) + name
            out += one.ljust((len(one) + 7) // 8 * 8, b"\0")
        return out


@contextlib.contextmanager
def fault_fs(room: int = 1 << 30) -> Iterator[FaultFs]:
    """One for the length of the block, in a folder of its own; `room`: bytes that all its files may have together."""
    folder = short_dir()
    one = FaultFs(folder, room)
    try:
        yield one
    finally:
        one.close()
        folder.rmdir()
