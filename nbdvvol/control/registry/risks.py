"""What taking a VVol from a host that does not answer puts at risk: who holds it, which legs keep that host out, what
is not flushed, its lease. Told before it is done, in the answer, and in the event list."""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy import Row, select

from nbdvvol.control.clock import Moment, moment
from nbdvvol.control.registry import leases, logs
from nbdvvol.control.registry import schema as s
from nbdvvol.control.registry.tx import Tx, transaction
from nbdvvol.control.registry.views import TOLD, find_vvol, kept_view, log_row
from nbdvvol.model.resources import ForceRisks, HolderRisk, LegRisk

_DOES = {"binding": "was told to serve it", "bound": "serves it", "releasing": "is to release it"}
OFF = "power that machine off first"


@transaction
def force_risks(tx: Tx, vm: str, name: str, now: Moment, connected: frozenset[str]) -> ForceRisks:
    """What `--force` puts at risk now. Raises NOT_FOUND."""
    return _at_risk(tx, find_vvol(tx, vm, name), now, connected)


def sentences(tx: Tx, row: Row[Any]) -> list[str]:
    """The same, for people; nothing where no host holds it and no failed sync is to be accepted."""
    return _at_risk(tx, row, moment(), frozenset()).risks


def _at_risk(tx: Tx, row: Row[Any], now: Moment, connected: frozenset[str]) -> ForceRisks:
    hosts = [_holder(tx, row, holder, now, connected) for holder in _holders(tx, row)]
    legs = _legs(tx, row)
    told = [_words(host) for host in hosts]
    if told:
        told += _of_bytes(row, [leg for leg in legs if not leg.fences])
    log = log_row(tx, row.uuid)
    if log is not None and log.state != "clean":
        told.append(f"{logs.holds(log)}: served by another host it is without that, for good")
    faulty = select(s.legs).where(s.legs.c.vvol == row.uuid, s.legs.c.fault_host != "").order_by(s.legs.c.id)
    told += [
        f"a sync failed on host {leg.fault_host}, datastore {leg.datastore}: what that lost is accepted"
        for leg in tx.db.execute(faulty).all()
    ]
    kept = kept_view(log) if log is not None and log.state != "clean" else None
    return ForceRisks(vvol=f"{row.vm}/{row.name}", hosts=hosts, legs=legs, log=kept, risks=told)


def _holders(tx: Tx, row: Row[Any]) -> list[Row[Any]]:
    """Whom it would be taken from: hosts that were told of it and have not released it."""
    mine = select(s.holders).where(s.holders.c.vvol == row.uuid, s.holders.c.state.in_((*TOLD, "releasing")))
    return list(tx.db.execute(mine.order_by(s.holders.c.host)).all())


def _legs(tx: Tx, row: Row[Any]) -> list[LegRisk]:
    query = select(s.legs, s.datastores.c.fences).join(s.datastores, s.datastores.c.name == s.legs.c.datastore)
    query = query.where(s.legs.c.vvol == row.uuid, s.legs.c.life == "live").order_by(s.legs.c.id)
    claims = bool(row.mirror)  # a single copy is not claimed, whatever its server knows
    return [
        LegRisk(leg=leg.id, datastore=leg.datastore, state=leg.state, fences=claims and leg.fences)
        for leg in tx.db.execute(query).all()
    ]


def _holder(tx: Tx, row: Row[Any], holder: Row[Any], now: Moment, connected: frozenset[str]) -> HolderRisk:
    lease: Literal["none", "runs", "over"] = "none"
    left_s = None
    if row.mirror and holder.lease_ms and leases.lease_of(tx, row.profile) is not None:
        lease = "over" if leases.is_over(tx, holder, now) else "runs"
        same_boot = holder.lease_boot == now.boot
        left_s = max(0.0, (holder.lease_ends - now.ms if same_boot else holder.lease_ms) / 1000)
    return HolderRisk(
        host=holder.host,
        state=holder.state,
        epoch=holder.epoch,
        connected=holder.host in connected,
        lease=lease,
        lease_left_s=left_s if lease == "runs" else None,
    )


def _words(holder: HolderRisk) -> str:
    text = f"host {holder.host} {_DOES[holder.state]}, under epoch {holder.epoch}, and has not released it"
    if holder.connected:
        text += "; its filter is connected: without force it is asked to drain it first, and nothing is lost"
    if holder.lease == "runs":
        text += f"; its lease may run for another {holder.lease_left_s:.0f} s"
    elif holder.lease == "over":
        text += "; its lease has run out, so that its filter has stopped"
    return text


def _of_bytes(row: Row[Any], unfenced: list[LegRisk]) -> list[str]:
    lost = "a write that it acknowledged and that was not flushed may be lost"
    if not row.mirror:
        text = "a single copy is not fenced: if its filter still runs, it may go on writing until it hears of this"
        return [f"{text}; {OFF}; its extents stay unused until it confirms", lost]
    if not unfenced:
        return ["every leg fences: what its filter still writes is dropped, and clients it still has get errors", lost]
    names = ", ".join(f"leg {leg.leg} on datastore {leg.datastore}" for leg in unfenced)
    land = "if its filter still runs, what it writes may land there beside what the new host writes"
    return [f"{names} cannot fence: {land}, and legs may differ unnoticed; {OFF}", lost]
