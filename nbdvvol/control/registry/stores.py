"""Datastores' rows: what a filter found there, formatting, and the areas of each."""

from __future__ import annotations

import uuid as uuids
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, delete, insert, select, update

from nbdvvol.control.allocator import Area, AreaState, Space
from nbdvvol.control.registry import feed
from nbdvvol.control.registry import schema as s
from nbdvvol.control.registry.tasks import add_task
from nbdvvol.control.registry.tx import Tx, transaction
from nbdvvol.control.registry.views import HELD
from nbdvvol.datastores import format as disk
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.farm import DatastoreConfig, DatastoreKind
from nbdvvol.model.link import DatastoreSpec
from nbdvvol.model.resources import TaskRef


@dataclass(frozen=True, slots=True)
class Store:
    """A datastore for the tasks."""

    name: str
    config: DatastoreConfig
    spec: DatastoreSpec
    use: str
    size: int
    state: str
    hosts: tuple[str, ...]
    header: str
    """Hex of the header that was written; empty: none."""

    @property
    def is_dir(self) -> bool:
        """Whether its legs are files of their own."""
        return self.config.kind is DatastoreKind.DIR


def store_row(tx: Tx, name: str) -> Row[Any]:
    """A datastore's row. Raises NOT_FOUND."""
    row = tx.db.execute(select(s.datastores).where(s.datastores.c.name == name)).one_or_none()
    if row is None:
        raise NvError(Code.NOT_FOUND, f"no datastore {name}", "list them: nbdvvol get datastores")
    return row


def load_areas(tx: Tx, name: str, obj: str = "") -> list[Area]:
    """The areas of a datastore's object."""
    query = select(s.areas).where(s.areas.c.datastore == name, s.areas.c.object == obj)
    return [Area(row.offset, row.length, AreaState(row.state), row.owner) for row in tx.db.execute(query)]


def save_areas(tx: Tx, name: str, before: list[Area], after: list[Area], obj: str = "") -> None:
    """Write the difference."""
    mine = (s.areas.c.datastore == name) & (s.areas.c.object == obj)
    for area in set(before) - set(after):
        tx.db.execute(delete(s.areas).where(mine, s.areas.c.offset == area.offset))
    rows = [
        {"datastore": name, "object": obj, "offset": a.offset, "length": a.length, "state": a.state, "owner": a.owner}
        for a in sorted(set(after) - set(before))
    ]
    if rows:
        tx.db.execute(insert(s.areas), rows)


def load_space(tx: Tx, row: Row[Any]) -> Space:
    """The extents of a formatted datastore."""
    return Space(DatastoreConfig.model_validate_json(row.config).extent_size, load_areas(tx, row.name))


def touch_store(tx: Tx, row: Row[Any]) -> None:
    """Every host that sees the datastore must hear of it."""
    config = DatastoreConfig.model_validate_json(row.config)
    for host in tx.db.execute(select(s.hosts.c.name)).scalars().all():
        if feed.sees(config, host):
            tx.touch(host, "datastore", row.name)


@transaction
def store(tx: Tx, name: str) -> Store:
    """One datastore. Raises NOT_FOUND."""
    row = store_row(tx, name)
    config = DatastoreConfig.model_validate_json(row.config)
    names = [host for host in tx.db.execute(select(s.hosts.c.name)).scalars() if feed.sees(config, host)]
    spec = feed.datastore_spec(tx, row)
    return Store(row.name, config, spec, row.use, row.size, row.state, tuple(sorted(names)), row.header)


@transaction
def seen_by(tx: Tx, host: str) -> list[str]:
    """Names of the datastores a host sees."""
    rows = tx.db.execute(select(s.datastores)).all()
    return [row.name for row in rows if feed.sees(DatastoreConfig.model_validate_json(row.config), host)]


def _found_on_disk(row: Row[Any], result: dict[str, Any]) -> str:
    """What is wrong with a formatted datastore's header; "" when it is the one we wrote."""
    if row.use != "formatted":
        return ""
    try:
        header = disk.decode_header(bytes.fromhex(result.get("header", "")))
    except (NvError, ValueError) as error:
        return f"{error}"
    if str(header.uuid) != row.uuid:
        return f"another datastore lies there: its UUID is {header.uuid}, expected {row.uuid}"
    return ""


