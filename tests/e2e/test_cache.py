"""The host's cache in a running farm: hits, prefetch, on and off by `apply` under a verified load, kills, what is told.

The VVols lie on O_DIRECT files, so that what the datastore is asked for tells hits from misses.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.lib.farm import Farm, JsonDict, plain_spec
from tests.lib.ledger import Ledger, Writer
from tests.lib.libnbd import libnbd
from tests.lib.nbdwords import KiB, MiB
from tests.lib.pattern import pattern
from tests.lib.procs import Process, wait_until
from tests.wire.test_verified_load import loadgen

__all__ = ["loadgen"]
pytestmark = pytest.mark.timeout(120)
MakeFarm = Callable[..., Farm]
BLOCK = 4 * KiB
MIX = "read=50,write=35,trim=5,zero=5,flush=5"
READ: JsonDict = {"mode": "read", "ram": "1MiB", "read-ahead": 0}


def spec(cache: JsonDict | None, **store: Any) -> JsonDict:
    """vm1/root, 16 MiB, under a profile that may have a cache; the host has 8 MiB for caches and two threads."""
    whole = plain_spec("40MiB", {"root": {"size": "16MiB", "profile": "gold"}})
    whole["datastores"]["main"] |= {"io": "direct", **store}
    whole["profiles"] = {"gold": {"datastore": "main", **({"cache": cache} if cache else {})}}
    whole["hosts"] = {"local": {"reactors": 2, "cache": "8MiB"}}
    return whole


def host(farm: Farm) -> JsonDict:
    [found] = farm.api("GET", "/v1/counters")
    return dict(found)


def cached(farm: Farm) -> JsonDict | None:
    """What the cache did for vm1/root."""
    [export] = host(farm)["exports"]
    found: JsonDict | None = export["cache"]
    return found


def counted(farm: Farm) -> JsonDict:
    found = cached(farm)
    assert found is not None
    return found


def disk_reads(farm: Farm) -> int:
    [store] = host(farm)["datastores"]
    return int(store["reads"])


def test_reads_hit_and_writes_take_the_place_of_what_was_there(farms: MakeFarm) -> None:
    farm = farms(spec(READ)).start()
    data = pattern(31, 0, MiB)
    with farm.open("root") as one, farm.open("root") as other:  # on both threads
        one.write(0, data)
        for nbd in (one, other, one):
            assert nbd.read(0, MiB) == data
            reads = disk_reads(farm)
            assert nbd.read(64 * KiB, 64 * KiB) == data[64 * KiB : 128 * KiB]
            assert disk_reads(farm) == reads, "what was read once is not asked for again"
        fresh = pattern(32, 0, 8 * KiB)
        other.write(64 * KiB, fresh)
        assert one.read(64 * KiB, 8 * KiB) == fresh
        found, whole = counted(farm), host(farm)["cache"]
        assert (found["misses"], found["filled"]) == (256 + 2, 256 + 2)
        assert found["hits"] == 2 * 256 + 3 * 16 and found["hit_ratio"] == pytest.approx(560 / 818)
        assert (found["mode"], found["bypassed"], found["refused"]) == ("read", False, 0)
        assert found["floor_bytes"] == found["ram_bytes"] == MiB
        assert whole["bytes"] == 8 * MiB and MiB <= whole["used_bytes"] <= 8 * MiB
        _tells(farm)


def _tells(farm: Farm) -> None:
    """The command line and Prometheus have it, too."""
    assert "68.5% of 818 blocks" in farm.cli("describe", "vvol", "root").stdout
    assert "read, ram 1MiB, read-ahead 0" in farm.cli("get", "profiles").stdout
    lines = [line.split() for line in farm.cli("status").stdout.splitlines()]
    assert ["vm1/root", "read", "1MiB", "1MiB", "68.5%", "560", "258", "258", "0", "0", "0", "0"] in lines
    drained = farm.cli("cache", "drain", "root").stdout
    assert drained == "vm1/root: nothing to drain: its cache (mode read) keeps no write back\n"
    with farm.client() as client:
        families = text_string_to_metric_families(client.get("/metrics").text)
        samples = {(one.name, one.labels.get("type")): one.value for family in families for one in family.samples}
    assert samples["nbdvvol_vvol_cache_blocks_total", "hit"] == 560
    assert samples["nbdvvol_vvol_cache_on", None] == 1


def test_what_is_fetched_ahead_is_there_when_it_is_read(farms: MakeFarm) -> None:
    """By libnbd's NBD_CMD_CACHE; then, under another policy, because a client reads on and on."""
    farm = farms(spec(READ)).start()
    script = "h = connect(); assert h.can_cache(); h.cache(2 * MiB, MiB); result = True"
    assert libnbd(script, uri=farm.uri("root"))
    wait_until("it is fetched", lambda: counted(farm)["filled"] == 512)
    reads = disk_reads(farm)
    with farm.open("root") as nbd:
        assert nbd.read(MiB, 2 * MiB) == bytes(2 * MiB)
    found = counted(farm)
    assert (found["ahead"], found["ahead_used"], found["hits"], found["misses"]) == (512, 512, 512, 0)
    assert disk_reads(farm) == reads
    farm.apply(spec({"mode": "read"}))
    with farm.open("root") as nbd:
        for at in range(4 * MiB, 6 * MiB, 16 * KiB):
            assert nbd.read(at, 16 * KiB) == bytes(16 * KiB)
    found = counted(farm)
    assert found["ahead_used"] - 512 > 256, "of 512 blocks, more than half were there before they were asked for"
    assert found["hits"] + found["misses"] == 2 * 512


