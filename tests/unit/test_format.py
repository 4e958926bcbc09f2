"""The datastore format: what is written is read back; what is damaged, newer or foreign is refused, never guessed."""

from __future__ import annotations

import random
import struct
import uuid

import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdvvol.datastores import format as disk
from nbdvvol.model.errors import Code, NvError

MIB = 1 << 20
STORE, REGISTRY, VVOL = (uuid.UUID(int=n) for n in (1, 2, 3))
HEADER = disk.plan_header(STORE, REGISTRY, MIB, 64 * MIB)


def _both(header: disk.Header = HEADER) -> bytearray:
    return bytearray(disk.encode_header(header) * 2)


def _newer(page: bytes) -> bytes:
    raw = bytearray(page[:4092])
    struct.pack_into("<I", raw, 8, disk.VERSION + 1)
    return bytes(raw) + struct.pack("<I", google_crc32c.value(bytes(raw)))


def test_layout_by_byte_offset() -> None:
    raw = disk.encode_header(HEADER)
    assert raw[:8] == b"NVDSTORE" and raw[16:32] == STORE.bytes and raw[32:48] == REGISTRY.bytes
    assert struct.unpack_from("<QQQQQQ", raw, 48) == (MIB, 64 * MIB, 8192, MIB - 8192, MIB, 1)
    assert struct.unpack_from("<I", raw, 4092)[0] == google_crc32c.value(raw[:4092])
    assert disk.decode_header(raw * 2) == HEADER


def test_m1_bad_magic_is_refused() -> None:
    raw = b"EVIL" + bytes(_both())[4:4096]
    with pytest.raises(NvError, match="hold something else") as refused:
        disk.decode_header(raw + raw)
    assert refused.value.code is Code.INVALID


def test_m2_this_version_is_opened() -> None:
    assert disk.decode_header(bytes(_both())).uuid == STORE


@pytest.mark.parametrize("intact", [True, False])
def test_m3_a_newer_version_is_refused_clearly(intact: bool) -> None:
    newer = _newer(disk.encode_header(HEADER))
    other = disk.encode_header(HEADER) if intact else newer
    with pytest.raises(NvError, match=r"version 2.*up to 1") as refused:
        disk.decode_header(newer + other)
    assert refused.value.code is Code.UNSUPPORTED


@pytest.mark.parametrize("damaged", [0, 1])
@pytest.mark.parametrize("at", [8, 17, 60, 4095])
def test_m4_the_other_copy_is_used(damaged: int, at: int) -> None:
    raw = _both()
    raw[damaged * 4096 + at] ^= 0x80
    assert disk.decode_header(bytes(raw)) == HEADER


def test_m4_both_damaged_is_refused() -> None:
    raw = _both()
    raw[200] ^= 1
    raw[4096 + 300] ^= 1
    with pytest.raises(NvError, match="damaged"):
        disk.decode_header(bytes(raw))


def test_the_newer_copy_counts() -> None:
    grown = disk.Header(STORE, REGISTRY, MIB, 99 * MIB, 8192, MIB - 8192, MIB, 2)
    assert disk.decode_header(disk.encode_header(HEADER) + disk.encode_header(grown)).size == 99 * MIB
    assert disk.decode_header(disk.encode_header(grown) + disk.encode_header(HEADER)).size == 99 * MIB


def test_m8_all_zero_is_refused() -> None:
    with pytest.raises(NvError, match="all zero"):
        disk.decode_header(bytes(8192))
    assert disk.is_blank(bytes(8192)) and not disk.has_header(bytes(8192))


@given(st.binary(min_size=0, max_size=300), st.integers(0, 2**32))
def test_m9_random_bytes_are_refused(start: bytes, seed: int) -> None:
    raw = start + random.Random(seed).randbytes(8192 - len(start))
    with pytest.raises(NvError):
        disk.decode_header(raw)
    with pytest.raises(NvError):
        disk.decode_label(raw)
    with pytest.raises(NvError):
        disk.decode_map((raw[:4096], raw[4096:]))


@given(st.integers(0, 8191), st.integers(1, 255))
def test_one_damaged_byte_never_changes_what_is_read(at: int, flip: int) -> None:
    raw = _both()
    raw[at] ^= flip
    assert disk.decode_header(bytes(raw)) == HEADER


def test_a_header_that_makes_no_sense_is_refused_though_its_checksum_is_right() -> None:
    wrong = disk.Header(STORE, REGISTRY, MIB + 1, 64 * MIB, 8192, MIB - 8192, MIB, 1)
    with pytest.raises(NvError):
        disk.decode_header(disk.encode_header(wrong) * 2)


@pytest.mark.parametrize("size", [0, MIB, 3 * MIB - 1])
def test_too_small_a_datastore_is_refused(size: int) -> None:
    with pytest.raises(NvError) as refused:
        disk.plan_header(STORE, REGISTRY, MIB, size)
    assert refused.value.code is Code.NO_SPACE


@pytest.mark.parametrize("extent", [0, 4096, 65535, 3 * MIB, 2 << 30])
def test_extent_sizes_are_powers_of_two_within_limits(extent: int) -> None:
    with pytest.raises(NvError, match="power of two"):
        disk.check_extent_size(extent)


