"""The keeper of a kernel attachment: making the device, reconnecting, resizing, taking over (no kernel needed)."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdvvol.filter import keeper as keeper_module
from nbdvvol.filter.attachments import Attachment
from nbdvvol.filter.dial import NbdDialer
from nbdvvol.filter.keeper import Keeper, Wanted
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.uri import NbdUri
from nbdvvol.nbd.constants import TransmissionFlag
from tests.lib.facts import open_files
from tests.lib.procs import short_dir
from tests.unit.fake_kernel import FLAGS, FakeKernel, FakeServer

pytestmark = pytest.mark.timeout(30)


class Bench:
    """A server, a kernel, and keepers between them."""

    def __init__(self, folder: Path) -> None:
        self.server = FakeServer(folder / "s")
        self.kernel = FakeKernel()
        self.saved: list[Attachment] = []
        self.tasks: list[tuple[Keeper, asyncio.Task[None]]] = []

    def keeper(self) -> Keeper:
        return Keeper(self.kernel, NbdDialer(NbdUri("root", socket=str(self.server.path))), self.saved.append)

    def keep(self, keeper: Keeper) -> asyncio.Task[None]:
        task = asyncio.create_task(keeper.keep())
        self.tasks.append((keeper, task))
        return task

    async def attached(self, connections: int = 3) -> Keeper:
        keeper = self.keeper()
        await keeper.attach(wanted(connections))
        self.keep(keeper)
        return keeper

    async def kill(self, keeper: Keeper) -> None:
        """End a keeper as SIGKILL does: our side of the sockets closes, the kernel's stays."""
        for entry in [entry for entry in self.tasks if entry[0] is keeper]:
            self.tasks.remove(entry)
            entry[1].cancel()
            await asyncio.gather(entry[1], return_exceptions=True)
        keeper.close()


def wanted(connections: int = 3, index: int | None = None) -> Wanted:
    return Wanted("id-1", "vm1/root", "nbd+unix:///root?socket=s", index, connections, 60, 20)


@asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    folder = short_dir()
    made = Bench(folder)
    await made.server.start()
    try:
        yield made
    finally:
        for keeper, _ in list(made.tasks):
            await made.kill(keeper)
        made.kernel.close()
        await made.server.stop()
        shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "SIZE_POLL_S", 0.05)
    monkeypatch.setattr(keeper_module, "BACKOFF_FIRST_S", 0.01)
    monkeypatch.setattr(keeper_module, "BACKOFF_MAX_S", 0.05)


async def until(condition: Callable[[], bool], what: str) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"not within 20 s: {what}")


async def test_attach_makes_a_device_of_that_many_sockets() -> None:
    async with bench() as at:
        at.server.size = (1 << 20) + 700
        keeper = await at.attached(connections=4)
        device = at.kernel.devices[0]
        assert len(device.slots) == 4
        assert at.kernel.alive() == 4
        settings = device.settings
        assert (settings.size, settings.block_size) == ((1 << 20) + 512, 512)
        assert (settings.flags, settings.backend) == (int(FLAGS), "id-1")
        assert (settings.request_timeout_s, settings.dead_timeout_s) == (20, 60)
        assert keeper.attachment.device == "/dev/nbd0"
        assert at.saved[-1] == keeper.attachment
        assert keeper.attachment.keeper_pid == os.getpid()


async def test_the_servers_smallest_block_is_the_devices() -> None:
    async with bench() as at:
        at.server.block_min = 4096
        await at.attached()
        assert at.kernel.devices[0].settings.block_size == 4096


async def test_a_block_larger_than_a_page_is_refused() -> None:
    async with bench() as at:
        at.server.block_min = 8192
        with pytest.raises(NvError, match="8192") as refused:
            await at.keeper().attach(wanted())
        assert refused.value.code is Code.UNSUPPORTED


async def test_several_connections_need_the_servers_promise() -> None:
    async with bench() as at:
        at.server.flags &= ~TransmissionFlag.CAN_MULTI_CONN
        with pytest.raises(NvError, match="2 connections") as refused:
            await at.keeper().attach(wanted(2))
        assert refused.value.code is Code.UNSUPPORTED
        await at.attached(connections=1)


@pytest.mark.parametrize(
    ("index", "refusal", "code"),
    [(3, errno.EBUSY, Code.BUSY), (None, errno.ENOSPC, Code.IO), (None, errno.EPERM, Code.DENIED)],
)
async def test_a_refused_device_leaves_nothing(index: int | None, refusal: int, code: Code) -> None:
    async with bench() as at:
        at.kernel.refuse = OSError(refusal, os.strerror(refusal))
        with pytest.raises(NvError) as refused:
            await at.keeper().attach(wanted(3, index))
        assert refused.value.code is code
        await until(lambda: not at.server.entered, "the server sees every connection end")
        assert not at.saved