def test_it_changes_under_a_load_that_knows_every_byte(farms: MakeFarm, loadgen: Path) -> None:
    """Off, on, another mode, another floor, while clients read and write; nobody is drained or connected anew."""
    farm = farms(spec(None)).start()
    before = farm.vvol("vm1/root")
    where = ["--unix", str(farm.socket()), "--export", "root", "--verify", "--mix", MIX]
    words = ["--block", "8k", "--depth", "16", "--connections", "4", "--structured", "--seconds", "4"]
    load = Process([loadgen, *where, *words], farm.folder / "load.log")
    hits = 0
    for policy in (READ, None, {"mode": "writethrough"}, {**READ, "ram": "64MiB"}, {"mode": "none"}, READ):
        result = farm.apply(spec(policy))
        assert not result["tasks"]
        on = policy is not None and policy["mode"] != "none"
        wait_until("it is in force", lambda on=on: (cached(farm) is not None) == on)  # type: ignore[misc]
        if on:
            wait_until("it is used", lambda: counted(farm)["hits"] > hits, timeout_s=10)  # noqa: B023
            hits = counted(farm)["hits"]
        assert load.alive(), load.text()
    assert load.popen.wait(60) == 0, load.text()
    after = farm.vvol("vm1/root")
    assert (after["epoch"], after["generation"]) == (before["epoch"], before["generation"])
    wait_until("nothing is pinned", lambda: host(farm)["cache"]["pinned_bytes"] == 0)


def test_a_killed_filter_takes_nothing_with_it(farms: MakeFarm) -> None:
    """And the next one takes up the host's other size, as `apply` said it would."""
    farm = farms(spec({"mode": "writethrough"}))
    farm.start_split()
    ledger = Ledger(33)
    for _ in range(3):
        writer = Writer(ledger, farm.open("root", wait_s=20))
        with farm.open("root") as nbd:
            nbd.read(0, 4 * MiB)
        writer.progress(200)
        farm.filters["local"].kill_group()
        writer.join()
        farm.start_filter()
        with farm.open("root", wait_s=20) as nbd:
            ledger.verify(nbd)
            ledger.verify(nbd)
        assert counted(farm)["hits"] > 0
    other = copy.deepcopy(farm.spec)
    other["hosts"]["local"]["cache"] = "16MiB"
    [change] = [one for one in farm.apply(other)["changes"] if one["kind"] == "host"]
    assert change["detail"] == "cache: 8MiB → 16MiB (cache: at the next start of its filter)"
    assert host(farm)["cache"]["bytes"] == 8 * MiB
    farm.filters["local"].stop()
    farm.start_filter()
    farm.open("root", wait_s=20).disconnect()
    assert host(farm)["cache"]["bytes"] == 16 * MiB


def test_a_filter_without_memory_for_it_serves_and_says_so(farms: MakeFarm) -> None:
    whole = spec(READ)
    whole["hosts"]["local"]["cache"] = "1MiB"
    farm = farms(whole)
    farm.start_control()
    farm.apply()
    farm.spec["hosts"]["local"]["cache"] = "0"  # what the filter is started with
    farm.start_filter()
    with farm.open("root", wait_s=40) as nbd:
        assert nbd.read(0, BLOCK) == nbd.read(0, BLOCK) == bytes(BLOCK)
    assert counted(farm)["mode"] == "none"
    [problem] = json.loads(farm.cli("status", "-x", "-o", "json", check=False).stdout)
    assert (problem["code"], problem["subject"]) == ("CACHE_OFF", "vm1/root")
    assert "unused" in farm.cli("describe", "vvol", "root").stdout
