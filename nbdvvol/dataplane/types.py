"""The data plane as the rest of Python sees it: plain types and one protocol, no cffi.

`plane.py` implements `DataPlane` over the C library; tests may implement it in pure Python. Nothing
here touches a data byte. All sizes and offsets are bytes.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from nbdvvol.dataplane.log import LogEvent, LogFound, LogPolicy, LogStats, LostSpan
    from nbdvvol.dataplane.mirror import LegMachine, MirrorDescription, MirrorEvent, MirrorStatus, Verified


@dataclass(frozen=True, slots=True)
class PlaneConfig:
    """How many reactors, and how they wait."""

    reactors: int = 1
    cpu_first: int | None = None
    spin_us: int = 200
    pool_bytes: int = 64 << 20
    connections_max: int = 4096
    lock_memory: bool = True
    cache_bytes: int = 0
    """Memory of the cache, for all volumes; it becomes resident as it is used. 0: none."""


class RunState(enum.IntEnum):
    """State of an extent run (DESIGN: map)."""

    MAPPED = 0
    ZERO = 1
    WRITE_PROTECTED = 2


class LegState(enum.IntEnum):
    """State of a leg."""

    IN_SYNC = 0
    STALE = 1
    SYNCING = 2


@dataclass(frozen=True, slots=True)
class Run:
    """A run of extents: VVol [offset, offset+length) lives in `object` from `object_offset` on."""

    offset: int
    length: int
    object: int
    object_offset: int
    state: RunState = RunState.MAPPED


@dataclass(frozen=True, slots=True)
class LegDescription:
    """One leg: its runs are sorted, gapless and cover the VVol."""

    id: int
    state: LegState
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class VolumeDescription:
    """What C runs (native/include/nbdvvol.cdef.h, nv_desc_header)."""

    uuid: bytes
    size: int
    epoch: int
    generation: int
    map_from: int
    map_to: int
    legs: tuple[LegDescription, ...]
    read_only: bool = False
    rotational: bool = False
    block_min: int = 1
    mirror: MirrorDescription | None = None
    """None: one leg, without intents."""


SHARES_USUAL = 100


@dataclass(frozen=True, slots=True)
class VolumeLimits:
    """What a volume may do in a second, over all its connections (nbdvvol.cdef.h, nv_qos_limits); 0: no limit."""

    iops: int = 0
    bandwidth: int = 0
    """Bytes a second, read and written together."""
    burst_us: int = 100_000
    """How much unused time may be saved up."""
    io_bytes: int = 0
    """A request counts as one I/O per so many bytes, begun; 0: as one."""
    shares: int = SHARES_USUAL
    """Of a busy reactor, beside other volumes."""


class CacheMode(enum.IntEnum):
    """What a volume keeps in the cache (docs/cache.md)."""

    NONE = 0
    READ = 1
    """What is read; what is written is dropped."""
    WRITETHROUGH = 2
    """What is written, too."""


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """A volume's part of the cache (nbdvvol.cdef.h, nv_cache_policy)."""

    mode: CacheMode = CacheMode.NONE
    ahead_bytes: int = 0
    """At most so many are read ahead of a stream; 0: none."""
    floor_bytes: int = 0
    """Of the cache, that other volumes cannot take."""


@dataclass(frozen=True, slots=True)
class CacheStats:
    """A volume's cache; counts are of blocks of 4 KiB since it was opened."""

    mode: int = 0
    bypassed: int = 0
    """1: its storage is in memory already."""
    held_bytes: int = 0
    floor_bytes: int = 0
    """In force."""
    hits: int = 0
    misses: int = 0
    filled: int = 0
    refused: int = 0
    """Not put in: a write came between, or there was no room."""
    written: int = 0
    """Put in by writes."""
    ahead: int = 0
    """Fetched ahead, and"""
    ahead_used: int = 0
    """asked for since."""


@dataclass(frozen=True, slots=True)
class CacheTotals:
    """The whole cache, in bytes but for `evictions` (blocks)."""

    bytes: int = 0
    used_bytes: int = 0
    pinned_bytes: int = 0
    """Being sent."""
    evictions: int = 0


@dataclass(frozen=True, slots=True)
class ContextId:
    """A selected meta context and the id the haggling gave it."""

    id: int
    name: str


@dataclass(frozen=True, slots=True)
class ConnectionParams:
    """What the haggling agreed with one client."""

    structured: bool = False
    extended: bool = False
    read_only: bool = False
    tflags: int = 0
    block_min: int = 1
    payload_max: int = 32 << 20
    contexts: tuple[ContextId, ...] = ()


@dataclass(frozen=True, slots=True)
class ConnectionEnd:
    """Why a connection ended: 0 is DISC or a clean end of stream, else an errno."""

    errno: int


