"""Control's looks at the hosts: counters in the API and for Prometheus, traces and summaries, hosts that fail."""

from __future__ import annotations

import asyncio
import re
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as prometheus

from nbdvvol.control import observe
from nbdvvol.control.link import question_id
from nbdvvol.control.metrics import FarmCollector
from nbdvvol.control.observe import summary, times
from nbdvvol.dataplane.types import ObjectStats, ReactorStats, VolumeStats
from nbdvvol.model import link
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.observe import (
    CacheCounters,
    DatastoreCounters,
    ExportCounters,
    HostCache,
    HostCounters,
    LogCounters,
    ReactorCounters,
    StageTimes,
    TracedRequest,
    TraceReport,
)
from nbdvvol.model.resources import Status
from tests.unit.control_farm import PLAIN
from tests.unit.fake_filter import FakeFilter
from tests.unit.test_api import Api, Pki, _error, api, https

__all__ = ["api", "https"]
ROOT = Path(__file__).parents[2]
TRACE = "/v1/vvols/vm1/root/trace"


def host_counters(fake: FakeFilter, **more: Any) -> HostCounters:
    uuid = next(iter(fake.serving))
    export = ExportCounters(
        vvol="vm1/root", uuid=uuid, epoch=1, reads=10, writes=4, flushes=2, trims=1, zeroes=3, others=5,
        read_bytes=40960, write_bytes=16384, errors=6, in_flight=7, connections=2,
        delayed=8, delay_ns=9_500_000_000,
        cache=CacheCounters(
            mode="read", hit_ratio=0.5, hits=31, misses=32, filled=33, refused=34, written=35, ahead=36, ahead_used=37,
            held_bytes=38, floor_bytes=39, ram_bytes=40,
        ),
        log=LogCounters(
            state="serving", ring_bytes=45, used_bytes=46, dirty_bytes=47, lost_bytes=48, oldest_age_ms=4900,
            destage_rate=50, logged=51, bypassed=52, groups=53, syncs=54, destaged_bytes=55, merged_bytes=56,
        ),
    )  # fmt: skip
    reactor = ReactorCounters(
        reactor=1, enters=11, sleeps=12, requests=13, batches=14, submissions=15, copies_bytes=16,
        connections=17, pool_free_bytes=18, pool_waits=19,
    )  # fmt: skip
    store = DatastoreCounters(
        datastore="local", objects=1, faults=0, reads=21, writes=22, zeroes=23, trims=24, syncs=25, others=26,
        read_bytes=27, write_bytes=28, errors=29,
    )  # fmt: skip
    cache = HostCache(bytes=41, used_bytes=42, pinned_bytes=43, evictions=44)
    values: dict[str, Any] = {"exports": [export], "reactors": [reactor], "datastores": [store], "cache": cache} | more
    return HostCounters(host=fake.host, instance=fake.instance, uptime_s=12.5, **values)


def request(number: int = 0, *, took: int = 100, command: str = "read", **more: Any) -> TracedRequest:
    at = 1000 * number
    values: dict[str, Any] = {"flags": [], "offset": 0, "length": 512, "error": 0, "connection": 1, "reactor": 0}
    moments = {"received_ns": at, "parsed_ns": at + 1, "submitted_ns": at + 3, "completed_ns": at + 3 + took}
    return TracedRequest(
        command=command, cookie=number, **(values | more), **moments, sent_ns=moments["completed_ns"] + 4
    )


def report(*requests: TracedRequest) -> TraceReport:
    return TraceReport(
        began=datetime.now(UTC), seconds=0.5, every=1, ended="seconds", dropped=0, requests=list(requests)
    )


async def served(api: Api) -> FakeFilter:
    answer = await api.client.post("/v1/apply", json={"farm": PLAIN})
    fake = await api.farm.filter()
    for task in answer.json()["tasks"]:
        assert (await api.farm.over(task)).state == "success"
    await api.farm.until(lambda: _bound(api))
    fake.counters = host_counters(fake)
    return fake


async def _bound(api: Api) -> bool:
    binding = (await api.farm.vvol()).binding
    return binding is not None and binding.state == "bound"


async def samples(client: httpx.AsyncClient, **how: Any) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """A scrape, by name and labels; every name has its help and type."""
    answer = await client.get("/metrics", **how)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=")
    found = {}
    for family in prometheus(answer.text):
        assert family.documentation and family.type in ("counter", "gauge"), family
        assert family.name.startswith("nbdvvol_")
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, "a series twice"
            found[key] = sample.value
    return found


