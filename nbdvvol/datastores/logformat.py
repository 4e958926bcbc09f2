"""A reader of the write-back log's on-disk format, for tools and for people: no I/O, and no policy.

`native/log/format.h` owns the format and has it by byte offset; this is an implementation of its own, held against that
one by tests. What recovery does with a log is `native/log/`'s business; here it can be looked at without being touched.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Protocol
from uuid import UUID

import google_crc32c

UNIT = 4096
RING_OFFSET = 2 * UNIT
RING_MIN, RING_MAX = 256 << 10, 1 << 42
ENTRIES_MAX = 160
DATA_UNITS_MAX = 128
ZERO_BLOCKS_MAX = 256
VERSION = 1
EPOCH_MAX = (1 << 64) - 1

_SUPER = struct.Struct("<8sII16s16sQQQQQQI")
_HEAD = struct.Struct("<8s16sQIIIIQII16s")
_ENTRY = struct.Struct("<QIIII")
_CRC = struct.Struct("<I")
_SUPER_MAGIC, _HEAD_MAGIC = b"NVWBLOG\0", b"NVWBREC\0"
_SUPER_SEAL, _HEAD_SEAL = 124, 60


class State(Enum):
    """What the place of the superblocks holds."""

    VALID = "valid"
    BLANK = "blank"
    FOREIGN = "foreign"
    """Something that is no log, or two damaged copies."""
    VERSION = "unknown-version"


class RecordKind(IntEnum):
    """What a record is for."""

    WRITES = 1
    BEGIN = 2
    PAD = 3


class EntryKind(IntEnum):
    """What an entry says of its blocks."""

    DATA = 1
    ZERO = 2
    TOMBSTONE = 3


@dataclass(frozen=True, slots=True)
class Super:
    """A superblock: whose log it is, and where its oldest live record lies."""

    vvol: UUID
    id: UUID
    sequence: int
    epoch: int
    generation: int
    ring: int
    tail: int
    next: int
    chain: int


@dataclass(frozen=True, slots=True)
class Entry:
    """Blocks of 4096 bytes of the VVol; `crc` is of the data, where there is some."""

    kind: EntryKind
    block: int
    blocks: int
    crc: int


@dataclass(frozen=True, slots=True)
class Record:
    """One record. `at` is its position: its place is at mod ring."""

    sequence: int
    kind: RecordKind
    epoch: int
    at: int
    units: int
    seal: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class End:
    """Where the records end: what would have to follow, and whether one of a later epoch is there."""

    position: int
    next: int
    chain: int
    newer: bool


def _seal_of(unit: bytes, seal: int, behind: int) -> int:
    """The checksum of a unit but for the place of the checksum itself (and what lies between)."""
    return int(google_crc32c.extend(google_crc32c.value(unit[:seal]), unit[behind:]))


def _decode_copy(copy: bytes) -> Super | State:
    if not any(copy):
        return State.BLANK
    (stored,) = _CRC.unpack_from(copy, _SUPER_SEAL)
    magic, version, _, vvol, log_id, *numbers = _SUPER.unpack_from(copy)
    if magic != _SUPER_MAGIC or stored != _seal_of(copy, _SUPER_SEAL, _SUPER_SEAL + 4):
        return State.FOREIGN
    if version != VERSION:
        return State.VERSION
    found = Super(UUID(bytes=vvol), UUID(bytes=log_id), *numbers)
    bounds = RING_MIN <= found.ring <= RING_MAX and found.tail < found.ring and found.sequence > 0
    return found if bounds and found.ring % UNIT == 0 and found.tail % UNIT == 0 else State.FOREIGN


def decode_super(copies: bytes) -> tuple[State, Super | None]:
    """The newer valid one of two copies (8192 bytes)."""
    both = [_decode_copy(copies[at : at + UNIT]) for at in (0, UNIT)]
    if State.VERSION in both:
        return State.VERSION, None
    valid = [one for one in both if isinstance(one, Super)]
    if valid:
        return State.VALID, max(valid, key=lambda one: one.sequence)
    return (State.BLANK if both == [State.BLANK, State.BLANK] else State.FOREIGN), None


def _decode_entry(unit: bytes, index: int) -> Entry | None:
    block, blocks, kind, crc, _ = _ENTRY.unpack_from(unit, 80 + index * _ENTRY.size)
    if kind == EntryKind.TOMBSTONE:
        blocks, crc = blocks | crc << 32, 0
    fine = {
        EntryKind.DATA: blocks == 1,
        EntryKind.ZERO: 1 <= blocks <= ZERO_BLOCKS_MAX,
        EntryKind.TOMBSTONE: blocks > 0,
    }
    return Entry(EntryKind(kind), block, blocks, crc) if fine.get(kind) and block + blocks < 1 << 64 else None


def _decode_entries(unit: bytes, count: int, units: int) -> tuple[Entry, ...] | None:
    """The entries of a WRITES record; None when one of them, or their number, cannot be."""
    if not 0 < count <= ENTRIES_MAX:
        return None
    entries = tuple(entry for index in range(count) if (entry := _decode_entry(unit, index)))
    data = sum(entry.kind is EntryKind.DATA for entry in entries)
    return entries if len(entries) == count and data <= DATA_UNITS_MAX and units == 1 + data else None


def _decode_head(unit: bytes, at: int) -> tuple[Record, bytes, int] | None:
    """A whole head: the record, the log's id and its chain; it says nothing of what it follows."""
    magic, log_id, sequence, chain, count, units, kind, epoch, _, seal, _ = _HEAD.unpack_from(unit)
    if magic != _HEAD_MAGIC or seal != _seal_of(unit, _HEAD_SEAL, _HEAD_SEAL + 4):
        return None
    if kind == RecordKind.WRITES:
        entries = _decode_entries(unit, count, units)
    elif kind == RecordKind.BEGIN:
        entries = () if count == 0 and units == 1 else None
    else:
        entries = () if kind == RecordKind.PAD and count == 0 and 0 < units <= DATA_UNITS_MAX else None
    if entries is None:
        return None
    return Record(sequence, RecordKind(kind), epoch, at, units, seal, entries), log_id, chain


