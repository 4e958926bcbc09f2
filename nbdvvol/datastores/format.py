"""The on-disk format of a datastore that nbdvvol formats itself: a pure codec, no I/O and no policy.

All integers are little-endian, all checksums CRC32C (Castagnoli), all offsets and lengths bytes. The head
area is [0, data_offset); after it the datastore is extents, handed out whole to legs as data or as metadata.

Header: two equal copies of 4096 bytes, at 0 and at 4096
    0    8   magic `NVDSTORE`
    8    4   format version (1)              12   4   flags, zero
    16   16  datastore UUID                  32   16  UUID of the registry that formatted it
    48   8   extent size                     56   8   size when this copy was written
    64   8   offset of the directory         72   8   length of the directory
    80   8   data_offset: where extents begin
    88   8   sequence: the copy with the higher one is the newer
    96       zeros                           4092 4   checksum of bytes 0..4091
Directory: pages of 4096 bytes, each 64 entries of 64 bytes; an entry of zeros is free
    0    16  VVol UUID                       16   4   leg id
    20   4   1: in use                       24   8   offset of the leg's metadata region
    32   8   length of the region            40       zeros
    60   4   checksum of bytes 0..59
Metadata region of a leg: whole extents, reserved when the leg is made
    0        label, slot 0 (4096)            4096     label, slot 1 (4096)
    8192     map copy, slot 0 (65536)        73728    map copy, slot 1 (65536)
    139264   intents, then dirty maps: each half of what is left, rounded down to 4096; docs/mirror.md has their pages.
             A region is the smallest power of two of bytes, from 4 MiB up, whose dirty pages fit their half
Label
    0    8   magic `NVLABEL\\0`               8    4   version (1)      12   4   leg id
    16   16  VVol UUID                       32   8   epoch            40   8   generation
    48   8   size of the VVol                56   8   sequence; the slot is sequence mod 2
    64   4   0: in sync when it was written; 1: not (being copied to, or new)
    4092 4   checksum of bytes 0..4091
Map copy
    0    8   magic `NVMAPCPY`                8    4   version (1)      12   4   leg id
    16   16  VVol UUID                       32   8   map version; the slot is map version mod 2
    40   8   size of the VVol                48   4   count of runs
    52   4   length of the words              56   4   checksum of the words
    60   4   checksum of bytes 0..59 and of the runs
    64   32  each run: VVol offset 8, length 8, offset in the datastore 8, state 4 (0 mapped, 1 zero,
             2 write-protected), zero 4
             then the words, at most 2048 bytes of JSON: what the VVol is called and which legs it has
             (model/rebuild.py). A copy without them, or with damaged ones, is a map all the same

Validity: a structure is valid when magic, version and checksum agree. A torn or damaged copy is passed over
for the other one; of two valid ones the higher sequence (map version) counts; none valid is an error, never a
guess. Versions to come keep magic, the version's place and the checksum; a whole copy of one is refused
clearly. Recovery reads the header, the directory, and of each entry the label and the map copy; intents and
dirty bits belong to mirrors. Structures are written one copy after the other, synced in between, so one of them
is always whole.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NoReturn
from uuid import UUID

import google_crc32c

from nbdvvol.model.errors import Code, NvError

VERSION = 1
PAGE = 4096
HEADER_AREA = 2 * PAGE
HEAD_BYTES_MIN = 1 << 20
EXTENT_MIN, EXTENT_MAX = 64 << 10, 1 << 30
ENTRY_BYTES = 64
ENTRIES_A_PAGE = PAGE // ENTRY_BYTES
MAP_SLOT_BYTES = 64 << 10
BITMAP_OFFSET = 2 * PAGE + 2 * MAP_SLOT_BYTES
REGION_SHIFT_MIN = 22
DIRTY_A_PAGE = PAGE - 128
"""Regions whose bytes of dirty lanes fit a page behind its head."""

_HEADER = struct.Struct("<8sII16s16sQQQQQQ")
_ENTRY = struct.Struct("<16sIIQQ")
_LABEL = struct.Struct("<8sII16sQQQQI")
_MAP = struct.Struct("<8sII16sQQIII")
_RUN = struct.Struct("<QQQII")
_CRC = struct.Struct("<I")
_HEADER_MAGIC, _LABEL_MAGIC, _MAP_MAGIC = b"NVDSTORE", b"NVLABEL\0", b"NVMAPCPY"
_SEALED = PAGE - _CRC.size
WORDS_MAX = 2048
RUNS_MAX = (MAP_SLOT_BYTES - ENTRY_BYTES - WORDS_MAX) // _RUN.size


@dataclass(frozen=True, slots=True)
class Header:
    """What a datastore says of itself."""

    uuid: UUID
    registry: UUID
    extent_size: int
    size: int
    directory_offset: int
    directory_length: int
    data_offset: int
    sequence: int

    @property
    def slots(self) -> int:
        """How many legs the directory can name."""
        return self.directory_length // ENTRY_BYTES


@dataclass(frozen=True, slots=True)
class Entry:
    """A directory entry: where a leg's metadata region lies."""

    vvol: UUID
    leg: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Label:
    """A leg's stamp."""

    vvol: UUID
    leg: int
    epoch: int
    generation: int
    size: int
    sequence: int
    syncing: bool = False
    """The leg was not in sync when this was written."""


