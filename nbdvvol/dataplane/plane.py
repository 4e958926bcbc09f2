"""The data plane over the C library: implements `types.DataPlane`.

One event loop owns a plane. Every call into C returns at once; what takes time ends with an event, which is matched to
a future by its token. Python never sees a data byte of a VVol, only metadata reads and writes of the control path."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import struct
from collections.abc import Callable
from typing import Any

from nbdvvol.dataplane import logs
from nbdvvol.dataplane.errors import PlaneError
from nbdvvol.dataplane.ffi import check, ffi, last_error, lib
from nbdvvol.dataplane.legs import Legs, decode_event, decode_status, encode_mirror
from nbdvvol.dataplane.log import LOST_SPANS, LogEvent, LogFound, LogPolicy, LogStats, LostSpan
from nbdvvol.dataplane.mirror import LegMachine, MirrorEvent, MirrorStatus, Verified
from nbdvvol.dataplane.remote import ClientContext, PlaneLink, encode_config
from nbdvvol.dataplane.remote import encode_params as encode_link_params
from nbdvvol.dataplane.tls import Connection, Context
from nbdvvol.dataplane.types import (
    CachePolicy,
    CacheStats,
    CacheTotals,
    ConnectionEnd,
    ConnectionParams,
    LinkEnd,
    LinkParams,
    ObjectStats,
    PlaneConfig,
    ReactorStats,
    RemoteConfig,
    RemoteStats,
    SyncFailedHandler,
    TlsClientConfig,
    TlsConfig,
    TlsConnection,
    TlsContext,
    TraceRecord,
    TraceState,
    VolumeDescription,
    VolumeLimits,
    VolumeStats,
)

METADATA_MAX = 1 << 20
"""Longest metadata read or write, bytes."""

NOBODY = 0
"""The token of what nobody waits for; those of others start at 1."""
STOPS = (1 << 64) - 1
"""The token of calls that a leg machine did not make (its own count from 1)."""

_EVENTS_AT_ONCE = 256
_CONTEXT_KINDS = {"base:allocation": lib.NV_CONTEXT_BASE_ALLOCATION}
_HEADER = struct.Struct("=IIQ16sQQQQQIII28x")
_LEG = struct.Struct("=IIQ")
_RUN = struct.Struct("=QQQII")
_TRACED = struct.Struct("=QQQQQQQQIIIHHi4x")


def encode_description(desc: VolumeDescription) -> bytes:
    """The flat record of a volume description (native/include/nbdvvol.cdef.h, nv_desc_header).

    Raises ValueError when a number does not fit its field; everything else is for C to judge."""
    flags = lib.NV_VOLUME_READ_ONLY * desc.read_only | lib.NV_VOLUME_ROTATIONAL * desc.rotational
    flags |= lib.NV_VOLUME_MIRROR * (desc.mirror is not None)
    legs = b"".join(_LEG.pack(leg.id, leg.state, len(leg.runs)) for leg in desc.legs)
    runs = b"".join(
        _RUN.pack(run.offset, run.length, run.object_offset, run.object, run.state)
        for leg in desc.legs
        for run in leg.runs
    )
    if len(desc.uuid) != 16:
        raise ValueError(f"a VVol's uuid has 16 bytes, not {len(desc.uuid)}")
    try:
        if desc.mirror is not None:
            legs += encode_mirror(desc.mirror)
        header = _HEADER.pack(
            lib.NV_DESC_MAGIC,
            lib.NV_DESC_VERSION,
            _HEADER.size + len(legs) + len(runs),
            desc.uuid,
            desc.size,
            desc.epoch,
            desc.generation,
            desc.map_from,
            desc.map_to,
            flags,
            desc.block_min,
            len(desc.legs),
        )
    except struct.error as error:
        raise ValueError(f"volume description: {error}") from None
    return header + legs + runs


def encode_limits(limits: VolumeLimits) -> Any:
    """The C form of a volume's limits. Raises OverflowError when a number does not fit its field."""
    out = ffi.new("nv_qos_limits *")
    out.iops = limits.iops
    out.bandwidth = limits.bandwidth
    out.burst_us = limits.burst_us
    out.io_bytes = limits.io_bytes
    out.shares = limits.shares
    return out


