"""uvicorn on sockets of our own, inside control's loop, with the peer's identity taken where it can be known.

On the unix socket the kernel says who connects (SO_PEERCRED); on TLS the certificate does, and a bad or expired
one never gets past the handshake. ASGI hides both, so the protocol class puts a `Peer` into the request's state.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import ssl
import struct
from collections.abc import Callable, Generator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from nbdvvol.control.credentials import Peer, may_use_socket
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.farm import ControlTls
from nbdvvol.model.link import MESSAGE_BYTES_MAX

PING_INTERVAL_S = 3.0
PING_TIMEOUT_S = 5.0
CONNECTIONS_MAX = 1024
REQUEST_TIMEOUT_S = 10.0
"""A connection that has not sent a whole request head by then is closed."""
_UCRED = struct.Struct("3i")


def unix_peer(sock: Any) -> Peer:
    """Who is at the other end of a unix socket."""
    _, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return Peer(local=True, uid=uid, gid=gid)


def tls_peer(certificate: dict[str, Any] | None) -> Peer:
    """Who is at the other end of a TLS connection whose certificate, if any, was verified."""
    for part in (certificate or {}).get("subject", ()):
        for key, value in part:
            if key == "commonName":
                return Peer(local=False, certificate=value)
    return Peer(local=False)


_DENIED = NvError(
    Code.DENIED,
    "this user may not use the control socket",
    "be root, the user control runs as, or in the farm file's control.group",
)


def _denial() -> bytes:
    body = json.dumps({"error": _DENIED.body().model_dump(mode="json")}).encode()
    head = f"HTTP/1.1 403 Forbidden\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"connection: close\r\n\r\n" + body


def protocol_class(allowed: Callable[[Peer], bool]) -> type[H11Protocol]:
    """uvicorn's HTTP protocol, knowing its peer and refusing strangers before they are read."""

    class PeerProtocol(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            sock = transport.get_extra_info("socket")
            if sock is not None and sock.family == socket.AF_UNIX:
                peer = unix_peer(sock)
            else:
                peer = tls_peer(transport.get_extra_info("peercert"))
            self.app_state = {**self.app_state, "peer": peer}
            super().connection_made(transport)
            if not allowed(peer):
                transport.write(_denial())
                transport.close()

            self._patience = self.loop.call_later(REQUEST_TIMEOUT_S, self._give_up)

        def data_received(self, data: bytes) -> None:
            if not self.transport.is_closing():
                super().data_received(data)
            if self.cycle is not None:
                self._patience.cancel()  # a whole request head came

        def connection_lost(self, exc: Exception | None) -> None:
            self._patience.cancel()
            super().connection_lost(exc)

        def _give_up(self) -> None:
            if self.cycle is None and self.transport.get_protocol() is self:
                self.transport.close()

    return PeerProtocol


class _Server(uvicorn.Server):
    """uvicorn's server without its own signal handlers: they are the daemon's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals alone."""
        yield


class ApiServer:
    """One listening socket with the API behind it."""

    def __init__(
        self, app: ASGIApp, sock: socket.socket, allowed: Callable[[Peer], bool], tls: ControlTls | None
    ) -> None:
        self._sock = sock
        options: dict[str, Any] = {}
        if tls is not None:
            options = {"ssl_certfile": tls.cert, "ssl_keyfile": tls.key}
            if tls.client_ca is not None:
                options |= {"ssl_ca_certs": tls.client_ca, "ssl_cert_reqs": ssl.CERT_OPTIONAL}
        config = uvicorn.Config(
            app,
            http=protocol_class(allowed),
            ws="websockets-sansio",
            ws_max_size=MESSAGE_BYTES_MAX,
            ws_ping_interval=PING_INTERVAL_S,
            ws_ping_timeout=PING_TIMEOUT_S,
            ws_per_message_deflate=False,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=CONNECTIONS_MAX,
            timeout_graceful_shutdown=2,
            **options,
        )
        try:
            config.load()
        except OSError as error:
            raise NvError(
                Code.CONFIG, f"control's TLS files: {error.strerror or error}", "check control.tls in the farm file"
            ) from None
        if config.ssl is not None:
            config.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Serve in the background; on return it answers."""
        self._task = asyncio.create_task(self._server.serve(sockets=[self._sock]))
        while not self._server.started:
            if self._task.done():
                await self._task
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """Let requests end for a moment, then close everything."""
        self._server.should_exit = True
        if self._task is not None:
            await self._task


def may_connect(group: Callable[[], str | None]) -> Callable[[Peer], bool]:
    """The rule of the unix socket; TLS peers show a token with each request instead."""
    own = os.geteuid()
    return lambda peer: not peer.local or may_use_socket(peer, own, group())
