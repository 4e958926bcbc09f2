"""Adoption end to end: bytes that were there stay there, and nothing beside an adopted part is ever touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lib.farm import ApiError, Farm, plain_spec
from tests.lib.nbdwords import MiB
from tests.lib.pattern import difference, pattern
from tests.lib.procs import need, run, short_dir, wait_until

pytestmark = pytest.mark.timeout(120)
MakeFarm = Callable[..., Farm]


def adopting(farms: MakeFarm, **adopt: object) -> tuple[Farm, bytes]:
    """A farm that adopts from an image made before; and that image's bytes."""
    folder = short_dir()
    data = pattern(90, 0, 12 * MiB)
    (folder / "image").write_bytes(data)
    spec = plain_spec()
    spec["datastores"]["disk"] = {"kind": "file", "path": "image"}
    spec["vms"]["vm1"]["vvols"]["old"] = {"adopt": {"datastore": "disk", **adopt}, "profile": "plain"}
    return farms(spec, folder), data


def test_adopting_a_whole_device_keeps_its_bytes(farms: MakeFarm) -> None:
    farm, data = adopting(farms)
    farm.start()
    with farm.open("old") as nbd:
        assert nbd.size == len(data)
        assert difference(data, nbd.read(0, len(data))) == ""
        nbd.write(5 * MiB + 1, b"changed")
        nbd.flush()
    want = data[: 5 * MiB + 1] + b"changed" + data[5 * MiB + 8 :]
    assert difference(want, (farm.folder / "image").read_bytes()) == ""
    farm.delete("vm1/old")
    assert difference(want, (farm.folder / "image").read_bytes()) == "", "deleting gives the bytes back as they are"


def test_adopting_a_part_never_touches_the_neighbours(farms: MakeFarm) -> None:
    start, length = 3 * MiB, 4 * MiB
    farm, data = adopting(farms, offset=start, length=length)
    farm.start()
    with farm.open("old") as nbd:
        assert nbd.size == length
        assert difference(data[start : start + length], nbd.read(0, length)) == ""
        nbd.write(0, b"\xa1" * 4097)
        nbd.write(length - 4097, b"\xa2" * 4097)
        nbd.zero(MiB, MiB)
        nbd.trim(0, length)
        nbd.zero(0, length)
        nbd.write(length - 1, b"!")
        nbd.flush()
    got = (farm.folder / "image").read_bytes()
    assert difference(data[:start], got[:start]) == ""
    assert difference(data[start + length :], got[start + length :]) == ""
    assert got[start : start + length] == bytes(length - 1) + b"!"
    for clash in ({"offset": start}, {"offset": 0, "length": start + 1}, {"offset": start + length - 1, "length": MiB}):
        with pytest.raises((ApiError, AssertionError)):
            farm.create("vm1", "clash", adopt={"datastore": "disk", **clash}, profile="plain")
        wait_until("the failed VVol can be deleted", lambda: gone(farm, "vm1/clash"), 10)
    farm.create("vm1", "beside", adopt={"datastore": "disk", "offset": 0, "length": start}, profile="plain")
    with farm.open("beside") as nbd:
        assert difference(data[:start], nbd.read(0, start)) == ""
    with pytest.raises((ApiError, AssertionError)):
        farm.create("vm1", "fresh", size="1MiB", datastore="disk")
    assert (farm.folder / "image").read_bytes()[:start] == data[:start]


def gone(farm: Farm, name: str) -> bool:
    """Delete what may be there; whether it is gone."""
    try:
        farm.delete(name)
    except ApiError as error:
        return error.code == "NOT_FOUND"
    return True


def test_adopting_part_of_a_block_device(farms: MakeFarm) -> None:
    """A loop device: kind block, O_DIRECT, BLKDISCARD stays inside the part."""
    folder = short_dir()
    data = pattern(91, 0, 8 * MiB)
    (folder / "backing").write_bytes(data)
    losetup = need("losetup", "mount")
    device = run([losetup, "--find", "--show", folder / "backing"]).stdout.strip()
    try:
        spec = plain_spec()
        spec["datastores"]["san"] = {"kind": "block", "path": device}
        part = {"datastore": "san", "offset": 2 * MiB, "length": 3 * MiB}
        spec["vms"]["vm1"]["vvols"]["part"] = {"adopt": part, "profile": "plain"}
        farm = farms(spec, folder)
        farm.start()
        with farm.open("part") as nbd:
            assert nbd.size == 3 * MiB
            assert difference(data[2 * MiB : 5 * MiB], nbd.read(0, 3 * MiB)) == ""
            nbd.write(0, b"\xb1" * 8192)
            nbd.zero(MiB, 2 * MiB)
            nbd.trim(8192, MiB - 8192)
            nbd.flush()
            assert not any(nbd.read(MiB, 2 * MiB))
        farm.stop()
        raw = Path(device).read_bytes()
        assert raw[: 2 * MiB] == data[: 2 * MiB] and raw[5 * MiB :] == data[5 * MiB :]
        assert raw[2 * MiB : 2 * MiB + 8192] == b"\xb1" * 8192 and not any(raw[3 * MiB : 5 * MiB])
    finally:
        run([losetup, "--detach", device])
