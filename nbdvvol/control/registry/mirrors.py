"""Requests on mirrors (add-leg, remove-leg, resync, verify), and what control does about them by itself.

Each request checks, writes its intent and queues its task, in one transaction."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Row, select, update

from nbdvvol.control import policy
from nbdvvol.control.legs import Standing, free_spare, replaced_by_now, spare_due
from nbdvvol.control.registry import bindings, legs, space
from nbdvvol.control.registry import schema as s
from nbdvvol.control.registry.stores import store_row
from nbdvvol.control.registry.tasks import add_task
from nbdvvol.control.registry.tx import Tx, transaction
from nbdvvol.control.registry.views import (
    HELD,
    NO_POLICY,
    check_ready,
    find_vvol,
    mirror_policy,
    profile_specs,
    vvol_row,
    vvol_view,
)
from nbdvvol.control.registry.vvols import check_sees, task_ref
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.farm import LEGS_MAX, DatastoreConfig, MirrorConfig
from nbdvvol.model.resources import AddLeg, Task, TaskRef, VVol

SPARE_AGAIN = timedelta(minutes=10)
"""How long a spare that could not be made is left alone."""
PARTS = "it has no room for a mirror's labels and intents: make a new VVol with a mirror's profile and copy"


def _mirrored(tx: Tx, vm: str, name: str) -> Row[Any]:
    row = find_vvol(tx, vm, name)
    check_ready(row)
    if not row.mirror:
        raise NvError(
            Code.CONFLICT,
            f"VVol {vm}/{name} is no mirror: it has one copy",
            f"add another: nbdvvol mirror add-leg {vm}/{name} --datastore DATASTORE",
        )
    return row


@transaction
def begin_add_leg(tx: Tx, vm: str, name: str, body: AddLeg) -> TaskRef:
    """Give a VVol another leg on a datastore, to be copied to. A VVol with one copy becomes a mirror by it.

    Raises CONFLICT or UNSUPPORTED for what cannot be."""
    row = find_vvol(tx, vm, name)
    check_ready(row)
    return task_ref(tx, start_add_leg(tx, row, body.datastore), row.uuid)


def start_add_leg(tx: Tx, row: Row[Any], datastore: str, replaces: int | None = None) -> Task:
    """Queue adding a leg; `replaces`: the leg whose place it takes, as a spare."""
    name = f"{row.vm}/{row.name}"
    store = store_row(tx, datastore)
    config = DatastoreConfig.model_validate_json(store.config)
    found = tx.db.execute(select(s.legs).where(s.legs.c.vvol == row.uuid).order_by(s.legs.c.id)).all()
    for leg in found:
        if leg.datastore == datastore:
            state = "is being removed from" if leg.life == "leaving" else "lies on"
            raise NvError(
                Code.CONFLICT, f"leg {leg.id} of VVol {name} {state} datastore {datastore} already", "name another one"
            )
    if len(found) >= LEGS_MAX:
        raise NvError(Code.CONFLICT, f"VVol {name} has {len(found)} legs, the most there can be", "remove one first")
    if row.adopt is not None:
        raise NvError(
            Code.UNSUPPORTED,
            f"VVol {name} is adopted: its bytes are one copy, and nothing of ours may be written beside them",
            "make a new VVol with a mirror's profile and copy",
        )
    if not row.mirror and any(not leg.meta_length for leg in found):
        raise NvError(Code.UNSUPPORTED, f"VVol {name} lies in a file of its own, without a mirror's metadata", PARTS)
    if store.use == "adopted":
        raise NvError(
            Code.CONFLICT, f"datastore {datastore} holds adopted bytes; it takes no new legs", "name another datastore"
        )
    policy.check_datastore(datastore, config)
    for host in _hosts_of(tx, row):
        check_sees(name, host, datastore, config)
    if not row.mirror:
        legs.not_served(tx, row)
        if any(leg.id < space.FIRST_LEG for leg in found):
            row = space.renumber(tx, row)
    task = add_task(
        tx, "add-leg", name, row.uuid, leg=row.next_leg, datastore=datastore, replaces=replaces, mirror=row.mirror
    )
    tx.db.execute(update(s.vvols).where(s.vvols.c.uuid == row.uuid).values(next_leg=row.next_leg + 1))
    return task


def _hosts_of(tx: Tx, row: Row[Any]) -> set[str]:
    """The VM's host, and the one that serves the VVol."""
    home: str = tx.db.execute(select(s.vms.c.host).where(s.vms.c.name == row.vm)).scalar_one()
    holds = select(s.holders.c.host).where(s.holders.c.vvol == row.uuid, s.holders.c.state.in_(HELD))
    return {home, *tx.db.execute(holds).scalars()}


