"""A seeded storm: VVols come, grow, move and go while control restarts and filters lose their link, stop or die.

The judge is the bytes. A filter that begins to serve a VVol checks that it holds what its VM wrote, zeros where it
never wrote, and that nobody else serves it; then it overwrites all of it with the VVol's own pattern. So a byte
that is handed out twice, unscrubbed, too early, or zeroed too late is found at the next look.
More seeds: NBDVVOL_STORM_SEEDS=FIRST:END.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import structlog

from nbdvvol.control.registry import tasks, views, vvols
from nbdvvol.model.errors import NvError
from nbdvvol.model.link import VVolSpec
from nbdvvol.model.resources import BindVVol, CreateVVol, ResizeVVol, VVol, VVolState
from tests.unit.control_farm import TestFarm
from tests.unit.fake_filter import Disks, FakeFilter

EXTENT = 64 << 10
HOSTS = ("a", "b")
STEPS = 40
SEEDS = range(*(int(word) for word in os.environ.get("NBDVVOL_STORM_SEEDS", "0:3").split(":")))
FARM: dict[str, Any] = {
    "hosts": {host: {} for host in HOSTS},
    "datastores": {"s": {"kind": "file", "path": "/fake/s", "size": "6MiB", "extent_size": EXTENT}},
    "vms": {"vm1": {"host": "a", "vvols": {}}},
}


class Storm:
    """The farm, its live filters, and what every VVol must hold."""

    def __init__(self, farm: TestFarm, seed: int) -> None:
        self.farm = farm
        self.random = random.Random(seed)
        self.filters: dict[str, FakeFilter] = {}
        self.written: dict[str, int] = {}
        self.wrong: list[str] = []
        self.looks = 0
        self.stopped: set[str] = set()

    async def start_filter(self, host: str) -> None:
        """A new filter process of a host."""
        fake = FakeFilter(host, self.farm.disks, f"/run/{host}")
        fake.on_serve = self._look
        self.stopped.discard(host)
        self.filters[host] = fake
        self.farm.filters.append(fake)
        await fake.connect(self.farm.control.links)

    def _look(self, me: FakeFilter, spec: VVolSpec) -> None:
        self.looks += 1
        others = [f.host for f in self.filters.values() if f is not me and spec.uuid in f.serving]
        if others:
            self.wrong.append(f"{spec.name} is served by {me.host} and {others}")
        data = self.farm.disks.bytes["/fake/s"]
        pattern = UUID(spec.uuid).bytes * (EXTENT // 16)
        mine = self.written.get(spec.uuid, 0)
        for run in spec.legs[0].runs:
            for at in range(0, run.n, EXTENT):
                want = pattern if run.o + at < mine else bytes(EXTENT)
                found = data[run.at + at : run.at + at + EXTENT]
                if found != want:
                    self.wrong.append(f"{spec.name} at {run.o + at}: {bytes(found[:16]).hex()}, mine to {mine}")
                data[run.at + at : run.at + at + EXTENT] = pattern
        self.written[spec.uuid] = spec.size

    async def step(self) -> None:
        """One random thing happens."""
        have = [v for v in await self._vvols() if v.state is VVolState.READY]
        do: list[tuple[int, Callable[[], Awaitable[object]]]] = [
            (6, self._create),
            (2, self._restart_control),
            (2, self._lose_link),
            (2, self._kill_filter),
            (1, self._stop_filter),
            (3, self._toggle_held_work),
            (4, self._let_things_happen),
        ]
        if have:
            one = self.random.choice(have)
            do += [(4, lambda: self._delete(one)), (4, lambda: self._resize(one)), (4, lambda: self._move(one))]
            do += [(1, lambda: self._unbind(one)), (1, self._cancel)]
        (act,) = self.random.choices([act for _, act in do], [weight for weight, _ in do])
        with contextlib.suppress(NvError):  # busy, no space: refusals are part of life
            await act()
        await self._reconnect()
        await self._let_things_happen()

    async def _let_things_happen(self) -> None:
        """Go on after some more transactions: counted, not timed, so that a slow machine has its storm too."""
        signal = self.farm.control.moved
        for _ in range(self.random.choice([0, 1, 3, 10, 40])):
            if not await signal.after(signal.ticket, 0.2):
                break

    async def _vvols(self) -> list[VVol]:
        return await self.farm.control.registry.run(views.vvols)

    async def _create(self) -> None:
        size = EXTENT * self.random.randint(1, 12)
        body = CreateVVol(vm="vm1", name=f"v{self.random.randrange(10**9)}", size=size)
        await self.farm.control.registry.run(vvols.begin_create, body)

    async def _delete(self, one: VVol) -> None:
        await self.farm.control.registry.run(vvols.begin_delete, one.vm, one.name)

    async def _resize(self, one: VVol) -> None:
        body = ResizeVVol(size=one.size + EXTENT * self.random.randint(1, 6))
        await self.farm.control.registry.run(vvols.begin_resize, one.vm, one.name, body)

    async def _move(self, one: VVol) -> None:
        body = BindVVol(host=self.random.choice(HOSTS))
        await self.farm.control.registry.run(vvols.begin_bind, one.vm, one.name, body)

    async def _unbind(self, one: VVol) -> None:
        await self.farm.control.registry.run(vvols.begin_unbind, one.vm, one.name, BindVVol())

    async def _cancel(self) -> None:
        live = await self.farm.live()
        if live:
            await self.farm.control.registry.run(tasks.cancel, self.random.choice(live).id)

    async def _restart_control(self) -> None:
        await self.farm.stop()
        await self.farm.start()

    async def _lose_link(self) -> None:
        fake = self.filters[self.random.choice(HOSTS)]
        if self.random.random() < 0.3:
            fake.hold_release = True
        await fake.disconnect()

    async def _kill_filter(self) -> None:
        host = self.random.choice(HOSTS)
        fake = self.filters[host]
        await fake.die()
        await self.start_filter(host)

    async def _stop_filter(self) -> None:
        """A clean end; the host is without a filter for a while."""
        host = self.random.choice(HOSTS)
        await self.filters[host].stop()
        self.stopped.add(host)

    async def _toggle_held_work(self) -> None:
        fake = self.filters[self.random.choice(HOSTS)]
        if fake.hold_work:
            fake.hold_work.clear()
        else:
            fake.hold_work.add(self.random.choice(["scrub", "write_meta"]))

    async def _reconnect(self) -> None:
        for fake in list(self.filters.values()):
            chance = 0.5 if fake.host in self.stopped else 0.7
            if fake.host not in self.farm.control.links.connected and self.random.random() < chance:
                await self._connect(fake)

    async def _connect(self, fake: FakeFilter) -> None:
        if fake.host in self.stopped:
            await self.start_filter(fake.host)
            return
        await fake.disconnect()
        await fake.connect(self.farm.control.links)
        if fake.hold_release and self.random.random() < 0.7:
            await fake.release()

    async def calm(self) -> None:
        """The storm is over: everything is connected and answers; every task must come to its end."""
        for fake in list(self.filters.values()):
            fake.hold_work.clear()
            if fake.host not in self.farm.control.links.connected:
                await self._connect(fake)
            if fake.hold_release:
                await fake.release()
        await self.farm.until(self._quiet, timeout_s=60)

    async def _quiet(self) -> bool:
        return not await self.farm.live()


@pytest.mark.timeout(240)
@pytest.mark.parametrize("seed", SEEDS)
async def test_storm(memory: Path, seed: int) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    farm = TestFarm(memory / "state")
    farm.disks.bytes["/fake/s"] = bytearray(b"old!" * (6 << 18))
    farm.disks.bytes["/fake/s"][: 1 << 20] = bytes(1 << 20)
    await farm.start()
    storm = Storm(farm, seed)
    try:
        await farm.apply(FARM)
        for host in HOSTS:
            await storm.start_filter(host)
        for _ in range(STEPS):
            await storm.step()
            assert not storm.wrong, storm.wrong
        await storm.calm()
        assert not storm.wrong, storm.wrong
        await _check_end(storm)
        assert storm.looks >= 5, "hardly anything was served: this proves nothing"
    finally:
        await farm.end()


async def _check_end(storm: Storm) -> None:
    """Deleting everything gives every byte back, as zeros behind the head."""
    for fake in list(storm.filters.values()):
        await fake.die()
        await storm.start_filter(fake.host)
    assert not storm.wrong, storm.wrong
    for one in await storm.farm.control.registry.run(views.vvols):
        await storm.farm.control.registry.run(vvols.begin_delete, one.vm, one.name)
    await storm.calm()
    (store,) = await storm.farm.control.registry.run(views.datastores)
    assert not await storm.farm.control.registry.run(views.vvols)
    assert store.use == "unused" or store.free == store.size - (1 << 20)


def test_the_judge_finds_what_it_looks_for() -> None:
    farm = TestFarm(Path("/nowhere"))
    farm.disks = Disks()
    farm.disks.bytes["/fake/s"] = bytearray(b"secret of another VM".ljust(2 * EXTENT, b"x"))
    storm = Storm(farm, 0)
    spec: dict[str, Any] = {"uuid": str(UUID(int=5)), "vm": "v", "name": "n", "size": EXTENT, "type": "data"}
    leg = {"id": 0, "datastore": "s", "state": "in-sync", "runs": [{"o": 0, "n": EXTENT, "at": 0}]}
    one = VVolSpec.model_validate(spec | {"epoch": 1, "generation": 1, "map_version": 1, "legs": [leg]})
    first, second = FakeFilter("a", farm.disks), FakeFilter("b", farm.disks)
    storm.filters = {"a": first, "b": second}
    storm._look(first, one)
    assert len(storm.wrong) == 1, "unscrubbed bytes"
    first.serving[one.uuid] = one
    storm._look(second, one)
    assert len(storm.wrong) == 2, "two hosts serve it"
    farm.disks.bytes["/fake/s"][:EXTENT] = bytes(EXTENT)
    first.serving.clear()
    storm._look(second, one)
    assert len(storm.wrong) == 3, "a late scrub"
