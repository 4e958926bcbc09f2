"""Prometheus' view of the farm: one collector over what `status` says, made anew for each scrape.

Names are `nbdvvol_THING_WHAT_UNIT`; counters are those of the filters (model/observe.py) and begin anew with a filter's
process or a VVol's opening, as Prometheus expects of counters. Labels: `vvol` is VM/NAME, `vm`, `host`, `reactor`,
`datastore`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from pydantic import BaseModel

from nbdvvol.model.observe import (
    CacheCounters,
    DatastoreCounters,
    ExportCounters,
    HostCache,
    HostCounters,
    LogCounters,
    ReactorCounters,
)
from nbdvvol.model.resources import Datastore, Status, TaskState, VVol

Labels = tuple[str, ...]

_EXPORT_TYPES = {
    "reads": "read",
    "writes": "write",
    "flushes": "flush",
    "trims": "trim",
    "zeroes": "zero",
    "others": "other",
}
_STORE_TYPES = {
    "reads": "read",
    "writes": "write",
    "zeroes": "zero",
    "trims": "trim",
    "syncs": "sync",
    "others": "other",
}
_CACHE_TYPES = {
    "hits": "hit",
    "misses": "missed",
    "filled": "filled",
    "refused": "refused",
    "written": "written",
    "ahead": "ahead",
    "ahead_used": "ahead_used",
}
_LOG_LEVELS = {
    "ring_bytes": ("size_bytes", "Its size."),
    "used_bytes": ("used_bytes", "Of it, in use."),
    "dirty_bytes": ("dirty_bytes", "What the storage has not yet."),
    "lost_bytes": ("lost_bytes", "What can be read nowhere any more."),
    "destage_rate": ("destage_bytes_per_second", "How fast it is carried to the storage now."),
}
_LOG_COUNTERS = {
    "logged": ("logged_requests", "Requests that were logged."),
    "bypassed": ("bypassed_requests", "Requests that went to the storage at once."),
    "groups": ("groups", "Writes to the log, each of one request or more."),
    "syncs": ("syncs", "Syncs of the log."),
    "destaged_bytes": ("destaged_bytes", "Carried to the storage."),
    "merged_bytes": ("merged_bytes", "Overwritten before they were carried."),
}
_REACTOR_COUNTERS = {
    "requests": ("requests", "Requests received."),
    "batches": ("batches", "Receives that brought something; requests come several at once."),
    "enters": ("enters", "System calls that hand operations to the kernel and wait."),
    "sleeps": ("sleeps", "Times it had nothing to do and slept."),
    "submissions": ("submissions", "Operations given to the ring."),
    "copies_bytes": ("copied_bytes", "Payload bytes copied between buffers."),
    "pool_waits": ("pool_waits", "Requests that waited for a buffer."),
}


def render(status: Status, tasks: Mapping[TaskState, int], accept: str) -> tuple[bytes, str]:
    """The text of a scrape and its content type, in the form that the Accept header asks for."""
    encode, kind = choose_encoder(accept)
    registry = CollectorRegistry()
    registry.register(FarmCollector(status, tasks))
    return encode(registry), kind


class FarmCollector(Collector):
    """What one look at the farm has shown."""

    def __init__(self, status: Status, tasks: Mapping[TaskState, int]) -> None:
        self._status = status
        self._tasks = tasks

    def collect(self) -> Iterator[Metric]:
        """Every metric, whether it has samples now or not."""
        status = self._status
        yield from chain(
            _control(status, self._tasks),
            _hosts(status),
            _vvols(status.vvols),
            _legs(status.vvols),
            _datastores(status.datastores),
            _exports(status.counters),
            _caches(status.counters),
            _logs(status.counters),
            _reactors(status.counters),
            _storage(status.counters),
        )


def _gauge(name: str, text: str, labels: Sequence[str], samples: Iterable[tuple[Labels, float]]) -> Metric:
    family = GaugeMetricFamily(f"nbdvvol_{name}", text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _counter(name: str, text: str, labels: Sequence[str], samples: Iterable[tuple[Labels, float]]) -> Metric:
    family = CounterMetricFamily(f"nbdvvol_{name}", text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _typed(found: Sequence[tuple[Labels, BaseModel]], types: Mapping[str, str]) -> Iterator[tuple[Labels, float]]:
    """Samples of counters that differ by the label `type` alone."""
    for labels, counters in found:
        for field, kind in types.items():
            yield (*labels, kind), getattr(counters, field)


def _one(found: Sequence[tuple[Labels, BaseModel]], field: str) -> Iterator[tuple[Labels, float]]:
    for labels, counters in found:
        yield labels, getattr(counters, field)


def _control(status: Status, tasks: Mapping[TaskState, int]) -> Iterator[Metric]:
    yield _gauge("build_info", "This control.", ["version"], [((status.version,), 1)])
    yield _gauge("registry_revision", "Changes of the registry so far.", [], [((), status.revision)])
    yield _gauge("tasks", "Tasks, by state.", ["state"], [((state.value,), n) for state, n in tasks.items()])
    problems: dict[str, int] = {}
    for problem in status.problems:
        problems[problem.code] = problems.get(problem.code, 0) + 1
    text = "What `nbdvvol status -x` tells, by code."
    yield _gauge("problems", text, ["code"], [((code,), count) for code, count in problems.items()])


def _hosts(status: Status) -> Iterator[Metric]:
    connected = [((host.name,), float(host.connected)) for host in status.hosts]
    yield _gauge("host_connected", "Whether the host's filter is linked to control.", ["host"], connected)
    yield _gauge("host_vvols", "VVols bound to the host.", ["host"], [((h.name,), h.vvols) for h in status.hosts])
    uptimes = [((host.host,), host.uptime_s) for host in status.counters]
    yield _gauge("filter_uptime_seconds", "Since the host's filter began to count.", ["host"], uptimes)


def _vvols(vvols: Sequence[VVol]) -> Iterator[Metric]:
    labels = ["vvol", "vm"]
    names = [(vvol, (vvol.full_name, vvol.vm)) for vvol in vvols]
    yield _gauge("vvol_size_bytes", "Its size.", labels, [(name, vvol.size) for vvol, name in names])
    ready = [(name, float(vvol.state == "ready")) for vvol, name in names]
    yield _gauge("vvol_ready", "Whether it is made and not being deleted.", labels, ready)
    bound = [(name, float(vvol.binding is not None and vvol.binding.state == "bound")) for vvol, name in names]
    yield _gauge("vvol_bound", "Whether a host serves it.", labels, bound)


def _legs(vvols: Sequence[VVol]) -> Iterator[Metric]:
    """Of mirrors: the copies, as the registry has them and as their hosts run them."""
    labels = ["vvol", "vm", "leg", "datastore"]
    found = [
        ((vvol.full_name, vvol.vm, str(leg.id), leg.datastore), leg)
        for vvol in vvols
        if vvol.mirror is not None
        for leg in vvol.legs
    ]
    whole = [(names, float(leg.state == "in-sync")) for names, leg in found]
    yield _gauge("leg_in_sync", "Whether the copy has all that was acknowledged.", labels, whole)
    runs = [(names, leg.now) for names, leg in found if leg.now is not None]
    dirty = [(names, now.dirty_bytes) for names, now in runs]
    yield _gauge("leg_dirty_bytes", "What may differ and is not copied yet.", labels, dirty)
    rates = [(names, now.rate) for names, now in runs]
    yield _gauge("leg_resync_bytes_per_second", "How fast it is copied to now.", labels, rates)
    times = [(names, now.latency_ns / 1e9) for names, now in runs]
    yield _gauge("leg_read_latency_seconds", "Of a read, smoothed.", labels, times)
    mirrors = [((vvol.full_name, vvol.vm), vvol.now) for vvol in vvols if vvol.now is not None]
    held = [(names, float(now.state in ("frozen", "expired"))) for names, now in mirrors]
    text = "Whether writes wait until the registry knows of a failed leg."
    yield _gauge("mirror_writes_held", text, ["vvol", "vm"], held)


def _datastores(stores: Sequence[Datastore]) -> Iterator[Metric]:
    labels = ["datastore"]
    yield _gauge("datastore_size_bytes", "Usable bytes.", labels, [((s.name,), s.size) for s in stores])
    yield _gauge("datastore_free_bytes", "Bytes that no VVol has.", labels, [((s.name,), s.free) for s in stores])
    online = [((store.name,), float(store.state == "online")) for store in stores]
    yield _gauge("datastore_online", "Whether it was there at the last look.", labels, online)
    text = "Failed syncs that no operator has accepted yet: FLUSH fails there."
    yield _gauge("datastore_sync_faults", text, labels, [((s.name,), len(s.faults)) for s in stores])


def _exports(hosts: Sequence[HostCounters]) -> Iterator[Metric]:
    labels = ["vvol", "vm", "host"]
    found: list[tuple[Labels, ExportCounters]] = [
        ((export.vvol, export.vvol.split("/")[0], host.host), export) for host in hosts for export in host.exports
    ]
    text = "Requests answered."
    yield _counter("vvol_requests", text, [*labels, "type"], _typed(found, _EXPORT_TYPES))
    yield _counter("vvol_read_bytes", "Bytes read.", labels, _one(found, "read_bytes"))
    yield _counter("vvol_written_bytes", "Bytes written.", labels, _one(found, "write_bytes"))
    yield _counter("vvol_errors", "Requests answered with an error.", labels, _one(found, "errors"))
    yield _counter("vvol_delayed_requests", "Requests that waited for limits.", labels, _one(found, "delayed"))
    waits = [(names, export.delay_ns / 1e9) for names, export in found]
    yield _counter("vvol_delay_seconds", "How long they waited, all together.", labels, waits)
    yield _gauge("vvol_requests_in_flight", "Requests not answered yet.", labels, _one(found, "in_flight"))
    yield _gauge("vvol_connections", "Connections of clients.", labels, _one(found, "connections"))


def _caches(hosts: Sequence[HostCounters]) -> Iterator[Metric]:
    labels = ["vvol", "vm", "host"]
    found: list[tuple[Labels, CacheCounters]] = [
        ((export.vvol, export.vvol.split("/")[0], host.host), export.cache)
        for host in hosts
        for export in host.exports
        if export.cache is not None
    ]
    text = "Blocks of 4 KiB, by what became of them."
    yield _counter("vvol_cache_blocks", text, [*labels, "type"], _typed(found, _CACHE_TYPES))
    yield _gauge("vvol_cache_held_bytes", "What the cache holds of it.", labels, _one(found, "held_bytes"))
    text = "What other VVols cannot take of that."
    yield _gauge("vvol_cache_floor_bytes", text, labels, _one(found, "floor_bytes"))
    on = [(names, float(cache.mode != "none" and not cache.bypassed)) for names, cache in found]
    yield _gauge("vvol_cache_on", "1: used; 0: no memory for it, or its storage is in memory already.", labels, on)
    caches: list[tuple[Labels, HostCache]] = [((host.host,), host.cache) for host in hosts]
    yield _gauge("host_cache_bytes", "RAM for caches.", ["host"], _one(caches, "bytes"))
    yield _gauge("host_cache_used_bytes", "Holding something.", ["host"], _one(caches, "used_bytes"))
    yield _gauge("host_cache_pinned_bytes", "Being sent.", ["host"], _one(caches, "pinned_bytes"))
    yield _counter("host_cache_evictions", "Blocks that had to leave.", ["host"], _one(caches, "evictions"))


def _logs(hosts: Sequence[HostCounters]) -> Iterator[Metric]:
    """Write-back logs."""
    labels = ["vvol", "vm", "host"]
    found: list[tuple[Labels, LogCounters]] = [
        ((export.vvol, export.vvol.split("/")[0], host.host), export.log)
        for host in hosts
        for export in host.exports
        if export.log is not None
    ]
    for field, (name, text) in _LOG_LEVELS.items():
        yield _gauge(f"vvol_log_{name}", text, labels, _one(found, field))
    ages = [(names, log.oldest_age_ms / 1000) for names, log in found]
    yield _gauge("vvol_log_oldest_age_seconds", "Since the oldest write not in the storage was logged.", labels, ages)
    serving = [(names, float(log.state == "serving")) for names, log in found]
    yield _gauge("vvol_log_serving", "1: writes are logged; 0: they go to the storage.", labels, serving)
    for field, (name, text) in _LOG_COUNTERS.items():
        yield _counter(f"vvol_log_{name}", text, labels, _one(found, field))


def _reactors(hosts: Sequence[HostCounters]) -> Iterator[Metric]:
    labels = ["host", "reactor"]
    found: list[tuple[Labels, ReactorCounters]] = [
        ((host.host, str(reactor.reactor)), reactor) for host in hosts for reactor in host.reactors
    ]
    for field, (name, text) in _REACTOR_COUNTERS.items():
        yield _counter(f"reactor_{name}", text, labels, _one(found, field))
    yield _gauge("reactor_connections", "Connections that live on it.", labels, _one(found, "connections"))
    yield _gauge("reactor_pool_free_bytes", "Buffer memory not in use.", labels, _one(found, "pool_free_bytes"))


def _storage(hosts: Sequence[HostCounters]) -> Iterator[Metric]:
    labels = ["datastore", "host"]
    found: list[tuple[Labels, DatastoreCounters]] = [
        ((store.datastore, host.host), store) for host in hosts for store in host.datastores
    ]
    text = "Operations that the storage carried out, metadata included."
    yield _counter("datastore_operations", text, [*labels, "type"], _typed(found, _STORE_TYPES))
    yield _counter("datastore_read_bytes", "Bytes read.", labels, _one(found, "read_bytes"))
    yield _counter("datastore_written_bytes", "Bytes written.", labels, _one(found, "write_bytes"))
    yield _counter("datastore_errors", "Operations that failed.", labels, _one(found, "errors"))
    yield _gauge("datastore_open_objects", "Files and devices open.", labels, _one(found, "objects"))
