"""One farm at a time: an advisory lock on every open datastore object.

Filters of one farm share an object (two hosts of a farm may see one LUN); another farm's may not. Each filter
holds a read lock on the one byte that its farm's identity selects, in a range far beyond any data, then looks
for a lock on any other byte of the range. Two farms that come at the same moment both see each other and both
give up, which is safe. Open-file-description locks are used: they live exactly as long as the open file, and on
NFS they reach the other hosts. A file system without locks is used without.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import struct

from nbdvvol.model.errors import Code, NvError

_FLOCK = struct.Struct("@hhqqi0q")
_BASE = 1 << 62
_SLOTS = 1 << 31
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


def lock_for_farm(fd: int, path: str, farm: str) -> bool:
    """Lock the open file for `farm`; False where locks do not exist. Raises NvError BUSY: another farm has it."""
    slot = int.from_bytes(hashlib.sha256(farm.encode()).digest()[:4], "big") % _SLOTS
    try:
        _call(fd, fcntl.F_OFD_SETLK, fcntl.F_RDLCK, _BASE + slot, 1)
        below = slot and _held(fd, _BASE, slot)
        above = _held(fd, _BASE + slot + 1, _SLOTS - slot - 1)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    if below or above:
        _call(fd, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, _BASE + slot, 1)
        raise NvError(Code.BUSY, f"{path} is in use by another farm on this or another host", "stop the other farm")
    return True


def _held(fd: int, start: int, length: int) -> bool:
    answer = _call(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, start, max(length, 1))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _call(fd: int, command: int, kind: int, start: int, length: int) -> bytes:
    return fcntl.fcntl(fd, command, _FLOCK.pack(kind, 0, start, length, 0))
