"""Where a VVol's write-back log lies on this host: a file of its own in a folder, or a device.

All functions block and run in a worker thread. A log is used by one filter at a time: its file is locked, its device
opened for this process alone; the kernel gives both back however the process ends. A file gets all its space when it is
made, so that a full file system is met then, and not by a write that is to be acknowledged.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from nbdvvol.dataplane.log import LogFound, LogVerdict
from nbdvvol.datastores.base import direct_alignment, sync_folder, uncache
from nbdvvol.datastores.logformat import (
    EPOCH_MAX,
    RING_OFFSET,
    UNIT,
    EntryKind,
    Record,
    State,
    Super,
    decode_super,
    records,
)
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.farm import LOG_UNIT
from nbdvvol.model.units import format_size

_WORDS = {
    errno.ENOENT: (Code.UNAVAILABLE, "is missing"),
    errno.ENOTDIR: (Code.UNAVAILABLE, "is missing"),
    errno.ENXIO: (Code.UNAVAILABLE, "has no device behind it"),
    errno.ENODEV: (Code.UNAVAILABLE, "has no device behind it"),
    errno.EACCES: (Code.DENIED, "may not be opened by the filter"),
    errno.EPERM: (Code.DENIED, "may not be opened by the filter"),
    errno.EROFS: (Code.DENIED, "is on a read-only file system"),
    errno.EBUSY: (Code.BUSY, "is in use: mounted, or another VVol's log"),
    errno.ELOOP: (Code.INVALID, "is a symbolic link"),
}
VERDICTS = {
    LogVerdict.MISSING: "no log is there",
    LogVerdict.FOREIGN: "what lies there is no log, or a damaged one",
    LogVerdict.UNKNOWN_VERSION: "it has a format that this program does not know",
    LogVerdict.OTHER_VVOL: "it is the log of another VVol",
    LogVerdict.OTHER_LOG: "it is a log of this VVol, but not the one that holds data of it",
    LogVerdict.UNKNOWN_DATA: "it holds data of this VVol of which the registry knows nothing",
    LogVerdict.REGISTRY_OLD: "it is newer than the registry",
    LogVerdict.CUT: "it was cut short",
    LogVerdict.TOO_MANY: "it holds more records than a log of its size can",
    LogVerdict.UNREADABLE: "it cannot be read",
    LogVerdict.HANGS: "its device has not answered within the log's deadline; look at that device",
}
"""What lies there, and why it is of no use."""
_PIECE = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class LogFile:
    """An open log. The caller owns `fd` and closes it once the data plane has its duplicate."""

    fd: int
    path: str
    length: int
    """Bytes that are used: whole units."""
    size: int
    direct: bool
    block: bool
    align: int
    identity: tuple[int, int]
    """By which `is_there` knows it again."""


def file_name(full_name: str, uuid: str) -> str:
    """The file of a VVol's log: readable, safe, unique."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", full_name.replace("/", "-"))
    return f"{safe[:120]}-{uuid}.log"


def open_log_file(folder: str, name: str, size: int, held: str = "") -> LogFile:
    """Open a VVol's log in a folder, made with `size` bytes where there is none, or on a device; `held`: exactly this
    one, which holds data. Raises NvError."""
    try:
        if held:
            path, block = held, stat.S_ISBLK(os.stat(held).st_mode)  # noqa: PTH116
        else:
            path, block = _place(folder, name)
        return _open_device(path, size, held) if block else _open_file(path, size, make=not held)
    except OSError as error:
        raise _told(error, held or folder) from error


def _told(error: OSError, where: str) -> NvError:
    code, words = _WORDS.get(error.errno or 0, (Code.IO, f"failed: {error.strerror}"))
    return NvError(code, f"the log {error.filename or where} {words}")


def _place(folder: str, name: str) -> tuple[str, bool]:
    """Its path, and whether that is a device. The folder is made if only it is missing."""
    with contextlib.suppress(FileExistsError):
        Path(folder).mkdir(mode=0o700)
        sync_folder(folder)
    mode = os.stat(folder).st_mode  # noqa: PTH116
    if stat.S_ISBLK(mode):
        return folder, True
    if not stat.S_ISDIR(mode):
        raise NvError(Code.INVALID, f"the place for logs {folder} is neither a folder nor a block device")
    return str(Path(folder) / name), False


def _open_device(path: str, size: int, held: str) -> LogFile:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT | os.O_EXCL)
    try:
        has = os.lseek(fd, 0, os.SEEK_END)
        length = has if held else min(size, has)
        align = direct_alignment(fd, True)
        return LogFile(fd, path, length // LOG_UNIT * LOG_UNIT, has, True, True, align, _identity(os.fstat(fd)))
    except BaseException:
        os.close(fd)
        raise


def _open_file(path: str, size: int, *, make: bool) -> LogFile:
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if make else 0)
    direct = True
    try:
        fd = os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        direct, fd = False, os.open(path, flags, 0o600)  # a file system that knows no O_DIRECT
    try:
        _lock(fd, path)
        if make and os.fstat(fd).st_size == 0:
            _allocate(fd, path, size)
        what = os.fstat(fd)
        align = direct_alignment(fd, False) if direct else 1
        if direct:
            uncache(fd)
        length = what.st_size // LOG_UNIT * LOG_UNIT
        return LogFile(fd, path, length, what.st_size, direct, False, align, _identity(what))
    except BaseException:
        os.close(fd)
        raise


