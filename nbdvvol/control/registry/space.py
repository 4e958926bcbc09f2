"""Where a VVol's bytes lie: placing, growing and freeing them, as steps that can each be repeated after a crash."""

from __future__ import annotations

import json
import uuid as uuids
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, delete, func, insert, select, update

from nbdvvol.control import allocator, policy
from nbdvvol.control.allocator import AreaState, Space
from nbdvvol.control.registry import bindings, faults
from nbdvvol.control.registry import schema as s
from nbdvvol.control.registry.stores import load_areas, load_space, save_areas, store_row
from nbdvvol.control.registry.tx import Tx, now, transaction
from nbdvvol.control.registry.views import leg_rows, vvol_row
from nbdvvol.datastores import format as disk
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.farm import AdoptConfig, DatastoreConfig, DatastoreKind, VVolType
from nbdvvol.model.rebuild import LegWords, MapWords

FIRST_LEG = 1
"""Legs are numbered from here: to the data plane's mirrors 0 is no leg. In older registries a single copy is leg 0; it
gets a number before it becomes a mirror's (`renumber`)."""

FILE_STEP = 1 << 20
"""Metadata at the head of a mirrored leg's own file takes whole such pieces, so that data stays aligned."""


@dataclass(frozen=True, slots=True)
class LegPlace:
    """Where a leg lies, for the tasks."""

    id: int
    datastore: str
    object: str
    adopted: bool
    slot: int | None
    meta_offset: int
    meta_length: int
    life: str
    scrub: tuple[tuple[int, int], ...]
    freeing: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """A VVol and its legs, for the tasks."""

    uuid: str
    name: str
    state: str
    size: int
    map_version: int
    mirror: bool
    places: tuple[str, ...]
    """The datastores that its first legs are to lie on, in the order of their numbers."""
    adopt: AdoptConfig | None
    legs: tuple[LegPlace, ...]

    def leg(self, number: int) -> LegPlace | None:
        """One of its legs."""
        return next((leg for leg in self.legs if leg.id == number), None)


def places_of(row: Row[Any]) -> list[str]:
    """The datastores that a VVol's first legs are to lie on."""
    return json.loads(row.places) if row.places else [row.datastore]


@transaction
def placement(tx: Tx, uuid: str) -> Placement | None:
    """Where a VVol stands; None when it is gone."""
    row = tx.db.execute(select(s.vvols).where(s.vvols.c.uuid == uuid)).one_or_none()
    if row is None:
        return None
    legs = tx.db.execute(select(s.legs).where(s.legs.c.vvol == uuid).order_by(s.legs.c.id)).all()
    return Placement(
        uuid=uuid,
        name=f"{row.vm}/{row.name}",
        state=row.state,
        size=row.size,
        map_version=row.map_version,
        mirror=row.mirror,
        places=tuple(places_of(row)),
        adopt=AdoptConfig.model_validate_json(row.adopt) if row.adopt else None,
        legs=tuple(_leg_place(tx, leg) for leg in legs),
    )


def _leg_place(tx: Tx, leg: Row[Any]) -> LegPlace:
    mine = select(s.areas).where(s.areas.c.datastore == leg.datastore, s.areas.c.owner == leg.vvol)
    areas = tx.db.execute(mine.order_by(s.areas.c.offset)).all()
    return LegPlace(
        id=leg.id,
        datastore=leg.datastore,
        object=leg.object,
        adopted=leg.adopted,
        slot=leg.slot,
        meta_offset=leg.meta_offset,
        meta_length=leg.meta_length,
        life=leg.life,
        scrub=tuple((a.offset, a.length) for a in areas if a.state == AreaState.SCRUBBING),
        freeing=tuple((a.offset, a.length) for a in areas if a.state == AreaState.FREEING),
    )


def _with_space(tx: Tx, name: str, act: Callable[[Space], None]) -> None:
    space = load_space(tx, store_row(tx, name))
    before = list(space.areas)
    act(space)
    save_areas(tx, name, before, space.areas)