def encode_params(params: ConnectionParams) -> Any:
    """The C form of what the haggling agreed. Raises ValueError for a meta context that C does not serve."""
    out = ffi.new("nv_connection_params *")
    out.flags = (
        lib.NV_CONN_STRUCTURED * params.structured
        | lib.NV_CONN_EXTENDED * params.extended
        | lib.NV_CONN_READ_ONLY * params.read_only
    )
    out.tflags = params.tflags
    out.block_min = params.block_min
    out.payload_max = min(params.payload_max, 32 << 20)
    if len(params.contexts) > lib.NV_CONTEXTS_MAX:
        raise ValueError(f"{len(params.contexts)} meta contexts; at most {lib.NV_CONTEXTS_MAX} are possible")
    out.context_count = len(params.contexts)
    for index, context in enumerate(params.contexts):
        if context.name not in _CONTEXT_KINDS:
            raise ValueError(f"meta context {context.name!r} is not served; known: {', '.join(_CONTEXT_KINDS)}")
        out.contexts[index].id = context.id
        out.contexts[index].kind = _CONTEXT_KINDS[context.name]
    return out


class Plane:
    """A running data plane (see types.DataPlane for each method's contract)."""

    def __init__(self, config: PlaneConfig | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._tokens = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._buffers: dict[int, Any] = {}
        self._connections: set[int] = set()
        self._numbers: dict[asyncio.Future[ConnectionEnd], int] = {}
        self._tls: dict[int, Connection] = {}
        self._links: dict[int, PlaneLink] = {}
        self._events = ffi.new("nv_event[]", _EVENTS_AT_ONCE)
        self.on_sync_failed: SyncFailedHandler | None = None
        self.on_mirror: Callable[[MirrorEvent], None] | None = None
        self.on_log: Callable[[LogEvent], None] | None = None
        self._plane = self._create(config or PlaneConfig())
        self._fd = lib.nv_plane_event_fd(self._plane)
        self._loop.add_reader(self._fd, self._on_events)

    @staticmethod
    def _create(config: PlaneConfig) -> Any:
        wish = ffi.new("nv_plane_config *")
        wish.reactors = config.reactors
        wish.cpu_first = -1 if config.cpu_first is None else config.cpu_first
        wish.spin_us = config.spin_us
        wish.flags = (lib.NV_PLANE_LOCK_MEMORY | lib.NV_PLANE_IO_FLUSHER) if config.lock_memory else 0
        wish.pool_bytes = config.pool_bytes
        wish.connections_max = config.connections_max
        wish.cache_bytes = config.cache_bytes
        plane = lib.nv_plane_create(wish)
        if plane == ffi.NULL:
            raise PlaneError(ffi.errno, last_error())
        return plane

    @property
    def _live(self) -> Any:
        if self._plane is None:
            raise PlaneError(errno.ESHUTDOWN, "the data plane is closed")
        return self._plane

    def _expect(self) -> tuple[int, asyncio.Future[Any]]:
        token = next(self._tokens)
        future: asyncio.Future[Any] = self._loop.create_future()
        self._waiting[token] = future
        return token, future

    def _started(self, token: int, result: int) -> None:
        if result < 0:
            self._waiting.pop(token, None)
            self._connections.discard(token)
            self._buffers.pop(token, None)
        check(result)

    # --- events ---

    def _on_events(self) -> None:
        if self._plane is None:
            return
        while (count := lib.nv_plane_events(self._plane, self._events, _EVENTS_AT_ONCE)) > 0:
            for index in range(count):
                try:
                    self._on_event(self._events[index])
                except Exception as error:  # of who hears it: what others wait for comes all the same
                    said = {"message": f"event {self._events[index].kind} was not dealt with", "exception": error}
                    self._loop.call_exception_handler(said)
            if count < _EVENTS_AT_ONCE:
                break

    def _on_event(self, event: Any) -> None:
        kind, token, result = event.kind, event.token, event.result
        if kind == lib.NV_EVENT_SYNC_FAILED:
            if self.on_sync_failed is not None:
                self.on_sync_failed(event.args[0], -result)
            return
        if kind == lib.NV_EVENT_LINK_LOST:
            self._links.pop(token).on_lost(-result)
            return
        if kind == lib.NV_EVENT_LINK_HEARD:
            self._links[token].on_heard()
            return
        if kind in (lib.NV_EVENT_TLS_READY, lib.NV_EVENT_TLS_OPTION):
            if connection := self._tls.get(token):
                connection.on_event(ready=kind == lib.NV_EVENT_TLS_READY)
            return
        if kind == lib.NV_EVENT_CONNECTION_CLOSED and (connection := self._tls.pop(token, None)):
            connection.on_closed()
        if self._tells(event):
            return
        if kind == lib.NV_EVENT_LOG_OPENED and token in self._waiting:
            self._buffers[token], result = logs.decode_found(event), 0
        if kind == lib.NV_EVENT_VERIFY_DONE and token in self._waiting:
            self._buffers[token] = Verified(event.args[0], event.args[1], event.args[2])
        self._finish(kind, token, result)

    def _tells(self, event: Any) -> bool:
        """True: a mirror or a log has told it by itself; nobody waits for it."""
        if (mirror := decode_event(event)) is not None:
            if self.on_mirror is not None:
                self.on_mirror(mirror)
            return True
        if (log := logs.decode_event(event)) is not None:
            if self.on_log is not None:
                self.on_log(log)
            return True
        return False

    def _finish(self, kind: int, token: int, result: int) -> None:
        future = self._waiting.pop(token, None)
        self._connections.discard(token)
        buffer = self._buffers.pop(token, None)
        if future is None or future.done():
            return
        if kind == lib.NV_EVENT_CONNECTION_CLOSED:
            future.set_result(ConnectionEnd(-result))
        elif result < 0:
            future.set_exception(PlaneError(-result, os.strerror(-result)))
        else:
            future.set_result(buffer)

    # --- objects ---

    def open_object(self, fd: int, *, size: int, direct: bool, block: bool, read_only: bool, align: int) -> int:
        """Give the plane a duplicate of `fd`; return the object's number."""
        flags = lib.NV_OBJECT_DIRECT * direct | lib.NV_OBJECT_BLOCK * block | lib.NV_OBJECT_READ_ONLY * read_only
        number = ffi.new("uint32_t *")
        check(lib.nv_object_open(self._live, fd, flags, align if direct else 1, size, number))
        return int(number[0])

    async def close_object(self, obj: int) -> None:
        """Close an object that no volume uses any more."""
        token, future = self._expect()
        self._started(token, lib.nv_object_close(self._live, obj, token))
        await future

    def set_object_size(self, obj: int, size: int) -> None:
        """Tell the plane that the object grew."""
        check(lib.nv_object_set_size(self._live, obj, size))

    def latch_fault(self, obj: int) -> None:
        """A sync of the object failed in an earlier process: FLUSH and FUA fail until the fault is cleared."""
        check(lib.nv_object_latch_fault(self._live, obj))

    def clear_fault(self, obj: int) -> None:
        """The operator accepts what a failed sync may have lost: FLUSH works again."""
        check(lib.nv_object_clear_fault(self._live, obj))

    async def _job(self, obj: int, op: int, buffer: Any, offset: int, length: int) -> Any:
        token, future = self._expect()
        self._buffers[token] = buffer
        self._started(token, lib.nv_object_job(self._live, obj, op, buffer or ffi.NULL, offset, length, token))
        # The buffer is C's until the job is done, also when the caller is cancelled: _buffers holds it.
        return await future

    @staticmethod
    def _metadata(length: int) -> None:
        if length > METADATA_MAX:
            raise ValueError(f"metadata of {length} bytes; at most {METADATA_MAX} are possible")

    async def read(self, obj: int, offset: int, length: int) -> bytes:
        """Read metadata (at most 1 MiB) in the object's own I/O mode."""
        self._metadata(length)
        buffer = ffi.new("uint8_t[]", max(length, 1))
        await self._job(obj, lib.NV_JOB_READ, buffer, offset, length)
        return bytes(ffi.buffer(buffer, length))

    async def write(self, obj: int, offset: int, data: bytes, *, sync: bool = True) -> None:
        """Write metadata (at most 1 MiB), durable on return when `sync`."""
        self._metadata(len(data))
        buffer = ffi.new("uint8_t[]", data or b"\0")
        await self._job(obj, lib.NV_JOB_WRITE, buffer, offset, len(data))
        if sync:
            await self.sync(obj)

    async def zero(self, obj: int, offset: int, length: int) -> None:
        """Write zeros over any length, durable on return (scrubbing)."""
        await self._job(obj, lib.NV_JOB_ZERO, None, offset, length)

    async def sync(self, obj: int) -> None:
        """Make everything written to the object durable."""
        await self._job(obj, lib.NV_JOB_SYNC, None, 0, 0)

    # --- remote exports ---

    def open_remote(self, config: RemoteConfig) -> int:
        """An export of an NBD server as an object; I/O waits for its links."""
        number = ffi.new("uint32_t *")
        check(lib.nv_remote_open(self._live, encode_config(config), number))
        return int(number[0])

    def give_up_remote(self, obj: int, *, yes: bool) -> None:
        """I/O that has no link fails from now on, until a link comes; or waits again."""
        check(lib.nv_remote_give_up(self._live, obj, yes))

    def remote_stats(self, obj: int) -> RemoteStats:
        """Counters of a remote export."""
        out = ffi.new("nv_remote_stats_t *")
        check(lib.nv_remote_stats(self._live, obj, out))
        return RemoteStats(**{name: int(getattr(out, name)) for name in RemoteStats.__slots__})

    def open_link(self, obj: int, fd: int, params: LinkParams) -> PlaneLink:
        """Hand over a socket in the transmission phase; C owns a duplicate of `fd`, the caller closes its own."""
        encoded = encode_link_params(params)
        return self._link(fd, lambda plane, copy, *rest: lib.nv_link_open(plane, obj, copy, encoded, *rest))

    def load_tls_client(self, config: TlsClientConfig) -> TlsContext:
        """Load what we trust and who we are. Raises PlaneError that names the bad file."""
        return ClientContext(config)

    def open_secure_link(
        self, obj: int, fd: int, context: TlsContext, hostname: str | None, timeout_ms: int
    ) -> PlaneLink:
        """Hand over a socket right after the server's STARTTLS acknowledgement."""
        if not isinstance(context, ClientContext):
            raise TypeError("open_secure_link wants a context made by load_tls_client")
        name = ffi.NULL if hostname is None else hostname.encode()

        def start(plane: Any, copy: int, token: int, number: Any) -> int:
            result = lib.nv_link_secure(plane, obj, copy, context.pointer, name, timeout_ms, token, number)
            return int(result)

        return self._link(fd, start)

    def _link(self, fd: int, start: Callable[[Any, int, int, Any], int]) -> PlaneLink:
        plane, token, number = self._live, next(self._tokens), ffi.new("uint32_t *")
        copy = os.dup(fd)
        result = start(plane, copy, token, number)
        if result < 0:
            os.close(copy)
        check(result)
        link = self._links[token] = PlaneLink(plane, int(number[0]), self._loop)
        return link

    # --- volumes ---

    def open_volume(self, desc: VolumeDescription, limits: VolumeLimits | None = None) -> int:
        """Validate and run a description; return the volume's number. The limits hold from the first request on."""
        record = encode_description(desc)
        encoded = encode_limits(limits) if limits is not None else None
        number = ffi.new("uint32_t *")
        check(lib.nv_volume_open(self._live, record, len(record), number))
        # On its way to every reactor before any connection can be: nobody needs to wait for the event.
        if encoded is not None and (result := lib.nv_volume_set_qos(self._live, number[0], encoded, NOBODY)) < 0:
            error = PlaneError(-result, last_error())
            lib.nv_volume_close(self._live, number[0], NOBODY)
            raise error
        return int(number[0])

    async def change_volume(self, volume: int, desc: VolumeDescription) -> None:
        """Replace a running description; returns once all reactors use it and older I/O drained."""
        record = encode_description(desc)
        token, future = self._expect()
        self._started(token, lib.nv_volume_change(self._live, volume, record, len(record), token))
        await future

    async def limit_volume(self, volume: int, limits: VolumeLimits) -> None:
        """Other limits, also for requests that wait already; returns once all reactors go by them. Drains nothing."""
        encoded = encode_limits(limits)
        token, future = self._expect()
        self._started(token, lib.nv_volume_set_qos(self._live, volume, encoded, token))
        await future

    async def cache_volume(self, volume: int, policy: CachePolicy) -> None:
        """Another part of the cache, at any time; returns once it is in force. Drains nothing."""
        encoded = ffi.new("nv_cache_policy *")
        encoded.mode = policy.mode
        encoded.ahead_bytes = policy.ahead_bytes
        encoded.floor_bytes = policy.floor_bytes
        token, future = self._expect()
        self._started(token, lib.nv_volume_set_cache(self._live, volume, encoded, token))
        await future

    def cache_stats(self, volume: int) -> CacheStats:
        """What the cache did for a volume."""
        out = ffi.new("nv_cache_status *")
        check(lib.nv_volume_cache(self._live, volume, out))
        return CacheStats(**{name: int(getattr(out, name)) for name in CacheStats.__slots__})

    def cache_totals(self) -> CacheTotals:
        """The whole cache; all zero without one."""
        out = ffi.new("nv_cache_totals *")
        check(lib.nv_plane_cache(self._live, out))
        return CacheTotals(**{name: int(getattr(out, name)) for name in CacheTotals.__slots__})

    async def close_volume(self, volume: int) -> None:
        """End its connections (ESHUTDOWN to new requests), drain, forget it."""
        token, future = self._expect()
        self._started(token, lib.nv_volume_close(self._live, volume, token))
        await future

    # --- mirrors ---

    def leg_machine(self, epoch: int) -> LegMachine:
        """What decides about the legs of a mirror at this epoch."""
        return Legs(epoch)

    def fail_leg(self, volume: int, leg: int, token: int) -> None:
        """A leg is gone."""
        check(lib.nv_leg_fail(self._live, volume, leg, token))

    def release_leg(self, volume: int, leg: int, generation: int, token: int) -> None:
        """The registry has the leg stale: acknowledge what is held."""
        check(lib.nv_leg_release(self._live, volume, leg, generation, token))

    def resync_leg(self, volume: int, leg: int, generation: int, token: int, *, full: bool) -> None:
        """The registry has the leg syncing: copy what differs, or everything."""
        check(lib.nv_leg_resync(self._live, volume, leg, full, generation, token))

    def promote_leg(self, volume: int, leg: int, generation: int, token: int) -> None:
        """The registry has the leg in sync."""
        check(lib.nv_leg_promote(self._live, volume, leg, generation, token))

    def stop_leg(self, volume: int, leg: int) -> None:
        """End a resync; event LEG_STOPPED."""
        check(lib.nv_leg_stop(self._live, volume, leg, STOPS))

    def fence_volume(self, volume: int) -> None:
        """A newer epoch exists: submit nothing more, for good."""
        check(lib.nv_volume_fence(self._live, volume))

    async def verify_volume(self, volume: int, *, repair: bool) -> Verified:
        """Compare the in-sync legs of a mirror, while it serves."""
        token, future = self._expect()
        self._started(token, lib.nv_volume_verify(self._live, volume, repair, token))
        found: Verified = await future
        return found

    def mirror_status(self, volume: int) -> MirrorStatus:
        """How a mirror is."""
        out = ffi.new("nv_mirror_status *")
        check(lib.nv_volume_mirror(self._live, volume, out))
        return decode_status(out)

    # --- write-back logs ---

    async def open_log(self, volume: int, obj: int, offset: int, length: int, policy: LogPolicy) -> LogFound:
        """Put a log before a volume that has had no connection yet, or (`policy.beside`) beside one that may have.

        Before it requests wait until it is recovered, and unless the verdict is USABLE they all fail; beside it, it
        concerns none before attach_log(). It stays until detach_log(), or until the volume is closed. Nothing is logged
        before allow_log(). Raises PlaneError where there can be none."""
        encoded = logs.encode_policy(policy)
        token, future = self._expect()
        self._started(token, lib.nv_volume_log_open(self._live, volume, obj, offset, length, encoded, token))
        found: LogFound = await future
        return found

    async def attach_log(self, volume: int) -> None:
        """Put the log that was opened beside a volume before it. What is under way ends first; others are held until
        then, for 2 s at most. Raises PlaneError: ETIMEDOUT, that was too long, and nothing has changed."""
        token, future = self._expect()
        self._started(token, lib.nv_volume_log_attach(self._live, volume, token))
        await future

    async def detach_log(self, volume: int) -> None:
        """Have a volume without its log again, as attach_log() has it with it; its object may be closed then.

        Raises PlaneError: EBUSY, it holds something still, or something of its own is under way; ETIMEDOUT."""
        token, future = self._expect()
        self._started(token, lib.nv_volume_log_detach(self._live, volume, token))
        await future

    def allow_log(self, volume: int) -> None:
        """The registry has that this log may hold data: write into it, also again after drain_log()."""
        check(lib.nv_volume_log_allow(self._live, volume))

    def limit_log(self, volume: int, policy: LogPolicy) -> None:
        """Other limits (bypass, stream, age, rate, deadline) from now on. EALREADY: it has not heard the last ones."""
        check(lib.nv_volume_log_limit(self._live, volume, logs.encode_policy(policy)))

    async def drain_log(self, volume: int) -> None:
        """Log nothing more; returns when all is below, flushed, and the log says so. Never, while a block is lost."""
        token, future = self._expect()
        self._started(token, lib.nv_volume_log_drain(self._live, volume, token))
        await future

    def forget_log(self, volume: int) -> None:
        """The registry has that nothing in this log is ever replayed (LogEventKind.NEEDS_WORD)."""
        check(lib.nv_volume_log_forget(self._live, volume))

    def log_stats(self, volume: int) -> LogStats:
        """How a volume's log is."""
        out = ffi.new("nv_log_status *")
        check(lib.nv_volume_log(self._live, volume, out))
        return logs.decode_status(out)

    def log_lost(self, volume: int) -> list[LostSpan]:
        """What was logged and can be read nowhere, in the volume's order, the first 1024 spans; 250 ms old at most."""
        out = ffi.new("nv_log_span[]", LOST_SPANS)
        return logs.decode_lost(out, check(lib.nv_volume_log_lost(self._live, volume, out, LOST_SPANS)))

    # --- counters of volumes ---

    def volume_stats(self, volume: int) -> VolumeStats:
        """Counters of a volume."""
        out = ffi.new("nv_volume_stats_t *")
        check(lib.nv_volume_stats(self._live, volume, out))
        return VolumeStats(**{name: int(getattr(out, name)) for name in VolumeStats.__slots__})

    # --- connections ---

    def open_connection(
        self, fd: int, volume: int, params: ConnectionParams, early: bytes = b""
    ) -> asyncio.Future[ConnectionEnd]:
        """Hand a socket over for the transmission phase; C owns a duplicate of `fd`, the caller closes its own."""
        plane = self._live
        encoded = encode_params(params)
        copy = os.dup(fd)
        token, future = self._expect()
        self._connections.add(token)
        number = ffi.new("uint32_t *")
        result = lib.nv_connection_open(plane, copy, volume, encoded, early, len(early), token, number)
        if result < 0:
            os.close(copy)
        self._started(token, result)
        self._numbers[future] = int(number[0])
        future.add_done_callback(lambda _: self._numbers.pop(future, None))
        return future

    def close_connection(self, end: asyncio.Future[ConnectionEnd]) -> None:
        """End a connection by its future, once what is in flight is done; harmless when it has ended."""
        number = self._numbers.get(end)
        if number is not None and not end.done():
            result = lib.nv_connection_close(self._live, number)
            check(0 if result == -errno.ENOENT else result)  # its last event is on its way

    def load_tls(self, config: TlsConfig) -> TlsContext:
        """Load certificates and keys. Raises PlaneError that names the bad file."""
        return Context(config)

    def open_tls(self, fd: int, context: TlsContext, timeout_ms: int) -> TlsConnection:
        """Hand a socket over right after the STARTTLS acknowledgement was sent; C owns a duplicate of `fd`."""
        if not isinstance(context, Context):
            raise TypeError("open_tls wants a context made by load_tls")
        plane = self._live
        copy = os.dup(fd)
        token, future = self._expect()
        self._connections.add(token)
        number = ffi.new("uint32_t *")
        result = lib.nv_tls_open(plane, copy, context.pointer, timeout_ms, token, number)
        if result < 0:
            os.close(copy)
        self._started(token, result)
        connection = Connection(plane, int(number[0]), future, encode_params)
        self._tls[token] = connection
        return connection

    # --- looking on ---

    def reactor_stats(self) -> list[ReactorStats]:
        """Counters, one entry a reactor."""
        out = ffi.new("nv_reactor_stats *")
        stats = []
        index = 0
        while lib.nv_plane_reactor_stats(self._live, index, out) == 0:
            stats.append(ReactorStats(**{name: int(getattr(out, name)) for name in ReactorStats.__slots__}))
            index += 1
        return stats

    def object_stats(self, obj: int) -> ObjectStats:
        """Counters of an object."""
        out = ffi.new("nv_object_stats_t *")
        check(lib.nv_object_stats(self._live, obj, out))
        return ObjectStats(**{name: int(getattr(out, name)) for name in ObjectStats.__slots__})

    def begin_trace(self, volume: int, every: int = 1) -> int:
        """Record one of `every` requests of a volume from now on; return the records' clock, nanoseconds."""
        now = ffi.new("uint64_t *")
        check(lib.nv_trace_begin(self._live, volume, every, now))
        return int(now[0])

    def read_trace(self, reactor: int, most: int) -> tuple[list[TraceRecord], TraceState]:
        """At most so many of one reactor's records that were not read yet, in the order of sending."""
        room = ffi.new("nv_trace_record[]", max(most, 1))
        state = ffi.new("nv_trace_state *")
        count = check(lib.nv_trace_read(self._live, reactor, room, most, state))
        found = [TraceRecord(*one) for one in _TRACED.iter_unpack(ffi.buffer(room, count * _TRACED.size)[:])]
        return found, TraceState(int(state.dropped), bool(state.recording))

    def end_trace(self) -> None:
        """Record nothing any more."""
        check(lib.nv_trace_end(self._live))

    def features(self) -> dict[str, bool]:
        """What the kernel offers and what is in use."""
        out = ffi.new("nv_features *")
        check(lib.nv_plane_features(self._live, out))
        names = [name for name, _ in ffi.typeof("nv_features").fields if name != "reserved"]
        return {name: bool(getattr(out, name)) for name in names}

    async def close(self) -> None:
        """End every connection after its in-flight requests finished; stop the reactors."""
        if self._plane is None:
            return
        self._loop.remove_reader(self._fd)
        plane, self._plane = self._plane, None
        # Waits for clients to take their replies (bounded in C), so not on the loop's thread.
        await self._loop.run_in_executor(None, lib.nv_plane_destroy, plane)
        for connection in self._tls.values():
            connection.on_closed()
        for link in self._links.values():
            link.on_end(LinkEnd(errno.ESHUTDOWN, "the data plane was closed"))
        for token, future in self._waiting.items():
            if future.done():
                continue
            if token in self._connections:
                future.set_result(ConnectionEnd(errno.ESHUTDOWN))
            else:
                future.set_exception(PlaneError(errno.ESHUTDOWN, "the data plane was closed meanwhile"))
        self._waiting.clear()
        self._connections.clear()
        self._buffers.clear()


async def open_plane(config: PlaneConfig | None = None) -> Plane:
    """Start a data plane in the running event loop. Raises PlaneError (ENOSYS, EPERM: no io_uring here)."""
    return Plane(config)