def find_leg(tx: Tx, row: Row[Any], which: str) -> Row[Any]:
    """A leg by its number or its datastore. Raises NOT_FOUND with the choices."""
    found = tx.db.execute(select(s.legs).where(s.legs.c.vvol == row.uuid).order_by(s.legs.c.id)).all()
    for leg in found:
        if which in (str(leg.id), leg.datastore) and leg.life != "leaving":
            return leg
    have = ", ".join(f"{leg.id} on {leg.datastore}" for leg in found)
    raise NvError(Code.NOT_FOUND, f"VVol {row.vm}/{row.name} has no leg {which}; its legs: {have}", "name one of them")


@transaction
def begin_remove_leg(tx: Tx, vm: str, name: str, which: str) -> TaskRef:
    """Take a leg out of a mirror: it is made stale first, where a host uses it; its space comes back after scrubbing.

    Raises CONFLICT for the only leg in sync."""
    row = _mirrored(tx, vm, name)
    leg = find_leg(tx, row, which)
    return task_ref(tx, start_remove_leg(tx, row, leg), row.uuid)


def start_remove_leg(tx: Tx, row: Row[Any], leg: Row[Any]) -> Task:
    """Queue removing a leg."""
    legs.keep_one(tx, row, leg)
    task = add_task(tx, "remove-leg", f"{row.vm}/{row.name}", row.uuid, leg=leg.id, wish=leg.resync)
    wish(tx, row, leg.id, "off")
    return task


def wish(tx: Tx, row: Row[Any], leg: int, what: str, *, vouched: bool = False) -> None:
    """What is to become of a leg; its host hears of it, also when it wishes the same again, and tries at once.

    `vouched`: a person says so, and with it that nothing which a server was asked before can still land there. Nobody
    else can know that: a server that is back may yet have old requests in hand."""
    mine = (s.legs.c.vvol == row.uuid) & (s.legs.c.id == leg)
    before = legs.leg_row(tx, row.uuid, leg)
    values: dict[str, object] = {"asked": before.asked + 1, "doubt": False} if vouched else {"tries": before.tries + 1}
    tx.db.execute(update(s.legs).where(mine).values(resync=what, **values))
    bindings.touch_holders(tx, row.uuid)
    tx.about.add(row.uuid)
    tx.changed = True


@transaction
def keep_leg(tx: Tx, uuid: str, leg: int, what: str) -> None:
    """Removing a leg was taken back."""
    found = tx.db.execute(select(s.legs).where(s.legs.c.vvol == uuid, s.legs.c.id == leg)).one_or_none()
    if found is not None and found.life == "live" and found.resync == "off":
        wish(tx, vvol_row(tx, uuid), leg, what)


