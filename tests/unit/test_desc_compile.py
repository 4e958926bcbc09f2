"""Volume descriptions that are wrong: each is refused with a sentence, and changes nothing."""

from __future__ import annotations

import contextlib
import errno
import random
import struct
from typing import Any

import pytest

from nbdvvol.dataplane.errors import PlaneError
from nbdvvol.dataplane.ffi import check, ffi, lib
from nbdvvol.dataplane.plane import encode_description
from nbdvvol.dataplane.types import LegDescription, LegState, Run, RunState, VolumeDescription
from tests.unit.plane_rig import Rig, describe, rig

__all__ = ["rig"]
MIB = 1 << 20


def open_record(rig: Rig, record: bytes) -> int:
    """Open a volume from raw bytes."""

    def run() -> int:
        number = ffi.new("uint32_t *")
        check(lib.nv_volume_open(rig.plane._live, record, len(record), number))
        return int(number[0])

    return rig.call(run)


def refused(rig: Rig, record: bytes, error: int, words: str) -> None:
    with pytest.raises(PlaneError, match=words) as caught:
        open_record(rig, record)
    assert caught.value.errno == error


@pytest.fixture
def good(rig: Rig) -> bytes:
    obj = rig.file_object(MIB)
    assert obj == 1
    return encode_description(describe(MIB, [Run(0, MIB // 2, obj, MIB // 2), Run(MIB // 2, MIB // 2, obj, 0)]))


def patched(record: bytes, offset: int, form: str, value: int) -> bytes:
    out = bytearray(record)
    struct.pack_into(form, out, offset, value)
    return bytes(out)


@pytest.mark.parametrize(
    ("offset", "form", "value", "error", "words"),
    [
        (0, "=I", 1, errno.EINVAL, "starts with"),
        (4, "=I", 2, errno.EINVAL, "version 2"),
        (8, "=Q", 5, errno.EINVAL, "says 5 bytes"),
        (32, "=Q", 1 << 63, errno.E2BIG, "volume size"),
        (32, "=Q", MIB + 1, errno.EINVAL, "cover"),
        (32, "=Q", MIB - 1, errno.EINVAL, "does not fit"),
        (72, "=I", 8, errno.EINVAL, "flags"),
        (76, "=I", 0, errno.EINVAL, "minimum block"),
        (76, "=I", 3, errno.EINVAL, "minimum block"),
        (76, "=I", 1 << 17, errno.EINVAL, "minimum block"),
        (80, "=I", 0, errno.EINVAL, "legs"),
        (80, "=I", 2, errno.EINVAL, "legs"),
        (108, "=I", 1, errno.EINVAL, "reserved"),
        (116, "=I", 1, errno.EINVAL, "state 1"),
        (120, "=Q", 3, errno.EINVAL, "exactly 3 runs"),
        (120, "=Q", 1 << 40, errno.E2BIG, "runs"),
        (128, "=Q", 1, errno.EINVAL, "starts at 1"),
        (136, "=Q", 0, errno.EINVAL, "does not fit"),
        (144, "=Q", MIB, errno.ERANGE, "outside object"),
        (144, "=Q", (1 << 64) - 1, errno.ERANGE, "outside object"),
        (152, "=I", 77, errno.ENOENT, "object 77"),
        (156, "=I", 9, errno.EINVAL, "state 9"),
        (160, "=Q", MIB // 4, errno.EINVAL, "starts at"),
    ],
)
def test_each_field(rig: Rig, good: bytes, offset: int, form: str, value: int, error: int, words: str) -> None:
    refused(rig, patched(good, offset, form, value), error, words)
    open_record(rig, good)


def test_every_cut_is_refused(rig: Rig, good: bytes) -> None:
    for length in range(len(good)):
        with pytest.raises(PlaneError):
            open_record(rig, good[:length])
        if length >= 16:
            with pytest.raises(PlaneError):
                open_record(rig, patched(good[:length], 8, "=Q", length))


def test_random_damage_never_crashes(rig: Rig, good: bytes) -> None:
    rand = random.Random(4)
    for _ in range(3000):
        record = bytearray(good)
        for _ in range(rand.randint(1, 4)):
            record[rand.randrange(len(record))] = rand.randrange(256)
        with contextlib.suppress(PlaneError):
            open_record(rig, bytes(record))


def test_alignment_of_direct_objects(rig: Rig) -> None:
    obj = rig.file_object(MIB, direct=True, align=4096)
    whole = [Run(0, MIB, obj, 0)]
    refused(rig, encode_description(describe(MIB, whole, block_min=512)), errno.EINVAL, "below the alignment")
    crooked = [Run(0, MIB - 8192, obj, 512)]
    refused(rig, encode_description(describe(MIB - 8192, crooked, block_min=4096)), errno.EINVAL, "not aligned")
    open_record(rig, encode_description(describe(MIB, whole, block_min=4096)))


def test_bad_python_side_values(rig: Rig) -> None:
    leg = LegDescription(0, LegState.IN_SYNC, (Run(0, 1, 1, 0, RunState.MAPPED),))
    fields: dict[str, Any] = {"epoch": 1, "generation": 1, "map_from": 0, "map_to": 1, "legs": (leg,)}
    with pytest.raises(ValueError, match="uuid"):
        encode_description(VolumeDescription(b"short", 1, **fields))
    with pytest.raises(ValueError, match="volume description"):
        encode_description(VolumeDescription(b"u" * 16, -1, **fields))


def test_an_empty_volume(rig: Rig) -> None:
    client = rig.connect(open_record(rig, encode_description(describe(0, []))), 0)
    assert client.read(0, 0) == b""
    client.flush()


def test_many_runs(rig: Rig) -> None:
    obj = rig.file_object(64 * MIB)
    runs = [Run(i * 512, 512, obj, (131071 - i) * 512) for i in range(131072)]
    client = rig.connect(rig.volume(64 * MIB, runs), 64 * MIB)
    client.write(1000, b"across the runs" * 100)
    assert client.read(1000, 1500) == b"across the runs" * 100