async def test_a_restarted_server_gets_every_connection_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "SIZE_POLL_S", 60.0)  # the hang-up alone wakes it
    async with bench() as at:
        keeper = await at.attached()
        await asyncio.sleep(0.05)
        await at.server.restart()
        await until(lambda: at.kernel.alive() == 3, "three sockets live again")
        await until(lambda: len(at.server.entered) == 3, "the server has three connections")
        await until(keeper._whole, "it knows that nothing is missing")
        monkeypatch.setattr(keeper_module, "SIZE_POLL_S", 0.05)
        at.server.entered[0].transport.abort()  # wakes it
        at.server.size = 3 << 20
        await until(lambda: at.kernel.devices[0].size == 3 << 20, "it is back to following the size")


async def test_one_dead_connection_is_replaced_and_the_others_are_left_alone() -> None:
    async with bench() as at:
        await at.attached()
        kept = [slot.sock.fileno() for slot in at.kernel.devices[0].slots[:1] + at.kernel.devices[0].slots[2:]]
        at.server.entered[1].transport.abort()
        await until(lambda: at.kernel.offers > 0 and at.kernel.alive() == 3, "the socket is replaced")
        slots = at.kernel.devices[0].slots
        assert sum(slot.sock.fileno() in kept for slot in slots) >= 2
        await until(lambda: len(at.server.entered) == 3, "no surplus connection is left")


async def test_sockets_are_offered_until_the_kernel_has_seen_the_death() -> None:
    async with bench() as at:
        await at.attached()
        at.kernel.blind = 4
        await at.server.restart()
        await until(lambda: at.kernel.alive() == 3, "three sockets live again")
        assert at.kernel.offers > 4
        assert at.server.granted == 6, "the same sockets are offered again, no others are dialled"
        await until(lambda: len(at.server.entered) == 3, "every dialled connection is in use")


async def test_a_kernel_that_never_sees_it_costs_no_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "TAKE_LIMIT_S", 0.1)
    async with bench() as at:
        await at.attached()
        at.kernel.blind = 12
        await at.server.restart()
        await until(lambda: at.kernel.offers > 6, "several rounds went by")
        assert len(at.server.entered) <= 3
        await until(lambda: at.kernel.alive() == 3, "it sees it at last")
        await until(lambda: len(at.server.entered) == 3, "three connections, no more")


async def test_a_server_that_is_away_for_long_is_found_again() -> None:
    async with bench() as at:
        keeper = await at.attached()
        await at.server.stop()
        await asyncio.sleep(0.3)
        assert keeper._epoll.poll(0) == [], "dead sockets that the kernel still holds do not keep it awake"
        assert at.kernel.alive() == 0
        await at.server.start()
        await until(lambda: at.kernel.alive() == 3, "three sockets live again")


async def test_a_grown_export_grows_the_device() -> None:
    async with bench() as at:
        keeper = await at.attached()
        at.server.size = 3 << 20
        await until(lambda: at.kernel.devices[0].size == 3 << 20, "the device has the new size")
        assert keeper.attachment.size == at.saved[-1].size == 3 << 20


async def test_a_size_that_changed_during_the_absence_is_followed() -> None:
    async with bench() as at:
        await at.attached()
        await at.server.stop()
        at.server.size = 2 << 20
        await at.server.start()
        await until(lambda: at.kernel.devices[0].size == 2 << 20, "the device has the new size")


async def test_keeping_ends_when_somebody_disconnects_the_device() -> None:
    async with bench() as at:
        keeper = await at.attached()
        await at.kernel.disconnect(0)
        await at.server.restart()
        await asyncio.wait_for(at.tasks[0][1], 5)
        assert not at.server.entered
        await at.kill(keeper)


async def test_a_killed_keeper_leaves_the_device_working_and_a_new_one_takes_over() -> None:
    async with bench() as at:
        first = await at.attached()
        await at.kill(first)
        assert at.kernel.alive() == 3, "the kernel's sockets outlive the keeper"
        at.server.entered[0].transport.abort()
        await until(lambda: at.kernel.alive() == 2, "one died unattended")
        second = at.keeper()
        second.take_over(first.attachment)
        at.keep(second)
        await until(lambda: at.kernel.alive() == 3, "the dead one is replaced")
        await until(lambda: len(at.server.entered) == 3, "the surplus ones are closed")


async def test_a_taken_over_socket_that_dies_is_replaced_on_the_kernels_word() -> None:
    async with bench() as at:
        first = await at.attached()
        await at.kill(first)
        second = at.keeper()
        second.take_over(first.attachment)
        at.keep(second)
        await until(lambda: at.kernel.offers > 0 and len(at.server.entered) == 3, "it has looked for dead ones")
        at.server.entered[0].transport.abort()
        await until(lambda: at.kernel.alive() == 2, "one died")
        at.kernel.notice(0)
        await until(lambda: at.kernel.alive() == 3, "the dead one is replaced")
        await at.server.restart()
        at.kernel.notice(0)
        await until(lambda: at.kernel.alive() == 3, "all are replaced after a restart")
        await until(lambda: len(at.server.entered) == 3, "three connections, no more")


async def test_no_descriptor_is_left_behind() -> None:
    before = open_files(os.getpid())
    async with bench() as at:
        await at.attached()
        for _ in range(3):
            await at.server.restart()
            await until(lambda: at.kernel.alive() == 3 and len(at.server.entered) == 3, "reconnected")
    await asyncio.sleep(0.05)
    assert open_files(os.getpid()) <= before + 1  # asyncio keeps its resolver
