"""Requests on VVols: each checks, writes its intent and queues its task, in one transaction."""

from __future__ import annotations

import json
import uuid as uuids
from typing import Any

from sqlalchemy import Row, insert, select, update

from nbdvvol.control import policy
from nbdvvol.control.registry import bindings, faults, logs, risks
from nbdvvol.control.registry import schema as s
from nbdvvol.control.registry.space import places_of
from nbdvvol.control.registry.stores import store_row
from nbdvvol.control.registry.tasks import add_task
from nbdvvol.control.registry.tx import Tx, transaction
from nbdvvol.control.registry.views import (
    HELD,
    NO_POLICY,
    check_ready,
    find_vvol,
    profile_specs,
    task_view,
    vvol_row,
    vvol_view,
)
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.farm import DatastoreConfig, DatastoreKind, ProfileConfig
from nbdvvol.model.resources import BindVVol, CreateVVol, ResizeVVol, Task, TaskRef


def _profile(tx: Tx, name: str | None) -> tuple[str, ProfileConfig] | None:
    if name is None:
        return None
    spec = tx.db.execute(select(s.profiles.c.spec).where(s.profiles.c.name == name)).scalar_one_or_none()
    if spec is None:
        raise NvError(Code.NOT_FOUND, f"no profile {name}", "declare it in the farm file and apply")
    return name, ProfileConfig.model_validate_json(spec)


def _check_adoption(name: str, body: CreateVVol, config: DatastoreConfig) -> None:
    assert body.adopt is not None, "only for adoptions"
    file = body.adopt.file
    if config.kind is DatastoreKind.DIR and (not file or "/" in file or file in (".", "..") or "\0" in file):
        raise NvError(
            Code.INVALID,
            f"VVol {name}: {file!r} is not the name of a file in datastore {body.adopt.datastore}",
            "give adopt.file, a plain name inside the directory",
        )
    if config.kind is not DatastoreKind.DIR and file is not None:
        raise NvError(
            Code.INVALID, f"VVol {name}: adopt.file is for datastores of kind dir", "take file out; use offset, length"
        )
    if body.size is not None:
        raise NvError(
            Code.INVALID, f"VVol {name}: size and adopt together say two things", "use adopt.length instead of size"
        )


def check_sees(name: str, host: str, store: str, config: DatastoreConfig) -> None:
    """Raise INVALID when the host does not see the datastore."""
    if config.hosts is not None and host not in config.hosts:
        raise NvError(
            Code.INVALID,
            f"VVol {name} lies on datastore {store}, which host {host} does not see",
            f"hosts that do: {', '.join(config.hosts) or 'none'}",
        )


def _declared(tx: Tx, body: CreateVVol) -> dict[str, Any]:
    """The row that a declaration makes, but for what tells one VVol from another. Raises NvError for what cannot be."""
    name = f"{body.vm}/{body.name}"
    home = tx.db.execute(select(s.vms.c.host).where(s.vms.c.name == body.vm)).scalar_one_or_none()
    if home is None:
        raise NvError(Code.NOT_FOUND, f"no VM {body.vm}", "declare it in the farm file and apply")
    profile = _profile(tx, body.profile)
    stores = list(tx.db.execute(select(s.datastores.c.name).order_by(s.datastores.c.name)).scalars())
    adopt = body.adopt
    if adopt is not None and body.datastore not in (None, adopt.datastore):
        raise NvError(
            Code.INVALID, f"VVol {name}: datastore {body.datastore} and adopt from {adopt.datastore}", "name one"
        )
    if adopt is not None and profile is not None and profile[1].mirror is not None:
        raise NvError(
            Code.UNSUPPORTED,
            f"VVol {name}: adopted bytes are one copy and stay as they are; profile {profile[0]} has a mirror",
            "use a profile without a mirror, or make a new VVol and copy",
        )
    places = policy.choose_places(name, adopt.datastore if adopt else body.datastore, profile, stores)
    for where in places:
        _check_place(tx, body, where, home)
    mirror = profile is not None and profile[1].mirror is not None
    return {
        "size": body.size or 0,
        "type": body.type.value,
        "profile": body.profile or "",
        "read_only": body.read_only or (profile is not None and profile[1].read_only),
        "description": body.description,
        "datastore": places[0],
        "adopt": adopt.model_dump_json() if adopt is not None else None,
        "mirror": mirror,
        "places": json.dumps(places) if mirror else "",
    }


