"""A control for tests of the filter: one WebSocket server on a unix socket, driven message by message."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel
from websockets.asyncio.server import Server, ServerConnection, serve, unix_serve
from websockets.exceptions import ConnectionClosed

from nbdvvol.model.link import Hello, HostState, Resumed, Snapshot, Stopped, Welcome, from_filter

WAIT_S = 5.0
M = TypeVar("M", bound=BaseModel)


class Session:
    """One connected filter."""

    def __init__(self, socket: ServerConnection, identity: str) -> None:
        assert socket.request is not None
        self.headers = socket.request.headers
        self.path = socket.request.path
        self.identity = identity
        self.seen: list[BaseModel] = []
        self._socket = socket
        self._inbox: asyncio.Queue[BaseModel] = asyncio.Queue()

    async def serve(self) -> None:
        try:
            async for raw in self._socket:
                message = from_filter.validate_json(raw)
                self.seen.append(message)
                self._inbox.put_nowait(message)
                if isinstance(message, Stopped):
                    await self._socket.close()
        except ConnectionClosed:
            pass

    async def send(self, message: BaseModel) -> None:
        await self._socket.send(message.model_dump_json())

    async def next(self, kind: type[M]) -> M:
        """The next message of a kind; others before it are passed over."""
        async with asyncio.timeout(WAIT_S):
            while True:
                message = await self._inbox.get()
                if isinstance(message, kind):
                    return message

    async def greet(self, revision: int, state: HostState | None = None) -> Hello:
        """Take the hello, welcome it, give the snapshot (or resume)."""
        hello = await self.next(Hello)
        await self.send(Welcome(control=self.identity, instance=hello.instance))
        await self.send(Snapshot(revision=revision, state=state) if state else Resumed(revision=revision))
        return hello

    async def close(self) -> None:
        await self._socket.close()


class FakeControl:
    """Listens; each connection becomes a Session."""

    def __init__(self, path: Path, identity: str = "control-1") -> None:
        self.path = path
        self.identity = identity
        self._sessions: asyncio.Queue[Session] = asyncio.Queue()
        self._server: Server | None = None

    async def start(self) -> None:
        self._server = await unix_serve(self._serve, str(self.path))

    async def start_https(self, context: ssl.SSLContext) -> int:
        """Listen on a TCP port of this machine instead; return it."""
        self._server = await serve(self._serve, "127.0.0.1", 0, ssl=context)
        [sock] = self._server.sockets
        port: int = sock.getsockname()[1]
        return port

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            self._server = None
            self.path.unlink(missing_ok=True)

    async def session(self) -> Session:
        """The next filter that connects."""
        return await asyncio.wait_for(self._sessions.get(), WAIT_S)

    async def _serve(self, socket: ServerConnection) -> None:
        session = Session(socket, self.identity)
        self._sessions.put_nowait(session)
        await session.serve()
