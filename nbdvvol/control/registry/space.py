"""Where a VVol's bytes lie: placing, growing and freeing them, as steps that can each be repeated after a crash."""

from __future__ import annotations

import uuid as uuids
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, delete, insert, select, update

from nbdvvol.control import allocator, policy
from nbdvvol.control.allocator import AreaState, Space
from nbdvvol.control.registry import bindings, faults
from nbdvvol.control.registry import schema as s
from nbdvvol.control.registry.stores import load_areas, load_space, save_areas, store_row
from nbdvvol.control.registry.tx import Tx, transaction
from nbdvvol.control.registry.views import leg_rows, vvol_row
from nbdvvol.datastores import format as disk
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.farm import AdoptConfig, DatastoreConfig, DatastoreKind

LEG = 0
"""Every VVol has one leg until mirrors are built."""


@dataclass(frozen=True, slots=True)
class Placement:
    """A VVol and its leg, for the tasks."""

    uuid: str
    name: str
    state: str
    size: int
    datastore: str
    adopt: AdoptConfig | None
    placed: bool
    object: str
    adopted: bool
    slot: int | None
    meta_offset: int
    meta_length: int
    scrub: tuple[tuple[int, int], ...]
    freeing: tuple[tuple[int, int], ...]


@transaction
def placement(tx: Tx, uuid: str) -> Placement | None:
    """Where a VVol stands; None when it is gone."""
    row = tx.db.execute(select(s.vvols).where(s.vvols.c.uuid == uuid)).one_or_none()
    if row is None:
        return None
    leg = tx.db.execute(select(s.legs).where(s.legs.c.vvol == uuid, s.legs.c.id == LEG)).one_or_none()
    mine = select(s.areas).where(s.areas.c.datastore == row.datastore, s.areas.c.owner == uuid)
    areas = tx.db.execute(mine.order_by(s.areas.c.offset)).all()
    return Placement(
        uuid=uuid,
        name=f"{row.vm}/{row.name}",
        state=row.state,
        size=row.size,
        datastore=row.datastore,
        adopt=AdoptConfig.model_validate_json(row.adopt) if row.adopt else None,
        placed=leg is not None,
        object=leg.object if leg else "",
        adopted=bool(leg.adopted) if leg else False,
        slot=leg.slot if leg else None,
        meta_offset=leg.meta_offset if leg else 0,
        meta_length=leg.meta_length if leg else 0,
        scrub=tuple((a.offset, a.length) for a in areas if a.state == AreaState.SCRUBBING),
        freeing=tuple((a.offset, a.length) for a in areas if a.state == AreaState.FREEING),
    )


def _with_space(tx: Tx, name: str, act: Callable[[Space], None]) -> None:
    space = load_space(tx, store_row(tx, name))
    before = list(space.areas)
    act(space)
    save_areas(tx, name, before, space.areas)


def _add_runs(tx: Tx, uuid: str, at_offset: int, pieces: list[tuple[int, int]]) -> None:
    """Append pieces to the map, one run where they are adjacent to the last one."""
    query = select(s.runs).where(s.runs.c.vvol == uuid, s.runs.c.leg == LEG).order_by(s.runs.c.offset.desc()).limit(1)
    for at, length in pieces:
        last = tx.db.execute(query).one_or_none()
        if last is not None and last.at + last.length == at and last.state == 0:
            mine = (s.runs.c.vvol == uuid) & (s.runs.c.leg == LEG) & (s.runs.c.offset == last.offset)
            tx.db.execute(update(s.runs).where(mine).values(length=last.length + length))
        else:
            tx.db.execute(insert(s.runs).values(vvol=uuid, leg=LEG, offset=at_offset, length=length, at=at))
        at_offset += length
    count = len(tx.db.execute(select(s.runs.c.offset).where(s.runs.c.vvol == uuid)).all())
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


