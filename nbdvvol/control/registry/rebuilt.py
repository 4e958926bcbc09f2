"""Writes what a rebuild decided (control/rebuild.py) into a registry that is still empty, in one transaction.

No VVol is bound: any host that sees a VVol's datastores may still serve it by the registry that was lost, so each is a
holder that has to release it first. A filter does so by connecting; a host that never comes back is the operator's
word (`--force`), as ever.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from sqlalchemy import insert, select, update

from nbdvvol.control.allocator import Area, AreaState, Space
from nbdvvol.control.apply import Have, Plan, compare
from nbdvvol.control.registry import schema as s
from nbdvvol.control.registry import vvols
from nbdvvol.control.registry.farm import write_declared
from nbdvvol.control.registry.feed import sees
from nbdvvol.control.registry.stores import save_areas
from nbdvvol.control.registry.tasks import add_task
from nbdvvol.control.registry.tx import Tx, now, transaction
from nbdvvol.control.registry.views import vvol_row
from nbdvvol.datastores import format as disk
from nbdvvol.model.errors import NvError
from nbdvvol.model.farm import DatastoreKind, Farm, VmConfig
from nbdvvol.model.rebuild import Rebuilt, RebuiltLeg, RebuiltStore, RebuiltVVol


def plan(farm: Farm) -> tuple[Plan, Farm]:
    """How the farm is made without its VVols, whose declarations come later, by `apply`; and that farm.

    Raises NvError for what cannot be."""
    bare = farm.model_copy(update={"vms": {name: _bare(vm) for name, vm in farm.vms.items()}})
    return compare(Have(), bare), bare


def _bare(vm: VmConfig) -> VmConfig:
    return vm.model_copy(update={"vvols": {}})


@transaction
def write(tx: Tx, farm: Farm, rebuilt: Rebuilt) -> None:
    """Fill an empty registry. Nothing may stand in the way any more."""
    assert not rebuilt.blockers, "what cannot be decided is not written"
    assert tx.db.execute(select(s.vvols)).first() is None, "only an empty registry is filled"
    write_declared(tx, *plan(farm))
    for store in rebuilt.datastores:
        _write_store(tx, store, rebuilt)
    for vvol in rebuilt.vvols:
        _write_vvol(tx, vvol)
        for leg in vvol.legs:
            remote = farm.datastores[leg.datastore].kind is DatastoreKind.NBD
            _write_leg(tx, vvol, leg, _extent(rebuilt, leg), doubt=remote and leg.state != "in-sync")
    for vvol in rebuilt.vvols:
        _hold(tx, farm, vvol)
        unknown = _log_unknown(tx, farm, vvol)
        _go_on(tx, vvol, unknown=unknown)
    for store in rebuilt.datastores:
        add_task(tx, "probe", store.name, datastore=store.name)
    for note in rebuilt.notes:
        tx.event("registry.rebuilt", note.subject, note.message)
    tx.event("registry.rebuilt", "farm", f"{len(rebuilt.vvols)} VVols from {len(rebuilt.datastores)} datastores")


def _extent(rebuilt: Rebuilt, leg: RebuiltLeg) -> int:
    """Extent size of the datastore that a leg lies on; 0: a `dir`."""
    return next(store.extent_size for store in rebuilt.datastores if store.name == leg.datastore)


def _write_store(tx: Tx, store: RebuiltStore, rebuilt: Rebuilt) -> None:
    values: dict[str, object] = {"size": store.size, "direct_ok": store.direct_ok}
    if store.header:
        values |= {"uuid": store.uuid, "header": store.header, "use": "formatted"}
        _write_areas(tx, store, rebuilt)
    tx.db.execute(update(s.datastores).where(s.datastores.c.name == store.name).values(**values))


def _write_areas(tx: Tx, store: RebuiltStore, rebuilt: Rebuilt) -> None:
    """Who owns which extents; what nobody owns may hold anything."""
    owned = [Area(0, store.data_offset, AreaState.META)]
    for vvol in rebuilt.vvols:
        for leg in vvol.legs:
            if leg.datastore == store.name:
                owned += [
                    Area(at, length, AreaState.ALLOCATED, vvol.uuid) for at, length in pieces(leg, store.extent_size)
                ]
    at = 0
    areas: list[Area] = []
    for area in sorted(owned):
        if area.offset > at:
            areas.append(Area(at, area.offset - at, AreaState.DIRTY))
        areas.append(area)
        at = area.end
    space = Space(store.extent_size, areas)
    space.extend(store.size)
    save_areas(tx, store.name, [], space.areas)


def pieces(leg: RebuiltLeg, extent: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what a leg has, in whole extents; 1 in a `dir`: to the byte."""
    if leg.meta_length:
        yield leg.meta_offset, leg.meta_length
    for _, length, at, state in leg.runs:
        if state == 0:
            yield at, disk.round_up(length, extent)


