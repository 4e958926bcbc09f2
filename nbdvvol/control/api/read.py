"""Routes that only read."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from nbdvvol.control.registry import views
from nbdvvol.control.service import Control
from nbdvvol.model.resources import Datastore, Event, ExportUri, ForceRisks, Host, Profile, Status, Task, Vm, VVol

WAIT_S_MAX = 60.0
Wait = Annotated[float, Query(ge=0, le=WAIT_S_MAX, description="seconds to wait for news")]


def read_routes(control: Control) -> APIRouter:
    """GET routes."""
    router = APIRouter(prefix="/v1")
    _vvol_routes(router, control)
    _farm_routes(router, control)
    _watch_routes(router, control)
    return router


def _vvol_routes(router: APIRouter, control: Control) -> None:
    @router.get("/vvols")
    async def vvols() -> list[VVol]:
        """Every VVol."""
        return await control.vvols()

    @router.get("/vvols/{vm}/{name}")
    async def vvol(vm: str, name: str) -> VVol:
        """One VVol."""
        return await control.vvol(vm, name)

    @router.get("/vvols/{vm}/{name}/risks")
    async def risks(vm: str, name: str) -> ForceRisks:
        """What taking it by force from a host that does not answer would put at risk now."""
        return await control.risks(vm, name)

    @router.get("/vvols/{vm}/{name}/uri")
    async def uri(vm: str, name: str) -> ExportUri:
        """Where to attach it, with lines to paste."""
        return await control.registry.run(views.export_uri, vm, name)

    @router.get("/resolve")
    async def resolve(name: Annotated[str, Query(max_length=256)]) -> VVol:
        """A VVol by its short name, where only one has it; also by full name or UUID."""
        return await control.resolve(name)


def _farm_routes(router: APIRouter, control: Control) -> None:
    @router.get("/status")
    async def status() -> Status:
        """The farm at a glance, with every problem and what to do about it."""
        return await control.status()

    @router.get("/datastores")
    async def datastores() -> list[Datastore]:
        """Every datastore."""
        return await control.registry.run(views.datastores)

    @router.get("/hosts")
    async def hosts() -> list[Host]:
        """Every host."""
        return await control.hosts()

    @router.get("/profiles")
    async def profiles() -> list[Profile]:
        """Every profile."""
        return await control.registry.run(views.profiles)

    @router.get("/vms")
    async def vms() -> list[Vm]:
        """Every VM."""
        return await control.registry.run(views.vms)


def _watch_routes(router: APIRouter, control: Control) -> None:
    @router.get("/tasks")
    async def tasks() -> list[Task]:
        """The newest tasks."""
        return await control.registry.run(views.tasks)

    @router.get("/tasks/{task_id}")
    async def task(task_id: int, wait: Wait = 0.0) -> Task:
        """One task; with `wait`, as soon as it moves on."""
        return await control.watch_task(task_id, wait)

    @router.get("/events")
    async def events(
        after: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
        wait: Wait = 0.0,
    ) -> list[Event]:
        """Events after an id; with `wait`, as soon as there is one."""
        return await control.watch_events(after, limit, wait)
