"""Routes that change something. A repeated `Idempotency-Key` has the same answer and no second effect."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header

from nbdvvol.control.registry import caches, farm, logs, mirrors, stores, tasks, vvols
from nbdvvol.control.service import Control
from nbdvvol.model.errors import NvError
from nbdvvol.model.resources import (
    AddLeg,
    ApplyRequest,
    ApplyResult,
    BindVVol,
    CreateVVol,
    ResizeVVol,
    ResyncLeg,
    Task,
    TaskRef,
    VerifyMirror,
    VVol,
)

Key = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=256)]


def write_routes(control: Control) -> APIRouter:
    """POST and DELETE routes."""
    router = APIRouter(prefix="/v1")
    once = control.registry.run_once

    @router.post("/vvols", status_code=202)
    async def create(body: CreateVVol, key: Key = None) -> TaskRef:
        """Create a VVol, or adopt bytes as one."""
        return await once(key, TaskRef, vvols.begin_create, body)

    @router.delete("/vvols/{vm}/{name}", status_code=202)
    async def delete(vm: str, name: str, force: bool = False, key: Key = None) -> TaskRef:
        """Delete a VVol; adopted bytes stay as they are."""
        return await once(key, TaskRef, vvols.begin_delete, vm, name, force)

    @router.post("/vvols/{vm}/{name}/resize", status_code=202)
    async def resize(vm: str, name: str, body: ResizeVVol, key: Key = None) -> TaskRef:
        """Grow a VVol, also while it is in use."""
        return await once(key, TaskRef, vvols.begin_resize, vm, name, body)

    @router.post("/vvols/{vm}/{name}/bind", status_code=202)
    async def bind(vm: str, name: str, body: BindVVol, key: Key = None) -> TaskRef:
        """Bind a VVol to a host under the next epoch."""
        if not body.force:
            await control.may_move(vm, name, body.host)
        return await once(key, TaskRef, vvols.begin_bind, vm, name, body)

    @router.post("/vvols/{vm}/{name}/unbind", status_code=202)
    async def unbind(vm: str, name: str, body: BindVVol, key: Key = None) -> TaskRef:
        """Take a VVol from its host."""
        return await once(key, TaskRef, vvols.begin_unbind, vm, name, body)

    _cache_routes(router, control)
    _mirror_routes(router, control)

    @router.post("/apply")
    async def apply(body: ApplyRequest, key: Key = None) -> ApplyResult:
        """Bring the farm to what a farm file declares; nothing is deleted by its absence."""
        result = await once(key, ApplyResult, farm.apply, body)
        if not body.dry_run:
            try:
                await control.settings_changed()
            except NvError as error:
                text = f"the farm is applied, but control cannot follow its own settings: {error.message}"
                raise NvError(error.code, text, error.hint) from None
        return result

    @router.post("/tasks/{task_id}/cancel")
    async def cancel(task_id: int, key: Key = None) -> Task:
        """Ask a task to stop."""
        return await once(key, Task, tasks.cancel, task_id)

    @router.post("/datastores/{name}/clear-fault", status_code=202)
    async def clear_fault(name: str, key: Key = None) -> TaskRef:
        """Accept what a failed sync may have lost: FLUSH works again."""
        return await once(key, TaskRef, stores.begin_clear_fault, name)

    return router


def _cache_routes(router: APIRouter, control: Control) -> None:
    once = control.registry.run_once

    @router.post("/vvols/{vm}/{name}/cache/drain", status_code=202)
    async def drain_cache(vm: str, name: str, key: Key = None) -> TaskRef:
        """Write out what a VVol's host alone has of it; the task's `detail` tells how that ended."""
        return await once(key, TaskRef, caches.begin_drain, vm, name)

    @router.post("/vvols/{vm}/{name}/cache/discard")
    async def discard_log(vm: str, name: str, key: Key = None) -> VVol:
        """Give up what any write-back log holds of a VVol, and let what lies in its log's place be overwritten."""
        return await once(key, VVol, logs.discard, vm, name)

    @router.post("/vvols/{vm}/{name}/cache/recover")
    async def recover_log(vm: str, name: str, key: Key = None) -> VVol:
        """Replay a log that the registry knows nothing of, which the VVol's host has found."""
        return await once(key, VVol, logs.recover, vm, name, await control.found_log(vm, name))


def _mirror_routes(router: APIRouter, control: Control) -> None:
    once = control.registry.run_once

    @router.post("/vvols/{vm}/{name}/legs", status_code=202)
    async def add_leg(vm: str, name: str, body: AddLeg, key: Key = None) -> TaskRef:
        """Give a VVol another copy, on a datastore."""
        return await once(key, TaskRef, mirrors.begin_add_leg, vm, name, body)

    @router.delete("/vvols/{vm}/{name}/legs/{leg}", status_code=202)
    async def remove_leg(vm: str, name: str, leg: str, key: Key = None) -> TaskRef:
        """Take a copy away, named by its number or its datastore."""
        return await once(key, TaskRef, mirrors.begin_remove_leg, vm, name, leg)

    @router.post("/vvols/{vm}/{name}/legs/{leg}/resync")
    async def resync(vm: str, name: str, leg: str, body: ResyncLeg, key: Key = None) -> VVol:
        """Copy to a leg that is not in sync, or stop copying."""
        return await once(key, VVol, mirrors.resync, vm, name, leg, body.full, body.stop)

    @router.post("/vvols/{vm}/{name}/verify", status_code=202)
    async def verify(vm: str, name: str, body: VerifyMirror, key: Key = None) -> TaskRef:
        """Compare the copies that are in sync."""
        return await once(key, TaskRef, mirrors.begin_verify, vm, name, body.repair)