def _add_runs(tx: Tx, uuid: str, leg: int, at_offset: int, pieces: list[tuple[int, int]]) -> None:
    """Append pieces to a leg's map, one run where they are adjacent to the last one."""
    mine = (s.runs.c.vvol == uuid) & (s.runs.c.leg == leg)
    query = select(s.runs).where(mine).order_by(s.runs.c.offset.desc()).limit(1)
    for at, length in pieces:
        last = tx.db.execute(query).one_or_none()
        if last is not None and last.at + last.length == at and last.state == 0:
            this = mine & (s.runs.c.offset == last.offset)
            tx.db.execute(update(s.runs).where(this).values(length=last.length + length))
        else:
            tx.db.execute(insert(s.runs).values(vvol=uuid, leg=leg, offset=at_offset, length=length, at=at))
        at_offset += length
    count = tx.db.execute(select(func.count()).select_from(s.runs).where(mine)).scalar_one()
    if count > disk.RUNS_MAX:
        raise NvError(
            Code.NO_SPACE,
            f"free space is in too many pieces: the map would have {count} runs, more than {disk.RUNS_MAX}",
            "free a larger contiguous part, or name another datastore",
        )


def _free_slot(tx: Tx, name: str, header: disk.Header) -> int:
    taken = set(tx.db.execute(select(s.legs.c.slot).where(s.legs.c.datastore == name)).scalars())
    for slot in range(header.slots):
        if slot not in taken:
            return slot
    raise NvError(Code.NO_SPACE, f"datastore {name} names {header.slots} legs already", "name another datastore")


def _leg(tx: Tx, uuid: str, leg: int) -> Row[Any] | None:
    return tx.db.execute(select(s.legs).where(s.legs.c.vvol == uuid, s.legs.c.id == leg)).one_or_none()


@transaction
def place(tx: Tx, uuid: str, leg: int, datastore: str, life: str = "live", replaces: int | None = None) -> None:
    """Take the extents of a new leg and of its metadata. Repeating it changes nothing."""
    row = vvol_row(tx, uuid)
    if _leg(tx, uuid, leg) is not None:
        return
    store = store_row(tx, datastore)
    if store.use != "formatted":
        raise NvError(Code.CONFLICT, f"datastore {datastore} is {store.use}, not formatted", "try again")
    config = DatastoreConfig.model_validate_json(store.config)
    strict = config.kind is DatastoreKind.NBD or policy.opens_direct(config, 2, store.direct_ok)
    if strict and store.block_size > policy.SECTOR:
        policy.check_size(f"{row.vm}/{row.name}", row.size, store.block_size)
    header = disk.decode_header(bytes.fromhex(store.header) * 2)
    space = load_space(tx, store)
    before = list(space.areas)
    meta_length = disk.region_bytes(row.size, header.extent_size)
    try:
        ((meta_offset, _),) = space.take(meta_length, uuid, one_run=True)
        pieces = space.take(row.size, uuid, near=meta_offset + meta_length)
    except NvError as error:
        raise NvError(error.code, f"datastore {datastore}: {error.message}", error.hint) from None
    save_areas(tx, datastore, before, space.areas)
    values = {"vvol": uuid, "id": leg, "datastore": datastore, "slot": _free_slot(tx, datastore, header)}
    where = {"meta_offset": meta_offset, "meta_length": meta_length}
    tx.db.execute(insert(s.legs).values(**values, **where, **_life(life), replaces=replaces))
    _add_runs(tx, uuid, leg, 0, pieces)


def _life(life: str) -> dict[str, str]:
    """A leg that comes to a VVol later has nothing of its bytes yet, and all is to be copied."""
    return {"life": life, "state": "stale", "resync": "full", "lost": now()} if life == "making" else {"life": life}


@transaction
def place_file(
    tx: Tx, uuid: str, leg: int, datastore: str, object_name: str, life: str = "live", replaces: int | None = None
) -> None:
    """Give a leg a file of its own in a `dir`; a mirror's metadata lies at its head. Repeating it changes nothing."""
    row = vvol_row(tx, uuid)
    if _leg(tx, uuid, leg) is not None:
        return
    meta = disk.region_bytes(row.size, FILE_STEP) if row.mirror or life == "making" else 0
    values = {"vvol": uuid, "id": leg, "datastore": datastore, "object": object_name, "meta_length": meta}
    tx.db.execute(insert(s.legs).values(**values, **_life(life), replaces=replaces))
    _add_runs(tx, uuid, leg, 0, [(meta, row.size)])


