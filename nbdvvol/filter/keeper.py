"""The keeper of one attachment: makes the kernel's nbd device and keeps it connected until it is detached.

It shares each socket with the kernel and sees it hang up, whoever ended it: the server, the network's
keep-alive, or the kernel itself after a request time-out. Then it dials the export again, with back-off, and
offers the fresh sockets by RECONFIGURE until the kernel has taken them in place of the dead ones. Meanwhile the
kernel holds the device's I/O, for the attachment's dead-connection time-out at most. The keeper also follows
the export's size.

An earlier keeper's sockets (it was killed) cannot be watched; the kernel's LINK_DEAD event tells of their end.
The keeper never takes the device down: that is `detach`, which ends the keeper first.
"""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from nbdvvol.filter.attachments import Attachment
from nbdvvol.filter.dial import Dialer, Link
from nbdvvol.filter.nbdnetlink import DeviceSettings, Kernel
from nbdvvol.model.errors import Code, NvError
from nbdvvol.nbd.client import ExportInfo
from nbdvvol.nbd.constants import TransmissionFlag

SECTOR_BYTES = 512
PAGE_BYTES = 4096
"""Smallest and largest logical block of a kernel device."""
SIZE_POLL_S = 5.0
BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.1, 2.0
TAKE_LIMIT_S = 2.0
"""Longest time for the kernel to see that a socket is dead and to take the one offered for it."""
TAKE_POLL_S = 0.05

