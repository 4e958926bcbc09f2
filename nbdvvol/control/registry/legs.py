"""The record of a mirrored VVol's legs, and the steps by which it changes (docs/mirror.md section 3).

`leg_change` is the compare-and-swap that filters ask for; what it decides is in control/legs.py. A leg comes in as
`making`, is `live` once its space, metadata and label are there, and goes out as `leaving`: out of the record at once,
its space is free only when no host can have anything of it in flight.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Row, select, update

from nbdvvol.control.legs import decide, in_sync
from nbdvvol.control.registry import bindings, logs
from nbdvvol.control.registry import schema as s
from nbdvvol.control.registry.space import commit_space
from nbdvvol.control.registry.tasks import add_task
from nbdvvol.control.registry.tx import Tx, now, transaction
from nbdvvol.control.registry.views import TOLD, log_row, vvol_row
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.mirror import LegChange, LegDoubt, LegRecord, Record, RecordLeg, Stamp

NOBODY = "*"
"""In `let_go`: no filter was ever told of the leg."""


def record_of(tx: Tx, row: Row[Any]) -> Record:
    """A VVol's record as filters go by it."""
    live = select(s.legs).where(s.legs.c.vvol == row.uuid, s.legs.c.life == "live").order_by(s.legs.c.id)
    legs = [
        RecordLeg(id=leg.id, state=leg.state, stamp=Stamp(epoch=leg.epoch, generation=leg.generation))
        for leg in tx.db.execute(live)
    ]
    return Record(epoch=row.epoch, generation=row.generation, legs=legs)


@transaction
def leg_change(tx: Tx, host: str, change: LegChange) -> LegRecord:
    """A filter asks for a leg's state to change. Whatever comes of it, the answer has the whole record."""
    row = tx.db.execute(select(s.vvols).where(s.vvols.c.uuid == change.vvol)).one_or_none()
    if row is None:
        return LegRecord(id=change.id, vvol=change.vvol, refused="unknown", message="there is no such VVol")
    record = record_of(tx, row)
    holder = select(s.holders).where(s.holders.c.vvol == row.uuid, s.holders.c.host == host)
    held = tx.db.execute(holder).one_or_none()
    if held is None or held.state == "forced" or held.epoch != change.epoch:
        text = f"host {host} does not hold it under epoch {change.epoch}"
        return LegRecord(id=change.id, vvol=row.uuid, refused="epoch", message=text, record=record)
    done = decide(record, change)
    if done.moved or done.confirmed:
        _write(tx, row, record, done.record, change)
    return LegRecord(id=change.id, vvol=row.uuid, refused=done.refused, message=done.message, record=done.record)


def _write(tx: Tx, row: Row[Any], before: Record, after: Record, change: LegChange) -> None:
    """Write what was decided, by compare-and-swap on the epoch and the generation."""
    moved = after.generation != before.generation
    same = (s.vvols.c.epoch == before.epoch) & (s.vvols.c.generation == before.generation)
    mine = update(s.vvols).where(s.vvols.c.uuid == row.uuid, same).values(generation=after.generation)
    if tx.db.execute(mine).rowcount != 1:
        raise NvError(Code.STALE, f"VVol {row.vm}/{row.name} moved on meanwhile", "ask again")
    leg = next(leg for leg in after.legs if leg.id == change.leg)
    values: dict[str, object] = {"epoch": leg.stamp.epoch, "generation": leg.stamp.generation}
    if change.wanted == "confirm" and leg.state == "syncing" and _is_newest(change, after):
        values["resync"] = "auto"  # its dirty map, of all there is or less, is durable: a copy goes on from there
    if moved:
        values |= {"state": leg.state, **_history(tx, row, leg, change)}
    tx.db.execute(update(s.legs).where(s.legs.c.vvol == row.uuid, s.legs.c.id == leg.id).values(**values))
    if moved:
        _say(tx, row, after, leg, change)
        bindings.touch_holders(tx, row.uuid)
        tx.about.add(row.uuid)


def _is_newest(change: LegChange, record: Record) -> bool:
    """The label was written since the registry called the leg `syncing`: an older one says nothing of its dirty map."""
    return change.stamp == Stamp(epoch=record.epoch, generation=record.generation)


def _history(tx: Tx, row: Row[Any], leg: RecordLeg, change: LegChange) -> dict[str, object]:
    """Since when it is not in sync, and why; a leg that was copied whole needs only what differs from then on."""
    if leg.state == "in-sync":
        return {"lost": "", "why": "", "resync": "auto", "fault_host": ""}
    if leg.state == "syncing":
        return {"doubt": False}  # who asks has seen everything end, or has the operator's word
    query = select(s.legs.c.lost).where(s.legs.c.vvol == row.uuid, s.legs.c.id == leg.id)
    return {"lost": tx.db.execute(query).scalar_one() or now(), "why": change.reason, "doubt": change.doubt}


