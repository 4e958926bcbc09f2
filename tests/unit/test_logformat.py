"""The write-back log's format: the reader in Python held against recovery in C, on logs whole, cut and damaged."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path
from uuid import UUID

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdvvol.datastores import logformat
from nbdvvol.datastores.logformat import End, EntryKind, Record, RecordKind, State, Super

ROOT = Path(__file__).resolve().parents[2]
RING = 256 << 10
EPOCH, GENERATION = 3, 5


@cache
def tool() -> Path:
    run = [ROOT / "scripts/sim", "--build", "nvlogfile"]
    built = subprocess.run(run, capture_output=True, text=True, timeout=400, check=True)
    return ROOT / built.stdout.strip() / "nvlogfile"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "log"


def make(file: Path, seed: int, count: int, keep: int) -> bytearray:
    subprocess.run([tool(), "make", file, str(RING), str(seed), str(count), str(keep)], check=True, timeout=20)
    return bytearray(file.read_bytes())


def in_c(
    file: Path, image: bytes, vvol: UUID, *more: str, epoch: int = EPOCH, generation: int = GENERATION
) -> list[str]:
    file.write_bytes(image)
    arguments = [tool(), "scan", file, vvol.hex, str(epoch), str(generation), *more]
    return subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()


def lines(found: Record | End) -> list[str]:
    if isinstance(found, End):
        end = f"end {found.position} next {found.next} chain {found.chain:08x}"
        return [end + " newer" if found.newer else end]
    head = f"record {found.sequence} kind {found.kind.value} at {found.at} units {found.units}"
    return [head, *(f"  {one.kind.name.lower()} {one.block} {one.blocks} {one.crc:08x}" for one in found.entries)]


def in_python(image: bytes, epoch: int = EPOCH) -> list[str]:
    _, found = logformat.decode_super(bytes(image[:8192]))
    assert found
    return ["usable", *(line for one in logformat.records(bytes(image[8192:]), found, epoch) for line in lines(one))]


def super_of(image: bytes) -> Super:
    state, found = logformat.decode_super(bytes(image[:8192]))
    assert state is State.VALID and found
    return found


def everything(image: bytes) -> list[Record]:
    found = logformat.records(bytes(image[8192:]), super_of(image), EPOCH)
    return [one for one in found if isinstance(one, Record)]


damages = st.lists(st.tuples(st.integers(0, RING - 1), st.sampled_from(["flip", "zero", "cut"])), max_size=3)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32), count=st.integers(0, 40), keep=st.integers(1, 20), damage=damages)
def test_both_readers_find_the_same(
    file: Path, seed: int, count: int, keep: int, damage: list[tuple[int, str]]
) -> None:
    image = make(file, seed, count, keep)
    vvol, whole = super_of(image).vvol, len(everything(image))
    assert whole >= min(count, keep) or min(count, keep) > 7, "few records never fill the ring"
    for at, kind in damage:
        place = 8192 + at
        if kind == "flip":
            image[place] ^= 1 << at % 8
        else:
            size = 512 if kind == "zero" else len(image) - place
            image[place : place + size] = bytes(min(size, len(image) - place))
    found = in_python(image)
    assert found == in_c(file, image, vvol)
    assert len(everything(image)) <= whole


def test_a_whole_log_is_read_round_the_end_of_its_ring(file: Path) -> None:
    image = make(file, 7, 40, 12)
    found = everything(image)
    assert len(found) == 12
    assert any(one.kind is RecordKind.BEGIN for one in everything(make(file, 8, 40, 12)) + found)
    kinds = {entry.kind for one in found for entry in one.entries}
    assert kinds == {EntryKind.DATA, EntryKind.ZERO, EntryKind.TOMBSTONE}
    wrapped = [
        seed for seed in range(12) if any(one.kind is RecordKind.PAD for one in everything(make(file, seed, 40, 12)))
    ]
    assert wrapped, "one of the logs goes round with a pad"


def test_any_torn_sector_of_the_last_record_ends_the_log_before_it(file: Path) -> None:
    image = make(file, 3, 9, 9)
    vvol, *_, last = super_of(image).vvol, *everything(image)
    start = 8192 + last.at % RING
    for sector in range(last.units * 8):
        torn = bytearray(image)
        torn[start + 512 * sector : start + 512 * sector + 512] = b"\xa5" * 512
        assert in_python(torn)[-1].startswith(f"end {last.at} next {last.sequence}")
        if sector % 5 == 0:
            assert in_python(torn) == in_c(file, torn, vvol)


def test_what_an_earlier_life_left_never_follows(file: Path) -> None:
    """Two logs of the same place and numbers, but other lives: a record of one in the other's place ends it."""
    image = make(file, 3, 9, 9)
    vvol, found = super_of(image).vvol, everything(image)
    first, second = found[-2], found[-1]
    # A BEGIN with another random number, in the place of the last record but one.
    place = 8192 + first.at % RING
    unit = bytearray(logformat.UNIT)
    unit[:64] = image[place : place + 64]
    unit[36:48] = (0).to_bytes(4, "little") + (1).to_bytes(4, "little") + (2).to_bytes(4, "little")
    unit[64:80] = b"another life than"[:16]
    seal = google_crc32c.extend(google_crc32c.value(bytes(unit[:60])), bytes(unit[64:]))
    unit[60:64] = int(seal).to_bytes(4, "little")
    # The old last record, whole, right behind it, where the new life's first record will be.
    old = image[8192 + second.at % RING :][: second.units * logformat.UNIT]
    image[place : place + len(unit)] = unit
    image[place + logformat.UNIT : place + logformat.UNIT + len(old)] = old
    assert in_python(image)[-1].startswith(f"end {first.at + logformat.UNIT} next {second.sequence}")
    assert in_python(image) == in_c(file, image, vvol)


def test_of_two_superblocks_the_newer_counts_and_a_torn_one_never(file: Path) -> None:
    image = make(file, 5, 6, 6)
    found = super_of(image)
    slot = found.sequence % 2
    older = bytearray(image)
    newest = bytes(image[slot * 4096 : slot * 4096 + 4096])
    older[(1 - slot) * 4096 : (2 - slot) * 4096] = newest
    assert super_of(older) == found
    older[slot * 4096 + 100] ^= 1
    assert super_of(older) == found, "the other copy serves"
    older[(1 - slot) * 4096 + 100] ^= 1
    assert logformat.decode_super(bytes(older[:8192])) == (State.FOREIGN, None)
    assert in_c(file, older, found.vvol) == ["foreign"]
    assert in_c(file, older, found.vvol, found.id.hex) == ["missing"]
    assert logformat.decode_super(bytes(8192)) == (State.BLANK, None)
    assert in_c(file, bytes(8192) + bytes(RING), found.vvol) == ["blank"]


def test_a_log_of_another_vvol_epoch_or_generation_is_refused(file: Path) -> None:
    image = make(file, 5, 6, 6)
    found = super_of(image)
    other = UUID(int=1)
    assert in_c(file, image, other) == ["other-vvol"]
    assert in_c(file, image, found.vvol, other.hex) == ["other-log"]
    assert in_c(file, image, found.vvol, epoch=EPOCH - 1) == ["registry-old"]
    assert in_c(file, image, found.vvol, generation=GENERATION - 1) == ["registry-old"]
    assert in_c(file, image[:-4096], found.vvol) == ["cut"]
    assert in_c(file, image, found.vvol, found.id.hex)[0] == "usable"
    assert in_python(image, epoch=EPOCH - 1)[-1].endswith("newer"), "a record of an epoch that nobody knows of"