def _fits(record: Record, ring: int, begin: int) -> bool:
    at, size = record.at % ring, record.units * UNIT
    if at + size > ring or record.at - begin + size > ring:
        return False
    return record.kind is not RecordKind.PAD or at + size == ring


def _data_valid(record: Record, data: bytes) -> bool:
    crcs = [entry.crc for entry in record.entries if entry.kind is EntryKind.DATA]
    return all(google_crc32c.value(data[i * UNIT : (i + 1) * UNIT]) == crc for i, crc in enumerate(crcs))


class Sliced(Protocol):
    """Bytes, or what gives them slice by slice, each at a multiple of a unit."""

    def __getitem__(self, part: slice, /) -> bytes:
        """Those from start to stop."""


def records(ring: Sliced, found: Super, epoch_max: int) -> Iterator[Record | End]:
    """The valid records from the tail on, then where they end. `ring` is all of the log behind its superblocks."""
    position, number, chain = found.tail, found.next, found.chain
    newer = False
    while position - found.tail < found.ring:
        at = position % found.ring
        decoded = _decode_head(ring[at : at + UNIT], position)
        if not decoded:
            break
        record, log_id, before = decoded
        if (log_id, record.sequence, before) != (found.id.bytes, number, chain):
            break
        if not _fits(record, found.ring, found.tail):
            break
        newer = record.epoch > epoch_max
        if newer or not _data_valid(record, ring[at + UNIT : at + record.units * UNIT]):
            break
        yield record
        position, number, chain = position + record.units * UNIT, number + 1, record.seal
    yield End(position, number, chain, newer)