class TlsAction(enum.IntEnum):
    """What follows a reply to a decrypted option."""

    CONTINUE = 0
    CLOSE = 1
    ENTER = 2


@dataclass(frozen=True, slots=True)
class TlsOption:
    """One decrypted option."""

    option: int
    payload: bytes


class TlsConnection(Protocol):
    """A socket that C owns since the STARTTLS acknowledgement, still haggling."""

    async def ready(self) -> str:
        """Wait for the TLS handshake; return the peer's identity (certificate name or PSK identity).

        An anonymous peer gives "". Raises ConnectionError when the handshake fails or times out."""

    async def option(self) -> TlsOption:
        """Wait for the next whole option. Raises ConnectionError when the client is gone."""

    def reply(
        self,
        data: bytes,
        action: TlsAction = TlsAction.CONTINUE,
        *,
        volume: int | None = None,
        params: ConnectionParams | None = None,
    ) -> None:
        """Answer the last option; with ENTER, go on to the transmission phase on `volume`."""

    def hang_up(self) -> None:
        """End the connection whatever it is doing; harmless when it has ended."""

    closed: asyncio.Future[ConnectionEnd]


@dataclass(frozen=True, slots=True)
class VolumeStats:
    """Counters of one volume since it was opened."""

    reads: int = 0
    writes: int = 0
    flushes: int = 0
    trims: int = 0
    zeroes: int = 0
    others: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    errors: int = 0
    in_flight: int = 0
    connections: int = 0
    delayed: int = 0
    """Requests that had to wait for the volume's limits."""
    delay_ns: int = 0
    """How long they waited, all together."""


@dataclass(frozen=True, slots=True)
class ReactorStats:
    """Counters of one reactor since start."""

    enters: int = 0
    sleeps: int = 0
    requests: int = 0
    batches: int = 0
    submissions: int = 0
    copies_bytes: int = 0
    connections: int = 0
    pool_free_bytes: int = 0
    pool_waits: int = 0


@dataclass(frozen=True, slots=True)
class ObjectStats:
    """What reached an object's storage since it was opened, metadata included; pieces, not requests."""

    reads: int = 0
    writes: int = 0
    zeroes: int = 0
    trims: int = 0
    syncs: int = 0
    others: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    errors: int = 0


@dataclass(frozen=True, slots=True)
class TraceRecord:
    """One request's fate. Moments are nanoseconds of one clock, in this order (native/nbd/trace.h)."""

    cookie: int
    offset: int
    length: int
    received_ns: int
    parsed_ns: int
    submitted_ns: int
    completed_ns: int
    sent_ns: int
    volume: int
    connection: int
    reactor: int
    type: int
    """The command, as on the wire."""
    flags: int
    error: int
    """The reply's, as on the wire."""


@dataclass(frozen=True, slots=True)
class TraceState:
    """How a trace goes on one reactor: records that found no room, and whether it has begun there."""

    dropped: int
    recording: bool


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """Files of the server's TLS identity; either kind or both."""

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    verify_client: bool = True
    psk_file: str | None = None


@dataclass(frozen=True, slots=True)
class TlsClientConfig:
    """Whom we trust as servers, and who we say we are.

    `verify` False: the server's certificate is not looked at. `psk_identity` names the key in `psk_file` that is ours;
    with a key and no `ca_file`, only a server that knows the key will do (and no certificate of ours is of use)."""

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    verify: bool = True
    psk_file: str | None = None
    psk_identity: str | None = None


class TlsContext(Protocol):
    """An opaque, loaded TLS identity."""

    def close(self) -> None:
        """Drop this reference; live connections keep theirs."""


@dataclass(frozen=True, slots=True)
class RemoteConfig:
    """A remote export as an object; sizes in bytes, `align` is the server's minimum block."""

    size: int
    align: int = 1
    read_only: bool = False
    write_through: bool = False
    """Every change is durable when it is acknowledged, so that a lost server owes nothing."""
    flush_first: bool = False
    """Begin with a FLUSH: a filter that was killed may have left something in the server's cache."""
    timeout_ms: int = 30_000
    """A connection on which requests wait, and nothing is heard for so long, is given up."""
    hold_ms: int = 60_000
    """How long one that was given up has to say what became of its changes, before they fail and the object latches."""


@dataclass(frozen=True, slots=True)
class LinkParams:
    """What the haggling of one connection to a remote export agreed."""

    structured: bool = False
    extended: bool = False
    tflags: int = 0
    payload_max: int = 32 << 20
    allocation: int | None = None
    """The id of base:allocation, if it was selected."""
    size: int = 0
    """Of the export, bytes: an object that is larger refuses the link."""
    align: int = 1
    """The server's minimum block, bytes: the object's must be a multiple of it."""


