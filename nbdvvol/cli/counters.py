"""Tables of counters for `status`: totals, or rates between two looks. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbdvvol.cli.output import amount, number
from nbdvvol.model.units import about_time

if TYPE_CHECKING:
    from nbdvvol.model.base import Model
    from nbdvvol.model.observe import CacheCounters, HostCounters

BLOCK = 4096
BYTES = ("read_bytes", "write_bytes")
Table = tuple[tuple[str, ...], list[tuple[object, ...]]]


@dataclass(frozen=True, slots=True)
class _Look:
    """Something that counts, now and, when it is the same as then, at an earlier look."""

    name: str
    host: str
    now: Model
    before: Model | None
    seconds: float

    def total(self, *names: str) -> float:
        """Sum of counters since they began."""
        return float(sum(getattr(self.now, name) for name in names))

    def rate(self, *names: str) -> float | None:
        """The same per second since the earlier look; None without one, or when something began anew meanwhile."""
        if self.before is None or self.seconds <= 0:
            return None
        differences = [getattr(self.now, name) - getattr(self.before, name) for name in names]
        return sum(differences) / self.seconds if min(differences) >= 0 else None


def tables(now: Sequence[HostCounters], before: Sequence[HostCounters] | None) -> list[Table]:
    """VVols, caches, datastores, reactors: totals, or with an earlier look rates. VVols need clients to be there."""
    live = before is not None
    parts = (_vvols, _caches, _logs, _host_caches, _datastores, _reactors)
    found = (part(now, before or (), live) for part in parts)
    return [table for table in found if table[1]]


def _vvols(now: Sequence[HostCounters], before: Sequence[HostCounters], live: bool) -> Table:
    heads = ("vvol", "clients", "in_flight", "reads", "writes", "flushes", "other", *BYTES, "errors", "delayed")
    rows = []
    for look in _looks(now, before, "exports", ("vvol", "uuid", "epoch")):
        used = look.total("connections", "reads", "writes", "flushes", "trims", "zeroes", "others", "errors")
        if used == 0 or (live and look.total("connections") == 0):
            continue
        rows.append(
            (
                look.name,
                int(look.total("connections")),
                int(look.total("in_flight")),
                *_counts(look, live, ("reads",), ("writes",), ("flushes",), ("trims", "zeroes", "others")),
                *_amounts(look, live, "read_bytes", "write_bytes"),
                *_counts(look, live, ("errors",), ("delayed",)),
            )
        )
    return _per_second(heads, 3) if live else heads, rows


def _caches(now: Sequence[HostCounters], before: Sequence[HostCounters], live: bool) -> Table:
    heads = ("cached", "mode", "held", "floor", "hit_ratio")
    counts = ("hits", "misses", "filled", "refused", "written", "ahead", "ahead_used")
    rows: list[tuple[object, ...]] = []
    for look in _looks(now, before, "exports", ("vvol", "uuid", "epoch")):
        cache, old = getattr(look.now, "cache", None), getattr(look.before, "cache", None)
        if cache is None or (live and look.total("connections") == 0):
            continue
        inner = _Look(look.name, look.host, cache, old, look.seconds)
        asked = inner.rate("hits", "misses") if live else inner.total("hits", "misses")
        hits = inner.rate("hits") if live else inner.total("hits")
        rows.append(
            (
                look.name,
                "bypassed" if cache.bypassed else cache.mode,
                amount(cache.held_bytes),
                floor_words(cache),
                f"{(hits or 0) / asked:.1%}" if asked else "-",
                *_counts(inner, live, *((name,) for name in counts)),
            )
        )
    return _per_second((*heads, *counts), len(heads)) if live else (*heads, *counts), rows


def _logs(now: Sequence[HostCounters], before: Sequence[HostCounters], live: bool) -> Table:
    """Write-back logs."""
    levels = ("logged", "state", "dirty", "oldest", "used", "size", "destage/s")
    counts = ("logged", "groups", "syncs", "bypassed")
    heads = (*levels, "requests", *counts[1:], "destaged_bytes", "merged_bytes")
    rows: list[tuple[object, ...]] = []
    for look in _looks(now, before, "exports", ("vvol", "uuid", "epoch")):
        log, old = getattr(look.now, "log", None), getattr(look.before, "log", None)
        if log is None:
            continue
        inner = _Look(look.name, look.host, log, old, look.seconds)
        oldest = about_time(log.oldest_age_ms / 1000) if log.dirty_bytes else "-"
        sizes = (amount(log.used_bytes), amount(log.ring_bytes), amount(log.destage_rate))
        columns = _counts(inner, live, *((name,) for name in counts))
        merged = _amounts(inner, live, "destaged_bytes", "merged_bytes")
        rows.append((look.name, log.state, amount(log.dirty_bytes), oldest, *sizes, *columns, *merged))
    return _per_second(heads, len(levels)) if live else heads, rows


def floor_words(cache: CacheCounters) -> str:
    """The floor in force, and where it had to be cut, what was asked for."""
    cut = cache.mode != "none" and cache.floor_bytes < cache.ram_bytes // BLOCK * BLOCK
    return f"{amount(cache.floor_bytes)} of {amount(cache.ram_bytes)}" if cut else amount(cache.floor_bytes)


def _host_caches(now: Sequence[HostCounters], before: Sequence[HostCounters], live: bool) -> Table:
    """Of hosts that cache something."""
    heads = ("host_cache", "bytes", "used", "pinned", "evictions")
    then = {(host.host, host.instance): host for host in before}
    rows: list[tuple[object, ...]] = []
    for host in now:
        if not any(one.cache for one in host.exports):
            continue
        old = then.get((host.host, host.instance))
        seconds = host.uptime_s - old.uptime_s if old is not None else 0.0
        look = _Look(host.host, host.host, host.cache, old.cache if old is not None else None, seconds)
        levels = (amount(look.total(name)) for name in ("bytes", "used_bytes", "pinned_bytes"))
        rows.append((host.host, *levels, *_counts(look, live, ("evictions",))))
    return _per_second(heads, 4) if live else heads, rows


def _datastores(now: Sequence[HostCounters], before: Sequence[HostCounters], live: bool) -> Table:
    heads = ("datastore", "host", "reads", "writes", "syncs", "other", *BYTES, "errors")
    rows: list[tuple[object, ...]] = [
        (
            look.name,
            look.host,
            *_counts(look, live, ("reads",), ("writes",), ("syncs",), ("trims", "zeroes", "others")),
            *_amounts(look, live, "read_bytes", "write_bytes"),
            *_counts(look, live, ("errors",)),
        )
        for look in _looks(now, before, "datastores", ("datastore",))
    ]
    return _per_second(heads, 2) if live else heads, rows


def _reactors(now: Sequence[HostCounters], before: Sequence[HostCounters], live: bool) -> Table:
    levels = ("reactor", "connections", "pool_free_bytes")
    heads = (*levels, "requests", "batches", "enters", "sleeps", "pool_waits", "copies_bytes")
    rows: list[tuple[object, ...]] = [
        (
            f"{look.host}/{look.name}",
            int(look.total("connections")),
            amount(look.total("pool_free_bytes")),
            *_counts(look, live, ("requests",), ("batches",), ("enters",), ("sleeps",), ("pool_waits",)),
            *_amounts(look, live, "copies_bytes"),
        )
        for look in _looks(now, before, "reactors", ("reactor",))
    ]
    return _per_second(heads, 3) if live else heads, rows


def _per_second(heads: tuple[str, ...], levels: int) -> tuple[str, ...]:
    """The first columns are names and levels; the others become rates."""
    return (*heads[:levels], *(f"{head}/s" for head in heads[levels:]))


def _counts(look: _Look, live: bool, *columns: tuple[str, ...]) -> Iterator[str]:
    for names in columns:
        value = look.rate(*names) if live else look.total(*names)
        yield "-" if value is None else number(value)


def _amounts(look: _Look, live: bool, *columns: str) -> Iterator[str]:
    for name in columns:
        value = look.rate(name) if live else look.total(name)
        yield "-" if value is None else amount(value)


def _looks(
    now: Iterable[HostCounters], before: Iterable[HostCounters], part: str, key: tuple[str, ...]
) -> Iterator[_Look]:
    """Each thing of a part (`exports`, ...), with its former self: of the same filter's process, with the same key.

    The key's first field is its name."""

    def keyed(host: HostCounters) -> dict[tuple[object, ...], Model]:
        return {tuple(getattr(item, name) for name in key): item for item in getattr(host, part)}

    then = {(host.host, host.instance): host for host in before}
    for host in now:
        old = then.get((host.host, host.instance))
        olds = keyed(old) if old is not None else {}
        seconds = host.uptime_s - old.uptime_s if old is not None else 0.0
        for name, item in keyed(host).items():
            yield _Look(str(name[0]), host.host, item, olds.get(name), seconds)
