"""The handshake on real sockets: accept, haggle, hand the socket over. Holds the clock, no policy.

It reads exact lengths from the raw socket, so that bytes behind GO or STARTTLS stay in the kernel for the data
plane. Plaintext that waits at STARTTLS ends the connection (it could be an attacker's, injected to be taken for
the client's). Silence, total time, and connections are limited; a connection over the limit is closed at once.
Errors end one connection and are logged; nothing here ends the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import structlog

from nbdvvol.dataplane.types import ConnectionEnd, DataPlane, TlsAction, TlsConnection, TlsContext
from nbdvvol.nbd.haggle import Answer, Drop, Enter, Haggle, Then, TlsRule, parse_header
from nbdvvol.nbd.options import HEADER
from nbdvvol.nbd.provider import Provider, ReplyError

_log = structlog.get_logger("nbd")
_ACCEPT_PAUSE_S = 0.2
_STOP_GRACE_S = 1.0
_OUT_OF_ROOM = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one listening socket allows."""

    silence_s: float = 10.0
    """Longest wait for the client's next byte, and for it to take ours."""
    total_s: float = 60.0
    """Longest handshake."""
    haggling_max: int = 64
    connections_max: int = 256
    """In all: haggling and in transmission."""


@dataclass(frozen=True, slots=True)
class Visit:
    """How one accepted socket is to be treated."""

    provider: Provider
    tls: TlsRule = TlsRule.OFF
    context: TlsContext | None = None
    by_identity: Callable[[str], Provider] | None = None
    """The provider of an encrypted client, by its identity; with TLS offered or required."""


class Gone(Exception):
    """The client left, fell silent, or took too long."""


@dataclass(eq=False, slots=True)
class _Conversation:
    haggle: Haggle
    end: asyncio.Future[ConnectionEnd] | None = None
    """Set once the data plane owns the socket: done when the connection has ended."""
    task: asyncio.Task[None] | None = None


@dataclass(slots=True)
class Server:
    """Serves listening sockets (or single connected ones) of one kind.

    `receive` decides by socket how a visitor is treated; None refuses it. Without `plane` (control's target) the
    provider must refuse every `open`."""

    receive: Callable[[socket.socket], Visit | None]
    plane: DataPlane | None = None
    limits: Limits = field(default_factory=Limits)
    _talks: set[_Conversation] = field(default_factory=set, init=False)
    _connections: int = field(default=0, init=False)
    _came: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _left: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _stopping: bool = field(default=False, init=False)

    @property
    def connections(self) -> int:
        """Connections now, haggling and in transmission."""
        return self._connections

    async def serve(self, listener: socket.socket) -> None:
        """Accept until cancelled; the caller closes the listener."""
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        while not self._stopping:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:
                if error.errno == errno.EBADF:
                    return
                _log.warning("accept failed", error=str(error))
                if error.errno in _OUT_OF_ROOM:
                    await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            self.welcome(sock)

    def welcome(self, sock: socket.socket) -> asyncio.Task[None] | None:
        """Start haggling on a connected socket, which is ours from here on. None: it was refused and closed."""
        visit = self.receive(sock) if self._has_room() else None
        if visit is None:
            sock.close()
            return None
        talk = _Conversation(Haggle(visit.provider, visit.tls))
        talk.haggle.stopping = self._stopping
        self._connections += 1
        self._came.set()
        self._talks.add(talk)
        talk.task = asyncio.get_running_loop().create_task(self._converse(sock, talk, visit))
        return talk.task

    async def stop(self) -> None:
        """Tell clients in haggling that the server stops, give them a moment, end them.

        Connections in transmission are the data plane's to end."""
        self._stopping = True
        for talk in self._talks:
            talk.haggle.stopping = True
        tasks = [talk.task for talk in self._talks if talk.task is not None]
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=_STOP_GRACE_S)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    async def visited(self) -> None:
        """Wait until a first client came."""
        await self._came.wait()

    async def idle(self) -> None:
        """Wait until no connection is left."""
        while self._connections:
            self._left.clear()
            await self._left.wait()

    def _has_room(self) -> bool:
        room = len(self._talks) < self.limits.haggling_max and self._connections < self.limits.connections_max
        if not room:
            _log.warning("connection refused: too many", haggling=len(self._talks), connections=self._connections)
        return room and not self._stopping

    async def _converse(self, sock: socket.socket, talk: _Conversation, visit: Visit) -> None:
        try:
            async with asyncio.timeout(self.limits.total_s):
                await self._plain(sock, talk, visit)
        except (Drop, Gone) as reason:
            _log.info("client dropped in the handshake", reason=str(reason))
        except TimeoutError:
            _log.info("client dropped in the handshake", reason=f"not done after {self.limits.total_s} s")
        except OSError as error:
            _log.info("client lost in the handshake", error=str(error))
        except Exception:
            _log.exception("a handshake failed")
        finally:
            sock.close()
            self._talks.discard(talk)
            self._settle(talk.end)

    def _settle(self, end: asyncio.Future[ConnectionEnd] | None) -> None:
        """Free the connection's slot: now, or when its transmission phase has ended."""
        if end is None:
            self._leave(None)
        else:
            end.add_done_callback(self._leave)

    def _leave(self, _: object) -> None:
        self._connections -= 1
        assert self._connections >= 0
        self._left.set()

    async def _plain(self, sock: socket.socket, talk: _Conversation, visit: Visit) -> None:
        """Haggle in the clear up to the hand-over."""
        haggle = talk.haggle
        stream = _Stream(sock, self.limits.silence_s)
        await stream.send(haggle.hello())
        haggle.client_flags(await stream.read(4))
        while True:
            number, length = parse_header(await stream.read(HEADER.size))
            answer = await haggle.option(number, await stream.read(length))
            if answer.then is Then.START_TLS:
                await self._encrypted(stream, answer, talk, visit)
                return
            await stream.send(answer.data)
            if answer.then is Then.ENTER:
                talk.end = self._enter(sock, answer)
            if answer.then is not Then.CONTINUE:
                return

    def _enter(self, sock: socket.socket, answer: Answer) -> asyncio.Future[ConnectionEnd]:
        assert self.plane is not None and answer.enter is not None
        plane, enter = self.plane, answer.enter
        _admit(enter)
        sock.setblocking(True)  # io_uring waits by itself; O_NONBLOCK would make it give up
        end = plane.open_connection(sock.fileno(), enter.opened.volume, enter.params)
        _entered(enter, end, lambda: plane.close_connection(end))
        return end

    async def _encrypted(self, stream: _Stream, answer: Answer, talk: _Conversation, visit: Visit) -> None:
        """The data plane does TLS from here on; the haggling goes on over its decrypted options."""
        assert self.plane is not None and visit.context is not None and visit.by_identity is not None
        if stream.waiting():
            raise Drop("plaintext behind STARTTLS")
        await stream.send(answer.data)
        stream.sock.setblocking(True)
        timeout_ms = int(self.limits.silence_s * 1000)
        tls = self.plane.open_tls(stream.sock.fileno(), visit.context, timeout_ms)
        talk.end = tls.closed
        stream.sock.close()
        try:
            talk.haggle.started_tls(visit.by_identity(await tls.ready()))
            await _haggle_encrypted(tls, talk.haggle)
        except (Exception, asyncio.CancelledError):
            with contextlib.suppress(OSError):
                tls.hang_up()
            raise