@dataclass(frozen=True, slots=True)
class LinkEnd:
    """Why a link ended: errno 0 is our own leaving; `reason` is for people."""

    errno: int
    reason: str


@dataclass(frozen=True, slots=True)
class RemoteStats:
    """Counters of a remote export (native/include/nbdvvol.cdef.h, nv_remote_stats_t)."""

    links: int = 0
    in_flight: int = 0
    waiting: int = 0
    asked: int = 0
    answered: int = 0
    errors: int = 0
    again: int = 0
    lost: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    owed: int = 0
    draining: int = 0
    unsure: int = 0


class Link(Protocol):
    """A connection to a remote export that C owns."""

    ended: asyncio.Future[LinkEnd]

    def leave(self) -> None:
        """Say DISC; harmless when it has ended."""


class SecureLink(Link, Protocol):
    """A link that is being haggled through TLS."""

    async def say(self, data: bytes, want: int) -> bytes:
        """Send `data`, then wait for exactly `want` bytes. Raises ConnectionError with the reason when it has ended."""

    def enter(self, params: LinkParams) -> None:
        """Go on to the transmission phase."""


SyncFailedHandler = Callable[[int, int], None]
"""Called with (object, errno) once an object's sync has failed and latched."""


class DataPlane(Protocol):
    """The reactors of one filter. Created inside a running event loop; every method is called there.

    Failures raise `errors.PlaneError` (an OSError with errno and the C side's sentence)."""

    on_sync_failed: SyncFailedHandler | None
    on_mirror: Callable[[MirrorEvent], None] | None
    """Called with each event of a mirror."""
    on_log: Callable[[LogEvent], None] | None
    """Called with what a write-back log tells by itself."""

    def open_object(self, fd: int, *, size: int, direct: bool, block: bool, read_only: bool, align: int) -> int:
        """Give the plane a duplicate of `fd`; return the object's number."""

    def open_remote(self, config: RemoteConfig) -> int:
        """An export of an NBD server as an object; I/O waits for its links. Return the object's number."""

    def open_link(self, obj: int, fd: int, params: LinkParams) -> Link:
        """Hand over a socket in the transmission phase; C owns a duplicate of `fd`, the caller closes its own."""

    def load_tls_client(self, config: TlsClientConfig) -> TlsContext:
        """Load what we trust and who we are. Raises PlaneError that names the bad file."""

    def open_secure_link(
        self, obj: int, fd: int, context: TlsContext, hostname: str | None, timeout_ms: int
    ) -> SecureLink:
        """Hand over a socket right after the server's STARTTLS acknowledgement; `hostname` is what it must prove."""

    def give_up_remote(self, obj: int, *, yes: bool) -> None:
        """I/O that has no link fails from now on, until a link comes; or waits again."""

    def remote_stats(self, obj: int) -> RemoteStats:
        """Counters of a remote export."""

    async def close_object(self, obj: int) -> None:
        """Close an object that no volume uses any more; the links of a remote export leave."""

    def set_object_size(self, obj: int, size: int) -> None:
        """Tell the plane that the object grew."""

    def latch_fault(self, obj: int) -> None:
        """A sync of the object failed in an earlier process: FLUSH and FUA fail until the fault is cleared."""

    def clear_fault(self, obj: int) -> None:
        """The operator accepts what a failed sync may have lost: FLUSH works again."""

    async def read(self, obj: int, offset: int, length: int) -> bytes:
        """Read metadata (at most 1 MiB) in the object's own I/O mode."""

    async def write(self, obj: int, offset: int, data: bytes, *, sync: bool = True) -> None:
        """Write metadata (at most 1 MiB), durable on return when `sync`."""

    async def zero(self, obj: int, offset: int, length: int) -> None:
        """Write zeros over any length, durable on return (scrubbing)."""

    async def sync(self, obj: int) -> None:
        """Make everything written to the object durable."""

    def open_volume(self, desc: VolumeDescription, limits: VolumeLimits | None = None) -> int:
        """Validate and run a description; return the volume's number. The limits hold from the first request on."""

    async def change_volume(self, volume: int, desc: VolumeDescription) -> None:
        """Replace a running description; returns once all reactors use it and older I/O drained."""

    async def limit_volume(self, volume: int, limits: VolumeLimits) -> None:
        """Other limits, also for requests that wait already; returns once all reactors go by them. Drains nothing."""

    async def cache_volume(self, volume: int, policy: CachePolicy) -> None:
        """Another part of the cache, at any time; returns once it is in force. Drains nothing."""

    def cache_stats(self, volume: int) -> CacheStats:
        """What the cache did for a volume."""

    def cache_totals(self) -> CacheTotals:
        """The whole cache; all zero without one."""

    async def open_log(self, volume: int, obj: int, offset: int, length: int, policy: LogPolicy) -> LogFound:
        """Put a write-back log before a volume; returns once it is recovered. Unless it is USABLE all requests fail.
        `policy.beside`: only open it; attach_log() puts it there."""

    async def attach_log(self, volume: int) -> None:
        """Put the log that was opened beside a volume before it, under its connections. ETIMEDOUT: try again later."""

    async def detach_log(self, volume: int) -> None:
        """Take an empty, void or refused log out, under connections. EBUSY, ETIMEDOUT: try again later."""

    def allow_log(self, volume: int) -> None:
        """The registry has that this log may hold data: write into it, also again after drain_log()."""

    def limit_log(self, volume: int, policy: LogPolicy) -> None:
        """Other limits (bypass, stream, age, rate, deadline) from now on; EALREADY: it has not heard the last ones."""

    async def drain_log(self, volume: int) -> None:
        """Log nothing more; returns when all is below, flushed, and the log says so."""

    def forget_log(self, volume: int) -> None:
        """The registry has that nothing in this log is ever replayed."""

    def log_stats(self, volume: int) -> LogStats:
        """How a volume's log is."""

    def log_lost(self, volume: int) -> list[LostSpan]:
        """What was logged and can be read nowhere any more, in the volume's order; at most 1024 spans."""

    async def close_volume(self, volume: int) -> None:
        """End its connections (ESHUTDOWN to new requests), drain, forget it."""

    def volume_stats(self, volume: int) -> VolumeStats:
        """Counters of a volume."""

    def leg_machine(self, epoch: int) -> LegMachine:
        """What decides about the legs of a mirror at this epoch."""

    def fail_leg(self, volume: int, leg: int, token: int) -> None:
        """A leg is gone. This and the next three end with the event LEG_CHANGED, by the token."""

    def release_leg(self, volume: int, leg: int, generation: int, token: int) -> None:
        """The registry has the leg stale: acknowledge what is held."""

    def resync_leg(self, volume: int, leg: int, generation: int, token: int, *, full: bool) -> None:
        """The registry has the leg syncing: copy what differs, or everything."""

    def promote_leg(self, volume: int, leg: int, generation: int, token: int) -> None:
        """The registry has the leg in sync."""

    def stop_leg(self, volume: int, leg: int) -> None:
        """End a resync; event LEG_STOPPED."""

    def fence_volume(self, volume: int) -> None:
        """A newer epoch exists: submit nothing more, for good."""

    async def verify_volume(self, volume: int, *, repair: bool) -> Verified:
        """Compare the in-sync legs of a mirror, while it serves."""

    def mirror_status(self, volume: int) -> MirrorStatus:
        """How a mirror is."""

    def open_connection(
        self, fd: int, volume: int, params: ConnectionParams, early: bytes = b""
    ) -> asyncio.Future[ConnectionEnd]:
        """Hand a socket over for the transmission phase; C owns a duplicate of `fd`, the caller closes its own.

        The future completes when the connection has ended and nothing of it is in flight."""

    def close_connection(self, end: asyncio.Future[ConnectionEnd]) -> None:
        """End a connection by its future, once what is in flight is done; harmless when it has ended."""

    def load_tls(self, config: TlsConfig) -> TlsContext:
        """Load certificates and keys. Raises PlaneError that names the bad file."""

    def open_tls(self, fd: int, context: TlsContext, timeout_ms: int) -> TlsConnection:
        """Hand a socket over right after the STARTTLS acknowledgement was sent; C owns a duplicate of `fd`."""

    def reactor_stats(self) -> list[ReactorStats]:
        """Counters, one entry a reactor."""

    def object_stats(self, obj: int) -> ObjectStats:
        """Counters of an object."""

    def begin_trace(self, volume: int, every: int = 1) -> int:
        """Record one of `every` requests of a volume from now on; return the records' clock, nanoseconds.

        Raises PlaneError with EBUSY while another trace runs: there is one at a time."""

    def read_trace(self, reactor: int, most: int) -> tuple[list[TraceRecord], TraceState]:
        """At most so many of one reactor's records that were not read yet, in the order of sending."""

    def end_trace(self) -> None:
        """Record nothing any more."""

    def features(self) -> dict[str, bool]:
        """What the kernel offers and what is in use."""

    async def close(self) -> None:
        """End every connection after its in-flight requests finished; stop the reactors."""


@dataclass(slots=True)
class ObjectSpec:
    """How to open a datastore object; used by datastores/."""

    path: str
    size: int = 0
    direct: bool = False
    read_only: bool = False
    block: bool = False
    align: int = 1
    extra: dict[str, str] = field(default_factory=dict)