@transaction
def place_adopted(tx: Tx, uuid: str, object_size: int, header: str) -> None:
    """Give a new VVol the bytes it adopts, untouched. Repeating it changes nothing.

    Raises CONFLICT when they have another owner, INVALID when they are not there."""
    row = vvol_row(tx, uuid)
    if tx.db.execute(select(s.legs.c.id).where(s.legs.c.vvol == uuid)).first() is not None:
        return
    assert row.adopt is not None, "only for adoptions"
    adopt = AdoptConfig.model_validate_json(row.adopt)
    store = store_row(tx, row.datastore)
    is_dir = DatastoreConfig.model_validate_json(store.config).kind is DatastoreKind.DIR
    if not is_dir and (store.use == "formatted" or store.header or disk.has_header(bytes.fromhex(header))):
        raise NvError(
            Code.CONFLICT,
            f"datastore {row.datastore} is formatted by nbdvvol; its bytes are not for adoption",
            "name another datastore",
        )
    obj = adopt.file or ""
    own_file = select(s.legs.c.vvol).where(
        s.legs.c.datastore == row.datastore, s.legs.c.object == obj, s.legs.c.adopted.is_(False)
    )
    if is_dir and tx.db.execute(own_file).first() is not None:
        raise NvError(Code.CONFLICT, f"file {obj} of datastore {row.datastore} belongs to a VVol", "name another file")
    before = load_areas(tx, row.datastore, obj)
    try:
        area = allocator.adopt(before, adopt.offset, adopt.length, object_size, uuid)
    except NvError as error:
        where = f"datastore {row.datastore}" + (f", file {obj}" if obj else "")
        raise NvError(error.code, f"{where}: {error.message}", error.hint) from None
    save_areas(tx, row.datastore, before, [*before, area], obj)
    tx.db.execute(insert(s.legs).values(vvol=uuid, id=FIRST_LEG, datastore=row.datastore, object=obj, adopted=True))
    tx.db.execute(insert(s.runs).values(vvol=uuid, leg=FIRST_LEG, offset=0, length=area.length, at=area.offset))
    tx.db.execute(update(s.vvols).where(s.vvols.c.uuid == uuid).values(size=area.length))
    if not is_dir and store.use == "unused":
        tx.db.execute(update(s.datastores).where(s.datastores.c.name == row.datastore).values(use="adopted"))
        for host in tx.db.execute(select(s.hosts.c.name)).scalars().all():
            tx.touch(host, "datastore", row.datastore)


@transaction
def scrubbed(tx: Tx, uuid: str, datastore: str) -> None:
    """All that was to be scrubbed for this VVol on a datastore is zero, on stable storage."""
    _with_space(tx, datastore, lambda space: space.scrubbed(uuid))


def commit_space(tx: Tx, uuid: str, datastore: str) -> None:
    """What the VVol reserved on a datastore, all of it scrubbed, is its own from now on."""
    if store_row(tx, datastore).use == "formatted":
        _with_space(tx, datastore, lambda space: space.commit(uuid))


def _stores_of(tx: Tx, uuid: str, use: str = "formatted") -> list[str]:
    """Names of the datastores that a VVol's legs lie on and that are used so."""
    query = select(s.datastores.c.name).join(s.legs, s.legs.c.datastore == s.datastores.c.name)
    query = query.where(s.legs.c.vvol == uuid, s.datastores.c.use == use).distinct()
    return sorted(tx.db.execute(query).scalars())


@transaction
def ready(tx: Tx, uuid: str) -> None:
    """A new VVol is whole: it may be bound. The labels of its legs are durable."""
    row = vvol_row(tx, uuid)
    if row.state != "creating":
        return
    for name in _stores_of(tx, uuid):
        _with_space(tx, name, lambda space: space.commit(uuid))
    values = {"state": "ready", "error": "", "next_leg": FIRST_LEG + len(places_of(row))}
    tx.db.execute(update(s.vvols).where(s.vvols.c.uuid == uuid).values(**values))
    if row.mirror:
        stamp = {"epoch": row.epoch, "generation": row.generation}
        tx.db.execute(update(s.legs).where(s.legs.c.vvol == uuid).values(**stamp))
    tx.event("vvol.ready", f"{row.vm}/{row.name}", f"{row.size} bytes on datastore {', '.join(places_of(row))}")