def test_directory_pages() -> None:
    entries = {slot: disk.Entry(uuid.UUID(int=slot + 1), slot % 3, slot * MIB, MIB) for slot in range(0, 130, 7)}
    found: dict[int, disk.Entry] = {}
    for page in range(3):
        raw = disk.encode_page(entries, page)
        assert len(raw) == 4096
        read, damaged = disk.decode_page(raw, page)
        assert not damaged
        found |= read
    assert found == entries
    torn = bytearray(disk.encode_page(entries, 0))
    torn[7 * 64 + 30] ^= 4
    read, damaged = disk.decode_page(bytes(torn), 0)
    assert damaged == [7] and 0 in read and 7 not in read


def test_labels_take_turns_and_the_newer_valid_one_counts() -> None:
    old = disk.Label(VVOL, 0, 3, 1, MIB, 4)
    new = disk.Label(VVOL, 0, 4, 2, MIB, 5)
    slots = bytearray(8192)
    for label in (old, new):
        at = disk.PAGE * (label.sequence % 2)
        slots[at : at + disk.PAGE] = disk.encode_label(label)
    assert disk.decode_label(bytes(slots)) == new
    slots[4096 + 50] ^= 1
    assert disk.decode_label(bytes(slots)) == old, "a torn write leaves the old stamp"
    slots[50] ^= 1
    with pytest.raises(NvError, match="no valid label"):
        disk.decode_label(bytes(slots))
    with pytest.raises(NvError, match="newer"):
        disk.decode_label(_newer(disk.encode_label(new)) + bytes(4096))


@pytest.mark.parametrize("syncing", [False, True])
def test_a_label_says_whether_its_leg_was_in_sync(syncing: bool) -> None:
    raw = disk.encode_label(disk.Label(VVOL, 1, 3, 9, MIB, 6, syncing))
    assert raw[64:68] == bytes([syncing, 0, 0, 0])
    assert disk.decode_label(raw + bytes(4096)).syncing is syncing


def test_map_copies() -> None:
    runs = tuple(disk.MapRun(n * MIB, MIB, (9 + 2 * n) * MIB) for n in range(5))
    old, new = disk.MapCopy(VVOL, 0, 6, 5 * MIB, runs[:3]), disk.MapCopy(VVOL, 0, 7, 5 * MIB, runs)
    assert disk.decode_map((disk.encode_map(old), disk.encode_map(new))) == new
    torn = bytearray(disk.encode_map(new))
    torn[64 + 4 * 32] ^= 1
    assert disk.decode_map((disk.encode_map(old), bytes(torn))) == old
    with pytest.raises(NvError, match="no valid map"):
        disk.decode_map((bytes(4096), bytes(torn)))


def test_a_map_copy_says_what_its_vvol_is_and_does_without() -> None:
    runs = (disk.MapRun(0, MIB, MIB), disk.MapRun(MIB, MIB, 4 * MIB))
    copy = disk.MapCopy(VVOL, 2, 6, 2 * MIB, runs, b'{"vm":"vm1"}')
    raw = bytearray(disk.encode_map(copy))
    assert disk.decode_map((bytes(raw), b"")) == copy
    raw[64 + 2 * 32 + 3] ^= 1
    read = disk.decode_map((bytes(raw), b""))
    assert (read.runs, read.words) == (runs, b""), "damaged words harm no map"
    old = disk.encode_map(disk.MapCopy(VVOL, 2, 6, 2 * MIB, runs))
    assert old[52:60] == bytes(8), "as it was before there were words"


def test_a_map_with_too_many_runs_is_refused() -> None:
    runs = tuple(disk.MapRun(n, 1, n) for n in range(disk.RUNS_MAX))
    words = bytes(range(256)) * (disk.WORDS_MAX // 256)
    raw = disk.encode_map(disk.MapCopy(VVOL, 0, 1, 1, runs, words))
    assert len(raw) == disk.MAP_SLOT_BYTES and disk.decode_map((raw, b"")).words == words
    with pytest.raises(NvError, match="runs"):
        disk.encode_map(disk.MapCopy(VVOL, 0, 1, 1, (*runs, runs[0])))


@given(st.integers(1, 1 << 50), st.sampled_from([64 << 10, MIB, 1 << 30]), st.integers(1, 64))
def test_bitmaps_fit_their_region_also_after_growing(size: int, extent: int, times: int) -> None:
    length = disk.region_bytes(size, extent)
    assert length % extent == 0
    layout = disk.region_layout(length, size)
    assert layout.region_shift == disk.REGION_SHIFT_MIN, "what is reserved does for the finest regions of its VVol"
    grown = disk.region_layout(length, size * times)
    pages = -(-size * times // (disk.DIRTY_A_PAGE << grown.region_shift))
    assert 2 * disk.PAGE * pages <= grown.bitmap_bytes, "each page of the dirty maps has two slots"
    assert grown.dirty + grown.bitmap_bytes <= length
    assert grown.maps[1] + disk.MAP_SLOT_BYTES <= grown.intent