@transaction
def resync(tx: Tx, vm: str, name: str, which: str, full: bool = False, stop: bool = False) -> VVol:
    """Copy to a stale leg (again, or whole), or stop copying and leave it stale.

    Raises CONFLICT for a leg that is in sync."""
    row = _mirrored(tx, vm, name)
    leg = find_leg(tx, row, which)
    full_name = f"{vm}/{name}"
    if leg.state == "in-sync":
        raise NvError(
            Code.CONFLICT,
            f"leg {leg.id} of VVol {full_name} is in sync",
            f"compare it with the others: nbdvvol mirror verify {full_name}",
        )
    what = "off" if stop else "full" if full or leg.resync == "full" else "auto"
    wish(tx, row, leg.id, what, vouched=not stop)
    words = {"off": "is left stale", "full": "is copied to as a whole", "auto": "is copied to where it differs"}
    tx.event("mirror.resync", full_name, f"leg {leg.id} on datastore {leg.datastore} {words[what]}, by request")
    return vvol_view(tx, vvol_row(tx, row.uuid))


@transaction
def begin_verify(tx: Tx, vm: str, name: str, repair: bool | None = None) -> TaskRef:
    """Compare the in-sync legs of a mirror while it is served. Left out, `repair` is the profile's word."""
    row = _mirrored(tx, vm, name)
    held = select(s.holders).where(s.holders.c.vvol == row.uuid, s.holders.c.state == "bound")
    if tx.db.execute(held).one_or_none() is None:
        raise NvError(
            Code.UNAVAILABLE,
            f"no host serves VVol {vm}/{name}: its legs are compared by the host that does",
            f"bind it: nbdvvol bind {vm}/{name}",
        )
    wants = repair if repair is not None else policy_of(tx, row).verify == "repair"
    return task_ref(tx, add_task(tx, "verify", f"{vm}/{name}", row.uuid, claim=False, repair=wants), row.uuid)


def policy_of(tx: Tx, row: Row[Any]) -> MirrorConfig:
    """How a mirrored VVol is run."""
    return mirror_policy(profile_specs(tx).get(row.profile, NO_POLICY), row)


# ---- what control does by itself ----


@transaction
def tend(tx: Tx, stuck: Mapping[tuple[str, int], float] | None = None) -> None:
    """Spares for legs that are lost for too long, removal of those that a spare has replaced, map copies that are old.

    A VVol that has a task is looked at again when that is over. `stuck`: by VVol and leg, for how many seconds nothing
    has been copied to a leg that is `syncing`, by its host's word."""
    stuck = stuck or {}
    busy = s.vvols.c.task.is_not(None) | (s.vvols.c.state != "ready")
    specs = profile_specs(tx)
    for row in tx.db.execute(select(s.vvols).where(s.vvols.c.mirror, ~busy)).all():
        found = tx.db.execute(select(s.legs).where(s.legs.c.vvol == row.uuid).order_by(s.legs.c.id)).all()
        standing = [_standing(leg, stuck) for leg in found]
        done = replaced_by_now(standing)
        if done:
            _replace(tx, row, next(leg for leg in found if leg.id == done[0]))
            continue
        mirror = mirror_policy(specs.get(row.profile, NO_POLICY), row)
        due = spare_due(standing, mirror.spare_after)
        if due is not None and mirror.spares and _spare(tx, row, standing, mirror.spares, due):
            continue
        if row.error and all(leg.lost_s is None for leg in standing):
            tx.db.execute(update(s.vvols).where(s.vvols.c.uuid == row.uuid).values(error=""))
            tx.changed = True  # no spare is needed any more
        if any(leg.life == "live" and leg.map_written < row.map_version for leg in found):
            _write_maps(tx, row, found)


def _standing(leg: Row[Any], stuck: Mapping[tuple[str, int], float]) -> Standing:
    lost_s = None
    if leg.life == "live" and leg.state == "stale" and leg.lost:
        lost_s = max(0.0, (datetime.now(UTC) - datetime.fromisoformat(leg.lost)).total_seconds())
    elif leg.life == "live" and leg.state == "syncing":
        lost_s = stuck.get((leg.vvol, leg.id))
    return Standing(leg.id, leg.datastore, leg.state, lost_s, leg.replaces, leg.life == "leaving")


