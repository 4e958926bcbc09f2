"""A write-back log as it lies on a disk (native/log/format.h): its superblock, and one record if it holds something."""

from __future__ import annotations

import mmap
import os
import struct

import google_crc32c

from nbdvvol.datastores.logformat import UNIT, EntryKind, RecordKind


def _sealed(unit: bytearray, at: int) -> bytes:
    crc = google_crc32c.extend(google_crc32c.value(bytes(unit[:at])), bytes(unit[at + 4 :]))
    struct.pack_into("<I", unit, at, crc)
    return bytes(unit)


def log_head(vvol: bytes, log: bytes, *, length: int, epoch: int = 1, blocks: int = 0) -> bytes:
    """The first units of a log of `length` bytes that holds zeros for so many blocks of the VVol, from 0 on."""
    copy = bytearray(UNIT)
    numbers = (1, epoch, 1, length - 2 * UNIT, 0, 1, 0)
    struct.pack_into("<8sII16s16sQQQQQQI", copy, 0, b"NVWBLOG\0", 1, 0, vvol, log, *numbers)
    record = bytearray(UNIT)
    head = (log, 1, 0, 1, 1, RecordKind.WRITES, epoch, 0, 0, bytes(16))
    struct.pack_into("<8s16sQIIIIQII16s", record, 0, b"NVWBREC\0", *head)
    struct.pack_into("<QIIII", record, 80, 0, max(blocks, 1), EntryKind.ZERO, 0, 0)
    return bytes(UNIT) + _sealed(copy, 124) + (_sealed(record, 60) if blocks else bytes(UNIT))


def write_head(fd: int, head: bytes) -> None:
    """Put it into a log's file, which may be open for direct I/O."""
    with mmap.mmap(-1, len(head)) as memory:
        memory[:] = head
        os.pwritev(fd, [memory], 0)