@transaction
def probed(tx: Tx, name: str, host: str, result: dict[str, Any]) -> str:
    """What a filter found: sizes, header. Returns what is wrong with it, or ""."""
    row = store_row(tx, name)
    config = DatastoreConfig.model_validate_json(row.config)
    size = int(result.get("size", 0))
    wrong = _found_on_disk(row, result)
    if config.kind is not DatastoreKind.DIR and size < row.size and row.use != "unused":
        wrong = wrong or f"it shrank to {size} bytes; {row.size} are in use"
    if wrong:
        tx.db.execute(update(s.datastores).where(s.datastores.c.name == name).values(state="faulty", detail=wrong))
        if wrong != row.detail:
            tx.event("datastore.faulty", name, f"host {host}: {wrong}")
        tx.changed = True
        return wrong
    values: dict[str, Any] = {
        "size": size,
        "state": "online",
        "detail": "",
        "block_size": int(result.get("block_size", 0)),
        "direct_ok": result.get("direct_ok"),
        "fences": bool(result.get("fences", False)),
    }
    tx.db.execute(update(s.datastores).where(s.datastores.c.name == name).values(**values))
    if row.use == "formatted" and size > row.size:
        space = load_space(tx, row)
        before = list(space.areas)
        space.extend(size)
        save_areas(tx, name, before, space.areas)
    if row.state not in ("online", "faulty"):
        tx.event("datastore.online", name, f"host {host} sees it: {size} bytes")
    if (row.size, row.direct_ok) != (size, result.get("direct_ok")):
        touch_store(tx, row)
    if row.fences != values["fences"]:
        _touch_vvols(tx, name)
    tx.changed = True
    return ""


def _touch_vvols(tx: Tx, name: str) -> None:
    """Whether its server fences is new: a leg on it that is in doubt may wait for that."""
    query = select(s.holders.c.host, s.holders.c.vvol).join(s.legs, s.legs.c.vvol == s.holders.c.vvol)
    query = query.where(s.legs.c.datastore == name, s.holders.c.state.in_(HELD)).distinct()
    for host, vvol in tx.db.execute(query).all():
        tx.touch(host, "vvol", vvol)


@transaction
def missing(tx: Tx, name: str, why: str) -> None:
    """A filter that should see the datastore cannot open it."""
    row = store_row(tx, name)
    if row.state != "missing" or row.detail != why:
        tx.db.execute(update(s.datastores).where(s.datastores.c.name == name).values(state="missing", detail=why))
        tx.event("datastore.missing", name, why)


@transaction
def lost(tx: Tx, name: str, why: str) -> None:
    """The server of a remote datastore is lost; a filter dials it again."""
    row = store_row(tx, name)
    if row.state != "faulty":
        tx.db.execute(update(s.datastores).where(s.datastores.c.name == name).values(state="reconnecting", detail=why))
        tx.changed = True


@transaction
def back(tx: Tx, name: str) -> None:
    """The server of a remote datastore is connected again."""
    row = store_row(tx, name)
    if row.state in ("reconnecting", "missing"):
        tx.db.execute(update(s.datastores).where(s.datastores.c.name == name).values(state="online", detail=""))
        tx.changed = True