def _identity(what: os.stat_result) -> tuple[int, int]:
    return (0, what.st_rdev) if stat.S_ISBLK(what.st_mode) else (what.st_dev, what.st_ino)


def is_there(path: str, identity: tuple[int, int]) -> bool:
    """Whether who starts next would find this log. What cannot be looked at counts as there: its I/O will tell."""
    try:
        return _identity(os.stat(path)) == identity  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


def look_at_log(path: str, uuid: str, log: str) -> LogFound:
    """What the log of a VVol with this id holds, which nobody uses now; it is not touched. USABLE: nothing;
    UNKNOWN_DATA: something; else it is not there. Raises NvError where it cannot be read."""
    try:
        fd = _open_to_look(path)
        try:
            return _look(Pieces(fd), os.lseek(fd, 0, os.SEEK_END), uuid, log)
        finally:
            os.close(fd)
    except OSError as error:
        raise _told(error, path) from error


def _open_to_look(path: str) -> int:
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags | os.O_DIRECT)  # what the device has, and nothing that is remembered of it
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags)


class Pieces:
    """The ring of a log that is open, as a reader of its format takes it: by aligned slices, zeros behind its end."""

    def __init__(self, fd: int, base: int = RING_OFFSET) -> None:
        self._fd, self._base = fd, base
        self._memory = mmap.mmap(-1, _PIECE)

    def __getitem__(self, part: slice) -> bytes:
        """Raises OSError: also where some of it could be read, for what is missing must not look like a log's end."""
        length, done = part.stop - part.start, 0
        with memoryview(self._memory) as whole:
            while done < length:
                with whole[done:length] as space:
                    count = os.preadv(self._fd, [space], self._base + part.start + done)
                if count == 0:
                    break
                done += count
            return bytes(whole[:done]).ljust(length, b"\0")


def _look(ring: Pieces, size: int, uuid: str, log: str) -> LogFound:
    state, found = decode_super(ring[-RING_OFFSET:0])
    if found is None:
        nothing = {State.BLANK: LogVerdict.MISSING, State.VERSION: LogVerdict.UNKNOWN_VERSION}
        return LogFound(nothing.get(state, LogVerdict.FOREIGN), 0, 0, 0, bytes(16))
    verdict = LogVerdict.USABLE
    if str(found.vvol) != uuid:
        verdict = LogVerdict.OTHER_VVOL
    elif found.id.hex != log:
        verdict = LogVerdict.OTHER_LOG
    elif size < RING_OFFSET + found.ring:
        verdict = LogVerdict.CUT
    if verdict is not LogVerdict.USABLE:
        return LogFound(verdict, 0, 0, 0, found.id.bytes)
    dirty, count = _dirty_blocks(ring, found)
    return LogFound(LogVerdict.UNKNOWN_DATA if dirty else verdict, 0, dirty * UNIT, count, found.id.bytes)


def _dirty_blocks(ring: Pieces, found: Super) -> tuple[int, int]:
    """Blocks of the VVol that live records hold, as recovery counts them; and how many records there are."""
    dirty: set[int] = set()
    count = 0
    for record in records(ring, found, EPOCH_MAX):
        if not isinstance(record, Record):
            break
        count += 1
        for entry in record.entries:
            blocks = range(entry.block, entry.block + entry.blocks)
            if entry.kind is not EntryKind.TOMBSTONE:
                dirty.update(blocks)
            elif len(blocks) <= len(dirty):
                dirty.difference_update(blocks)
            else:
                dirty = {block for block in dirty if block not in blocks}
    return len(dirty), count


def _lock(fd: int, path: str) -> None:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise NvError(Code.INVALID, f"the log {path} is neither a file nor a block device")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise NvError(Code.BUSY, f"the log {path} is in use by another process") from None


def _allocate(fd: int, path: str, size: int) -> None:
    """All its space, in zeros, and durable; nothing is left of it where that cannot be had."""
    try:
        _fill(fd, size)
        os.fsync(fd)
        sync_folder(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(path)  # noqa: PTH108
        if error.errno in _FULL:
            text = f"the log {path} of {format_size(size)} does not fit: {error.strerror}"
            raise NvError(Code.NO_SPACE, text, "free space there, or ask for a smaller log") from error
        raise


def _fill(fd: int, size: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    else:
        return
    with mmap.mmap(-1, _PIECE) as zeros:  # a file system that cannot; libc's way out needs a file without O_DIRECT
        for at in range(0, size, _PIECE):
            piece = memoryview(zeros)[: min(_PIECE, size - at)]
            done = os.pwrite(fd, piece, at)
            short = done < len(piece)
            piece.release()
            if short:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def remove_log_file(path: str, uuid: str) -> None:
    """Remove a file that is this VVol's log, or was to become it; anything else is left alone. Raises OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return
        state, found = decode_super(os.pread(fd, RING_OFFSET, 0).ljust(RING_OFFSET, b"\0"))
    finally:
        os.close(fd)
    if state is State.BLANK or (found is not None and str(found.vvol) == uuid):
        os.unlink(path)  # noqa: PTH108
        sync_folder(path)