@transaction
def place(tx: Tx, uuid: str) -> None:
    """Take the extents of a new VVol and of its leg's metadata. Repeating it changes nothing."""
    row = vvol_row(tx, uuid)
    if tx.db.execute(select(s.legs).where(s.legs.c.vvol == uuid)).one_or_none() is not None:
        return
    store = store_row(tx, row.datastore)
    if store.use != "formatted":
        raise NvError(Code.CONFLICT, f"datastore {row.datastore} is {store.use}, not formatted", "try again")
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
        raise NvError(error.code, f"datastore {row.datastore}: {error.message}", error.hint) from None
    save_areas(tx, row.datastore, before, space.areas)
    leg = {"vvol": uuid, "id": LEG, "datastore": row.datastore, "slot": _free_slot(tx, row.datastore, header)}
    tx.db.execute(insert(s.legs).values(**leg, meta_offset=meta_offset, meta_length=meta_length))
    _add_runs(tx, uuid, 0, pieces)


@transaction
def place_file(tx: Tx, uuid: str, object_name: str) -> None:
    """Give a new VVol a file of its own in a `dir`. Repeating it changes nothing."""
    row = vvol_row(tx, uuid)
    if tx.db.execute(select(s.legs).where(s.legs.c.vvol == uuid)).one_or_none() is None:
        tx.db.execute(insert(s.legs).values(vvol=uuid, id=LEG, datastore=row.datastore, object=object_name))
        _add_runs(tx, uuid, 0, [(0, row.size)])


@transaction
def place_adopted(tx: Tx, uuid: str, object_size: int, header: str) -> None:
    """Give a new VVol the bytes it adopts, untouched. Repeating it changes nothing.

    Raises CONFLICT when they have another owner, INVALID when they are not there."""
    row = vvol_row(tx, uuid)
    if tx.db.execute(select(s.legs).where(s.legs.c.vvol == uuid)).one_or_none() is not None:
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
    tx.db.execute(insert(s.legs).values(vvol=uuid, id=LEG, datastore=row.datastore, object=obj, adopted=True))
    tx.db.execute(insert(s.runs).values(vvol=uuid, leg=LEG, offset=0, length=area.length, at=area.offset))
    tx.db.execute(update(s.vvols).where(s.vvols.c.uuid == uuid).values(size=area.length))
    if not is_dir and store.use == "unused":
        tx.db.execute(update(s.datastores).where(s.datastores.c.name == row.datastore).values(use="adopted"))
        for host in tx.db.execute(select(s.hosts.c.name)).scalars().all():
            tx.touch(host, "datastore", row.datastore)


@transaction
def scrubbed(tx: Tx, uuid: str) -> None:
    """All that was to be scrubbed for this VVol is zero, on stable storage."""
    _with_space(tx, vvol_row(tx, uuid).datastore, lambda space: space.scrubbed(uuid))


@transaction
def ready(tx: Tx, uuid: str) -> None:
    """A new VVol is whole: it may be bound."""
    row = vvol_row(tx, uuid)
    if row.state != "creating":
        return
    if store_row(tx, row.datastore).use == "formatted":
        _with_space(tx, row.datastore, lambda space: space.commit(uuid))
    tx.db.execute(update(s.vvols).where(s.vvols.c.uuid == uuid).values(state="ready", error=""))
    tx.event("vvol.ready", f"{row.vm}/{row.name}", f"{row.size} bytes on datastore {row.datastore}")


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


@transaction
def reserve_growth(tx: Tx, uuid: str, size: int) -> None:
    """Take the extents that growing to `size` needs, as runs beyond the size. Repeating it changes nothing."""
    row = vvol_row(tx, uuid)
    pieces = tx.db.execute(select(s.runs).where(s.runs.c.vvol == uuid).order_by(s.runs.c.offset)).all()
    last = pieces[-1]
    have = last.offset + last.length
    if have >= size:
        return
    store = store_row(tx, row.datastore)
    space = load_space(tx, store)
    before = list(space.areas)
    try:
        taken = space.take(size - have, uuid, near=last.at + last.length)
    except NvError as error:
        raise NvError(error.code, f"datastore {row.datastore}: {error.message}", error.hint) from None
    save_areas(tx, row.datastore, before, space.areas)
    _add_runs(tx, uuid, have, taken)


@transaction
def reserve_file_growth(tx: Tx, uuid: str, size: int) -> None:
    """A `dir` leg's file is about to grow."""
    row = vvol_row(tx, uuid)
    mine = update(s.runs).where(s.runs.c.vvol == uuid, s.runs.c.leg == LEG)
    tx.db.execute(mine.values(length=max(size, row.size)))