@transaction
def plan_format(tx: Tx, name: str, found: str, blank: bool) -> disk.Header:
    """Decide to format an unused datastore whose first bytes are `found` (hex). The same plan until it is done.

    `blank` is the filter's word that both of its ends are zero.
    Raises CONFLICT when something lies there and `format: force` is not said, or when it holds adoptions."""
    row = store_row(tx, name)
    config = DatastoreConfig.model_validate_json(row.config)
    raw = bytes.fromhex(found)
    if row.use == "adopted":
        raise NvError(
            Code.CONFLICT,
            f"datastore {name} holds adopted bytes; new VVols need one that nbdvvol formats",
            "name another datastore",
        )
    if row.header:
        return disk.decode_header(bytes.fromhex(row.header) * 2)
    if config.format != "force" and not (blank and disk.is_blank(raw)):
        what = "another farm's datastore" if disk.has_header(raw) else "something already"
        raise NvError(
            Code.CONFLICT,
            f"datastore {name} at {config.path or config.uri} holds {what}; it is not formatted over",
            "adopt it, clear its first 8 KiB, or say format: force to lose what is there",
        )
    if row.block_size > disk.PAGE:
        raise NvError(
            Code.UNSUPPORTED,
            f"datastore {name}: its server takes no less than {row.block_size} bytes at a time; nbdvvol's own format "
            f"is written in pieces of {disk.PAGE}",
            "adopt the export as a VVol instead, or serve it with a smaller minimum block",
        )
    store_id = uuids.uuid4()
    header = disk.plan_header(store_id, uuids.UUID(tx.identity), config.extent_size, row.size)
    values = {"uuid": str(store_id), "header": disk.encode_header(header).hex()}
    tx.db.execute(update(s.datastores).where(s.datastores.c.name == name).values(**values))
    return header


@transaction
def formatted(tx: Tx, name: str) -> None:
    """The header is on stable storage: the datastore has extents from now on."""
    row = store_row(tx, name)
    if row.use != "unused":
        return
    header = disk.decode_header(bytes.fromhex(row.header) * 2)
    space = Space.format(header.extent_size, row.size, header.data_offset)
    save_areas(tx, name, [], space.areas)
    tx.db.execute(update(s.datastores).where(s.datastores.c.name == name).values(use="formatted"))
    tx.event("datastore.formatted", name, f"{space.free} bytes in extents of {header.extent_size}")
    touch_store(tx, row)


@dataclass(frozen=True, slots=True)
class KnownLeg:
    """A leg that a datastore's directory may name, and how new its VVol is."""

    vvol: str
    name: str
    offset: int
    length: int
    epoch: int
    generation: int

    def is_at(self, entry: disk.Entry) -> bool:
        """Whether an entry of the directory names it. (Its number may have changed: `space.renumber`.)"""
        return (self.vvol, self.offset, self.length) == (str(entry.vvol), entry.offset, entry.length)


@transaction
def known_legs(tx: Tx, name: str) -> dict[int, KnownLeg]:
    """Legs on a formatted datastore, by their slot in its directory."""
    query = select(s.legs.c.slot, s.legs.c.meta_offset, s.legs.c.meta_length, s.vvols).join(
        s.vvols, s.vvols.c.uuid == s.legs.c.vvol
    )
    rows = tx.db.execute(query.where(s.legs.c.datastore == name, s.legs.c.slot.is_not(None))).all()
    return {
        row.slot: KnownLeg(
            row.uuid, f"{row.vm}/{row.name}", row.meta_offset, row.meta_length, row.epoch, row.generation
        )
        for row in rows
    }


@transaction
def directory_page(tx: Tx, name: str, slot: int) -> tuple[int, bytes]:
    """(offset, bytes) of the directory page that holds `slot`, as the registry has it now."""
    row = store_row(tx, name)
    header = disk.decode_header(bytes.fromhex(row.header) * 2)
    page = slot // disk.ENTRIES_A_PAGE
    query = select(s.legs).join(s.vvols, s.vvols.c.uuid == s.legs.c.vvol)
    query = query.where(s.legs.c.datastore == name, s.legs.c.slot.is_not(None), s.vvols.c.state != "deleting")
    query = query.where(s.legs.c.life != "leaving")
    entries = {
        leg.slot: disk.Entry(uuids.UUID(leg.vvol), leg.id, leg.meta_offset, leg.meta_length)
        for leg in tx.db.execute(query)
        if leg.slot // disk.ENTRIES_A_PAGE == page
    }
    return header.directory_offset + page * disk.PAGE, disk.encode_page(entries, page)


@transaction
def begin_clear_fault(tx: Tx, name: str) -> TaskRef:
    """Have every filter forget a datastore's sync faults: the operator accepts what they may have lost."""
    store_row(tx, name)
    return TaskRef(task=add_task(tx, "clear-fault", name, datastore=name))