def _say(tx: Tx, row: Row[Any], after: Record, leg: RecordLeg, change: LegChange) -> None:
    where = tx.db.execute(select(s.legs.c.datastore).where(s.legs.c.vvol == row.uuid, s.legs.c.id == leg.id))
    name = f"leg {leg.id} on datastore {where.scalar_one()}"
    left = f"{len(in_sync(after.legs))} of {len(after.legs)} legs in sync"
    words = {
        "stale": f"{name} is stale{f': {change.reason}' if change.reason else ''}; {left}",
        "syncing": f"{name} is being copied to",
        "in-sync": f"{name} is in sync; {left}",
    }
    tx.event(f"mirror.{leg.state}", f"{row.vm}/{row.name}", f"{words[leg.state]}, generation {after.generation}")


@transaction
def leg_doubt(tx: Tx, host: str, said: LegDoubt) -> None:
    """Whether a leg's server may still carry out what it was asked; a host that does not hold the VVol says nothing."""
    query = select(s.legs, s.vvols.c.vm, s.vvols.c.name).join(s.vvols, s.vvols.c.uuid == s.legs.c.vvol)
    query = query.join(s.holders, s.holders.c.vvol == s.vvols.c.uuid)
    query = query.where(s.holders.c.host == host, s.holders.c.state != "forced", s.holders.c.epoch == said.epoch)
    found = tx.db.execute(query.where(s.legs.c.vvol == said.vvol, s.legs.c.id == said.leg)).one_or_none()
    if found is None or found.state == "in-sync" or found.doubt == said.doubt:
        return
    mine = update(s.legs).where(s.legs.c.vvol == said.vvol, s.legs.c.id == said.leg)
    tx.db.execute(mine.values(doubt=said.doubt))
    bindings.touch_holders(tx, said.vvol)
    tx.about.add(said.vvol)
    tx.changed = True


# ---- a leg comes ----


@transaction
def leg_made(tx: Tx, uuid: str, leg: int) -> None:
    """A leg has its space, its metadata and a label that says "not in sync": filters may know of it.

    The VVol is a mirror from now on. Repeating it changes nothing."""
    found = leg_row(tx, uuid, leg)
    if found.life != "making":
        return
    row = vvol_row(tx, uuid)
    if not row.mirror:
        not_served(tx, row)
    commit_space(tx, uuid, found.datastore)
    tx.db.execute(update(s.legs).where(s.legs.c.vvol == uuid, s.legs.c.id == leg).values(life="live"))
    _changed_legs(tx, row, mirror=True)
    tx.event("mirror.leg_added", f"{row.vm}/{row.name}", f"leg {leg} on datastore {found.datastore}, to be copied to")


def not_served(tx: Tx, row: Row[Any]) -> None:
    """Raise BUSY while a host may serve the VVol: as a single copy, it writes down no intents. CONFLICT while a log
    holds data of it: it was logged before a single copy."""
    log = log_row(tx, row.uuid)
    if log is not None and log.state != "clean":
        raise NvError(
            Code.CONFLICT,
            f"VVol {row.vm}/{row.name}: {logs.holds(log)}",
            f"have it drained: start that host's filter, then nbdvvol unbind {row.vm}/{row.name}",
        )
    told = select(s.holders.c.host).where(s.holders.c.vvol == row.uuid, s.holders.c.state != "assigned")
    hosts = sorted(tx.db.execute(told).scalars())
    if hosts:
        raise NvError(
            Code.BUSY,
            f"host {', '.join(hosts)} serves VVol {row.vm}/{row.name} as a single copy",
            f"unbind it first: nbdvvol unbind {row.vm}/{row.name}",
        )


def _changed_legs(tx: Tx, row: Row[Any], **values: object) -> None:
    """Which legs there are has changed: the generation and the map version rise, and every holder hears of it."""
    bindings.advance_generation(tx, row.uuid, row.generation, map_version=row.map_version + 1, **values)
    bindings.touch_holders(tx, row.uuid)
    tx.about.add(row.uuid)


def leg_row(tx: Tx, uuid: str, leg: int) -> Row[Any]:
    """A leg's row. Raises NOT_FOUND."""
    found = tx.db.execute(select(s.legs).where(s.legs.c.vvol == uuid, s.legs.c.id == leg)).one_or_none()
    if found is None:
        row = vvol_row(tx, uuid)
        raise NvError(
            Code.NOT_FOUND,
            f"VVol {row.vm}/{row.name} has no leg {leg}",
            f"look: nbdvvol describe vvol {row.vm}/{row.name}",
        )
    return found


# ---- a leg goes ----


@transaction
def out_of_use(tx: Tx, uuid: str, leg: int) -> str:
    """What removing a leg waits for: that it counts no more, where a host may be using it; "" for nothing.

    Raises CONFLICT for the only leg in sync: the others were lost while it waited."""
    found = leg_row(tx, uuid, leg)
    keep_one(tx, vvol_row(tx, uuid), found)
    here = select(s.holders.c.host).where(s.holders.c.vvol == uuid, s.holders.c.state.in_((*TOLD, "releasing")))
    hosts = sorted(tx.db.execute(here).scalars())
    if found.life != "live" or found.state == "stale" or not hosts:
        return ""
    return f"host {', '.join(hosts)} to take leg {leg} out of use"