@transaction
def failed(tx: Tx, uuid: str, error: str) -> None:
    """A step failed. A VVol that was being created keeps what it took: for the next try, or until it is deleted."""
    row = tx.db.execute(select(s.vvols).where(s.vvols.c.uuid == uuid)).one_or_none()
    if row is None:
        return
    values = {"error": error}
    if row.state in ("creating", "deleting"):
        values["state"] = "failed"
    tx.db.execute(update(s.vvols).where(s.vvols.c.uuid == uuid).values(**values))
    tx.changed = True


def renumber(tx: Tx, row: Row[Any]) -> Row[Any]:
    """Give a single copy from before `FIRST_LEG` its number; what is on disk is written by the task that adds a leg.

    Nobody serves the VVol. Returns its row as it is now."""
    values = {"next_leg": row.next_leg + 1}
    bindings.advance_generation(tx, row.uuid, row.generation, map_version=row.map_version + 1, **values)
    tx.db.execute(update(s.legs).where(s.legs.c.vvol == row.uuid).values(id=row.next_leg))
    tx.db.execute(update(s.runs).where(s.runs.c.vvol == row.uuid).values(leg=row.next_leg))
    return vvol_row(tx, row.uuid)


@transaction
def reserve_growth(tx: Tx, uuid: str, size: int) -> None:
    """Take the extents that growing to `size` needs on every leg, as runs beyond the size; a leg with a file of its own
    will have a longer one. All or nothing; repeating it changes nothing."""
    row = vvol_row(tx, uuid)
    for leg in tx.db.execute(select(s.legs).where(s.legs.c.vvol == uuid).order_by(s.legs.c.id)).all():
        if leg.life == "leaving":
            raise NvError(
                Code.CONFLICT,
                f"leg {leg.id} of VVol {row.vm}/{row.name} was removed and its space on datastore {leg.datastore} is "
                "not free yet",
                f"bring datastore {leg.datastore} back, or wait for its task",
            )
        if leg.object:
            mine = update(s.runs).where(s.runs.c.vvol == uuid, s.runs.c.leg == leg.id)
            tx.db.execute(mine.values(length=max(size, row.size)))
        else:
            _reserve(tx, uuid, leg, size)


def _reserve(tx: Tx, uuid: str, leg: Row[Any], size: int) -> None:
    mine = select(s.runs).where(s.runs.c.vvol == uuid, s.runs.c.leg == leg.id)
    last = tx.db.execute(mine.order_by(s.runs.c.offset.desc()).limit(1)).one()
    have = last.offset + last.length
    if have >= size:
        return
    space = load_space(tx, store_row(tx, leg.datastore))
    before = list(space.areas)
    try:
        taken = space.take(size - have, uuid, near=last.at + last.length)
    except NvError as error:
        raise NvError(error.code, f"datastore {leg.datastore}: {error.message}", error.hint) from None
    save_areas(tx, leg.datastore, before, space.areas)
    _add_runs(tx, uuid, leg.id, have, taken)


@transaction
def commit_growth(tx: Tx, uuid: str, size: int) -> None:
    """The VVol has its new size: compare-and-swap on the generation, then every holder hears of it."""
    row = vvol_row(tx, uuid)
    if row.size >= size:
        return
    for name in _stores_of(tx, uuid):
        _with_space(tx, name, lambda space: space.commit(uuid))
    bindings.advance_generation(tx, uuid, row.generation, size=size, map_version=row.map_version + 1)
    bindings.touch_holders(tx, uuid)
    tx.event("vvol.resized", f"{row.vm}/{row.name}", f"from {row.size} to {size} bytes")