@dataclass(frozen=True, slots=True)
class MapRun:
    """A run of a map copy."""

    offset: int
    length: int
    at: int
    state: int = 0


@dataclass(frozen=True, slots=True)
class MapCopy:
    """A leg's map with its version."""

    vvol: UUID
    leg: int
    version: int
    size: int
    runs: tuple[MapRun, ...]
    words: bytes = b""
    """What the VVol is, for a registry that has to be rebuilt; empty when they are not known or damaged."""


@dataclass(frozen=True, slots=True)
class RegionLayout:
    """Where things lie in a leg's metadata region, relative to it."""

    labels: tuple[int, int]
    maps: tuple[int, int]
    intent: int
    dirty: int
    bitmap_bytes: int
    region_shift: int
    """A region of the VVol is 1 << region_shift bytes."""


def round_up(value: int, step: int) -> int:
    """The smallest multiple of `step` that is not below `value`."""
    return -(-value // step) * step


def check_extent_size(extent_size: int) -> None:
    """Raise INVALID unless it is a power of two in 64 KiB..1 GiB."""
    if extent_size & (extent_size - 1) or not EXTENT_MIN <= extent_size <= EXTENT_MAX:
        raise NvError(
            Code.INVALID,
            f"extent size {extent_size} is not a power of two in {EXTENT_MIN}..{EXTENT_MAX} bytes",
            "leave extent_size out to get 1MiB",
        )


def plan_header(store: UUID, registry: UUID, extent_size: int, size: int) -> Header:
    """The header of a datastore to be formatted. Raises NO_SPACE when not one extent is left behind the head."""
    check_extent_size(extent_size)
    data_offset = round_up(HEAD_BYTES_MIN, extent_size)
    if size < data_offset + 2 * extent_size:
        raise NvError(
            Code.NO_SPACE,
            f"{size} bytes are too small for a datastore: its head takes {data_offset} and a VVol two extents of "
            f"{extent_size}",
            "give the datastore more space or a smaller extent_size",
        )
    return Header(store, registry, extent_size, size, HEADER_AREA, data_offset - HEADER_AREA, data_offset, 1)


def _seal(body: bytes) -> bytes:
    padded = body.ljust(_SEALED, b"\0")
    return padded + _CRC.pack(google_crc32c.value(padded))


def _refuse_newer(what: str, version: int) -> NoReturn:
    raise NvError(
        Code.UNSUPPORTED,
        f"{what} has format version {version}; this program knows versions up to {VERSION}",
        "use a newer nbdvvol; nothing was changed",
    )


def _unseal(raw: bytes, magic: bytes, what: str) -> bool:
    """Whether this copy is whole. Raises UNSUPPORTED when it is, but of a newer version."""
    if len(raw) < PAGE or raw[:8] != magic:
        return False
    (version,) = struct.unpack_from("<I", raw, 8)
    if _CRC.unpack_from(raw, _SEALED)[0] != google_crc32c.value(raw[:_SEALED]):
        return False
    if version > VERSION:
        _refuse_newer(what, version)
    return bool(version == VERSION)


def is_blank(raw: bytes) -> bool:
    """Whether these bytes are all zero."""
    return not any(raw)


def has_header(raw: bytes) -> bool:
    """Whether either header copy at least begins like one of ours, damaged or not."""
    return any(raw[at : at + 8] == _HEADER_MAGIC for at in (0, PAGE))


def encode_header(header: Header) -> bytes:
    """One copy of the header, 4096 bytes."""
    return _seal(
        _HEADER.pack(
            _HEADER_MAGIC,
            VERSION,
            0,
            header.uuid.bytes,
            header.registry.bytes,
            header.extent_size,
            header.size,
            header.directory_offset,
            header.directory_length,
            header.data_offset,
            header.sequence,
        )
    )


def _header_copy(raw: bytes) -> Header | None:
    if not _unseal(raw, _HEADER_MAGIC, "the datastore"):
        return None
    _, _, _, store, registry, extent, size, dir_offset, dir_length, data_offset, sequence = _HEADER.unpack_from(raw)
    sane = (
        EXTENT_MIN <= extent <= EXTENT_MAX
        and not extent & (extent - 1)
        and dir_offset >= HEADER_AREA
        and dir_offset % PAGE == dir_length % PAGE == 0
        and dir_offset + dir_length <= data_offset <= size
        and data_offset % extent == 0
    )
    if not sane:
        return None
    return Header(UUID(bytes=store), UUID(bytes=registry), extent, size, dir_offset, dir_length, data_offset, sequence)


def decode_header(raw: bytes) -> Header:
    """The header from the first 8192 bytes. Raises INVALID when neither copy is valid, UNSUPPORTED when newer."""
    copies = [_header_copy(raw[at : at + PAGE]) for at in (0, PAGE)]
    valid = [copy for copy in copies if copy is not None]
    if not valid:
        what = "are all zero" if is_blank(raw) else "are damaged" if has_header(raw) else "hold something else"
        raise NvError(
            Code.INVALID,
            f"no nbdvvol datastore here: both header copies {what}",
            "check that the path is right; nothing was changed",
        )
    return max(valid, key=lambda header: header.sequence)


def encode_page(entries: dict[int, Entry], page: int) -> bytes:
    """Directory page number `page` from all entries by slot."""
    out = bytearray(PAGE)
    for slot in range(page * ENTRIES_A_PAGE, (page + 1) * ENTRIES_A_PAGE):
        entry = entries.get(slot)
        if entry is None:
            continue
        body = _ENTRY.pack(entry.vvol.bytes, entry.leg, 1, entry.offset, entry.length).ljust(ENTRY_BYTES - 4, b"\0")
        at = (slot % ENTRIES_A_PAGE) * ENTRY_BYTES
        out[at : at + ENTRY_BYTES] = body + _CRC.pack(google_crc32c.value(body))
    return bytes(out)


def decode_page(raw: bytes, page: int) -> tuple[dict[int, Entry], list[int]]:
    """Entries by slot, and the slots that are damaged (to be found by a scan for labels)."""
    entries: dict[int, Entry] = {}
    damaged: list[int] = []
    for index in range(ENTRIES_A_PAGE):
        chunk = raw[index * ENTRY_BYTES : (index + 1) * ENTRY_BYTES]
        slot = page * ENTRIES_A_PAGE + index
        if is_blank(chunk):
            continue
        body, (crc,) = chunk[:-4], _CRC.unpack(chunk[-4:])
        vvol, leg, used, offset, length = _ENTRY.unpack_from(body)
        if crc != google_crc32c.value(body) or used != 1:
            damaged.append(slot)
        else:
            entries[slot] = Entry(UUID(bytes=vvol), leg, offset, length)
    return entries, damaged


def decode_pages(raw: bytes, first: int) -> tuple[dict[int, Entry], list[int]]:
    """The same of several whole pages, from page `first` on."""
    entries: dict[int, Entry] = {}
    damaged: list[int] = []
    for at in range(0, len(raw), PAGE):
        found, bad = decode_page(raw[at : at + PAGE], first + at // PAGE)
        entries |= found
        damaged += bad
    return entries, damaged


def region_bytes(size: int, extent_size: int) -> int:
    """Length of the metadata region to reserve for a leg of `size` bytes."""
    pages = -(-size // (DIRTY_A_PAGE << REGION_SHIFT_MIN))
    return round_up(BITMAP_OFFSET + 2 * 2 * PAGE * pages, extent_size)


def region_layout(region_length: int, size: int) -> RegionLayout:
    """The layout of a region for a VVol of `size` bytes; it grows by larger regions."""
    bitmap = (region_length - BITMAP_OFFSET) // 2 // PAGE * PAGE
    assert bitmap >= 2 * PAGE, "a region is made by region_bytes()"
    pages, shift = bitmap // (2 * PAGE), REGION_SHIFT_MIN
    while -(-size // (DIRTY_A_PAGE << shift)) > pages:
        shift += 1
    maps = (2 * PAGE, 2 * PAGE + MAP_SLOT_BYTES)
    return RegionLayout((0, PAGE), maps, BITMAP_OFFSET, BITMAP_OFFSET + bitmap, bitmap, shift)


def encode_label(label: Label) -> bytes:
    """A label, 4096 bytes, for slot `sequence mod 2`."""
    return _seal(
        _LABEL.pack(
            _LABEL_MAGIC,
            VERSION,
            label.leg,
            label.vvol.bytes,
            label.epoch,
            label.generation,
            label.size,
            label.sequence,
            int(label.syncing),
        )
    )


def decode_label(raw: bytes) -> Label:
    """The newer valid label of both slots (8192 bytes). Raises INVALID when there is none."""
    found: list[Label] = []
    for at in (0, PAGE):
        slot = raw[at : at + PAGE]
        if _unseal(slot, _LABEL_MAGIC, "the leg's label"):
            _, _, leg, vvol, epoch, generation, size, sequence, flag = _LABEL.unpack_from(slot)
            found.append(Label(UUID(bytes=vvol), leg, epoch, generation, size, sequence, bool(flag)))
    if not found:
        raise NvError(Code.INVALID, "no valid label in either slot of the leg's metadata region", "nothing was changed")
    return max(found, key=lambda label: label.sequence)


def encode_map(copy: MapCopy) -> bytes:
    """A map copy, padded to whole pages, for slot `version mod 2`. Raises NO_SPACE when it has too many runs."""
    if len(copy.runs) > RUNS_MAX:
        raise NvError(
            Code.NO_SPACE,
            f"the map has {len(copy.runs)} runs, more than the {RUNS_MAX} that fit its copy on disk",
            "free a larger contiguous part of the datastore",
        )
    assert len(copy.words) <= WORDS_MAX, "who writes the words keeps them short"
    words = len(copy.words), google_crc32c.value(copy.words)
    head = _MAP.pack(_MAP_MAGIC, VERSION, copy.leg, copy.vvol.bytes, copy.version, copy.size, len(copy.runs), *words)
    body = b"".join(_RUN.pack(run.offset, run.length, run.at, run.state, 0) for run in copy.runs)
    raw = head + _CRC.pack(google_crc32c.value(head + body)) + body + copy.words
    return raw.ljust(round_up(len(raw), PAGE), b"\0")


def _map_slot(raw: bytes) -> MapCopy | None:
    if len(raw) < ENTRY_BYTES or raw[:8] != _MAP_MAGIC:
        return None
    _, version, leg, vvol, map_version, size, count, length, sum_of_words = _MAP.unpack_from(raw)
    end = ENTRY_BYTES + count * _RUN.size
    if end > len(raw):
        return None
    body = raw[ENTRY_BYTES:end]
    (crc,) = _CRC.unpack_from(raw, ENTRY_BYTES - 4)
    if crc != google_crc32c.value(raw[: ENTRY_BYTES - 4] + body):
        return None
    if version > VERSION:
        _refuse_newer("the leg's map copy", version)
    if version != VERSION:
        return None
    runs = tuple(MapRun(o, n, at, state) for o, n, at, state, _ in _RUN.iter_unpack(body))
    words = raw[end : end + length] if length <= WORDS_MAX else b""
    if google_crc32c.value(words) != sum_of_words:
        words = b""
    return MapCopy(UUID(bytes=vvol), leg, map_version, size, runs, words)


def decode_map(slots: tuple[bytes, bytes]) -> MapCopy:
    """The newer valid map copy of both slots (65536 bytes each). Raises INVALID when there is none."""
    found = [copy for copy in (_map_slot(raw) for raw in slots) if copy is not None]
    if not found:
        raise NvError(Code.INVALID, "no valid map copy in the leg's metadata region", "nothing was changed")
    return max(found, key=lambda copy: copy.version)
