"""kind block end to end: a LUN (a loop device) that two hosts see is used with O_DIRECT, and its size is its own.

Needs root and the kernel's loop driver."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lib.farm import Farm
from tests.lib.nbdwords import EINVAL, MiB
from tests.lib.pattern import difference, pattern
from tests.lib.procs import need, run, short_dir
from tests.lib.rawio import NbdError

pytestmark = pytest.mark.timeout(180)
MakeFarm = Callable[..., Farm]


@pytest.fixture
def lun() -> Iterator[Path]:
    """A 64 MiB block device of 512-byte sectors."""
    folder = short_dir()
    with (folder / "lun.img").open("wb") as file:
        file.truncate(64 * MiB)
    losetup = need("losetup", "mount")
    device = run([losetup, "--show", "--find", folder / "lun.img"]).stdout.strip()
    try:
        yield Path(device)
    finally:
        run([losetup, "--detach", device])
        shutil.rmtree(folder)


def spec_of(lun: Path) -> dict[str, object]:
    return {
        "hosts": {"one": {}, "two": {}},
        "datastores": {"san": {"kind": "block", "path": str(lun)}},
        "profiles": {"plain": {"datastore": "san"}},
        "vms": {"vm1": {"host": "one", "vvols": {"disk": {"size": "16MiB", "profile": "plain"}}}},
    }


def test_a_lun_is_used_without_the_page_cache(farms: MakeFarm, lun: Path) -> None:
    farm = farms(spec_of(lun)).start()
    data = pattern(7, 0, 16 * MiB)
    with farm.open("disk") as nbd:
        assert nbd.size == 16 * MiB
        nbd.write(0, data)
        assert difference(data, nbd.read(0, len(data))) == ""
        nbd.trim(MiB, MiB)
        nbd.zero(4 * MiB, MiB)
        nbd.flush()
        assert nbd.read(4 * MiB, MiB) == bytes(MiB)
        with pytest.raises(NbdError) as refused:  # the device's sector is the smallest request
            nbd.read(1, 512)
        assert refused.value.error == EINVAL
        assert difference(data[5 * MiB :], nbd.read(5 * MiB, 11 * MiB)) == ""
    region = farm.vvol("vm1/disk")["legs"][0]["regions"][0]
    farm.stop()
    raw = lun.read_bytes()
    at = region["object_offset"] + 5 * MiB
    assert region["length"] == 16 * MiB and difference(data[5 * MiB :], raw[at : at + 11 * MiB]) == ""
