"""What is seen of a host while it works: counters of exports, reactors and datastores, and traces of single requests.

The link carries these words from a filter to control, and the API gives them on as they are. Counters only grow for as
long as a filter's process (`instance`) lives, but those of an export begin anew when it is opened again.
"""

from __future__ import annotations

from datetime import datetime
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field

from nbdvvol.model.base import Model
from nbdvvol.model.log import LogPhase

TRACE_SECONDS_MAX = 60.0
TRACE_REQUESTS_MAX = 10_000
"""Below the records that a reactor can keep unread (native/include/limits.h): a trace within it loses none."""
TRACE_EVERY_MAX = 1_000_000

STAGES = ("parse", "submit", "complete", "send", "total")
"""Of a request: each ends with the moment of its name; `total` is all of them."""

TraceSeconds = Annotated[float, Field(gt=0, le=TRACE_SECONDS_MAX, description="how long it lasts at most")]
TraceCount = Annotated[int, Field(ge=1, le=TRACE_REQUESTS_MAX, description="it ends after so many requests")]
TraceEvery = Annotated[int, Field(ge=1, le=TRACE_EVERY_MAX, description="record one of so many requests")]


class CacheCounters(Model):
    """What the host's cache did for a VVol since it was opened; blocks are of 4 KiB."""

    mode: Literal["none", "read", "writethrough", "writeback"]
    """In force: `none` where the profile asks for a cache and the host has no memory for one. How the log of
    `writeback` is, is in `log`."""
    bypassed: bool = False
    """Its storage is in memory already: nothing is copied into the cache."""
    hit_ratio: float | None = None
    """Hits of all blocks that were read; null before the first one."""
    hits: int = 0
    misses: int = 0
    filled: int = 0
    """Blocks that were put in when they were read, or read ahead."""
    refused: int = 0
    """Blocks that were not: a write came between, or there was no room."""
    written: int = 0
    """Blocks that were put in by writes."""
    ahead: int = 0
    """Blocks that were fetched before anybody asked for them, ..."""
    ahead_used: int = 0
    """... and were asked for since."""
    held_bytes: int = 0
    floor_bytes: int = 0
    """What other VVols cannot take of it: `ram` of its profile, unless the host's floors had to be cut."""
    ram_bytes: int = 0
    """What its profile asks for."""


class LogCounters(Model):
    """The write-back log of a VVol since it was opened."""

    state: LogPhase
    ring_bytes: int = 0
    """Its size."""
    used_bytes: int = 0
    dirty_bytes: int = 0
    """Not carried to the storage yet."""
    lost_bytes: int = 0
    """That can be read nowhere any more."""
    oldest_age_ms: int = 0
    """Since the oldest write that is not in the storage was logged."""
    destage_rate: int = 0
    """Bytes a second that are carried to the storage now, smoothed."""
    held: int = 0
    """Requests that wait until a log that has failed is void."""
    blocked: int = 0
    """Bypasses that had to wait."""
    logged: int = 0
    """Requests."""
    groups: int = 0
    """Writes to the log: requests that arrive together share one."""
    syncs: int = 0
    bypassed: int = 0
    """Requests that went to the storage."""
    tombstones: int = 0
    destaged_bytes: int = 0
    merged_bytes: int = 0
    """Overwritten before they were carried."""


class HostCache(Model):
    """A host's cache, of all its VVols together."""

    bytes: int = 0
    """0: the filter was started without one."""
    used_bytes: int = 0
    pinned_bytes: int = 0
    """Being sent to clients: they stay where they are until that is done."""
    evictions: int = 0
    """Blocks that had to leave."""


class ExportCounters(Model):
    """A VVol as a host serves it: requests that were answered, by command; those in flight; who is connected."""

    vvol: str
    """`VM/NAME`."""
    uuid: str
    epoch: int
    reads: int = 0
    writes: int = 0
    flushes: int = 0
    trims: int = 0
    zeroes: int = 0
    others: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    errors: int = 0
    """Answered with an error; those refused before they reached the volume count here alone."""
    in_flight: int = 0
    connections: int = 0
    delayed: int = 0
    """Requests that had to wait for the VVol's limits."""
    delay_ns: int = 0
    """How long they waited, all together."""
    cache: CacheCounters | None = None
    """null: its profile asks for none."""
    log: LogCounters | None = None
    """null: it has no write-back log."""