def _admit(enter: Enter) -> None:
    """The answer took its time: a newer claim may have come. From here to the data plane nothing is awaited."""
    try:
        if enter.opened.gate is not None:
            enter.opened.gate.admit(enter.claims, read_only=enter.params.read_only)
    except ReplyError as error:
        raise Drop(error.message) from None


def _entered(enter: Enter, end: asyncio.Future[ConnectionEnd], hang_up: Callable[[], None]) -> None:
    if enter.opened.gate is not None:
        enter.opened.gate.entered(enter.claims, end, hang_up, read_only=enter.params.read_only)


async def _haggle_encrypted(tls: TlsConnection, haggle: Haggle) -> None:
    while True:
        option = await tls.option()
        answer = await haggle.option(option.option, option.payload)
        if answer.enter is not None:
            enter = answer.enter
            _admit(enter)
            tls.reply(answer.data, TlsAction.ENTER, volume=enter.opened.volume, params=enter.params)
            _entered(enter, tls.closed, tls.hang_up)
            return
        if answer.then is not Then.CONTINUE:
            tls.reply(answer.data, TlsAction.CLOSE)
            return
        tls.reply(answer.data)


class _Stream:
    """Exact reads and whole writes on a non-blocking socket, each step bounded by the silence limit."""

    def __init__(self, sock: socket.socket, silence_s: float) -> None:
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.sock = sock
        self._silence_s = silence_s

    async def read(self, count: int) -> bytes:
        """Exactly `count` bytes; what follows them stays in the kernel."""
        loop = asyncio.get_running_loop()
        data = bytearray()
        while len(data) < count:
            async with self._patience("send"):
                piece = await loop.sock_recv(self.sock, count - len(data))
            if not piece:
                raise Gone("the client closed the connection")
            data += piece
        return bytes(data)

    async def send(self, data: bytes) -> None:
        """All of `data`."""
        if data:
            async with self._patience("take"):
                await asyncio.get_running_loop().sock_sendall(self.sock, data)

    def waiting(self) -> bool:
        """Whether bytes have arrived that were not read yet."""
        try:
            return bool(self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return False

    @contextlib.asynccontextmanager
    async def _patience(self, what: str) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._silence_s):
                yield
        except TimeoutError:
            raise Gone(f"the client did not {what} for {self._silence_s} s") from None
