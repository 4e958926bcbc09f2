"""A control without sockets for tests: registry in a folder, a farm applied, fake filters connected."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from nbdvvol.control.registry import Registry, farm, tasks, views
from nbdvvol.control.registry.vvols import begin_create
from nbdvvol.control.service import Control
from nbdvvol.model.farm import Farm
from nbdvvol.model.resources import ApplyRequest, ApplyResult, CreateVVol, Task, TaskState, VVol
from tests.unit.fake_filter import Disks, FakeFilter

MIB = 1 << 20
PLAIN: dict[str, Any] = {
    "hosts": {"local": {}},
    "datastores": {"local": {"kind": "file", "path": "/fake/local.img", "size": "16MiB"}},
    "vms": {"vm1": {"vvols": {"root": {"size": "4MiB"}}}},
}
OVER = (TaskState.SUCCESS, TaskState.ERROR, TaskState.CANCELLED)


class TestFarm:
    """A control that can be killed and started again on the same state."""

    __test__ = False

    def __init__(self, state: Path) -> None:
        self.state = state
        self.disks = Disks()
        self.filters: list[FakeFilter] = []

    async def start(self) -> Control:
        """Start control (again)."""
        self.state.mkdir(exist_ok=True)
        self.control = Control(await Registry.open(self.state / "registry.db"), self.state)
        await self.control.start()
        return self.control

    async def stop(self) -> None:
        """Stop control; filters live on without it."""
        await self.control.stop()
        for fake in self.filters:
            await fake.disconnect()

    async def end(self) -> None:
        """Stop control and every filter."""
        for fake in self.filters:
            await fake.die()
        await self.control.stop()

    async def filter(self, host: str = "local", run_dir: str = "/run/fake") -> FakeFilter:
        """A new filter process of a host, connected."""
        fake = FakeFilter(host, self.disks, run_dir)
        await fake.connect(self.control.links)
        self.filters.append(fake)
        return fake

    async def apply(self, spec: dict[str, Any] | None = None, **more: Any) -> ApplyResult:
        """Apply a farm file's content."""
        request = ApplyRequest(farm=Farm.model_validate(PLAIN if spec is None else spec), **more)
        result = await self.control.registry.run(farm.apply, request)
        if not request.dry_run:
            await self.control.settings_changed()
        return result

    async def over(self, task_id: int, timeout_s: float = 10.0) -> Task:
        """Wait until a task is over."""
        async with asyncio.timeout(timeout_s):
            while True:
                task = await self.control.watch_task(task_id, 1.0)
                if task.state in OVER:
                    return task

    async def settle(self, result: ApplyResult) -> list[Task]:
        """Wait for every task of an apply; all must succeed."""
        done = [await self.over(number) for number in result.tasks]
        assert all(task.state is TaskState.SUCCESS for task in done), done
        return done

    async def serve_two(self, spec: dict[str, Any]) -> tuple[FakeFilter, str, str]:
        """Apply a farm with vm1/root and vm1/free: the filter that serves them, and their UUIDs."""
        result = await self.apply(spec)
        fake = await self.filter()
        await self.settle(result)
        return fake, (await self.vvol("vm1/root")).uuid, (await self.vvol("vm1/free")).uuid

    async def vvol(self, name: str = "vm1/root") -> VVol:
        """A VVol by its full name."""
        return await self.control.registry.run(views.resolve, name)

    async def create(self, name: str, size: int, **more: Any) -> Task:
        """Create a VVol of vm1 and wait for its task."""
        body = CreateVVol(vm="vm1", name=name, size=size, **more)
        return await self.over((await self.control.registry.run(begin_create, body)).task.id)

    async def live(self) -> list[tasks.Job]:
        """Tasks that are not over."""
        return await self.control.registry.run(tasks.live_jobs)

    async def until(self, check: Any, timeout_s: float = 20.0) -> None:
        """Wait until `await check()` is true."""
        async with asyncio.timeout(timeout_s):
            while not await check():
                await asyncio.sleep(0.005)

    async def until_sent(self, fake: FakeFilter, uuid: str, key: str, value: object) -> None:
        """Wait until a filter has this of a VVol."""

        async def sent() -> bool:
            return bool(getattr(fake.serving[uuid], key) == value)

        await self.until(sent)

    def begun(self, what: str) -> list[dict[str, Any]]:
        """Args of the orders of a kind that some filter began."""
        return [args for _, kind, args in self.disks.log if kind == what]


@pytest.fixture(name="farm")
async def running_farm(memory: Path) -> AsyncIterator[TestFarm]:
    """A farm whose control has started, with nothing applied."""
    it = TestFarm(memory / "state")
    await it.start()
    yield it
    await it.end()
