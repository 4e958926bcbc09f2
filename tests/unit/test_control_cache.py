"""Caches on their way from a farm file to the host's filter: by profiles, at run time; their drain; what is told."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from nbdvvol.control.registry import caches, views
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.farm import CacheConfig
from nbdvvol.model.observe import HostCache, HostCounters
from nbdvvol.model.resources import ApplyResult
from tests.unit.control_farm import PLAIN, TestFarm, running_farm

__all__ = ["running_farm"]
READ: dict[str, Any] = {"mode": "read", "ram": "64MiB", "read-ahead": 0}


def spec(cache: dict[str, Any] | None, host: dict[str, Any] | None = None) -> dict[str, Any]:
    """vm1/root under a profile that may have a cache, vm1/free under none."""
    whole = copy.deepcopy(PLAIN)
    whole["hosts"] = {"local": host or {}}
    whole["profiles"] = {"gold": {"cache": cache} if cache else {}}
    whole["vms"]["vm1"]["vvols"]["root"]["profile"] = "gold"
    whole["vms"]["vm1"]["vvols"]["free"] = {"size": "1MiB"}
    return whole


def details(result: ApplyResult) -> dict[str, tuple[str, str]]:
    return {f"{change.kind} {change.name}": (change.action, change.detail) for change in result.changes}


async def test_a_profile_has_its_vvols_cached(farm: TestFarm) -> None:
    fake, root, free = await farm.serve_two(spec(READ))
    wanted = CacheConfig(mode="read", ram=64 << 20, read_ahead=0)
    assert fake.serving[root].cache == wanted and fake.serving[free].cache is None
    assert (await farm.vvol("vm1/root")).cache == wanted and (await farm.vvol("vm1/free")).cache is None
    [gold] = await farm.control.registry.run(views.profiles)
    assert gold.spec.cache == wanted


async def test_the_cache_changes_at_run_time_and_nothing_else_does(farm: TestFarm) -> None:
    fake, root, free = await farm.serve_two(spec(READ))
    before, told = fake.serving[root], fake.serving[free]
    other = {"mode": "writethrough", "read-ahead": "1MiB"}
    words = "cache: read, ram 64MiB, read-ahead 0 → writethrough, read-ahead 1MiB"
    dry = await farm.apply(spec(other), dry_run=True)
    assert details(dry)["profile gold"] == details(dry)["vvol vm1/root"] == ("update", words)
    assert fake.serving[root] is before
    result = await farm.apply(spec(other))
    assert details(result) == details(dry) and not result.tasks, "nothing is moved, made or drained"
    wanted = CacheConfig(mode="writethrough", read_ahead=1 << 20)
    await farm.until_sent(fake, root, "cache", wanted)
    assert fake.serving[root] == before.model_copy(update={"cache": wanted})
    assert fake.serving[free] is told, "a VVol that the change does not concern is not sent again"
    await farm.apply(spec({"mode": "none"}))
    await farm.until_sent(fake, root, "cache", None)
    assert (await farm.vvol("vm1/root")).cache is None


async def test_a_hosts_cache_waits_for_the_next_start_of_its_filter_and_apply_says_so(farm: TestFarm) -> None:
    await farm.serve_two(spec(READ))
    result = await farm.apply(spec(READ, {"cache": "1GiB"}))
    words = "cache: 256MiB → 1GiB (cache: at the next start of its filter)"
    assert details(result)["host local"] == ("update", words)
    assert details(result)["vvol vm1/root"] == ("keep", "")


async def test_a_log_needs_a_size_and_a_whole_path(farm: TestFarm) -> None:
    with pytest.raises(NvError, match="profile gold: mode writeback needs a log") as refused:
        await farm.apply(spec({"mode": "writeback"}))
    assert refused.value.code is Code.CONFIG
    with pytest.raises(NvError, match="the log's path 'x' is not absolute"):
        await farm.apply(spec({"mode": "writeback", "log": {"path": "x", "size": "1GiB"}}))


@pytest.mark.parametrize(
    ("cache", "says"),
    [
        (READ, "nothing to drain: its cache (mode read) keeps no write back"),
        (None, "nothing to drain: without a cache it keeps no write back"),
    ],
)
async def test_a_drain_ends_well_where_nothing_is_dirty(
    farm: TestFarm, cache: dict[str, Any] | None, says: str
) -> None:
    await farm.serve_two(spec(cache))
    task = await farm.over((await farm.control.registry.run(caches.begin_drain, "vm1", "root")).task.id)
    assert (task.kind, task.state, task.detail) == ("drain-cache", "success", says)


async def test_a_drain_of_nothing_is_refused(farm: TestFarm) -> None:
    await farm.serve_two(spec(None))
    with pytest.raises(NvError, match="no VVol vm1/other"):
        await farm.control.registry.run(caches.begin_drain, "vm1", "other")


@pytest.mark.parametrize("room", [0, 1 << 20])
async def test_a_filter_without_memory_for_a_cache_is_a_problem(farm: TestFarm, room: int) -> None:
    fake, _, _ = await farm.serve_two(spec(READ))
    fake.counters = HostCounters(host="local", instance=fake.instance, uptime_s=1.0, cache=HostCache(bytes=room))
    found = [problem for problem in (await farm.control.status()).problems if problem.code == "CACHE_OFF"]
    assert [problem.subject for problem in found] == ([] if room else ["vm1/root"])
    assert all("hosts.local.cache" in problem.action for problem in found)
