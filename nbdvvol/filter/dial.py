"""Sockets for the kernel's nbd driver: connected, haggled up to the transmission phase, and watched for their end.

A `Link` shares its socket with the kernel: the kernel reads and writes it, we only see it hang up. Nothing here
reads a byte after the haggling.
"""

from __future__ import annotations

import select
import socket
import struct
from typing import Protocol

from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.uri import NbdUri
from nbdvvol.nbd.client import ExportInfo, haggle
from nbdvvol.nbd.dial import SocketWire, dial, drive

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
        sock, info = await self._talk(enter=True)
        sock.setblocking(True)
        return Link(sock), info

    async def inspect(self) -> ExportInfo:
        """See Dialer."""
        sock, info = await self._talk(enter=False)
        sock.close()
        return info

    async def _talk(self, *, enter: bool) -> tuple[socket.socket, ExportInfo]:
        async def act(sock: socket.socket) -> tuple[socket.socket, ExportInfo]:
            return sock, await drive(haggle(self.uri.name, enter=enter), SocketWire(sock))

        return await dial(self.uri, act)
