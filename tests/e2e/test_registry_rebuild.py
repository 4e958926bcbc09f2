"""A registry that went back in time is refused, and says so; one that is rebuilt from the datastores serves again."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.lib.farm import Farm, serves
from tests.lib.nbdwords import MiB
from tests.lib.netfarm import all_in_sync, states
from tests.lib.pattern import difference, pattern
from tests.lib.procs import run, wait_until

pytestmark = pytest.mark.timeout(120)
MakeFarm = Callable[..., Farm]
SIZE = 8 * MiB


def spec() -> dict[str, Any]:
    """A mirror on two of three datastores, one of them a directory, and a single copy."""
    stores = {name: {"kind": "file", "path": f"./data/{name}.img", "size": "24MiB"} for name in ("one", "three")}
    mirror = {"legs": ["one", "two"], "intent-idle": "200ms"}
    return {
        "datastores": stores | {"two": {"kind": "dir", "path": "./data/two"}},
        "profiles": {"twice": {"mirror": mirror}, "plain": {"datastore": "three"}},
        "vms": {
            "vm1": {
                "vvols": {
                    "disk": {"size": "8MiB", "profile": "twice"},
                    "solo": {"size": "2MiB", "profile": "plain"},
                }
            }
        },
    }


def problems(farm: Farm) -> dict[str, str]:
    return {one["subject"]: one["code"] for one in farm.api("GET", "/v1/status")["problems"]}


def write(farm: Farm, name: str, seed: int, size: int) -> bytes:
    data = pattern(seed, 0, size)
    with farm.open(name, wait_s=20) as nbd:
        nbd.write(0, data)
        nbd.flush()
    return data


def rebuild(farm: Farm, *words: str, check: bool = True) -> Any:
    """The command, which needs no running farm."""
    command = [sys.executable, "-m", "nbdvvol", "registry", "rebuild", "-f", farm.file, "--state", farm.state, *words]
    return run(command, check=check)


def test_an_old_registry_is_refused_and_a_rebuilt_one_serves(farms: MakeFarm) -> None:
    farm = farms(spec())
    (farm.folder / "data" / "two").mkdir(parents=True)
    farm.start()
    write(farm, "disk", 1, SIZE)
    solo = write(farm, "solo", 2, 2 * MiB)
    registry, old = farm.state / "registry.db", farm.folder / "backup.db"
    with contextlib.closing(sqlite3.connect(registry)) as now, contextlib.closing(sqlite3.connect(old)) as copy:
        now.backup(copy)

    for verb in ("unbind", "bind"):
        farm.task(farm.api("POST", f"/v1/vvols/vm1/disk/{verb}", {}))
    farm.task(farm.api("POST", "/v1/vvols/vm1/disk/legs", {"datastore": "three"}))
    wait_until("the new leg is in sync", lambda: states(farm).get("three") == "in-sync", 30)
    epoch = farm.vvol("vm1/disk")["epoch"]
    data = write(farm, "disk", 3, SIZE)
    farm.stop()

    shutil.copy(old, registry)
    farm.begin()
    wait_until("it is refused", lambda: farm.api_answers() and problems(farm).get("vm1/disk") == "REGISTRY_OLD", 30)
    assert not serves(farm.socket(), "disk")
    binding = farm.vvol("vm1/disk")["binding"]
    assert binding["why"] == "old-registry" and "newer than the registry" in binding["error"]
    told = farm.cli("status", "-x", check=False)
    assert told.returncode == 1 and "nbdvvol registry rebuild" in told.stdout
    farm.stop()

    before = registry.read_bytes()
    shutil.move(farm.folder / "data" / "three.img", farm.folder / "data" / "away.img")
    missing = rebuild(farm, check=False)
    assert missing.returncode == 1 and "LEG_MISSING" in missing.stderr and "may be newer" in missing.stderr
    assert registry.read_bytes() == before, "nothing was written"
    shutil.move(farm.folder / "data" / "away.img", farm.folder / "data" / "three.img")
    done = rebuild(farm).stdout
    assert (
        "the old one is" in done
        and "vm1/disk" in done
        and len(list(farm.state.glob("registry.db.before-rebuild-*"))) == 1
    )

    farm.start()
    now = farm.vvol("vm1/disk")
    assert now["epoch"] > epoch and all_in_sync(farm) and len(now["legs"]) == 3
    for name, expected in (("disk", data), ("solo", solo)):
        with farm.open(name, wait_s=20) as nbd:
            assert difference(expected, nbd.read(0, len(expected))) == ""
    assert problems(farm) == {}


def test_a_filter_that_runs_on_is_given_everything_anew(farms: MakeFarm) -> None:
    """Control and its registry are gone; what the filter serves meanwhile goes on, and comes back under new epochs."""
    farm = farms(spec())
    (farm.folder / "data" / "two").mkdir(parents=True)
    farm.start_split()
    pid = farm.filter_pid()
    epoch = farm.vvol("vm1/disk")["epoch"]
    assert farm.control is not None
    assert farm.control.stop(30) == 0
    data = write(farm, "disk", 4, SIZE)
    for path in farm.state.glob("registry.db*"):
        path.unlink()
    assert "the old one" not in rebuild(farm).stdout
    farm.start_control()
    for name in ("disk", "solo"):
        farm.wait_bound(f"vm1/{name}", 30)
    assert farm.filter_pid() == pid and farm.vvol("vm1/disk")["epoch"] > epoch
    with farm.open("disk", wait_s=20) as nbd:
        assert difference(data, nbd.read(0, SIZE)) == ""
    assert all_in_sync(farm)