@transaction
def drop_growth(tx: Tx, uuid: str) -> None:
    """Growing was cancelled or failed: what it had taken is free again."""
    row = vvol_row(tx, uuid)
    for leg in tx.db.execute(select(s.legs).where(s.legs.c.vvol == uuid)).all():
        store = store_row(tx, leg.datastore)
        if store.use != "formatted":
            mine = update(s.runs).where(s.runs.c.vvol == uuid, s.runs.c.leg == leg.id)
            tx.db.execute(mine.values(length=row.size))
        elif leg.life == "live":
            _with_space(tx, leg.datastore, lambda space: space.give_up(uuid))
            extent_size = DatastoreConfig.model_validate_json(store.config).extent_size
            _cut_runs(tx, uuid, leg.id, disk.round_up(row.size, extent_size))


def _cut_runs(tx: Tx, uuid: str, leg: int, keep: int) -> None:
    for run in tx.db.execute(select(s.runs).where(s.runs.c.vvol == uuid, s.runs.c.leg == leg)).all():
        mine = (s.runs.c.vvol == uuid) & (s.runs.c.leg == leg) & (s.runs.c.offset == run.offset)
        if run.offset >= keep:
            tx.db.execute(delete(s.runs).where(mine))
        elif run.offset + run.length > keep:
            tx.db.execute(update(s.runs).where(mine).values(length=keep - run.offset))


@transaction
def begin_freeing(tx: Tx, uuid: str) -> None:
    """No host holds the VVol any more: its extents wait to be scrubbed. Raises BUSY while one may hold it."""
    row = vvol_row(tx, uuid)
    assert row.state == "deleting", "only a VVol that is being deleted frees its extents"
    hosts = bindings.unreleased(tx, uuid)
    if hosts:
        raise NvError(Code.BUSY, f"host {', '.join(hosts)} may still hold VVol {row.vm}/{row.name}", "wait for it")
    for name in _stores_of(tx, uuid):
        _with_space(tx, name, lambda space: space.release(uuid))


@transaction
def begin_freeing_leg(tx: Tx, uuid: str, leg: int) -> None:
    """Nothing of a leg is in flight anywhere: its extents wait to be scrubbed. Repeating it changes nothing."""
    found = _leg(tx, uuid, leg)
    if found is not None and store_row(tx, found.datastore).use == "formatted":
        assert found.life != "live", "only a leg that was taken away, or never was whole, frees its extents"
        _with_space(tx, found.datastore, lambda space: space.release(uuid))


def _leg_given_back(tx: Tx, leg: Row[Any]) -> None:
    """All that the leg had is scrubbed (or left as it is, if adopted): its space is free."""
    store = store_row(tx, leg.datastore)
    if store.use == "formatted":
        _with_space(tx, leg.datastore, lambda space: space.freed(leg.vvol))
    if leg.object:
        faults.forget(tx, leg.datastore, leg.object)
    areas = (s.areas.c.datastore == leg.datastore) & (s.areas.c.owner == leg.vvol)
    tx.db.execute(delete(s.areas).where(areas, s.areas.c.state == AreaState.ADOPTED))
    tx.db.execute(delete(s.runs).where(s.runs.c.vvol == leg.vvol, s.runs.c.leg == leg.id))
    tx.db.execute(delete(s.legs).where(s.legs.c.vvol == leg.vvol, s.legs.c.id == leg.id))
    if store.use == "adopted" and not load_areas(tx, leg.datastore):
        tx.db.execute(update(s.datastores).where(s.datastores.c.name == leg.datastore).values(use="unused"))


@transaction
def leg_gone(tx: Tx, uuid: str, leg: int) -> None:
    """A leg's space is free again. Repeating it changes nothing."""
    found = _leg(tx, uuid, leg)
    row = vvol_row(tx, uuid)
    if found is None or row.state == "deleting":
        return  # the task that deletes the VVol frees this too, and may be scrubbing it again
    _leg_given_back(tx, found)
    text = f"the space of its leg {leg} on datastore {found.datastore} is free again"
    tx.event("mirror.leg_gone", f"{row.vm}/{row.name}", text)


