"""What control may see of this host while it works: counters at this moment, and traces of single requests.

Counters are read where they are counted, when somebody asks: nobody pays for them otherwise. One trace runs at a time;
it is bounded in time and number, and ends at once when nobody waits for it any more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Literal

import structlog
from pydantic import BaseModel

from nbdvvol.dataplane.types import CacheMode, DataPlane, TraceRecord, TraceState
from nbdvvol.filter.exports import ExportTable
from nbdvvol.filter.objects import ObjectTable
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.link import Counters, Forget, Look, Traced, TraceOrder, VVolSpec
from nbdvvol.model.observe import (
    CacheCounters,
    ExportCounters,
    HostCache,
    HostCounters,
    LogCounters,
    ReactorCounters,
    TracedRequest,
    TraceReport,
)
from nbdvvol.nbd.constants import Command, CommandFlag

_log = structlog.get_logger("observe")
READ_EVERY_S = 0.02
READ_AT_ONCE = 4096

Mode = Literal["none", "read", "writethrough", "writeback"]
_CACHE_MODES: dict[CacheMode, Mode] = {
    CacheMode.NONE: "none",
    CacheMode.READ: "read",
    CacheMode.WRITETHROUGH: "writethrough",
}

Send = Callable[[BaseModel], None]
Ended = Literal["count", "seconds", "closed"]


class Observer:
    """Answers control's questions about what this filter is doing."""

    def __init__(
        self, host: str, instance: str, plane: DataPlane, exports: ExportTable, objects: ObjectTable, send: Send
    ) -> None:
        self._host = host
        self._instance = instance
        self._plane = plane
        self._exports = exports
        self._objects = objects
        self._send = send
        self._began_s = time.monotonic()
        self._busy = False
        self._tracing = ""
        self._traces: dict[int, asyncio.Task[None]] = {}

    def take(self, question: Look | TraceOrder | Forget) -> None:
        """Answer, now or when a trace is over; or stop working on an answer."""
        match question:
            case Look():
                self._send(Counters(id=question.id, counters=self.counters()))
            case TraceOrder():
                task = asyncio.get_running_loop().create_task(self._trace(question))
                self._traces[question.id] = task
                task.add_done_callback(lambda _: self._traces.pop(question.id, None))
            case Forget():
                if found := self._traces.get(question.id):
                    found.cancel()

    def forget_all(self) -> None:
        """Nobody waits for any answer."""
        for task in self._traces.values():
            task.cancel()

    async def stop(self) -> None:
        """End every trace without an answer."""
        self.forget_all()
        await asyncio.gather(*self._traces.values(), return_exceptions=True)

    def counters(self) -> HostCounters:
        """All counters as they are now."""
        return HostCounters(
            host=self._host,
            instance=self._instance,
            uptime_s=time.monotonic() - self._began_s,
            tracing=self._tracing,
            cache=HostCache(**asdict(self._plane.cache_totals())),
            exports=list(self._export_counters()),
            reactors=[
                ReactorCounters(reactor=number, **asdict(stats))
                for number, stats in enumerate(self._plane.reactor_stats())
            ],
            datastores=self._objects.counters(),
        )

    def _export_counters(self) -> Iterator[ExportCounters]:
        for spec, volume in self._exports.serving():
            try:
                stats = self._plane.volume_stats(volume)
                cache, log = self._cache_counters(spec, volume), self._log_counters(spec)
            except OSError:  # closed a moment ago, and its task does not know yet
                continue
            yield ExportCounters(
                vvol=f"{spec.vm}/{spec.name}", uuid=spec.uuid, epoch=spec.epoch, **asdict(stats), cache=cache, log=log
            )

    def _log_counters(self, spec: VVolSpec) -> LogCounters | None:
        log = self._exports.log_of(spec.uuid)
        if log is None or log.phase is None:
            return None
        stats = log.stats()
        counted = asdict(stats) if stats is not None else {}
        return LogCounters(**counted | {"state": log.phase}, destage_rate=log.rate)

    def _cache_counters(self, spec: VVolSpec, volume: int) -> CacheCounters | None:
        if spec.cache is None:
            return None
        found = self._plane.cache_stats(volume)
        asked = found.hits + found.misses
        mode: Mode = _CACHE_MODES[CacheMode(found.mode)]
        if spec.cache.mode == "writeback" and mode == "writethrough":
            mode = "writeback"
        ratio = found.hits / asked if asked else None
        counted = asdict(found) | {"mode": mode, "bypassed": bool(found.bypassed)}
        return CacheCounters(**counted, hit_ratio=ratio, ram_bytes=spec.cache.ram)

    # ---- traces ----

    async def _trace(self, order: TraceOrder) -> None:
        try:
            self._send(Traced(id=order.id, report=await self._record(order)))
        except NvError as error:
            self._send(Traced(id=order.id, error=error.message, code=error.code, hint=error.hint))
        except OSError as error:
            self._send(Traced(id=order.id, error=str(error), code=Code.INTERNAL))

    def _volume(self, uuid: str) -> int:
        """The volume to trace. Raises UNAVAILABLE."""
        export = self._exports.get(uuid)
        if export is None or export.volume is None:
            why = export.error if export is not None and export.error else "it is not served here now"
            raise NvError(Code.UNAVAILABLE, why, "see what `nbdvvol status` says of it")
        return export.volume

    async def _record(self, order: TraceOrder) -> TraceReport:
        volume = self._volume(order.uuid)
        if self._busy:
            raise NvError(
                Code.BUSY, "another trace runs on this host, and there is one at a time", "repeat it in a while"
            )
        began_ns = self._plane.begin_trace(volume, order.every)
        began = datetime.now(UTC)
        self._busy = True
        try:
            records, dropped, ended = await self._collect(order, volume)
            lasted_s = (time.monotonic_ns() - began_ns) / 1e9
        finally:
            self._busy, self._tracing = False, ""
            self._plane.end_trace()
        requests = [_words(record, began_ns) for record in sorted(records, key=lambda r: (r.received_ns, r.parsed_ns))]
        _log.info("traced", uuid=order.uuid, requests=len(requests), dropped=dropped, seconds=round(lasted_s, 3))
        return TraceReport(
            began=began, seconds=lasted_s, every=order.every, ended=ended, dropped=dropped, requests=requests
        )

    async def _collect(self, order: TraceOrder, volume: int) -> tuple[list[TraceRecord], int, Ended]:
        """Read until it is over: the first `count` records in the order of sending, and how many were dropped."""
        end_s = time.monotonic() + order.seconds
        found: list[list[TraceRecord]] = [[] for _ in self._plane.reactor_stats()]
        while True:
            over = time.monotonic() >= end_s
            states = [self._read(number, records, order.count) for number, records in enumerate(found)]
            if all(state.recording for state in states):
                self._tracing = order.uuid
            export = self._exports.get(order.uuid)
            closed = export is None or export.volume != volume
            enough = sum(map(len, found)) >= order.count
            if enough or over or closed:
                records = sorted((record for some in found for record in some), key=lambda record: record.sent_ns)
                ended: Ended = "count" if enough else "seconds" if over else "closed"
                return records[: order.count], sum(state.dropped for state in states), ended
            await asyncio.sleep(max(0.0, min(READ_EVERY_S, end_s - time.monotonic())))

    def _read(self, reactor: int, records: list[TraceRecord], count: int) -> TraceState:
        """Add one reactor's records, as many as may be wanted."""
        while True:
            most = min(READ_AT_ONCE, count - len(records))
            more, state = self._plane.read_trace(reactor, most)
            records += more
            if len(more) < READ_AT_ONCE:
                return state


def _command(number: int) -> str:
    try:
        return Command(number).name.lower().replace("_", "-")
    except ValueError:
        return f"command-{number}"


def _flags(bits: int) -> list[str]:
    known = [flag for flag in CommandFlag if bits & flag]
    rest = bits & ~sum(known)
    return [str(flag.name).lower().replace("_", "-") for flag in known] + ([f"{rest:#x}"] if rest else [])


def _words(record: TraceRecord, began_ns: int) -> TracedRequest:
    """A record as people read it."""
    return TracedRequest(
        command=_command(record.type),
        flags=_flags(record.flags),
        offset=record.offset,
        length=record.length,
        error=record.error,
        connection=record.connection,
        reactor=record.reactor,
        cookie=record.cookie,
        received_ns=record.received_ns - began_ns,
        parsed_ns=record.parsed_ns - began_ns,
        submitted_ns=record.submitted_ns - began_ns,
        completed_ns=record.completed_ns - began_ns,
        sent_ns=record.sent_ns - began_ns,
    )