@transaction
def commit_growth(tx: Tx, uuid: str, size: int) -> None:
    """The VVol has its new size: compare-and-swap on the generation, then every holder hears of it."""
    row = vvol_row(tx, uuid)
    if row.size >= size:
        return
    if store_row(tx, row.datastore).use == "formatted":
        _with_space(tx, row.datastore, lambda space: space.commit(uuid))
    bindings.advance_generation(tx, uuid, row.generation, size=size, map_version=row.map_version + 1)
    bindings.touch_holders(tx, uuid)
    tx.event("vvol.resized", f"{row.vm}/{row.name}", f"from {row.size} to {size} bytes")


@transaction
def drop_growth(tx: Tx, uuid: str) -> None:
    """Growing was cancelled or failed: what it had taken is free again."""
    row = vvol_row(tx, uuid)
    store = store_row(tx, row.datastore)
    if store.use != "formatted":
        tx.db.execute(update(s.runs).where(s.runs.c.vvol == uuid).values(length=row.size))
        return
    _with_space(tx, row.datastore, lambda space: space.give_up(uuid))
    keep = disk.round_up(row.size, DatastoreConfig.model_validate_json(store.config).extent_size)
    for run in tx.db.execute(select(s.runs).where(s.runs.c.vvol == uuid)).all():
        mine = (s.runs.c.vvol == uuid) & (s.runs.c.leg == run.leg) & (s.runs.c.offset == run.offset)
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
    if store_row(tx, row.datastore).use == "formatted":
        _with_space(tx, row.datastore, lambda space: space.release(uuid))


def _given_back(tx: Tx, uuid: str) -> Row[Any]:
    """Everything the VVol had is scrubbed (or left as it is, if adopted): its space is free. Returns its row."""
    row = vvol_row(tx, uuid)
    store = store_row(tx, row.datastore)
    if store.use == "formatted":
        _with_space(tx, row.datastore, lambda space: space.freed(uuid))
    for leg in tx.db.execute(select(s.legs).where(s.legs.c.vvol == uuid, s.legs.c.object != "")).all():
        faults.forget(tx, leg.datastore, leg.object)
    tx.db.execute(delete(s.areas).where(s.areas.c.owner == uuid, s.areas.c.state == AreaState.ADOPTED))
    tx.db.execute(delete(s.runs).where(s.runs.c.vvol == uuid))
    tx.db.execute(delete(s.legs).where(s.legs.c.vvol == uuid))
    if store.use == "adopted" and not load_areas(tx, row.datastore):
        tx.db.execute(update(s.datastores).where(s.datastores.c.name == row.datastore).values(use="unused"))
    return row


@transaction
def finish_delete(tx: Tx, uuid: str) -> None:
    """The VVol's space is free again, and it is gone."""
    row = _given_back(tx, uuid)
    tx.db.execute(delete(s.vvols).where(s.vvols.c.uuid == uuid))
    tx.event("vvol.deleted", f"{row.vm}/{row.name}", f"its space on datastore {row.datastore} is free again")


@transaction
def start_over(tx: Tx, uuid: str, size: int, datastore: str, adopt: str | None) -> None:
    """A VVol that failed gave back the place it had: it is created anew in the one that is declared now."""
    row = _given_back(tx, uuid)
    values = {"size": size, "datastore": datastore, "adopt": adopt, "state": "creating"}
    tx.db.execute(update(s.vvols).where(s.vvols.c.uuid == uuid).values(**values))
    tx.event("vvol.creating", f"{row.vm}/{row.name}", f"anew, on datastore {datastore}")


@transaction
def stamp(tx: Tx, uuid: str) -> tuple[disk.Label, disk.MapCopy]:
    """The leg's next label and its map copy, as they are to be written now."""
    row = vvol_row(tx, uuid)
    leg = tx.db.execute(select(s.legs).where(s.legs.c.vvol == uuid, s.legs.c.id == LEG)).one()
    sequence = leg.stamp + 1
    tx.db.execute(update(s.legs).where(s.legs.c.vvol == uuid, s.legs.c.id == LEG).values(stamp=sequence))
    runs = tuple(disk.MapRun(o, n, at, state) for o, n, at, state in leg_rows(tx, [row]).runs[uuid, LEG])
    vvol = uuids.UUID(uuid)
    label = disk.Label(vvol, LEG, row.epoch, row.generation, row.size, sequence)
    return label, disk.MapCopy(vvol, LEG, row.map_version, row.size, runs)
