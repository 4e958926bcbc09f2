"""A data plane in Python for tests of the filter: objects are files, connections are recorded, nothing is served."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from nbdvvol.dataplane.log import LogEvent, LogFound, LogPolicy, LogState, LogStats, LogVerdict, LostSpan
from nbdvvol.dataplane.mirror import MirrorEvent
from nbdvvol.dataplane.types import (
    CachePolicy,
    CacheStats,
    CacheTotals,
    ConnectionEnd,
    ConnectionParams,
    DataPlane,
    ObjectStats,
    ReactorStats,
    SyncFailedHandler,
    TlsAction,
    TlsConfig,
    TlsContext,
    TlsOption,
    TraceRecord,
    TraceState,
    VolumeDescription,
    VolumeLimits,
    VolumeStats,
)
from tests.unit.log_words import log_head, write_head


@dataclass
class FakeObject:
    fd: int
    size: int
    direct: bool
    block: bool
    read_only: bool
    align: int
    stats: ObjectStats = field(default_factory=ObjectStats)


@dataclass
class FakeConnection:
    sock: socket.socket
    volume: int
    params: ConnectionParams
    end: asyncio.Future[ConnectionEnd]


@dataclass
class FakeLog:
    obj: int
    length: int
    policy: LogPolicy
    id: bytes
    state: LogState = LogState.THROUGH
    dirty_bytes: int = 0
    lost: list[LostSpan] = field(default_factory=list)
    drained: asyncio.Event = field(default_factory=asyncio.Event)


class FakeTls:
    """A client "in TLS": options are put in, replies come out; no cryptography."""

    def __init__(self, identity: str) -> None:
        self.identity = identity
        self.options: asyncio.Queue[TlsOption | None] = asyncio.Queue()
        self.replies: list[tuple[bytes, TlsAction, int | None, ConnectionParams | None]] = []
        self.closed: asyncio.Future[ConnectionEnd] = asyncio.get_running_loop().create_future()

    async def ready(self) -> str:
        if self.identity == "!":
            raise ConnectionError("no handshake")
        return self.identity

    async def option(self) -> TlsOption:
        option = await self.options.get()
        if option is None:
            raise ConnectionError("gone")
        return option

    def reply(
        self,
        data: bytes,
        action: TlsAction = TlsAction.CONTINUE,
        *,
        volume: int | None = None,
        params: ConnectionParams | None = None,
    ) -> None:
        self.replies.append((data, action, volume, params))
        if action is TlsAction.CLOSE:
            self.hang_up()

    def hang_up(self) -> None:
        self.options.put_nowait(None)
        if not self.closed.done():
            self.closed.set_result(ConnectionEnd(0))


class FakeContext(TlsContext):
    def close(self) -> None:
        pass


@dataclass
class FakePlane(DataPlane):
    on_sync_failed: SyncFailedHandler | None = None
    on_mirror: Callable[[MirrorEvent], None] | None = None
    on_log: Callable[[LogEvent], None] | None = None
    logs: dict[int, FakeLog] = field(default_factory=dict)
    verdicts: list[LogFound] = field(default_factory=list)
    """What the next logs turn out to be; then they are usable and empty."""
    hung: set[int] = field(default_factory=set)
    """Objects of logs whose device has not answered yet."""
    fail_log: int = 0
    fail_attach: int = 0
    """Errno of the next logs' opening."""
    objects: dict[int, FakeObject] = field(default_factory=dict)
    volumes: dict[int, VolumeDescription] = field(default_factory=dict)
    limits: dict[int, VolumeLimits] = field(default_factory=dict)
    cache: CacheTotals = field(default_factory=lambda: CacheTotals(bytes=1 << 20))
    caches: dict[int, CachePolicy] = field(default_factory=dict)
    fail_cache: str = ""
    connections: list[FakeConnection] = field(default_factory=list)
    tls: list[tuple[socket.socket, FakeTls]] = field(default_factory=list)
    tls_identity: str = ""
    log: list[str] = field(default_factory=list)
    fail_open: str = ""
    fail_sync: bool = False
    closing: asyncio.Event | None = None
    """close_volume waits for it when set."""
    configs: list[TlsConfig] = field(default_factory=list)
    closed: bool = False
    traced: int = 0
    records: list[TraceRecord] = field(default_factory=list)
    """What a trace finds."""
    dropped: int = 0
    _next: int = 1

    def _number(self) -> int:
        self._next += 1
        return self._next

    def open_object(self, fd: int, *, size: int, direct: bool, block: bool, read_only: bool, align: int) -> int:
        number = self._number()
        self.objects[number] = FakeObject(os.dup(fd), size, direct, block, read_only, align)
        return number

    async def close_object(self, obj: int) -> None:
        assert all(log.obj != obj for log in self.logs.values())
        if obj in self.hung:
            raise OSError(errno.EBUSY, "what was asked of its device has not ended")
        assert all(run.object != obj for desc in self.volumes.values() for leg in desc.legs for run in leg.runs)
        os.close(self.objects.pop(obj).fd)

    def set_object_size(self, obj: int, size: int) -> None:
        self.objects[obj].size = size

    def latch_fault(self, obj: int) -> None:
        self.log.append(f"latch_fault {obj}")

    def clear_fault(self, obj: int) -> None:
        self.log.append(f"clear_fault {obj}")

    async def read(self, obj: int, offset: int, length: int) -> bytes:
        assert length <= 1 << 20
        with mmap.mmap(-1, max(length, 1)) as aligned:  # O_DIRECT wants it
            return aligned[: os.preadv(self.objects[obj].fd, [memoryview(aligned)[:length]], offset)]

    async def write(self, obj: int, offset: int, data: bytes, *, sync: bool = True) -> None:
        assert len(data) <= 1 << 20
        os.pwrite(self.objects[obj].fd, data, offset)

    async def zero(self, obj: int, offset: int, length: int) -> None:
        os.pwrite(self.objects[obj].fd, bytes(length), offset)

    async def sync(self, obj: int) -> None:
        if self.fail_sync:
            raise OSError(errno.EIO, "sync failed")
        os.fsync(self.objects[obj].fd)
        self.log.append(f"sync {obj}")

    def open_volume(self, desc: VolumeDescription, limits: VolumeLimits | None = None) -> int:
        if self.fail_open:
            raise OSError(errno.EINVAL, self.fail_open)
        for leg in desc.legs:
            at = 0
            for run in leg.runs:
                assert run.offset == at and run.object in self.objects
                assert run.object_offset + run.length <= self.objects[run.object].size
                at += run.length
            assert at >= desc.size
        number = self._number()
        self.volumes[number] = desc
        self.limits[number] = limits or VolumeLimits()
        self.log.append(f"open {number}")
        return number

    async def limit_volume(self, volume: int, limits: VolumeLimits) -> None:
        assert volume in self.volumes
        self.limits[volume] = limits
        self.log.append(f"limit {volume}")

    async def cache_volume(self, volume: int, policy: CachePolicy) -> None:
        assert volume in self.volumes and self.cache.bytes
        if self.fail_cache:
            raise OSError(errno.ENOMEM, self.fail_cache)
        self.caches[volume] = policy
        self.log.append(f"cache {volume}")

    def cache_stats(self, volume: int) -> CacheStats:
        policy = self.caches.get(volume, CachePolicy())
        return CacheStats(mode=policy.mode, floor_bytes=policy.floor_bytes // 2, hits=3, misses=1)

    def cache_totals(self) -> CacheTotals:
        return self.cache

    async def open_log(self, volume: int, obj: int, offset: int, length: int, policy: LogPolicy) -> LogFound:
        assert volume in self.volumes and volume not in self.logs and self.objects[obj].size == length and not offset
        if self.fail_log:
            raise OSError(self.fail_log, "no log")
        usable = LogFound(LogVerdict.USABLE, 0, 0, 0, policy.held or policy.fresh)
        found = self.verdicts.pop(0) if self.verdicts else usable
        self.logs[volume] = FakeLog(obj, length, policy, found.id, dirty_bytes=found.dirty_bytes)
        if found.verdict is LogVerdict.HANGS:
            self.hung.add(obj)
        if found.verdict is LogVerdict.USABLE and not policy.held:
            self._write_log(volume, 0)
        self.log.append(f"log {volume}")
        return found

    def _write_log(self, volume: int, blocks: int) -> None:
        """On its file, for who looks there: it holds so many blocks."""
        log, desc = self.logs[volume], self.volumes[volume]
        head = log_head(desc.uuid, log.id, length=log.length, epoch=desc.epoch, blocks=blocks)
        write_head(self.objects[log.obj].fd, head)

    async def attach_log(self, volume: int) -> None:
        assert self.logs[volume].policy.beside
        if self.fail_attach:
            raise OSError(self.fail_attach, "not now")
        self.log.append(f"attach {volume}")

    async def detach_log(self, volume: int) -> None:
        if volume not in self.logs:
            raise OSError(errno.EINVAL, "no log")
        del self.logs[volume]
        self.log.append(f"detach {volume}")

    def allow_log(self, volume: int) -> None:
        self.logs[volume].state, self.logs[volume].dirty_bytes = LogState.SERVING, 4096
        self._write_log(volume, 1)
        self.log.append(f"allow {volume}")

    def limit_log(self, volume: int, policy: LogPolicy) -> None:
        self.logs[volume].policy = policy
        self.log.append(f"limit_log {volume}")

    async def drain_log(self, volume: int) -> None:
        self.logs[volume].state = LogState.THROUGH
        self.log.append(f"drain {volume}")
        await self.logs[volume].drained.wait()
        self.logs[volume].dirty_bytes = 0
        self._write_log(volume, 0)

    def forget_log(self, volume: int) -> None:
        self.log.append(f"forget {volume}")

    def log_stats(self, volume: int) -> LogStats:
        log = self.logs[volume]
        counts = dict.fromkeys(LogStats.__slots__, 0) | {"dirty_bytes": log.dirty_bytes, "ring_bytes": log.length}
        counts["lost_bytes"] = sum(span.length for span in log.lost)
        return LogStats(**{**counts, "state": log.state})

    def log_lost(self, volume: int) -> list[LostSpan]:
        return self.logs[volume].lost

    async def change_volume(self, volume: int, desc: VolumeDescription) -> None:
        if desc.map_from != self.volumes[volume].map_to:
            raise OSError(errno.ESTALE, "stale map")
        self.volumes[volume] = desc
        self.log.append(f"change {volume}")

    async def close_volume(self, volume: int) -> None:
        if self.closing is not None:
            await self.closing.wait()
        del self.volumes[volume]
        self.logs.pop(volume, None)
        for connection in self.connections:
            if connection.volume == volume and not connection.end.done():
                self.hang_up(connection, errno.ESHUTDOWN)
        self.log.append(f"close {volume}")

    def hang_up(self, connection: FakeConnection, why: int = 0) -> None:
        connection.sock.close()
        connection.end.set_result(ConnectionEnd(why))

    def volume_stats(self, volume: int) -> VolumeStats:
        if volume not in self.volumes:
            raise OSError(errno.ENOENT, "not open")
        return VolumeStats(connections=sum(c.volume == volume and not c.end.done() for c in self.connections))

    def open_connection(
        self, fd: int, volume: int, params: ConnectionParams, early: bytes = b""
    ) -> asyncio.Future[ConnectionEnd]:
        assert volume in self.volumes and os.get_blocking(fd)
        sock = socket.socket(fileno=os.dup(fd))
        end: asyncio.Future[ConnectionEnd] = asyncio.get_running_loop().create_future()
        self.connections.append(FakeConnection(sock, volume, params, end))
        return end

    def close_connection(self, end: asyncio.Future[ConnectionEnd]) -> None:
        for connection in self.connections:
            if connection.end is end and not end.done():
                self.hang_up(connection)

    def load_tls(self, config: TlsConfig) -> TlsContext:
        self.configs.append(config)
        return FakeContext()

    def open_tls(self, fd: int, context: TlsContext, timeout_ms: int) -> FakeTls:
        tls = FakeTls(self.tls_identity)
        self.tls.append((socket.socket(fileno=os.dup(fd)), tls))
        return tls

    def reactor_stats(self) -> list[ReactorStats]:
        return [ReactorStats(requests=1), ReactorStats(requests=2)]

    def object_stats(self, obj: int) -> ObjectStats:
        return self.objects[obj].stats

    def begin_trace(self, volume: int, every: int = 1) -> int:
        assert not self.traced and volume in self.volumes
        self.traced = volume
        self.log.append(f"trace {volume} every {every}")
        return time.monotonic_ns()

    def read_trace(self, reactor: int, most: int) -> tuple[list[TraceRecord], TraceState]:
        assert self.traced
        waiting = [record for record in self.records if record.reactor == reactor][:most]
        self.records = [record for record in self.records if record not in waiting]
        return waiting, TraceState(self.dropped, recording=True)

    def end_trace(self) -> None:
        assert self.traced
        self.traced = 0
        self.log.append("trace ends")

    def features(self) -> dict[str, bool]:
        return {}

    async def close(self) -> None:
        self.closed = True
        for connection in self.connections:
            if not connection.end.done():
                self.hang_up(connection)