log = structlog.get_logger("keeper")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user asked for. `index` None: a free device."""

    identity: str
    vvol: str
    uri: str
    index: int | None
    connections: int
    dead_timeout_s: int
    request_timeout_s: int


class Keeper:
    """Attach (or take over) one device, then `keep` it."""

    def __init__(
        self,
        kernel: Kernel,
        dialer: Dialer,
        save: Callable[[Attachment], None],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._kernel = kernel
        self._dialer = dialer
        self._save = save
        self._sleep = sleep
        self._links: list[Link] = []
        self._lost = 0  # sockets of ours that died and are not replaced yet
        self._offer = False  # one of an earlier keeper's may have died
        self._wake = asyncio.Event()
        self._epoll = select.epoll()
        self._attachment: Attachment | None = None

    @property
    def attachment(self) -> Attachment:
        """The record as it stands; only after attach or take_over."""
        assert self._attachment is not None
        return self._attachment

    async def attach(self, wanted: Wanted) -> Attachment:
        """Dial every connection and make the device. Raises NvError; then nothing is left behind."""
        info = await self._dialer.inspect()
        block_size = _block_size(info)
        if wanted.connections > 1 and not info.flags & TransmissionFlag.CAN_MULTI_CONN:
            raise NvError(
                Code.UNSUPPORTED,
                f"{wanted.connections} connections: the server does not promise that they see each other's writes",
                "use --connections 1",
            )
        try:
            for _ in range(wanted.connections):
                link, info = await self._dialer.enter()
                self._watch(link)
            size = info.size - info.size % block_size
            settings = DeviceSettings(
                wanted.index, size, block_size, int(info.flags), wanted.request_timeout_s,
                wanted.dead_timeout_s, wanted.identity,
            )  # fmt: skip
            index = await self._connect(settings)
            if not all(link.taken() for link in self._links):
                await self._kernel.disconnect(index)
                raise NvError(Code.UNSUPPORTED, "this kernel's nbd driver does not show which sockets it uses")
        except BaseException:
            self.close()
            raise
        return self._record(
            Attachment(
                identity=wanted.identity, vvol=wanted.vvol, uri=wanted.uri, device=f"/dev/nbd{index}", index=index,
                size=size, block_size=block_size, connections=wanted.connections, keeper_pid=os.getpid(),
                dead_timeout_s=wanted.dead_timeout_s, request_timeout_s=wanted.request_timeout_s,
            )
        )  # fmt: skip

    def take_over(self, attachment: Attachment) -> Attachment:
        """Go on with a device whose keeper died."""
        self._offer = True
        return self._record(attachment.model_copy(update={"keeper_pid": os.getpid()}))

    async def keep(self) -> None:
        """Repair and resize until somebody disconnected the device. Cancel it to leave the device as it is."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._epoll.fileno(), self._wake.set)
        events = asyncio.create_task(self._listen())
        try:
            while True:
                self._wake.clear()
                try:
                    await self._step()
                except _GoneError:
                    return
                except NvError as error:
                    log.warning("trying again", device=self.attachment.device, error=str(error))
                except OSError as error:
                    log.error("the kernel refused", device=self.attachment.device, error=str(error))
                await self._wait(SIZE_POLL_S if self._whole() else BACKOFF_MAX_S)
        finally:
            events.cancel()
            loop.remove_reader(self._epoll.fileno())

    def close(self) -> None:
        """Close our side of every socket; the kernel's side works on."""
        for link in list(self._links):
            self._forget(link)
        self._epoll.close()

    async def _step(self) -> None:
        if not self._whole():
            await self._repair()
        else:
            await self._follow((await self._dialer.inspect()).size)

    def _whole(self) -> bool:
        return not self._lost and not self._offer and not any(link.hung_up() for link in self._links)

    async def _repair(self) -> None:
        """Replace every dead socket, or as many as the kernel takes now."""
        self._offer = False
        for link in [link for link in self._links if link.hung_up()]:
            self._forget(link)
            self._lost += 1
        fresh: list[Link] = []
        try:
            size = self.attachment.size
            while len(self._links) + len(fresh) < self.attachment.connections:
                link, info = await self._dial()
                fresh.append(link)
                size = info.size
            await self._place(fresh, at_least=self._lost)
        finally:
            placed = sum(link in self._links for link in fresh)
            self._lost = max(self._lost - placed, 0)
            for link in fresh:
                if link not in self._links:
                    link.close()
        log.info("reconnected", device=self.attachment.device, sockets=placed, of=self.attachment.connections)
        await self._follow(size)

    async def _place(self, fresh: list[Link], *, at_least: int) -> None:
        """Offer sockets until the kernel has taken `at_least` so many; those taken are watched."""
        waiting = list(fresh)
        for _ in range(int(TAKE_LIMIT_S / TAKE_POLL_S)):
            try:
                await self._reconfigure(fds=[link.fileno() for link in waiting])
            finally:
                for link in waiting:
                    if link.taken():
                        self._watch(link)
                waiting = [link for link in waiting if not link.taken()]
            if len(fresh) - len(waiting) >= at_least:
                return
            await self._sleep(TAKE_POLL_S)  # the kernel has not seen yet that the old socket is dead

    async def _dial(self) -> tuple[Link, ExportInfo]:
        """A fresh connection, however long the server is away. Raises _GoneError when the device was disconnected."""
        pause_s = BACKOFF_FIRST_S
        while True:
            if not await self._kernel.connected(self.attachment.index):
                raise _GoneError
            try:
                return await self._dialer.enter()
            except NvError as error:
                if pause_s == BACKOFF_FIRST_S:
                    log.warning("no server", device=self.attachment.device, error=str(error))
            await self._sleep(pause_s)
            pause_s = min(2 * pause_s, BACKOFF_MAX_S)

    async def _follow(self, size: int) -> None:
        size -= size % self.attachment.block_size
        if size == self.attachment.size:
            return
        if size < self.attachment.size:
            log.warning("the export shrank", device=self.attachment.device, before=self.attachment.size, now=size)
        await self._reconfigure(size=size)
        self._record(self.attachment.model_copy(update={"size": size}))
        log.info("resized", device=self.attachment.device, size=size)

    async def _connect(self, settings: DeviceSettings) -> int:
        fds = [link.fileno() for link in self._links]
        try:
            return await self._kernel.connect(settings, fds)
        except PermissionError as error:
            raise NvError(Code.DENIED, "the kernel refused to make a device", "run it as root") from error
        except OSError as error:
            if settings.index is None:
                raise NvError(Code.IO, f"the kernel refused to make a device: {error}") from error
            raise NvError(
                Code.BUSY, f"/dev/nbd{settings.index}: the kernel refused: {error}", "leave --device out for a free one"
            ) from error

    async def _reconfigure(self, *, fds: list[int] | None = None, size: int | None = None) -> None:
        try:
            await self._kernel.reconfigure(self.attachment.index, self.attachment.identity, fds=fds or (), size=size)
        except OSError:
            if not await self._kernel.connected(self.attachment.index):
                raise _GoneError from None
            raise

    async def _listen(self) -> None:
        while True:
            ours = await self._kernel.link_dead() == self.attachment.index
            if ours and len(self._links) + self._lost < self.attachment.connections:
                self._offer = True
                self._wake.set()

    async def _wait(self, limit_s: float) -> None:
        try:
            async with asyncio.timeout(limit_s):
                await self._wake.wait()
        except TimeoutError:
            pass  # time to look at the size

    def _watch(self, link: Link) -> None:
        self._links.append(link)
        self._epoll.register(link.fileno(), select.EPOLLRDHUP)

    def _forget(self, link: Link) -> None:
        self._links.remove(link)
        self._epoll.unregister(link.fileno())  # closing is not enough: the kernel's driver holds the socket too
        link.close()

    def _record(self, attachment: Attachment) -> Attachment:
        self._attachment = attachment
        self._save(attachment)
        return attachment


class _GoneError(Exception):
    """Somebody disconnected the device."""


def _block_size(info: ExportInfo) -> int:
    if info.block_min > PAGE_BYTES:
        raise NvError(
            Code.UNSUPPORTED, f"the export's smallest block is {info.block_min} bytes; the kernel takes {PAGE_BYTES}"
        )
    return max(SECTOR_BYTES, info.block_min)
