"""kind nbd: an export of an NBD server, ours or another. Its size is what the server says; it is never created by us.

`RemoteExport` is one such export in use: the data plane's object, its links, and their reconnecting. It dials and
haggles; every byte of the transmission phase is the data plane's, which also keeps I/O waiting and finds out what a
lost server owed (native/backend/nbd.h). What a server says is compared with what it said first: an export that shrank,
became read-only or lost what durability needs is not the one that we knew, and is not used.
"""

from __future__ import annotations

import asyncio
import datetime
import errno
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import structlog

from nbdvvol.dataplane.errors import PlaneError
from nbdvvol.dataplane.types import (
    DataPlane,
    Link,
    LinkEnd,
    LinkParams,
    ObjectSpec,
    RemoteConfig,
    RemoteStats,
    SecureLink,
    TlsClientConfig,
)
from nbdvvol.datastores.base import OpenObject
from nbdvvol.datastores.single import SingleStore
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.farm import RemoteTls
from nbdvvol.model.link import DatastoreSpec, RemoteSpec
from nbdvvol.model.uri import NbdUri, parse_uri
from nbdvvol.nbd.claims import Claim
from nbdvvol.nbd.client import ExportInfo, Haggle, Outclaimed, Wants, haggle
from nbdvvol.nbd.constants import TransmissionFlag
from nbdvvol.nbd.dial import DIAL_LIMIT_S, SocketWire, Wire, dial, drive
from nbdvvol.nbd.reconnect import Action, Dial, Reconnector

_log = structlog.get_logger("remote")
_HOLD_MAX_MS = 86_400_000

Tell = Callable[[bool, str], None]
"""Called with whether the server is connected, and a sentence, each time that changes."""
OnOutclaimed = Callable[[str], None]
"""Called once with the server's words, when it no longer takes our claim: another host has the leg."""


class NbdStore(SingleStore):
    """A datastore that is one remote export, as far as a path would do: nothing of it is a file."""

    block = False
    mistaken = "is a remote export", "it is opened through the data plane"

    def open(self, name: str, *, may_read_only: bool = False) -> OpenObject:
        """Not this kind: it is opened by `RemoteExport`."""
        raise NvError(Code.INTERNAL, f"datastore {self.spec.name}: a remote export has no file descriptor")

    def prepare(self, create_size: int) -> None:
        """An export is there or not."""
        del create_size

    def direct_works(self) -> bool:
        """The page cache, if there is one, is the server's."""
        return False

    def size(self, name: str) -> int:
        """Not this kind: the server tells."""
        raise self._no_files()


class _SecureWire:
    """The haggling's bytes through a link's TLS: what is sent goes with the next question."""

    def __init__(self, link: SecureLink) -> None:
        self.link = link
        self._unsent = b""

    async def send(self, data: bytes) -> None:
        self._unsent += data

    async def receive(self, length: int) -> bytes:
        data, self._unsent = self._unsent, b""
        return await self.link.say(data, length)


class _Dialler:
    """Connects to one export: to look at it, or to hand a link to the data plane."""

    def __init__(self, plane: DataPlane, spec: DatastoreSpec, claim: Claim | None = None) -> None:
        assert spec.remote is not None, "control gives every datastore of kind nbd its settings"
        self._claim = claim
        self._plane = plane
        self._spec = spec
        self.uri: NbdUri = parse_uri(spec.path)
        self.remote: RemoteSpec = spec.remote

    async def inspect(self) -> ExportInfo:
        """The export's facts now. Raises NvError.

        By GO, which is what will count: there are servers whose INFO tells something else."""
        scratch = self._plane.open_remote(RemoteConfig(0, read_only=True))
        try:
            link, info = await self.connect(scratch, lambda _: None)
            link.leave()
            return info
        finally:
            await self._plane.close_object(scratch)

    async def connect(self, obj: int, check: Callable[[ExportInfo], None]) -> tuple[Link, ExportInfo]:
        """A link for the object, in the transmission phase, if its facts pass the check. Raises NvError."""

        async def act(sock: socket.socket) -> tuple[Link, ExportInfo]:
            if self.uri.tls:
                link, info = await self._secure(obj, sock)
                try:
                    check(info)
                    link.enter(_params(info))
                except BaseException:
                    link.leave()
                    raise
                return link, info
            info = await drive(self._haggle(), SocketWire(sock))
            check(info)
            sock.setblocking(True)
            plain = self._plane.open_link(obj, sock.fileno(), _params(info))
            sock.close()
            return plain, info

        return await dial(self.uri, act)

    def _haggle(self) -> Haggle:
        return haggle(self.uri.name, enter=True, wants=Wants(self.uri.tls, structured=True, claim=self._claim))

    async def _secure(self, obj: int, sock: socket.socket) -> tuple[SecureLink, ExportInfo]:
        links: list[SecureLink] = []

        async def secure() -> Wire:
            links.append(self._start_tls(obj, sock))
            return _SecureWire(links[0])

        try:
            info = await drive(self._haggle(), SocketWire(sock), secure)
        except BaseException as error:
            for link in links:
                link.leave()
            if isinstance(error, ConnectionError) and links:
                raise NvError(
                    Code.DENIED, f"{self.uri.where}: {error.strerror}", "see `tls` of the datastore"
                ) from error
            raise
        return links[0], info

    def _start_tls(self, obj: int, sock: socket.socket) -> SecureLink:
        tls = self.remote.tls or RemoteTls()
        try:
            context = self._plane.load_tls_client(_tls_config(tls))
        except PlaneError as error:
            why = f"datastore {self._spec.name}: {error.strerror}"
            raise NvError(Code.CONFIG, why, "correct `tls` of the datastore, or the file") from error
        hostname = tls.hostname or self.uri.host or None
        if hostname is None and tls.verify and tls.psk is None:
            raise NvError(
                Code.CONFIG,
                f"datastore {self._spec.name}: over a unix socket any certificate would do",
                "say tls.hostname, what the certificate must be for",
            )
        try:
            checked = hostname if tls.verify and (tls.psk is None or tls.certs is not None) else None
            sock.setblocking(True)
            link = self._plane.open_secure_link(obj, sock.fileno(), context, checked, int(DIAL_LIMIT_S * 1000))
        finally:
            context.close()
        sock.close()
        return link


