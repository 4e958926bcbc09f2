"""Syncs that failed: which host latches which object, and which VVols may have lost acknowledged bytes there.

A fault stands until the operator clears it. While it does, the host fails every FLUSH on the object, also after a
restart of its filter; and a VVol that was bound there moves to no other host, where FLUSH would call clean what is
lost.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import delete, insert, select, update

from nbdvvol.control.registry import schema as s
from nbdvvol.control.registry.tx import Tx, now, transaction
from nbdvvol.model import link
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.resources import SyncFault


@transaction
def record(tx: Tx, host: str, fault: link.Fault) -> None:
    """A host reports a failed sync. Repeating it changes nothing."""
    known = tx.db.execute(select(s.faults.c.id).where(s.faults.c.id == fault.id)).one_or_none()
    store = tx.db.execute(select(s.datastores.c.name).where(s.datastores.c.name == fault.datastore)).one_or_none()
    if known is not None:
        return
    if store is None:
        raise NvError(
            Code.NOT_FOUND, f"host {host} reports a failed sync of datastore {fault.datastore}, which is none"
        )
    values = {"datastore": fault.datastore, "object": fault.object, "host": host, "message": fault.message}
    tx.db.execute(insert(s.faults).values(id=fault.id, time=now(), **values))
    here = select(s.holders.c.vvol).where(s.holders.c.host == host)
    legs = update(s.legs).where(s.legs.c.datastore == fault.datastore, s.legs.c.object == fault.object)
    tx.db.execute(legs.where(s.legs.c.vvol.in_(here)).values(fault_host=host))
    tx.touch(host, "faults", fault.datastore)
    tx.event("sync_failed", fault.datastore, f"host {host}: {fault.message}")


def of_host(tx: Tx, host: str) -> dict[str, dict[str, str]]:
    """Datastore → fault id → object, of the faults that stand on a host."""
    found: dict[str, dict[str, str]] = {}
    for row in tx.db.execute(select(s.faults).where(s.faults.c.host == host)):
        found.setdefault(row.datastore, {})[row.id] = row.object
    return found


def of_datastore(tx: Tx, name: str) -> list[SyncFault]:
    """The faults that stand on a datastore, oldest first."""
    rows = tx.db.execute(select(s.faults).where(s.faults.c.datastore == name).order_by(s.faults.c.time)).all()
    return [
        SyncFault(host=row.host, object=row.object, message=row.message, time=datetime.fromisoformat(row.time))
        for row in rows
    ]


def inherit(tx: Tx, uuid: str, host: str) -> None:
    """A VVol is bound to a host: what it will write there shares the fate of the objects that are latched there."""
    for leg in tx.db.execute(select(s.legs).where(s.legs.c.vvol == uuid)).all():
        mine = select(s.faults.c.id).where(
            s.faults.c.host == host, s.faults.c.datastore == leg.datastore, s.faults.c.object == leg.object
        )
        if tx.db.execute(mine).first() is not None:
            this = (s.legs.c.vvol == uuid) & (s.legs.c.id == leg.id)
            tx.db.execute(update(s.legs).where(this).values(fault_host=host))


def elsewhere(tx: Tx, uuid: str, host: str) -> str:
    """What a VVol waits for before `host` may serve it, because a sync failed on another one; "" for nothing."""
    legs = select(s.legs).where(s.legs.c.vvol == uuid, s.legs.c.fault_host.not_in(("", host)))
    legs = legs.where(s.legs.c.state == "in-sync")  # of a mirror's other legs nothing is read
    return "; ".join(
        f"the operator's word on the sync that failed on host {leg.fault_host}: "
        f"nbdvvol datastore clear-fault {leg.datastore}"
        for leg in tx.db.execute(legs.order_by(s.legs.c.id))
    )


def accept(tx: Tx, uuid: str, name: str) -> None:
    """The operator takes the VVol as it is."""
    mine = (s.legs.c.vvol == uuid) & (s.legs.c.fault_host != "")
    for leg in tx.db.execute(select(s.legs).where(mine)).all():
        tx.event("vvol.forced", name, f"what the sync that failed on host {leg.fault_host} may have lost is accepted")
        tx.about.add(uuid)
    tx.db.execute(update(s.legs).where(mine).values(fault_host=""))


@transaction
def clear(tx: Tx, name: str) -> tuple[int, list[str]]:
    """The operator accepts what failed syncs of a datastore may have lost, and says that its server works on nothing
    old: what legs had there that were taken away may be freed.

    Returns the revision that says so and the hosts that must hear of it."""
    mine = s.faults.c.datastore == name
    hosts = sorted(set(tx.db.execute(select(s.faults.c.host).where(mine)).scalars()))
    tx.db.execute(delete(s.faults).where(mine))
    for host in hosts:
        tx.touch(host, "faults", name)
    waiting = select(s.legs.c.vvol).where(s.legs.c.datastore == name, s.legs.c.fault_host != "")
    tx.about |= set(tx.db.execute(waiting).scalars())
    tx.db.execute(update(s.legs).where(s.legs.c.datastore == name).values(fault_host=""))
    over = s.vvols.c.state == "deleting"
    leaving = (s.legs.c.life == "leaving") | s.legs.c.vvol.in_(select(s.vvols.c.uuid).where(over))
    doubted = s.legs.c.datastore == name, s.legs.c.doubt, leaving
    tx.about |= set(tx.db.execute(select(s.legs.c.vvol).where(*doubted)).scalars())
    if tx.db.execute(update(s.legs).where(*doubted).values(doubt=False)).rowcount:
        tx.event("datastore.cleared", name, "by the operator's word its server works on nothing old: space is freed")
    if hosts:
        tx.event("datastore.cleared", name, f"sync faults of host {', '.join(hosts)} were cleared by the operator")
    return tx.revision, hosts


def forget(tx: Tx, datastore: str, name: str) -> None:
    """An object is gone, and what happened to it."""
    mine = (s.faults.c.datastore == datastore) & (s.faults.c.object == name)
    for host in set(tx.db.execute(select(s.faults.c.host).where(mine)).scalars()):
        tx.touch(host, "faults", datastore)
    tx.db.execute(delete(s.faults).where(mine))
