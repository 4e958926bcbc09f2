"""Sockets for the kernel's nbd driver: connected, haggled up to the transmission phase, and watched for their end.

A `Link` shares its socket with the kernel: the kernel reads and writes it, we only see it hang up. Nothing here
reads a byte after the haggling.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct
from typing import Protocol

from nbdvvol.model.errors import Code, NvError
from nbdvvol.nbd.client import ExportInfo, Haggle, haggle
from nbdvvol.nbd.uri import NbdUri

DIAL_LIMIT_S = 10.0
"""Longest time for one connection and its haggling."""
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 15, 5, 3
"""A TCP peer that vanished without a word is noticed after 30 s, also while no I/O runs."""
_TIMEVAL = struct.Struct("@ll")


class Link:
    """One socket in the transmission phase."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock

    def fileno(self) -> int:
        """Our descriptor of the socket."""
        return self.socket.fileno()

    def hung_up(self) -> bool:
        """Whether the server, the kernel or we ended the connection."""
        poll = select.poll()
        poll.register(self.socket, select.POLLRDHUP)
        return bool(poll.poll(0))

    def taken(self) -> bool:
        """Whether the kernel's driver uses the socket: it puts its request time-out there as the send time-out."""
        value = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.size)
        return _TIMEVAL.unpack(value) != (0, 0)

    def close(self) -> None:
        """Close our side; the connection ends unless the kernel uses it."""
        self.socket.close()


class Dialer(Protocol):
    """How the keeper reaches the export. Failures are NvError."""

    async def enter(self) -> tuple[Link, ExportInfo]:
        """A fresh connection in the transmission phase."""

    async def inspect(self) -> ExportInfo:
        """The export's facts now."""


class NbdDialer:
    """`Dialer` for an NBD URI."""

    def __init__(self, uri: NbdUri) -> None:
        if uri.tls:
            raise NvError(
                Code.UNSUPPORTED,
                f"{uri}: the kernel's nbd driver does not speak TLS",
                "attach through the host's unix socket, or give the VM's disk to QEMU, which does",
            )
        self.uri = uri

    async def enter(self) -> tuple[Link, ExportInfo]:
        """See Dialer."""
        sock, info = await self._talk(haggle(self.uri.name, enter=True))
        sock.setblocking(True)
        return Link(sock), info

    async def inspect(self) -> ExportInfo:
        """See Dialer."""
        sock, info = await self._talk(haggle(self.uri.name, enter=False))
        sock.close()
        return info

    async def _talk(self, talk: Haggle) -> tuple[socket.socket, ExportInfo]:
        try:
            async with asyncio.timeout(DIAL_LIMIT_S):
                sock = await _connect(self.uri)
                try:
                    return sock, await _drive(sock, talk)
                except BaseException:
                    sock.close()
                    raise
        except TimeoutError as error:
            raise NvError(
                Code.TIMEOUT, f"{self.uri.where}: no NBD server answered within {DIAL_LIMIT_S:.0f} s"
            ) from error
        except OSError as error:
            raise NvError(
                Code.UNAVAILABLE, f"{self.uri.where}: {_reason(error)}", "is the filter running there?"
            ) from error


def _reason(error: OSError) -> str:
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


async def _drive(sock: socket.socket, talk: Haggle) -> ExportInfo:
    loop = asyncio.get_running_loop()
    given = b""
    try:
        wanted = next(talk)
        while True:
            if isinstance(wanted, bytes):
                await loop.sock_sendall(sock, wanted)
                given = b""
            else:
                given = await _receive(sock, wanted)
            wanted = talk.send(given)
    except StopIteration as done:
        info: ExportInfo = done.value
        return info


async def _receive(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = await asyncio.get_running_loop().sock_recv(sock, length - len(data))
        if not piece:
            raise ConnectionResetError(0, "the server hung up during the handshake")
        data += piece
    return data
