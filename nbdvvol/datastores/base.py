"""What every kind of datastore does: open objects, look at itself, make and remove files.

All functions block and run in a worker thread; none touches a VM's bytes. Errors are NvError that name the
datastore and the path. A datastore is used by one farm at a time (lock.py).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nbdvvol.dataplane.types import ObjectSpec
from nbdvvol.datastores.lock import lock_for_farm
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.link import DatastoreSpec

_BLKSSZGET = 0x1268
_ALIGNMENTS = (512, 4096)


@dataclass(frozen=True, slots=True)
class OpenObject:
    """An open file or device. The caller owns `fd` and closes it once the data plane has its duplicate."""

    fd: int
    spec: ObjectSpec


class Store(Protocol):
    """One datastore, as its kind does it. `name` is an object's name; "" where the datastore is one object."""

    spec: DatastoreSpec

    def open(self, name: str, *, may_read_only: bool = False) -> OpenObject:
        """Open an object in the datastore's I/O mode, read-only only if it cannot be written and that will do."""

    def prepare(self, create_size: int) -> None:
        """Before a look: create what is missing with this many bytes, or grow it to them. 0: neither."""

    def direct_works(self) -> bool:
        """Whether O_DIRECT can be used here."""

    def create(self, name: str, size: int) -> None:
        """A fully allocated file of zeros; it is all there or not at all. Repeating it is fine."""

    def grow(self, name: str, size: int) -> None:
        """Make a file longer, allocated; never shorter."""

    def remove(self, name: str) -> None:
        """Remove a file. Repeating it is fine."""

    def size(self, name: str) -> int:
        """Bytes of a file."""

    def list(self) -> list[tuple[str, int]]:
        """Names and sizes of the files in a directory."""


def open_path(spec: DatastoreSpec, path: str, farm: str, *, may_read_only: bool, follow: bool = True) -> OpenObject:
    """Open and lock `path` as `spec` says, and find its size and alignment."""
    flags = os.O_CLOEXEC | (os.O_DIRECT if spec.direct else 0) | (0 if follow else os.O_NOFOLLOW)
    fd, read_only = _open(spec, path, flags, may_read_only)
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise NvError(Code.INVALID, f"datastore {spec.name}: {path} is neither a file nor a block device")
        block = stat.S_ISBLK(mode)
        lock_for_farm(fd, path, farm)
        size = os.lseek(fd, 0, os.SEEK_END)
        align = 1
        if spec.direct:
            align = direct_alignment(fd, block)
            uncache(fd)
    except OSError as error:
        os.close(fd)
        raise broken(spec, path, error) from error
    except NvError:
        os.close(fd)
        raise
    return OpenObject(fd, ObjectSpec(path, size, spec.direct, read_only, block, align))


def _open(spec: DatastoreSpec, path: str, flags: int, may_read_only: bool) -> tuple[int, bool]:
    try:
        return os.open(path, flags | os.O_RDWR), False
    except OSError as error:
        if not may_read_only or error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise broken(spec, path, error) from error
    try:
        return os.open(path, flags | os.O_RDONLY), True
    except OSError as error:
        raise broken(spec, path, error) from error


def direct_alignment(fd: int, block: bool) -> int:
    """Bytes that offsets and lengths of O_DIRECT must be multiples of.

    A device tells. A file system is asked by trying, which also works where it cannot say (statx's answer is
    newer than the kernels we support, and missing on NFS)."""
    if block:
        raw = fcntl.ioctl(fd, _BLKSSZGET, struct.pack("i", 0))
        return int(struct.unpack("i", raw)[0])
    with mmap.mmap(-1, 2 * _ALIGNMENTS[-1]) as page:
        for align in _ALIGNMENTS:
            with memoryview(page)[align : 2 * align] as piece:
                try:
                    os.preadv(fd, [piece], align)
                    return align
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
    raise OSError(errno.EOPNOTSUPP, "O_DIRECT reads of 512 and of 4096 bytes are both refused")


def uncache(fd: int) -> None:
    """Let the clean pages of what is used with O_DIRECT leave the page cache: while it has any, every write looks for
    those it overlaps, and takes them out one by one."""
    with contextlib.suppress(OSError):  # a file system that knows no such thing
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def path_direct_works(path: str) -> bool:
    """Whether O_DIRECT opens and reads `path`; the file is only looked at."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return False
    try:
        direct_alignment(fd, stat.S_ISBLK(os.fstat(fd).st_mode))
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def allocate(spec: DatastoreSpec, path: str, fd: int, size: int) -> None:
    """Grow an open file to `size` bytes of allocated zeros and make that durable. Never shortens it."""
    have = os.fstat(fd).st_size
    try:
        if have < size:
            os.posix_fallocate(fd, have, size - have)
        os.fsync(fd)  # also when it had the size: an earlier try may have ended just before this
    except OSError as error:
        raise broken(spec, path, error) from error


def sync_folder(path: str) -> None:
    """Make a created, renamed or removed name durable."""
    fd = os.open(Path(path).parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


_WORDS: dict[int, tuple[Code, str, str]] = {
    errno.ENOENT: (Code.UNAVAILABLE, "is missing", "mount it, or correct the path in the farm file"),
    errno.ENXIO: (Code.UNAVAILABLE, "has no device behind it", "connect the device"),
    errno.ENODEV: (Code.UNAVAILABLE, "has no device behind it", "connect the device"),
    errno.EACCES: (Code.DENIED, "may not be opened by the filter", "give the filter's user read and write access"),
    errno.EPERM: (Code.DENIED, "may not be opened by the filter", "give the filter's user read and write access"),
    errno.EROFS: (Code.DENIED, "is on a read-only file system", "remount it, or make the VVol read_only"),
    errno.ENOSPC: (Code.NO_SPACE, "does not fit: the file system is full", "free space, or ask for less"),
    errno.EDQUOT: (Code.NO_SPACE, "does not fit in the quota", "raise the quota, or ask for less"),
    errno.EFBIG: (Code.TOO_LARGE, "would be larger than the file system allows", "ask for less"),
    errno.EISDIR: (Code.INVALID, "is a directory", "use kind: dir"),
    errno.ELOOP: (Code.INVALID, "is a symbolic link", "name the file itself"),
}


def broken(spec: DatastoreSpec, path: str, error: OSError) -> NvError:
    """The NvError for a failed system call on `path`."""
    if spec.direct and error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
        return NvError(
            Code.UNSUPPORTED,
            f"datastore {spec.name}: {path} does not take O_DIRECT ({error.strerror})",
            "set io: buffered, unless other hosts write to it",
        )
    code, words, hint = _WORDS.get(
        error.errno or 0, (Code.IO, f"failed: {error.strerror}", "look into the kernel's log of this host")
    )
    return NvError(code, f"datastore {spec.name}: {path} {words}", hint)
