"""Connecting to an NBD server: a socket, and the haggling over it. Failures are NvError that name the server.

Whoever goes on through TLS says how (`Secure`): the data plane owns the socket from the STARTTLS acknowledgement on.
Nothing here reads a byte beyond the haggling.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.uri import NbdUri
from nbdvvol.nbd.client import ExportInfo, Haggle, StartTls

T = TypeVar("T")
DIAL_LIMIT_S = 10.0
"""Longest time for one connection and its haggling."""
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 15, 5, 3
"""A TCP peer that vanished without a word is noticed after 30 s, also while no I/O runs."""


class Wire(Protocol):
    """Where the haggling's bytes go. Raises OSError when the connection is gone."""

    async def send(self, data: bytes) -> None:
        """Send all of it."""

    async def receive(self, length: int) -> bytes:
        """Exactly so many bytes."""


Secure = Callable[[], Awaitable[Wire]]
"""The connection goes on through TLS, from its next byte on."""


class SocketWire:
    """A connected, non-blocking socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock

    async def send(self, data: bytes) -> None:
        """Send all of it."""
        await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def receive(self, length: int) -> bytes:
        """Exactly so many bytes, and not one more."""
        data = b""
        while len(data) < length:
            piece = await asyncio.get_running_loop().sock_recv(self.socket, length - len(data))
            if not piece:
                raise ConnectionResetError(0, "the server hung up during the handshake")
            data += piece
        return data


async def dial(uri: NbdUri, act: Callable[[socket.socket], Awaitable[T]]) -> T:
    """Connect and `act` within the limit. `act` owns the socket if it succeeds; else it is closed. Raises NvError."""
    try:
        async with asyncio.timeout(DIAL_LIMIT_S):
            sock = await _connect(uri)
            try:
                return await act(sock)
            except BaseException:
                sock.close()
                raise
    except TimeoutError as error:
        raise NvError(Code.TIMEOUT, f"{uri.where}: no NBD server answered within {DIAL_LIMIT_S:.0f} s") from error
    except OSError as error:
        raise NvError(Code.UNAVAILABLE, f"{uri.where}: {reason(error)}", "is the server running there?") from error


async def drive(talk: Haggle, wire: Wire, secure: Secure | None = None) -> ExportInfo:
    """Haggle over the wire, through TLS from where the haggle says so."""
    given = b""
    try:
        wanted = next(talk)
        while True:
            if isinstance(wanted, StartTls):
                assert secure is not None, "TLS was not wanted"
                wire, given = await secure(), b""
            elif isinstance(wanted, bytes):
                await wire.send(wanted)
                given = b""
            else:
                given = await wire.receive(wanted)
            wanted = talk.send(given)
    except StopIteration as done:
        info: ExportInfo = done.value
        return info


def reason(error: OSError) -> str:
    """What a failed system call says, for people."""
    return os.strerror(error.errno) if error.errno else error.strerror or str(error)


async def _connect(uri: NbdUri) -> socket.socket:
    loop = asyncio.get_running_loop()
    if uri.socket is not None:
        return await _open(socket.AF_UNIX, uri.socket)
    failure: OSError | None = None
    for family, _, _, _, address in await loop.getaddrinfo(uri.host, uri.port, type=socket.SOCK_STREAM):
        try:
            sock = await _open(family, address)
        except OSError as error:
            failure = error
            continue
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
        return sock
    raise failure or OSError("the host has no address")


async def _open(family: int, address: object) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, address)  # type: ignore[arg-type]  # of its family
    except BaseException:
        sock.close()
        raise
    return sock