def _usable(tx: Tx) -> list[str]:
    return list(tx.db.execute(select(s.datastores.c.name).where(s.datastores.c.state == "online")).scalars())


def _spare(tx: Tx, row: Row[Any], standing: list[Standing], spares: list[str], lost: int) -> bool:
    """Give a lost leg a spare; False: none can be had, and that is told."""
    name = f"{row.vm}/{row.name}"
    datastore = free_spare(standing, spares, _usable(tx))
    if datastore is None:
        _no_spare(tx, row, lost, _why_none(tx, standing, spares))
        return False
    if _failed_lately(tx, name):
        return True
    try:
        start_add_leg(tx, row, datastore, replaces=lost)
    except NvError as error:
        _no_spare(tx, row, lost, f"spare {datastore}: {error.message}")
        return False
    tx.db.execute(update(s.vvols).where(s.vvols.c.uuid == row.uuid).values(error=""))
    tx.event("mirror.spare", name, f"a spare leg on datastore {datastore} takes the place of leg {lost}")
    return True


def _no_spare(tx: Tx, row: Row[Any], lost: int, why: str) -> None:
    if row.error != why:
        tx.db.execute(update(s.vvols).where(s.vvols.c.uuid == row.uuid).values(error=why))
        tx.event("mirror.no_spare", f"{row.vm}/{row.name}", f"no spare takes the place of leg {lost}: {why}")


def _why_none(tx: Tx, standing: list[Standing], spares: list[str]) -> str:
    states = {store.name: store.state for store in tx.db.execute(select(s.datastores.c.name, s.datastores.c.state))}
    taken = {leg.datastore for leg in standing}
    return "; ".join(
        f"spare {name} has a leg of it" if name in taken else f"spare {name} is {states.get(name, 'not declared')}"
        for name in spares
    )


def _failed_lately(tx: Tx, name: str) -> bool:
    """Whether adding a leg to this VVol failed not long ago: the cause may need the operator."""
    query = select(s.tasks).where(s.tasks.c.kind == "add-leg", s.tasks.c.subject == name)
    last = tx.db.execute(query.order_by(s.tasks.c.id.desc()).limit(1)).one_or_none()
    if last is None or last.state not in ("error", "cancelled"):
        return False
    return datetime.now(UTC) - datetime.fromisoformat(last.updated) < SPARE_AGAIN


def _replace(tx: Tx, row: Row[Any], leg: Row[Any]) -> None:
    start_remove_leg(tx, row, leg)
    text = f"leg {leg.id} on datastore {leg.datastore} is removed: a spare has taken its place and is in sync"
    tx.event("mirror.replaced", f"{row.vm}/{row.name}", text)


def _write_maps(tx: Tx, row: Row[Any], found: list[Row[Any]] | Any) -> None:
    """The map copies of legs whose datastores are there again."""
    usable = _usable(tx)
    if any(leg.datastore in usable and leg.life == "live" and leg.map_written < row.map_version for leg in found):
        add_task(tx, "write-maps", f"{row.vm}/{row.name}", row.uuid)


@transaction
def store_is_back(tx: Tx, name: str) -> None:
    """A datastore can be used again: legs on it that are not in sync are tried at once."""
    query = select(s.legs).where(s.legs.c.datastore == name, s.legs.c.life == "live", s.legs.c.state != "in-sync")
    for leg in tx.db.execute(query.where(s.legs.c.resync != "off")).all():
        wish(tx, vvol_row(tx, leg.vvol), leg.id, leg.resync)


@transaction
def missing_stores(tx: Tx) -> list[str]:
    """Datastores that cannot be opened and that legs lie on which are to be copied to."""
    query = select(s.datastores.c.name).join(s.legs, s.legs.c.datastore == s.datastores.c.name).distinct()
    query = query.where(s.datastores.c.state == "missing", s.legs.c.life == "live", s.legs.c.state != "in-sync")
    return sorted(tx.db.execute(query).scalars())