def _given_back(tx: Tx, uuid: str) -> Row[Any]:
    """The VVol has no space any more. Returns its row."""
    for leg in tx.db.execute(select(s.legs).where(s.legs.c.vvol == uuid)).all():
        _leg_given_back(tx, leg)
    return vvol_row(tx, uuid)


@transaction
def finish_delete(tx: Tx, uuid: str) -> None:
    """The VVol's space is free again, and it is gone."""
    where = ", ".join(tx.db.execute(select(s.legs.c.datastore).where(s.legs.c.vvol == uuid)).scalars())
    row = _given_back(tx, uuid)
    tx.db.execute(delete(s.vvols).where(s.vvols.c.uuid == uuid))
    tx.event("vvol.deleted", f"{row.vm}/{row.name}", f"its space on datastore {where or row.datastore} is free again")


@transaction
def start_over(tx: Tx, uuid: str, size: int, datastore: str, adopt: str | None, places: str, mirror: bool) -> None:
    """A VVol that failed gave back the place it had: it is created anew in the one that is declared now."""
    row = _given_back(tx, uuid)
    values = {"size": size, "datastore": datastore, "adopt": adopt, "places": places, "mirror": mirror}
    tx.db.execute(update(s.vvols).where(s.vvols.c.uuid == uuid).values(**values, state="creating"))
    where = ", ".join(json.loads(places)) if places else datastore
    tx.event("vvol.creating", f"{row.vm}/{row.name}", f"anew, on datastore {where}")


def words_of(tx: Tx, row: Row[Any]) -> MapWords:
    """What the VVol's map copies say of it. A leg that is on its way in or out is none of it."""
    legs = tx.db.execute(
        select(s.legs.c.id, s.legs.c.datastore, s.datastores.c.uuid)
        .join(s.datastores, s.datastores.c.name == s.legs.c.datastore)
        .where(s.legs.c.vvol == row.uuid, s.legs.c.life == "live")
        .order_by(s.legs.c.id)
    )
    return MapWords(
        vm=row.vm,
        name=row.name,
        type=VVolType(row.type),
        profile=row.profile,
        read_only=row.read_only,
        mirror=row.mirror,
        next_leg=max(row.next_leg, FIRST_LEG + len(places_of(row))),
        legs=[LegWords(id=leg.id, datastore=leg.datastore, uuid=leg.uuid) for leg in legs],
    )


@transaction
def map_copy(tx: Tx, uuid: str, leg: int) -> tuple[disk.MapCopy, int]:
    """A leg's map copy as it is to be written now, and the version of its newest copy on disk."""
    row = vvol_row(tx, uuid)
    found = _leg(tx, uuid, leg)
    assert found is not None, "a task writes the maps of legs that its VVol has"
    runs = tuple(disk.MapRun(o, n, at, state) for o, n, at, state in leg_rows(tx, [row]).runs[uuid, leg])
    words = words_of(tx, row).model_dump_json(exclude_defaults=True).encode()
    return disk.MapCopy(uuids.UUID(uuid), leg, row.map_version, row.size, runs, words), found.map_written


@transaction
def map_is_written(tx: Tx, uuid: str, leg: int, version: int) -> None:
    """A leg's map copy of this version is on stable storage."""
    mine = update(s.legs).where(s.legs.c.vvol == uuid, s.legs.c.id == leg, s.legs.c.map_written < version)
    tx.db.execute(mine.values(map_written=version))


@transaction
def label(tx: Tx, uuid: str, leg: int) -> disk.Label | None:
    """A leg's next label, as it is to be written now; None where that is the filter's, who serves the mirror.

    A leg that comes later is labelled as not in sync, and below anything that is confirmed."""
    row = vvol_row(tx, uuid)
    found = _leg(tx, uuid, leg)
    assert found is not None, "a task labels legs that its VVol has"
    making = found.life == "making"
    if row.mirror and not making and row.state != "creating":
        return None
    sequence = found.stamp + 1
    tx.db.execute(update(s.legs).where(s.legs.c.vvol == uuid, s.legs.c.id == leg).values(stamp=sequence))
    epoch, generation = (0, 0) if making else (row.epoch, row.generation)
    return disk.Label(uuids.UUID(uuid), leg, epoch, generation, row.size, sequence, making)