def _check_place(tx: Tx, body: CreateVVol, where: str, home: str) -> None:
    """Raise NvError when a leg of this VVol cannot lie on a datastore."""
    name = f"{body.vm}/{body.name}"
    store = store_row(tx, where)
    config = DatastoreConfig.model_validate_json(store.config)
    policy.check_datastore(where, config)
    check_sees(name, home, where, config)
    if body.adopt is not None:
        _check_adoption(name, body, config)
    elif body.size is None:
        raise NvError(
            Code.INVALID, f"VVol {name} has neither a size nor bytes to adopt", "give it a size, such as 1GiB"
        )
    else:
        policy.check_size(name, body.size)
    adopts = body.adopt is not None and config.kind is not DatastoreKind.DIR
    if store.use == ("formatted" if adopts else "adopted"):
        raise NvError(
            Code.CONFLICT,
            f"VVol {name}: datastore {where} is {store.use}; a datastore holds new VVols or adopted bytes, never both",
            "name another datastore",
        )


def insert_vvol(tx: Tx, body: CreateVVol) -> Task:
    """Write the row of a new VVol and queue its creation. Raises NvError for what cannot be."""
    name = f"{body.vm}/{body.name}"
    taken = select(s.vvols.c.uuid).where(s.vvols.c.vm == body.vm, s.vvols.c.name == body.name)
    if tx.db.execute(taken).one_or_none() is not None:
        raise NvError(Code.EXISTS, f"VVol {name} exists already", "choose another name or delete it first")
    row = {"uuid": str(uuids.uuid4()), "vm": body.vm, "name": body.name, "state": "creating", **_declared(tx, body)}
    tx.db.execute(insert(s.vvols).values(**row))
    where = json.loads(row["places"]) if row["places"] else [row["datastore"]]
    tx.event("vvol.creating", name, f"on datastore {', '.join(where)}")
    return add_task(tx, "create", name, str(row["uuid"]))


def task_ref(tx: Tx, task: Task, uuid: str, at_risk: list[str] | None = None) -> TaskRef:
    """A task, with its VVol as that is now."""
    return TaskRef(task=task, vvol=vvol_view(tx, vvol_row(tx, uuid)), risks=at_risk or [])


@transaction
def begin_create(tx: Tx, body: CreateVVol) -> TaskRef:
    """Create a VVol: it is `creating` until its task made it ready and bound it to its VM's host."""
    task = insert_vvol(tx, body)
    return task_ref(tx, task, find_vvol(tx, body.vm, body.name).uuid)


def retry_create(tx: Tx, row: Row[Any], body: CreateVVol) -> Task:
    """Try again to create a VVol that failed while it was made, as it is declared now.

    Where it has a place already that is not the one it is to have, it gives that back first."""
    wanted = _declared(tx, body)
    place = {key: wanted[key] for key in ("size", "datastore", "adopt", "places", "mirror")}
    same = all(place[key] == getattr(row, key) for key in ("datastore", "adopt", "places", "mirror"))
    if place["adopt"] is None:
        same = same and place["size"] == row.size
    placed = tx.db.execute(select(s.legs.c.id).where(s.legs.c.vvol == row.uuid)).first() is not None
    given_back = select(s.areas.c.offset).where(s.areas.c.owner == row.uuid, s.areas.c.state == "freeing")
    start_over = placed and not (same and tx.db.execute(given_back).first() is None)
    if start_over:
        wanted |= {"state": "deleting", **{key: getattr(row, key) for key in place}}
    else:
        wanted |= {"state": "creating", **({"size": row.size} if placed else {})}
    tx.db.execute(update(s.vvols).where(s.vvols.c.uuid == row.uuid).values(**wanted, error=""))
    name = f"{row.vm}/{row.name}"
    if start_over:
        return add_task(tx, "create", name, row.uuid, instead=place)
    return add_task(tx, "create", name, row.uuid)


@transaction
def begin_delete(tx: Tx, vm: str, name: str, force: bool = False) -> TaskRef:
    """Delete a VVol: no host serves it from now on; its extents come back after release and scrubbing.

    `force`: the operator's word that hosts which do not answer hold it no more. Raises CONFLICT while busy."""
    row = find_vvol(tx, vm, name)
    full = f"{vm}/{name}"
    running = tx.db.execute(select(s.tasks).where(s.tasks.c.id == row.task)).one_or_none()
    if running is not None and running.kind == "delete":
        if force:
            bindings.unbind(tx, row.uuid, True)
            bindings.give_up_holders(tx, row.uuid)
        return task_ref(tx, task_view(running), row.uuid)
    task = add_task(tx, "delete", full, row.uuid, force=force)
    tx.db.execute(update(s.vvols).where(s.vvols.c.uuid == row.uuid).values(state="deleting", error=""))
    bindings.unbind(tx, row.uuid, force)
    tx.event("vvol.deleting", full, "deleted by request")
    return task_ref(tx, task, row.uuid)