@transaction
def take_out(tx: Tx, uuid: str, leg: int) -> None:
    """A leg is no part of the VVol any more; its space is freed by a task of its own. Repeating it changes nothing.

    Raises CONFLICT for the only leg in sync."""
    found = leg_row(tx, uuid, leg)
    row = vvol_row(tx, uuid)
    if found.life == "leaving":
        return
    keep_one(tx, row, found)
    if out_of_use(tx, uuid, leg):
        raise NvError(Code.BUSY, f"leg {leg} of VVol {row.vm}/{row.name} is still in use", "wait for its host")
    never = {"let_go": NOBODY} if found.life == "making" else {}
    mine = update(s.legs).where(s.legs.c.vvol == uuid, s.legs.c.id == leg)
    tx.db.execute(mine.values(life="leaving", state="stale", **never))
    others = select(s.legs).where(s.legs.c.vvol == uuid, s.legs.c.life == "live").order_by(s.legs.c.id)
    if found.life == "live":
        first = tx.db.execute(others).first()
        assert first is not None, "one leg in sync stays"
        values = {"datastore": first.datastore} if row.datastore == found.datastore else {}
        _changed_legs(tx, row, **values)
    replaced = update(s.legs).where(s.legs.c.vvol == uuid, s.legs.c.replaces == leg)
    tx.db.execute(replaced.values(replaces=None))
    name = f"{row.vm}/{row.name}"
    add_task(tx, "free-leg", name, uuid, claim=False, leg=leg)
    tx.event("mirror.leg_removed", name, f"leg {leg} on datastore {found.datastore}; its space is freed next")


def keep_one(tx: Tx, row: Row[Any], leg: Row[Any]) -> None:
    """Raise CONFLICT when this is the VVol's only leg in sync."""
    record = record_of(tx, row)
    if leg.life == "live" and in_sync(record.legs) == [leg.id]:
        raise NvError(
            Code.CONFLICT,
            f"leg {leg.id} on datastore {leg.datastore} is the only copy of VVol {row.vm}/{row.name} that is in sync",
            f"wait until another is in sync, or add one: nbdvvol mirror add-leg {row.vm}/{row.name} --datastore NAME",
        )


@transaction
def leg_users(tx: Tx, uuid: str, leg: int) -> list[str]:
    """Hosts that may still have operations on a leaving leg in flight."""
    found = leg_row(tx, uuid, leg)
    gone = found.let_go.split("\n")
    if NOBODY in gone:
        return []
    query = select(s.holders.c.host).where(s.holders.c.vvol == uuid, s.holders.c.state != "assigned")
    return sorted(host for host in tx.db.execute(query).scalars() if host not in gone)


@transaction
def leg_released(tx: Tx, host: str, uuid: str, leg: int, doubt: bool = False) -> None:
    """Nothing of a leg that was taken out is in flight on a host. Said of another leg, it means nothing.

    `doubt`: but its server may have kept something of it."""
    mine = select(s.legs).where(s.legs.c.vvol == uuid, s.legs.c.id == leg, s.legs.c.life == "leaving")
    found = tx.db.execute(mine).one_or_none()
    if found is None:
        return
    if doubt and host not in found.let_go.split("\n"):  # it is repeated at every connect, after the operator's word too
        this = (s.legs.c.vvol == uuid) & (s.legs.c.id == leg)
        tx.db.execute(update(s.legs).where(this).values(doubt=True))
    bindings.let_go(tx, host, found)


@transaction
def doubts(tx: Tx, uuid: str, leg: int | None = None) -> str:
    """What giving back the space of a leg, or of all, waits for: old writes that may still land there; "": nothing."""
    mine = select(s.legs.c.datastore).where(s.legs.c.vvol == uuid, s.legs.c.doubt, s.legs.c.state != "in-sync")
    if leg is not None:
        mine = mine.where(s.legs.c.id == leg)
    names = sorted(set(tx.db.execute(mine).scalars()))
    return "; ".join(
        f"the operator's word that the server of datastore {name}, which timed out, was restarted and works on nothing "
        f"old: nbdvvol datastore clear-fault {name}"
        for name in names
    )


@transaction
def verified(tx: Tx, uuid: str, text: str, differed: int, left: int) -> None:
    """What comparing a mirror's legs has found: pieces that differed, and those of them that still do."""
    row = vvol_row(tx, uuid)
    tx.db.execute(update(s.vvols).where(s.vvols.c.uuid == uuid).values(differed=text if left else ""))
    tx.event("mirror.differed" if differed else "mirror.verified", f"{row.vm}/{row.name}", text)