def _write_vvol(tx: Tx, vvol: RebuiltVVol) -> None:
    keys = ("uuid", "vm", "name", "size", "profile", "read_only", "mirror", "epoch", "generation", "map_version")
    places = [leg.datastore for leg in vvol.legs if leg.life == "live"] or [leg.datastore for leg in vvol.legs]
    values = {key: getattr(vvol, key) for key in keys} | {
        "type": vvol.type.value,
        "state": vvol.state,
        "next_leg": vvol.next_leg,
        "datastore": places[0],
        "places": json.dumps(places) if vvol.mirror else "",
    }
    tx.db.execute(insert(s.vvols).values(**values))


def _write_leg(tx: Tx, vvol: RebuiltVVol, leg: RebuiltLeg, extent: int, *, doubt: bool) -> None:
    """A leg that is not in sync is copied to as a whole: nobody knows which of its label's promises were kept.

    `doubt`: nor what its server was asked, unless that fences."""
    keys = ("id", "datastore", "object", "life", "state", "slot", "meta_offset", "meta_length", "why", "map_written")
    values = {key: getattr(leg, key) for key in keys} | {
        "vvol": vvol.uuid,
        "stamp": leg.label_sequence,
        "epoch": leg.stamp.epoch,
        "generation": leg.stamp.generation,
        "doubt": doubt,
    }
    if leg.state != "in-sync":
        values |= {"resync": "full", "lost": now()}
    tx.db.execute(insert(s.legs).values(**values))
    last = len(leg.runs) - 1
    for index, (offset, length, at, state) in enumerate(leg.runs):
        whole = disk.round_up(length, extent) if extent and index == last else length
        run = {"vvol": vvol.uuid, "leg": leg.id, "offset": offset, "length": whole, "at": at, "state": state}
        tx.db.execute(insert(s.runs).values(**run))


def _hold(tx: Tx, farm: Farm, vvol: RebuiltVVol) -> None:
    """Every host that may have served it, as one that has not released it yet."""
    stores = {leg.datastore for leg in vvol.legs}
    for host in farm.hosts:
        if any(sees(farm.datastores[name], host) for name in stores):
            tx.db.execute(insert(s.holders).values(vvol=vvol.uuid, host=host, epoch=0, state="releasing"))


def logs_writes(farm: Farm, vvol: RebuiltVVol) -> bool:
    """Whether a VVol's profile, in the farm file or by its map copies, has a write-back log."""
    declared = farm.vms[vvol.vm].vvols.get(vvol.name) if vvol.vm in farm.vms else None
    names = {vvol.profile, declared.profile if declared is not None else None}
    return any(profile.logging is not None for name, profile in farm.profiles.items() if name in names)


def hosts_of(farm: Farm, vvol: RebuiltVVol) -> list[str]:
    """The hosts that may have served a VVol: those that see a datastore of it."""
    stores = [farm.datastores[leg.datastore] for leg in vvol.legs if leg.datastore in farm.datastores]
    return sorted(host for host in farm.hosts if any(store.hosts is None or host in store.hosts for store in stores))


def _log_unknown(tx: Tx, farm: Farm, vvol: RebuiltVVol) -> bool:
    """A log on one of several hosts may hold data of it: the operator is to say which of them served it last. Where
    there is only one, its filter will find the log."""
    if not logs_writes(farm, vvol) or len(hosts_of(farm, vvol)) < 2:
        return False
    tx.db.execute(insert(s.logs).values(vvol=vvol.uuid, state="unknown"))
    return True


def _go_on(tx: Tx, vvol: RebuiltVVol, *, unknown: bool) -> None:
    """Bind it to its VM's host, once every host has released it; free what is no part of it any more."""
    if vvol.state == "deleting":
        add_task(tx, "delete", vvol.full_name, vvol.uuid, force=False)
        return
    for leg in vvol.legs:
        if leg.life == "leaving":
            add_task(tx, "free-leg", vvol.full_name, vvol.uuid, claim=False, leg=leg.id)
    if unknown:
        text = "it is bound to no host: a write-back log may hold data of it, and nobody knows on which"
        tx.event("vvol.unbound", vvol.full_name, text)
        return
    home: str = tx.db.execute(select(s.vms.c.host).where(s.vms.c.name == vvol.vm)).scalar_one()
    try:
        vvols.start_bind(tx, vvol_row(tx, vvol.uuid), home)
    except NvError as error:
        tx.event("vvol.unbound", vvol.full_name, f"it is not bound to host {home}: {error.message}")
