"""A kernel with an nbd driver, as far as netlink and sockets show it, and a server that haggles and then holds still.

The fake driver holds duplicates of the sockets it was given and marks them as the real one does (the request
time-out becomes the send time-out). It notices a dead socket only when a test lets it, as the real one's receive
thread may come late.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nbdvvol.filter.nbdnetlink import DeviceSettings
from nbdvvol.nbd.constants import TransmissionFlag

FLAGS = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH | TransmissionFlag.CAN_MULTI_CONN
REPLY_MAGIC = 0x0003E889045565A9


def hung_up(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


@dataclass
class Slot:
    """One socket of a device."""

    sock: socket.socket
    dead: bool = False


@dataclass
class Device:
    settings: DeviceSettings
    slots: list[Slot]
    size: int


class FakeKernel:
    """`nbdnetlink.Kernel` for tests."""

    def __init__(self) -> None:
        self.devices: dict[int, Device] = {}
        self.refuse: OSError | None = None
        self.blind = 0  # so many offers come before the driver sees that its sockets are dead
        self.offers = 0
        self._events: asyncio.Queue[int] = asyncio.Queue()

    async def connect(self, settings: DeviceSettings, fds: Sequence[int]) -> int:
        if self.refuse is not None:
            raise self.refuse
        index = settings.index if settings.index is not None else len(self.devices)
        if index in self.devices:
            raise OSError(errno.EBUSY, "busy")
        slots = [self._take(fd, settings) for fd in fds]
        self.devices[index] = Device(settings, slots, settings.size)
        return index

    async def reconfigure(self, index: int, backend: str, *, fds: Sequence[int] = (), size: int | None = None) -> None:
        device = self.devices.get(index)
        if device is None or device.settings.backend != backend:
            raise OSError(errno.EINVAL, "not configured")
        if fds:
            self.offers += 1
            self.notice(index)
        for fd in fds:
            dead = next((slot for slot in device.slots if slot.dead), None)
            if dead is None:
                return  # as the real one: the rest is silently dropped
            dead.sock.close()
            device.slots[device.slots.index(dead)] = self._take(fd, device.settings)
        if size is not None:
            device.size = size

    async def disconnect(self, index: int) -> None:
        for slot in self.devices.pop(index).slots:
            slot.sock.close()

    async def connected(self, index: int) -> bool:
        return index in self.devices

    async def link_dead(self) -> int:
        return await self._events.get()

    def close(self) -> None:
        for device in self.devices.values():
            for slot in device.slots:
                slot.sock.close()

    def notice(self, index: int) -> None:
        """The driver's receive threads see which sockets ended."""
        if self.offers and self.offers <= self.blind:
            return
        for slot in self.devices[index].slots:
            if not slot.dead and hung_up(slot.sock):
                slot.dead = True
                self._events.put_nowait(index)

    def alive(self, index: int = 0) -> int:
        return sum(not slot.dead and not hung_up(slot.sock) for slot in self.devices[index].slots)

    @staticmethod
    def _take(fd: int, settings: DeviceSettings) -> Slot:
        sock = socket.socket(fileno=os.dup(fd))
        limit = struct.pack("@ll", settings.request_timeout_s, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        return Slot(sock)


@dataclass
class FakeServer:
    """An NBD server on a unix socket that grants every GO and INFO and never answers a request."""

    path: Path
    size: int = 1 << 20
    flags: int = FLAGS
    block_min: int = 1
    entered: list[asyncio.StreamWriter] = field(default_factory=list)
    granted: int = 0
    _server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self.path)

    async def stop(self) -> None:
        """Die: the listener and every connection end."""
        assert self._server is not None
        self._server.close()
        self.path.unlink(missing_ok=True)
        for writer in self.entered:
            writer.transport.abort()
        self.entered.clear()
        await asyncio.sleep(0)

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(struct.pack(">QQH", 0x4E42444D41474943, 0x49484156454F5054, 3))
            await reader.readexactly(4)
            while True:
                _, option, length = struct.unpack(">QII", await reader.readexactly(16))
                await reader.readexactly(length)
                if option not in (6, 7):
                    break
                export = struct.pack(">HQH", 0, self.size, self.flags)
                sizes = struct.pack(">HIII", 3, self.block_min, 4096, 32 << 20)
                for kind, body in ((3, export), (3, sizes), (1, b"")):
                    writer.write(struct.pack(">QIII", REPLY_MAGIC, option, kind, len(body)) + body)
                if option == 7:
                    self.granted += 1
                    self.entered.append(writer)
                    await reader.read()
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            if writer in self.entered:
                self.entered.remove(writer)
            writer.close()
