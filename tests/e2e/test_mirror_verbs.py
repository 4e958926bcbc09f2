"""The verbs of mirrors on a farm of real daemons, while a client uses the VVol."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.lib.farm import Farm
from tests.lib.nbdwords import MiB
from tests.lib.netfarm import states
from tests.lib.pattern import difference, pattern
from tests.lib.procs import wait_until

pytestmark = pytest.mark.timeout(240)
MakeFarm = Callable[..., Farm]
SIZE = 16 * MiB


def spec(*names: str) -> dict[str, Any]:
    """A VVol with a leg on datastore one; the others are free."""
    return {
        "datastores": {name: {"kind": "file", "path": f"./data/{name}.img", "size": "48MiB"} for name in names},
        "profiles": {"mine": {"mirror": {"legs": [names[0]], "intent-idle": "200ms"}}},
        "vms": {"vm1": {"vvols": {"disk": {"size": "16MiB", "profile": "mine"}}}},
    }


def test_copies_are_added_compared_and_taken_away_under_a_client(farms: MakeFarm) -> None:
    farm = farms(spec("one", "two", "three")).start()
    data = bytearray(pattern(31, 0, SIZE))
    with farm.open("disk") as nbd:
        nbd.write(0, bytes(data))
        nbd.flush()
        for store in ("two", "three"):
            farm.cli("mirror", "add-leg", "vm1/disk", "--datastore", store)
            farm.cli("mirror", "resync", "vm1/disk")
            assert states(farm)[store] == "in-sync"
        assert "16MiB compared" in farm.cli("mirror", "verify", "disk").stdout
        farm.cli("mirror", "remove-leg", "disk", "one")
        wait_until("its space is free", lambda: set(states(farm)) == {"two", "three"}, timeout_s=30)
        data[MiB : MiB + 4096] = pattern(32, 0, 4096)
        nbd.write(MiB, bytes(data[MiB : MiB + 4096]))
        nbd.flush()
        farm.cli("mirror", "remove-leg", "disk", "3")
        last = farm.cli("mirror", "remove-leg", "disk", "two", check=False)
        assert last.returncode == 1 and "the only copy" in last.stderr
        assert difference(bytes(data), nbd.read(0, SIZE)) == ""
    shown = farm.cli("describe", "vvol", "disk").stdout
    assert "serving on host local" in shown and "in-sync on two" in shown
    farm.kill_everything()
    farm.start()
    with farm.open("disk", wait_s=20) as nbd:
        assert difference(bytes(data), nbd.read(0, SIZE)) == ""
    status = json.loads(farm.cli("status", "-o", "json").stdout)
    assert [leg["now"]["lane"] for leg in status["vvols"][0]["legs"]] == ["in-sync"]
