"""Limits on their way from a farm file to the host's filter: through profiles, at run time, told by a dry run."""

from __future__ import annotations

import copy
from typing import Any

from nbdvvol.control.registry import views
from nbdvvol.model.farm import QosConfig
from tests.unit.control_farm import PLAIN, TestFarm, running_farm
from tests.unit.fake_filter import FakeFilter

__all__ = ["running_farm"]


def spec(qos: dict[str, Any] | None, profile: str | None = "gold") -> dict[str, Any]:
    whole = copy.deepcopy(PLAIN)
    whole["profiles"] = {"gold": {"qos": qos} if qos else {}, "other": {"qos": {"shares": 300}}}
    root = whole["vms"]["vm1"]["vvols"]["root"]
    root["profile"] = profile
    whole["vms"]["vm1"]["vvols"]["free"] = {"size": "1MiB"}
    return whole


async def test_a_profile_limits_its_vvols(farm: TestFarm) -> None:
    fake, root, free = await farm.serve_two(spec({"iops": 50, "bandwidth": "1MiB/s"}))
    limits = QosConfig(iops=50, bandwidth=1 << 20)
    assert fake.serving[root].qos == limits and fake.serving[free].qos is None
    assert (await farm.vvol("vm1/root")).qos == limits and (await farm.vvol("vm1/free")).qos is None
    (gold, _) = await farm.control.registry.run(views.profiles)
    assert gold.spec.qos == limits


async def test_other_limits_reach_the_filter_and_change_nothing_else(farm: TestFarm) -> None:
    fake, root, free = await farm.serve_two(spec({"iops": 50}))
    before, told = fake.serving[root], fake.serving[free]
    result = await farm.apply(spec({"iops": 70, "burst": "1s"}))
    assert not result.tasks, "no task: nothing is moved, made or drained"
    await farm.until_sent(fake, root, "qos", QosConfig(iops=70, burst=1.0))
    assert fake.serving[root] == before.model_copy(update={"qos": QosConfig(iops=70, burst=1.0)})
    assert fake.serving[free] is told, "a VVol that the change does not concern is not sent again"
    await farm.apply(spec(None))
    await farm.until_sent(fake, root, "qos", None)


async def test_another_profile_brings_its_limits(farm: TestFarm) -> None:
    fake, root, _ = await farm.serve_two(spec({"iops": 50}))
    result = await farm.apply(spec({"iops": 50}, profile="other"))
    (line,) = [change for change in result.changes if change.name == "vm1/root"]
    assert line.action == "update"
    assert line.detail == "profile: gold → other, qos: iops 50, burst 100ms, shares 100 → shares 300"
    await farm.until_sent(fake, root, "qos", QosConfig(shares=300))
    assert (await farm.vvol("vm1/root")).profile == "other"
    await farm.apply(spec({"iops": 50}, profile=None))
    await farm.until_sent(fake, root, "qos", None)
    again = await farm.apply(spec({"iops": 50}, profile=None))
    assert {change.action for change in again.changes} == {"keep"}


async def test_a_dry_run_tells_the_difference(farm: TestFarm) -> None:
    fake, root, _ = await farm.serve_two(spec(None))
    result = await farm.apply(spec({"iops": 20000, "bandwidth": "400MiB/s", "shares": 200}), dry_run=True)
    said = {change.name: (change.action, change.detail) for change in result.changes}
    words = "qos: none → iops 20000, bandwidth 400MiB/s, burst 100ms, shares 200"
    assert said["gold"] == ("update", words) and said["vm1/root"] == ("update", words)
    assert said["other"][0] == "keep" and said["vm1/free"][0] == "keep"
    assert fake.serving[root].qos is None and (await farm.vvol("vm1/root")).qos is None


async def test_limits_survive_control_and_filter(farm: TestFarm) -> None:
    fake, root, _ = await farm.serve_two(spec({"iops": 50}))
    await farm.stop()
    await farm.start()
    await fake.connect(farm.control.links)
    assert fake.serving[root].qos == QosConfig(iops=50)
    await fake.die()
    other = await farm.filter()
    await farm.until(lambda: _serves(other, root))
    assert other.serving[root].qos == QosConfig(iops=50)


async def _serves(fake: FakeFilter, uuid: str) -> bool:
    return uuid in fake.serving