class ReactorCounters(Model):
    """A thread of the data plane."""

    reactor: int
    enters: int = 0
    """System calls that hand operations to the kernel and wait for them."""
    sleeps: int = 0
    requests: int = 0
    batches: int = 0
    """Receives that brought something: requests come several at once."""
    submissions: int = 0
    """Operations given to the ring."""
    copies_bytes: int = 0
    """Payload bytes that were copied between buffers."""
    connections: int = 0
    pool_free_bytes: int = 0
    pool_waits: int = 0
    """Requests that had to wait for a buffer."""


class DatastoreCounters(Model):
    """What a host's filter did on a datastore's files and devices: operations on contiguous pieces, not requests."""

    datastore: str
    objects: int = 0
    """Open now."""
    faults: int = 0
    """Of them those on which FLUSH fails, because a sync has failed."""
    reads: int = 0
    writes: int = 0
    zeroes: int = 0
    trims: int = 0
    syncs: int = 0
    others: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    errors: int = 0


class HostCounters(Model):
    """All that a host's filter counts, at one moment."""

    host: str
    instance: str
    """The filter's process: another one counts from zero."""
    uptime_s: float
    """Since that process began to count; the clock of rates between two looks."""
    tracing: str = ""
    """UUID of the VVol whose requests are being traced."""
    cache: HostCache = HostCache()
    exports: list[ExportCounters] = Field(default_factory=list)
    reactors: list[ReactorCounters] = Field(default_factory=list)
    datastores: list[DatastoreCounters] = Field(default_factory=list)


class TracedRequest(Model):
    """One request. Moments are nanoseconds since the trace began, in this order."""

    command: str
    flags: list[str]
    """Such as `fua`."""
    offset: int
    length: int
    error: int
    """0, or the error that the reply carried (an errno)."""
    connection: int
    reactor: int
    cookie: int
    received_ns: int
    """Its header arrived; requests that arrived together share the moment."""
    parsed_ns: int
    submitted_ns: int
    """The storage was first asked. Before: waiting for the VVol's limits, its payload, memory, requests it overlaps."""
    completed_ns: int
    """Its reply was ready. A read that is sent straight from memory is ready at once: the send does the work."""
    sent_ns: int
    """The kernel had taken the whole reply (with TLS: it was encrypted)."""

    def stages(self) -> dict[str, int]:
        """How long each stage took and all of them together, nanoseconds, by the names of STAGES."""
        moments = self.received_ns, self.parsed_ns, self.submitted_ns, self.completed_ns, self.sent_ns
        took = [after - before for before, after in pairwise(moments)]
        return dict(zip(STAGES, [*took, self.sent_ns - self.received_ns], strict=True))


class TraceReport(Model):
    """A trace as the filter recorded it."""

    began: datetime
    seconds: float
    """How long it lasted."""
    every: int
    """One of so many requests was recorded."""
    ended: Literal["count", "seconds", "closed"]
    """Why: enough requests; enough time; or the volume was closed, moved or opened anew."""
    dropped: int
    """Requests that could not be recorded because they came too fast to be read."""
    requests: list[TracedRequest]
    """In the order of their arrival."""


class StageTimes(Model):
    """How long a stage took, nanoseconds."""

    p50_ns: int
    p90_ns: int
    p99_ns: int
    max_ns: int


class CommandTimes(Model):
    """All traced requests of one command together."""

    command: str
    requests: int
    errors: int
    bytes: int
    """Asked for, by requests that succeeded."""
    parse: StageTimes
    """From received to parsed."""
    submit: StageTimes
    """From parsed to submitted."""
    complete: StageTimes
    """From submitted to completed."""
    send: StageTimes
    """From completed to sent."""
    total: StageTimes
    """From received to sent."""


class Trace(TraceReport):
    """A trace of one VVol's requests."""

    vvol: str
    host: str
    commands: list[CommandTimes]
