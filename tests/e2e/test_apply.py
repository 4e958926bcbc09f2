"""`apply` end to end, and the isolation of VMs."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.lib.farm import Farm, plain_spec, serves
from tests.lib.nbdwords import MiB
from tests.lib.pattern import difference, pattern

pytestmark = pytest.mark.timeout(120)
MakeFarm = Callable[..., Farm]


def test_apply_is_idempotent_and_dry_runs_change_nothing(farms: MakeFarm) -> None:
    farm = farms(plain_spec())
    farm.start()

    def apply(*options: str) -> list[dict[str, str]]:
        out = farm.cli("apply", "-f", str(farm.file), "-o", "json", *options).stdout
        changes: list[dict[str, str]] = json.loads(out)["changes"]
        return changes

    assert {change["action"] for change in apply()} == {"keep"}
    before = farm.api("GET", "/v1/vvols"), farm.api("GET", "/v1/events?after=0&limit=1000")
    grown = plain_spec()
    grown["vms"]["vm1"]["vvols"] |= {"more": {"size": "4MiB", "profile": "plain"}}
    grown["vms"]["vm2"] = {"vvols": {"root": {"size": "4MiB", "profile": "plain"}}}
    farm.write_file(grown)
    dry = apply("--dry-run")
    created = {change["name"] for change in dry if change["action"] == "create" and change["kind"] == "vvol"}
    assert created == {"vm1/more", "vm2/root"}
    assert (farm.api("GET", "/v1/vvols"), farm.api("GET", "/v1/events?after=0&limit=1000")) == before
    assert [change for change in apply() if change["action"] != "keep"] == [c for c in dry if c["action"] != "keep"]
    for vm, name in (("vm1", "more"), ("vm2", "root")):
        with farm.open(name, vm=vm, wait_s=10) as nbd:
            nbd.write(0, b"kept")
    farm.write_file(plain_spec())
    absent = {change["name"] for change in apply() if change["action"] == "absent" and change["kind"] == "vvol"}
    assert absent == {"vm1/more", "vm2/root"}
    with farm.open("more") as nbd:
        assert nbd.read(0, 4) == b"kept", "absence never deletes"
    assert {change["action"] for change in apply()} <= {"keep", "absent"}


def test_sockets_isolate_vms(farms: MakeFarm) -> None:
    spec = plain_spec()
    spec["vms"]["vm1"]["socket"] = {"mode": "0660"}
    spec["vms"]["vm2"] = {"vvols": {"root": {"size": "8MiB", "profile": "plain"}}}
    farm = farms(spec)
    farm.start()
    for vm, seed in (("vm1", 1), ("vm2", 2)):
        with farm.open("root", vm=vm) as nbd:
            nbd.write(0, pattern(seed, 0, MiB))
    for vm, seed in (("vm1", 1), ("vm2", 2)):
        with farm.open("root", vm=vm) as nbd:
            assert difference(pattern(seed, 0, MiB), nbd.read(0, MiB)) == ""
    assert farm.socket("vm1").stat().st_mode & 0o777 == 0o660
    assert farm.socket("vm2").stat().st_mode & 0o777 == 0o600
    for foreign in ("vm2/root", "vm2"):
        assert not serves(farm.socket("vm1"), foreign)
