"""What `status` and `trace` print: totals, rates between two looks, restarts in between, short numbers."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

import pytest

from nbdvvol.cli import trace as verb
from nbdvvol.cli.counters import tables
from nbdvvol.cli.output import amount, duration, number
from nbdvvol.model.observe import (
    CacheCounters,
    CommandTimes,
    DatastoreCounters,
    ExportCounters,
    HostCache,
    HostCounters,
    ReactorCounters,
    StageTimes,
    Trace,
    TracedRequest,
)


def host(uptime_s: float, factor: int = 1, *, instance: str = "i", epoch: int = 1, clients: int = 1) -> HostCounters:
    """A host after `factor` times the same work."""
    busy = ExportCounters(
        vvol="vm1/a", uuid="a", epoch=epoch, connections=clients, in_flight=3, reads=100 * factor, writes=50 * factor,
        flushes=factor, trims=factor, zeroes=factor, read_bytes=factor << 20, write_bytes=512 * factor, errors=0,
    )  # fmt: skip
    idle = ExportCounters(vvol="vm1/b", uuid="b", epoch=1)
    store = DatastoreCounters(datastore="main", reads=10 * factor, syncs=factor, read_bytes=1024 * factor)
    reactor = ReactorCounters(reactor=0, connections=2, requests=200 * factor, pool_free_bytes=64 << 20)
    return HostCounters(
        host="h", instance=instance, uptime_s=uptime_s, exports=[busy, idle], datastores=[store], reactors=[reactor]
    )


def rows(now: HostCounters, before: HostCounters | None, *, live: bool = True) -> list[dict[str, str]]:
    """The first row of each table, by column."""
    found = tables([now], ([before] if before else []) if live else None)
    return [dict(zip(heads, map(str, some[0]), strict=True)) for heads, some in found]


def test_totals() -> None:
    vvol, store, reactor = rows(host(1, 20), None, live=False)
    assert vvol == {
        "vvol": "vm1/a", "clients": "1", "in_flight": "3", "reads": "2,000", "writes": "1,000", "flushes": "20",
        "other": "40", "read_bytes": "20MiB", "write_bytes": "10KiB", "errors": "0",
        "delayed": "0",
    }  # fmt: skip
    assert (store["datastore"], store["host"], store["reads"], store["syncs"]) == ("main", "h", "200", "20")
    assert (reactor["reactor"], reactor["pool_free_bytes"], reactor["requests"]) == ("h/0", "64MiB", "4,000")


def cached(uptime_s: float, factor: int) -> HostCounters:
    """A host that caches vm1/a, and once for each mode of being without."""
    found = host(uptime_s, factor)
    found.exports[0].cache = CacheCounters(
        mode="read", hit_ratio=0.9, hits=90 * factor, misses=10 * factor, ahead=4, ahead_used=3, held_bytes=5 << 20,
        floor_bytes=8 << 20, ram_bytes=32 << 20,
    )  # fmt: skip
    found.cache = HostCache(bytes=16 << 20, used_bytes=12 << 20, evictions=6 * factor)
    return found


def test_caches_are_told_of_where_there_are_some() -> None:
    _, vvol, whole, *_ = rows(cached(1, 2), None, live=False)
    told = {"cached": "vm1/a", "mode": "read", "held": "5MiB", "floor": "8MiB of 32MiB", "hit_ratio": "90.0%"}
    assert vvol == told | {
        "hits": "180", "misses": "20", "filled": "0", "refused": "0", "written": "0", "ahead": "4", "ahead_used": "3"
    }  # fmt: skip
    assert whole == {"host_cache": "h", "bytes": "16MiB", "used": "12MiB", "pinned": "0B", "evictions": "12"}
    _, vvol, whole, *_ = rows(cached(12, 3), cached(10, 1))
    assert (vvol["hits/s"], vvol["misses/s"], vvol["hit_ratio"], whole["evictions/s"]) == ("90", "10", "90.0%", "6")
    first = rows(cached(12, 3), None)
    assert (first[1]["hits/s"], first[1]["hit_ratio"], first[2]["evictions/s"]) == ("-", "-", "-")


def test_a_cache_that_does_nothing_says_why() -> None:
    whole = cached(1, 1)
    assert whole.exports[0].cache is not None
    whole.exports[0].cache.bypassed = True
    assert rows(whole, None, live=False)[1]["mode"] == "bypassed"


def test_vvols_without_clients_are_left_out() -> None:
    [(_, totals), *_] = tables([host(1, clients=0)], None)
    assert [row[0] for row in totals] == ["vm1/a"], "it has done something once"
    assert len(tables([host(1, clients=0)], [])) == 2, "and does nothing now"


def test_rates_are_per_second_of_the_filters_clock() -> None:
    vvol, store, reactor = rows(host(14, 3), host(10, 1))
    assert (vvol["reads/s"], vvol["writes/s"], vvol["flushes/s"], vvol["other/s"]) == ("50", "25", "0.5", "1")
    assert (vvol["read_bytes/s"], vvol["write_bytes/s"]) == ("512KiB", "256B")
    assert (vvol["clients"], vvol["in_flight"]) == ("1", "3"), "levels stay levels"
    assert (store["reads/s"], reactor["requests/s"]) == ("5", "100")


@pytest.mark.parametrize(
    "before",
    [None, host(10, 1, instance="former"), host(10, 1, epoch=7), host(14, 1), host(10, 5)],
    ids=["first-look", "filter-restarted", "opened-anew", "same-moment", "went-back"],
)
def test_no_rate_where_there_is_none(before: HostCounters | None) -> None:
    assert rows(host(14, 3), before)[0]["reads/s"] == "-"


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.04, "0.0"), (2.5, "2.5"), (9, "9"), (12.4, "12"), (1234567.8, "1,234,568")]
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0B"), (1023, "1,023B"), (1536, "1.5KiB"), (5 << 20, "5MiB"), (3 << 30, "3GiB"), (1 << 52, "4,096TiB")],
)
def test_amounts(size_bytes: float, text: str) -> None:
    assert amount(size_bytes) == text


@pytest.mark.parametrize(
    ("time_ns", "text"),
    [(0, "0ns"), (999, "999ns"), (1500, "1.5us"), (123456, "123us"), (2_500_000, "2.5ms"), (3.2e9, "3.20s")],
)
def test_durations(time_ns: float, text: str) -> None:
    assert duration(time_ns) == text


def a_trace(count: int, *, ended: Literal["count", "seconds", "closed"] = "count", **more: Any) -> Trace:
    requests = [
        TracedRequest(
            command="write", flags=["fua"], offset=4096 * n, length=4096, error=5 if n == 1 else 0, connection=1,
            reactor=0, cookie=n, received_ns=n * 1000, parsed_ns=n * 1000 + 10, submitted_ns=n * 1000 + 30,
            completed_ns=n * 1000 + 130 + n, sent_ns=n * 1000 + 150 + n,
        )
        for n in range(count)
    ]  # fmt: skip
    stage = StageTimes(p50_ns=10, p90_ns=20, p99_ns=30, max_ns=4000)
    times = CommandTimes(
        command="write", requests=count, errors=1, bytes=4096, parse=stage, submit=stage, complete=stage, send=stage,
        total=stage,
    )  # fmt: skip
    values: dict[str, Any] = {"seconds": 0.25, "every": 1, "dropped": 0} | more
    return Trace(
        vvol="vm1/a", host="h", began=datetime.now(UTC), ended=ended, requests=requests,
        commands=[times] if requests else [], **values,
    )  # fmt: skip


def test_a_printed_trace(capsys: pytest.CaptureFixture[str]) -> None:
    verb._print(a_trace(8), 8)
    out = capsys.readouterr().out
    assert out.startswith("vm1/a on host h: 8 recorded in 0.250 s; ended at --count 8\n")
    lines = [line.split() for line in out.splitlines()]
    assert ["write", "8", "1", "4KiB", "parse", "10ns", "20ns", "30ns", "4.0us"] in lines
    assert ["complete", "10ns", "20ns", "30ns", "4.0us"] in lines
    slowest = lines[lines.index(["slowest", "of", "8:"]) + 2 :]
    assert [line[1] for line in slowest] == [str(4096 * n) for n in (7, 6, 5, 4, 3)]
    assert slowest[0] == ["write+fua", "28672", "4KiB", "7.0us", "10ns", "20ns", "107ns", "20ns", "157ns", "-"]


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (a_trace(0, ended="seconds"), "0 recorded in 0.250 s"),
        (a_trace(0, ended="closed"), "ended early"),
        (a_trace(0, ended="seconds", every=100), "one of 100 requests"),
        (a_trace(0, ended="count", dropped=12), "12 more came too fast"),
    ],
    ids=["nothing", "closed", "sampled", "dropped"],
)
def test_what_a_trace_left_out_is_said(found: Trace, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    verb._print(found, 10)
    out = capsys.readouterr().out
    assert says in out and out.count("\n") == 1