def series(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return f"nbdvvol_{name}", frozenset(labels.items())


# ---- counters ----


async def test_counters_are_the_hosts_own(api: Api) -> None:
    fake = await served(api)
    assert (await api.client.get("/v1/counters")).json() == [fake.counters.model_dump(mode="json")]
    assert (await api.client.get("/v1/status")).json()["counters"] == [fake.counters.model_dump(mode="json")]
    [reactor] = (await api.client.get("/v1/reactors")).json()
    assert (reactor["host"], reactor["reactor"], reactor["requests"]) == ("local", 1, 13)
    fake.counters = host_counters(fake, tracing="x")
    assert (await api.client.get("/v1/counters")).json()[0]["tracing"] == "x", "each look is a new one"


async def test_a_host_that_is_away_or_silent_is_left_out(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "LOOK_TIMEOUT_S", 0.1)
    assert (await api.client.get("/v1/counters")).json() == []
    fake = await served(api)
    fake.silent = True
    assert (await api.client.get("/v1/counters")).json() == []
    fake.silent = False
    assert len((await api.client.get("/v1/counters")).json()) == 1
    await fake.disconnect()
    await api.farm.until(lambda: _down(api))
    status = (await api.client.get("/v1/status")).json()
    assert status["counters"] == [] and status["problems"][0]["code"] == "HOST_DOWN"


async def _down(api: Api) -> bool:
    return not api.farm.control.links.connected


async def test_a_scrape_has_everything_in_prometheus_form(api: Api) -> None:
    await served(api)
    found = await samples(api.client)
    export = {"vvol": "vm1/root", "vm": "vm1", "host": "local"}
    by_type = {"read": 10, "write": 4, "flush": 2, "trim": 1, "zero": 3, "other": 5}
    reactor, store = {"host": "local", "reactor": "1"}, {"datastore": "local", "host": "local"}
    operations = {"read": 21, "write": 22, "zero": 23, "trim": 24, "sync": 25, "other": 26}
    blocks = {"hit": 31, "missed": 32, "filled": 33, "refused": 34, "written": 35, "ahead": 36, "ahead_used": 37}
    expected = {
        **{series("vvol_requests_total", type=kind, **export): count for kind, count in by_type.items()},
        series("vvol_read_bytes_total", **export): 40960,
        series("vvol_written_bytes_total", **export): 16384,
        series("vvol_errors_total", **export): 6,
        series("vvol_delayed_requests_total", **export): 8,
        series("vvol_delay_seconds_total", **export): 9.5,
        series("vvol_requests_in_flight", **export): 7,
        series("vvol_connections", **export): 2,
        **{series("vvol_cache_blocks_total", type=kind, **export): count for kind, count in blocks.items()},
        series("vvol_cache_held_bytes", **export): 38,
        series("vvol_cache_floor_bytes", **export): 39,
        series("vvol_cache_on", **export): 1,
        series("vvol_log_serving", **export): 1,
        series("vvol_log_size_bytes", **export): 45,
        series("vvol_log_used_bytes", **export): 46,
        series("vvol_log_dirty_bytes", **export): 47,
        series("vvol_log_lost_bytes", **export): 48,
        series("vvol_log_oldest_age_seconds", **export): 4.9,
        series("vvol_log_destage_bytes_per_second", **export): 50,
        series("vvol_log_logged_requests_total", **export): 51,
        series("vvol_log_bypassed_requests_total", **export): 52,
        series("vvol_log_groups_total", **export): 53,
        series("vvol_log_syncs_total", **export): 54,
        series("vvol_log_destaged_bytes_total", **export): 55,
        series("vvol_log_merged_bytes_total", **export): 56,
        series("host_cache_bytes", host="local"): 41,
        series("host_cache_used_bytes", host="local"): 42,
        series("host_cache_pinned_bytes", host="local"): 43,
        series("host_cache_evictions_total", host="local"): 44,
        series("reactor_enters_total", **reactor): 11,
        series("reactor_sleeps_total", **reactor): 12,
        series("reactor_requests_total", **reactor): 13,
        series("reactor_batches_total", **reactor): 14,
        series("reactor_submissions_total", **reactor): 15,
        series("reactor_copied_bytes_total", **reactor): 16,
        series("reactor_connections", **reactor): 17,
        series("reactor_pool_free_bytes", **reactor): 18,
        series("reactor_pool_waits_total", **reactor): 19,
        **{series("datastore_operations_total", type=kind, **store): n for kind, n in operations.items()},
        series("datastore_read_bytes_total", **store): 27,
        series("datastore_written_bytes_total", **store): 28,
        series("datastore_errors_total", **store): 29,
        series("datastore_open_objects", **store): 1,
        series("datastore_sync_faults", datastore="local"): 0,
        series("filter_uptime_seconds", host="local"): 12.5,
        series("host_connected", host="local"): 1,
        series("host_vvols", host="local"): 1,
        series("vvol_bound", vvol="vm1/root", vm="vm1"): 1,
        series("vvol_ready", vvol="vm1/root", vm="vm1"): 1,
        series("vvol_size_bytes", vvol="vm1/root", vm="vm1"): 4 << 20,
        series("datastore_online", datastore="local"): 1,
        series("datastore_size_bytes", datastore="local"): (await store_of(api))["size"],
        series("datastore_free_bytes", datastore="local"): (await store_of(api))["free"],
        series("tasks", state="running"): 0,
        series("tasks", state="queued"): 0,
        series("tasks", state="error"): 0,
        series("tasks", state="cancelled"): 0,
    }
    assert {key: found.pop(key) for key in expected} == expected
    rest = {name for name, _ in found}
    assert rest == {"nbdvvol_build_info", "nbdvvol_registry_revision", "nbdvvol_tasks"}


async def store_of(api: Api) -> dict[str, Any]:
    [store] = (await api.client.get("/v1/datastores")).json()
    found: dict[str, Any] = store
    return found


async def test_a_scrape_tells_of_trouble(api: Api) -> None:
    fake = await served(api)
    await fake.say(link.Fault(id="f1", datastore="local", object="", message="errno 5"))
    await api.farm.until(lambda: _says(api, series("problems", code="SYNC_FAILED")))
    await fake.disconnect()
    await api.farm.until(lambda: _down(api))
    found = await samples(api.client)
    assert found[series("problems", code="HOST_DOWN")] == 1
    assert found[series("host_connected", host="local")] == 0
    assert found[series("datastore_sync_faults", datastore="local")] == 1
    assert not [name for name, _ in found if name == "nbdvvol_vvol_requests_total"]


async def _says(api: Api, key: tuple[str, frozenset[tuple[str, str]]]) -> bool:
    return key in await samples(api.client)


async def test_an_empty_farm_can_be_scraped(api: Api) -> None:
    found = await samples(api.client)
    assert found[series("registry_revision")] == 0 and series("tasks", state="queued") in found


async def test_openmetrics_when_asked_for(api: Api) -> None:
    await served(api)
    answer = await api.client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    families = {family.name: family for family in openmetrics(answer.text)}
    assert families["nbdvvol_vvol_requests"].type == "counter"


async def test_metrics_are_guarded_as_everything_is(https: tuple[Api, Pki, str]) -> None:
    _, pki, address = https
    async with httpx.AsyncClient(verify=pki.client(None), base_url=f"https://{address}") as client:
        for route in ("/metrics", "/v1/counters", "/v1/reactors", TRACE):
            answer = await client.get(route)
            assert answer.status_code == 401 and _error(answer)["code"] == "DENIED"
        await samples(client, headers={"authorization": "Bearer correct-horse-battery"})


def test_every_metric_is_documented_and_no_other() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    collector = FarmCollector(Status(version="1", instance="i", revision=1), {})
    made = {f"{family.name}{'_total' if family.type == 'counter' else ''}" for family in collector.collect()}
    assert set(re.findall(r"`(nbdvvol_[a-z_]+)", text)) == made


# ---- traces ----


async def test_a_trace_comes_with_its_summary(api: Api) -> None:
    fake = await served(api)
    fake.report = report(request(0, took=100), request(1, took=300, error=5), request(2, command="flush", length=0))
    found = (await api.client.get(TRACE, params={"seconds": 1, "count": 10, "every": 2})).json()
    assert (found["vvol"], found["host"], found["ended"]) == ("vm1/root", "local", "seconds")
    assert [one["cookie"] for one in found["requests"]] == [0, 1, 2]
    read, flush = found["commands"]
    assert (read["command"], read["requests"], read["errors"], read["bytes"]) == ("read", 2, 1, 512)
    assert read["complete"] == {"p50_ns": 100, "p90_ns": 300, "p99_ns": 300, "max_ns": 300}
    assert read["parse"]["max_ns"] == 1 and read["submit"]["max_ns"] == 2 and read["send"]["max_ns"] == 4
    assert read["total"]["max_ns"] == 307 and flush["requests"] == 1
    [order] = [message for message in fake.heard if isinstance(message, link.TraceOrder)]
    assert (order.seconds, order.count, order.every) == (1, 10, 2) and order.uuid == next(iter(fake.serving))


@pytest.mark.parametrize(
    "bad",
    [
        {"seconds": 0},
        {"seconds": 61},
        {"seconds": "nan"},
        {"count": 0},
        {"count": 10_001},
        {"every": 0},
        {"every": 1e7},
    ],
    ids=str,
)
async def test_a_trace_is_bounded(api: Api, bad: dict[str, Any]) -> None:
    answer = await api.client.get(TRACE, params=bad)
    assert answer.status_code == 400 and _error(answer)["code"] == "INVALID"
    assert next(iter(bad)) in _error(answer)["message"]


async def test_why_there_is_no_trace(api: Api) -> None:
    unknown = await api.client.get("/v1/vvols/vm1/nix/trace")
    assert unknown.status_code == 404 and "no VVol vm1/nix" in _error(unknown)["message"]
    fake = await served(api)
    fake.report = link.Traced(id=0, error="another trace runs", code=Code.BUSY, hint="wait")
    busy = await api.client.get(TRACE)
    assert busy.status_code == 409 and _error(busy)["code"] == "BUSY" and _error(busy)["hint"] == "wait"
    assert _error(busy)["message"] == "host local cannot trace VVol vm1/root: another trace runs"
    await fake.disconnect()
    await api.farm.until(lambda: _down(api))
    away = await api.client.get(TRACE)
    assert away.status_code == 503 and "the filter of host local is not connected" in _error(away)["message"]
    fake = await api.farm.filter()
    await api.farm.until(lambda: _bound(api))
    unbind = await api.client.post("/v1/vvols/vm1/root/unbind", json={})
    assert (await api.farm.over(unbind.json()["task"]["id"])).state == "success"
    unbound = await api.client.get(TRACE)
    assert unbound.status_code == 503 and "is bound to no host" in _error(unbound)["message"]


async def test_a_link_that_is_lost_ends_the_wait(api: Api) -> None:
    fake = await served(api)
    waiting = asyncio.ensure_future(api.client.get(TRACE, params={"seconds": 60}))
    await api.farm.until(lambda: _heard(fake, link.TraceOrder))
    await fake.disconnect()
    answer = await waiting
    assert answer.status_code == 503 and _error(answer)["code"] == "UNAVAILABLE"


async def _heard(fake: FakeFilter, kind: type) -> bool:
    return any(isinstance(message, kind) for message in fake.heard)


async def test_a_client_that_hangs_up_ends_the_trace(api: Api) -> None:
    fake = await served(api)
    _, writer = await asyncio.open_unix_connection(str(api.path))
    writer.write(f"GET {TRACE}?seconds=60 HTTP/1.1\r\nhost: x\r\n\r\n".encode())
    await api.farm.until(lambda: _heard(fake, link.TraceOrder))
    writer.close()
    await api.farm.until(lambda: _heard(fake, link.Forget))
    [order] = [message.id for message in fake.heard if isinstance(message, link.TraceOrder)]
    assert order in [message.id for message in fake.heard if isinstance(message, link.Forget)]


async def test_an_answer_of_the_wrong_kind_or_to_nobody_is_ignored(api: Api) -> None:
    fake = await served(api)
    links = api.farm.control.links
    question = link.TraceOrder(id=question_id(), uuid="u", seconds=1, count=1)
    waiting = asyncio.ensure_future(links.ask("local", question, link.Traced, 5))
    await api.farm.until(lambda: _heard(fake, link.TraceOrder))
    await fake.say(link.Counters(id=question.id, counters=fake.counters))
    await fake.say(link.Traced(id=question.id + 1, error="for another"))
    await fake.say(link.Traced(id=question.id, error="mine"))
    await fake.say(link.Traced(id=question.id, error="twice"))
    assert (await waiting).error == "mine"


async def test_a_silent_filter_is_given_up(api: Api) -> None:
    fake = await served(api)
    fake.silent = True
    with pytest.raises(NvError, match="has not answered within 0.05 s") as told:
        await api.farm.control.links.ask("local", link.Look(id=1), link.Counters, 0.05)
    assert told.value.code is Code.TIMEOUT
    await api.farm.until(lambda: _heard(fake, link.Forget))
    assert not api.farm.control.links.connected["local"].questions


# ---- summaries ----


@pytest.mark.parametrize(
    ("durations", "expected"),
    [
        ([7], (7, 7, 7, 7)),
        ([2, 1], (1, 2, 2, 2)),
        (list(range(100, 0, -1)), (50, 90, 99, 100)),
        (list(range(1, 1001)), (500, 900, 990, 1000)),
    ],
    ids=["one", "two", "hundred", "thousand"],
)
def test_percentiles_are_durations_that_occurred(durations: list[int], expected: tuple[int, int, int, int]) -> None:
    p50, p90, p99, top = expected
    assert times(durations) == StageTimes(p50_ns=p50, p90_ns=p90, p99_ns=p99, max_ns=top)


def test_the_commonest_command_comes_first() -> None:
    some = [request(0, command="write"), request(1), request(2), request(3, command="flush")]
    assert [one.command for one in summary(some)] == ["read", "flush", "write"]
    assert summary([]) == []


def test_every_counter_of_the_data_plane_has_its_place() -> None:
    """What the data plane counts goes over the link as it is: a field that is missing there would end the link."""
    pairs = (VolumeStats, ExportCounters), (ReactorStats, ReactorCounters), (ObjectStats, DatastoreCounters)
    for stats, counters in pairs:
        assert {field.name for field in fields(stats)} <= set(counters.model_fields)