def start_resize(tx: Tx, row: Row[Any], size: int) -> Task | None:
    """Queue growing to `size`; None when it has that size. Raises INVALID for anything smaller."""
    name = f"{row.vm}/{row.name}"
    check_ready(row)
    if size == row.size:
        return None
    if size < row.size:
        raise NvError(
            Code.INVALID,
            f"VVol {name}: {size} bytes are fewer than the {row.size} it has; a VVol only grows",
            "make a smaller VVol and copy",
        )
    if row.adopt is not None:
        raise NvError(Code.UNSUPPORTED, f"VVol {name} is adopted: it has the bytes it has", "make a new VVol and copy")
    policy.check_size(name, size)
    logs.check_growth(tx, row, profile_specs(tx).get(row.profile, NO_POLICY))
    return add_task(tx, "resize", name, row.uuid, size=size)


@transaction
def begin_resize(tx: Tx, vm: str, name: str, body: ResizeVVol) -> TaskRef:
    """Grow a VVol, bound or not; its clients see the new size when they ask again."""
    row = find_vvol(tx, vm, name)
    task = start_resize(tx, row, body.size)
    if task is None:
        task = add_task(tx, "resize", f"{vm}/{name}", row.uuid, size=body.size)
    return task_ref(tx, task, row.uuid)


def start_bind(tx: Tx, row: Row[Any], host: str, force: bool = False) -> Task:
    """Queue binding to `host`. Raises NOT_FOUND or INVALID when that host cannot serve it."""
    name = f"{row.vm}/{row.name}"
    if tx.db.execute(select(s.hosts.c.name).where(s.hosts.c.name == host)).one_or_none() is None:
        raise NvError(Code.NOT_FOUND, f"no host {host}", "list them: nbdvvol get hosts")
    for leg in tx.db.execute(select(s.legs.c.datastore).where(s.legs.c.vvol == row.uuid)).scalars():
        check_sees(name, host, leg, DatastoreConfig.model_validate_json(store_row(tx, leg).config))
    return add_task(tx, "bind", name, row.uuid, host=host, force=force)


@transaction
def begin_bind(tx: Tx, vm: str, name: str, body: BindVVol) -> TaskRef:
    """Bind a VVol to a host (left out: its VM's). Raises CONFLICT unless it is ready and idle.

    `force` takes it from a host that does not answer, also for a bind that waits already."""
    row = find_vvol(tx, vm, name)
    check_ready(row)
    running = tx.db.execute(select(s.tasks).where(s.tasks.c.id == row.task)).one_or_none()
    at_risk = risks.sentences(tx, row) if body.force else []
    if running is not None and body.force and running.kind == "bind":
        bindings.unbind(tx, row.uuid, True)
        faults.accept(tx, row.uuid, f"{vm}/{name}")
        wanted = json.loads(running.args)["host"]
        if logs.kept_by(tx, row.uuid) != wanted:
            logs.give_up(tx, row, f"given up for host {wanted}, by force")
        return task_ref(tx, task_view(running), row.uuid, at_risk)
    home: str = tx.db.execute(select(s.vms.c.host).where(s.vms.c.name == vm)).scalar_one()
    return task_ref(tx, start_bind(tx, row, body.host or home, body.force), row.uuid, at_risk)


@transaction
def begin_unbind(tx: Tx, vm: str, name: str, body: BindVVol) -> TaskRef:
    """Take a VVol from its host. With `force`, also from one that does not answer, even in a task that waits."""
    row = find_vvol(tx, vm, name)
    if body.host is not None:
        mine = select(s.holders).where(s.holders.c.vvol == row.uuid, s.holders.c.host == body.host)
        if tx.db.execute(mine).one_or_none() is None:
            raise NvError(
                Code.CONFLICT, f"VVol {vm}/{name} is not bound to host {body.host}", "look: nbdvvol get vvols"
            )
    running = tx.db.execute(select(s.tasks).where(s.tasks.c.id == row.task)).one_or_none()
    at_risk = risks.sentences(tx, row) if body.force else []
    if running is not None and body.force and running.kind in ("bind", "unbind"):
        bindings.unbind(tx, row.uuid, True)
        return task_ref(tx, task_view(running), row.uuid, at_risk)
    task = add_task(tx, "unbind", f"{vm}/{name}", row.uuid, force=body.force)
    bindings.unbind(tx, row.uuid, body.force)
    return task_ref(tx, task, row.uuid, at_risk)


def places_now(tx: Tx, row: Row[Any]) -> list[str]:
    """The datastores that a VVol's legs lie on, or, until it is whole, are to lie on."""
    legs = select(s.legs.c.datastore).where(s.legs.c.vvol == row.uuid, s.legs.c.life != "leaving")
    found = list(tx.db.execute(legs.order_by(s.legs.c.id)).scalars())
    return found if found and row.state == "ready" else places_of(row)


def bound_host(tx: Tx, uuid: str) -> str | None:
    """The host a VVol is bound to, or being bound to."""
    query = select(s.holders.c.host).where(s.holders.c.vvol == uuid, s.holders.c.state.in_(HELD))
    return tx.db.execute(query).scalar_one_or_none()