def _params(info: ExportInfo) -> LinkParams:
    return LinkParams(
        structured=info.structured,
        extended=info.extended,
        tflags=int(info.flags),
        payload_max=info.payload_max - info.payload_max % info.block_min,
        allocation=info.allocation,
        size=info.size,
        align=info.block_min,
    )


def _tls_config(tls: RemoteTls) -> TlsClientConfig:
    """The files of a client's identity; a certificate of ours is used when it is there."""
    folder = Path(tls.certs) if tls.certs is not None else None
    mine = folder is not None and (folder / "client-cert.pem").exists()
    return TlsClientConfig(
        ca_file=str(folder / "ca-cert.pem") if folder is not None else None,
        cert_file=str(folder / "client-cert.pem") if folder is not None and mine else None,
        key_file=str(folder / "client-key.pem") if folder is not None and mine else None,
        verify=tls.verify,
        psk_file=tls.psk,
        psk_identity=tls.identity,
    )


async def inspect(plane: DataPlane, spec: DatastoreSpec) -> ExportInfo:
    """What the server of a datastore says of its export now. Raises NvError."""
    return await _Dialler(plane, spec).inspect()


class RemoteExport:
    """One remote export in use by this filter; with a claim, by one leg of one mirror."""

    def __init__(
        self, plane: DataPlane, dialler: _Dialler, number: int, spec: ObjectSpec, info: ExportInfo, tell: Tell
    ) -> None:
        self.on_outclaimed: OnOutclaimed | None = None
        self.timed_out = False
        """A connection was given up, not closed by the server: it may still work on what it was asked."""
        self.number = number
        self.spec = spec
        self._plane = plane
        self._dialler = dialler
        self._info = info
        self._tell = tell
        self._told = True
        self._loop = asyncio.get_running_loop()
        wanted = dialler.remote.connections if info.flags & TransmissionFlag.CAN_MULTI_CONN else 1
        self._machine = Reconnector(wanted, dialler.remote.hold_s, self._loop.time())
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._first: asyncio.Future[None] = self._loop.create_future()
        self._down_at = datetime.datetime.now(datetime.UTC)
        self._closing = False

    @classmethod
    async def open(
        cls, plane: DataPlane, spec: DatastoreSpec, tell: Tell, *, may_read_only: bool, claim: Claim | None = None
    ) -> RemoteExport:
        """Look at the export, make its object, connect. Raises NvError; Outclaimed when there is a newer claim."""
        dialler = _Dialler(plane, spec, claim)
        info = await dialler.inspect()
        write_through = dialler.remote.write_through or not info.flags & TransmissionFlag.SEND_FLUSH
        read_only = bool(info.flags & TransmissionFlag.READ_ONLY)
        lasting = info.flags & (TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_FUA)
        if (read_only or not lasting) and not may_read_only:
            why = (
                "is read-only" if read_only else "offers neither FLUSH nor FUA: nothing written there would be durable"
            )
            raise NvError(
                Code.DENIED,
                f"datastore {spec.name}: {spec.path} {why}",
                "let it be written to, or make the VVol read_only",
            )
        config = RemoteConfig(
            info.size,
            align=info.block_min,
            read_only=read_only or not lasting,
            write_through=write_through,
            flush_first=True,
            timeout_ms=max(int(dialler.remote.timeout_s * 1000), 1),
            hold_ms=min(int(dialler.remote.hold_s * 1000), _HOLD_MAX_MS),
        )
        number = plane.open_remote(config)
        facts = ObjectSpec(spec.path, info.size, read_only=config.read_only, align=info.block_min)
        export = cls(plane, dialler, number, facts, info, tell)
        try:
            await export._connect_first()
        except BaseException:
            await export.close()
            raise
        return export

    @property
    def fences(self) -> bool:
        """The server keeps hosts with older epochs away; with a claim: it holds ours."""
        return self._info.fences

    async def refresh(self) -> int:
        """The export's size now, bytes. Raises NvError when the server cannot be asked."""
        size = (await self._dialler.inspect()).size
        self._info = replace(self._info, size=max(size, self._info.size))
        return size

    @property
    def unsure(self) -> bool:
        """The server may still carry out something that it was asked to change, although nobody waits for it."""
        return self.timed_out or self.stats().unsure > 0

    def stats(self) -> RemoteStats:
        """The data plane's counters."""
        return self._plane.remote_stats(self.number)

    async def close(self) -> None:
        """Leave the server and close the object; nothing uses it any more."""
        self.quit()
        if self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._plane.close_object(self.number)

    def quit(self) -> None:
        """Dial no more: I/O that has no link fails from here on. It may be said again, also once it is closed."""
        if self._closing:
            return
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks - {asyncio.current_task(self._loop)}:
            task.cancel()
        self._plane.give_up_remote(self.number, yes=True)

    async def _connect_first(self) -> None:
        self._act(self._machine.tick(self._loop.time()))
        await self._first

    # ---- the reconnecting ----

    def _act(self, actions: list[Action]) -> None:
        if self._closing:
            return
        for action in actions:
            if isinstance(action, Dial):
                task = self._loop.create_task(self._dial(action.place))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            else:
                _log.error("server lost for too long: its I/O fails", uri=self.spec.path)
                self._plane.give_up_remote(self.number, yes=True)
        if self._timer is not None:
            self._timer.cancel()
        due_s = self._machine.next_s()
        self._timer = None if due_s is None else self._loop.call_at(due_s, self._on_time)
        self._say()

    def _on_time(self) -> None:
        self._timer = None
        self._act(self._machine.tick(self._loop.time()))

    async def _dial(self, place: int) -> None:
        try:
            link, info = await self._dialler.connect(self.number, self._check)
        except (NvError, OSError) as error:
            message = error.message if isinstance(error, NvError) else str(error)
            if isinstance(error, Outclaimed) and self._first.done():
                self._outclaimed(error.message)
                return
            if not self._first.done():
                failure = error if isinstance(error, NvError) else NvError(Code.UNAVAILABLE, message)
                self._first.set_exception(failure)
            self._act(self._machine.failed(place, message, self._loop.time()))
            return
        link.ended.add_done_callback(lambda end: self._on_end(place, end.result()))
        self._machine.limit(None if info.flags & TransmissionFlag.CAN_MULTI_CONN else 1)
        if not self._first.done():
            self._first.set_result(None)
        self._act(self._machine.up(place, self._loop.time()))

    def _outclaimed(self, message: str) -> None:
        """Another host has the leg: there is nothing to wait for."""
        if self._closing:
            return
        _log.error("fenced: the server refuses our claim", uri=self.spec.path, reason=message)
        self.quit()
        if self.on_outclaimed is not None:
            self.on_outclaimed(message)

    def _on_end(self, place: int, end: LinkEnd) -> None:
        if self._closing:
            return
        _log.warning("connection lost", uri=self.spec.path, reason=end.reason)
        self.timed_out |= end.errno in (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)
        self._down_at = datetime.datetime.now(datetime.UTC)
        self._act(self._machine.lost(place, end.reason, self._loop.time()))

    def _check(self, info: ExportInfo) -> None:
        """Whether this is still the export that we opened. Raises NvError."""
        lost = self._needs() & ~info.flags
        if info.size < self._info.size:
            why = f"shrank from {self._info.size} to {info.size} bytes"
        elif info.block_min > self._info.block_min:
            why = f"wants blocks of {info.block_min} bytes now, not of {self._info.block_min}"
        elif info.flags & TransmissionFlag.READ_ONLY and not self.spec.read_only:
            why = "is read-only now"
        elif self._info.fences and not info.fences:
            why = "no longer keeps other hosts away (its meta context for epochs is gone)"
        elif lost:
            why = f"no longer offers {TransmissionFlag(lost).name}"
        else:
            return
        raise NvError(Code.CONFLICT, f"{self.spec.path} {why}", "bring back what was there, or unbind its VVols first")

    def _needs(self) -> int:
        """What durability rests on."""
        if self.spec.read_only:
            return 0
        return int(self._info.flags & (TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_FUA))

    def _say(self) -> None:
        """Tell when the last connection was lost, and when one is there again."""
        up = self._machine.up_count > 0
        if up == self._told or not self._first.done():
            return
        self._told = up
        if up:
            self._tell(True, f"{self.spec.path} is connected again")
        else:
            since = self._down_at.strftime("%Y-%m-%dT%H:%M:%SZ")
            self._tell(False, f"{self.spec.path}: reconnecting since {since}: {self._machine.last_error}")
