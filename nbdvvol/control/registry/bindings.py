"""Which host serves a VVol, under which epoch; which hosts may still hold one.

Epochs only grow, by compare-and-swap. A VVol is given to a host only when no other host may hold it: the
others released it, or were never told of it, or their filters stopped cleanly, or the operator took it from them by
force and said so.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Row, delete, insert, select, update

from nbdvvol.control.clock import Moment
from nbdvvol.control.registry import faults, feed, leases, logs, orders, risks, views
from nbdvvol.control.registry import schema as s
from nbdvvol.control.registry.tx import Tx, transaction
from nbdvvol.control.registry.views import HELD, TOLD, vvol_row
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.link import ExportReport, Hello, Resumed, Snapshot
from nbdvvol.model.log import holding_words


def advance_epoch(tx: Tx, uuid: str, epoch: int) -> None:
    """Compare-and-swap: raise the VVol's epoch from `epoch` to the next. Raises STALE when it is another."""
    query = update(s.vvols).where(s.vvols.c.uuid == uuid, s.vvols.c.epoch == epoch).values(epoch=epoch + 1)
    if tx.db.execute(query).rowcount != 1:
        raise NvError(Code.STALE, f"VVol {uuid} is no longer at epoch {epoch}", "somebody else bound it; look again")


def advance_generation(tx: Tx, uuid: str, generation: int, **values: object) -> None:
    """Compare-and-swap: raise the generation from `generation` to the next and set `values`. Raises STALE."""
    query = update(s.vvols).where(s.vvols.c.uuid == uuid, s.vvols.c.generation == generation)
    if tx.db.execute(query.values(generation=generation + 1, **values)).rowcount != 1:
        raise NvError(
            Code.STALE, f"VVol {uuid} is no longer at generation {generation}", "somebody else changed it; look again"
        )


def touch_holder(tx: Tx, host: str, uuid: str, vm: str) -> None:
    """A binding on this host changed: its VVol, and whether it needs the VM's socket."""
    tx.touch(host, "vvol", uuid)
    tx.touch(host, "vm", vm)
    tx.about.add(uuid)


def touch_holders(tx: Tx, uuid: str) -> None:
    """The VVol itself changed: every host that serves it must hear of it."""
    for host in tx.db.execute(
        select(s.holders.c.host).where(s.holders.c.vvol == uuid, s.holders.c.state.in_(HELD))
    ).scalars():
        tx.touch(host, "vvol", uuid)


def _move(tx: Tx, uuid: str, host: str, state: str) -> None:
    tx.db.execute(update(s.holders).where(s.holders.c.vvol == uuid, s.holders.c.host == host).values(state=state))


def _take(tx: Tx, row: Row[Any], force: bool = False) -> list[str]:
    """Take a VVol from whoever has it. Returns the hosts that are to release it first.

    One whose log holds data keeps it until that is carried to the storage; by force, or to be deleted, it does not."""
    waiting = []
    pinned = logs.pinned_to(tx, row.uuid) if not force and row.state == "ready" else ""
    for holder in tx.db.execute(select(s.holders).where(s.holders.c.vvol == row.uuid)).all():
        if holder.host == pinned and holder.state in HELD:
            logs.wish_drain(tx, row.uuid)
            waiting.append(holder.host)
        elif holder.state == "assigned":
            _let_go(tx, row.uuid, holder.host, row.vm)
        elif holder.state in TOLD:
            _move(tx, row.uuid, holder.host, "releasing")
            touch_holder(tx, holder.host, row.uuid, row.vm)
        if holder.state in (*TOLD, "releasing") and holder.host not in waiting:
            waiting.append(holder.host)
    if not waiting:
        logs.unwish(tx, row.uuid)
    return waiting


def _wait_words(tx: Tx, row: Row[Any], hosts: list[str]) -> str:
    """What is waited for: that hosts release a VVol, and that one carries its log to the storage before."""
    pinned = logs.pinned_to(tx, row.uuid)
    if pinned in hosts and row.state == "ready":
        log = views.log_row(tx, row.uuid)
        assert log is not None
        held = f": {holding_words(log.dirty_bytes, log.oldest_ms)}" if log.told else ""
        return f"host {pinned} to carry what its log holds to the storage{held}"
    return f"host {', '.join(hosts)} to release it"


def _let_go(tx: Tx, uuid: str, host: str, vm: str) -> None:
    """The host holds nothing of the VVol."""
    tx.db.execute(delete(s.holders).where(s.holders.c.vvol == uuid, s.holders.c.host == host))
    touch_holder(tx, host, uuid, vm)


@transaction
def bind(tx: Tx, uuid: str, host: str, force: bool = False, now: Moment | None = None) -> str:
    """Bind to `host` under the next epoch, once nobody else may hold the VVol. Returns what it waits for, or "".

    `force` takes it from hosts that do not answer: the operator's word that they no longer serve it. Without it, a host
    whose lease has run out by `now` counts as one that stopped, if every leg keeps out what it still has in flight."""
    row = vvol_row(tx, uuid)
    if row.state != "ready":
        raise NvError(Code.CONFLICT, f"VVol {row.vm}/{row.name} is {row.state}, not ready", "wait for its task")
    name = f"{row.vm}/{row.name}"
    mine = select(s.holders).where(s.holders.c.vvol == uuid, s.holders.c.host == host, s.holders.c.state.in_(HELD))
    if tx.db.execute(mine).one_or_none() is not None:
        return ""
    if force:
        faults.accept(tx, uuid, name)
        if logs.kept_by(tx, uuid) != host:
            logs.give_up(tx, row, f"given up for host {host}, by force")
    logs.check_pin(tx, row, host)
    risk = faults.elsewhere(tx, uuid, host)
    if risk:
        return risk
    waiting = _take(tx, row, force)
    if waiting and not force:
        late = _leases_over(tx, uuid, waiting, now) if not logs.pinned_to(tx, uuid) else []
        wait = [other for other in waiting if other not in late]
        open_legs = leases.unfenced(tx, uuid) if late and not wait else []
        if wait or open_legs:
            return f"{_wait_words(tx, row, waiting)}{_open_words(name, open_legs)}"
    for other in waiting:
        _force(tx, uuid, other, name, lease=not force)
    here = s.holders.c.vvol == uuid, s.holders.c.host == host
    if tx.db.execute(select(s.holders.c.state).where(*here)).one_or_none() is None:
        for leg in tx.db.execute(select(s.legs).where(s.legs.c.vvol == uuid, s.legs.c.life == "leaving")).all():
            let_go(tx, host, leg)
    tx.db.execute(delete(s.holders).where(*here))
    advance_epoch(tx, uuid, row.epoch)
    tx.db.execute(insert(s.holders).values(vvol=uuid, host=host, epoch=row.epoch + 1, state="assigned"))
    faults.inherit(tx, uuid, host)
    touch_holder(tx, host, uuid, row.vm)
    tx.event("vvol.binding", name, f"bound to host {host} under epoch {row.epoch + 1}")
    return ""


def _leases_over(tx: Tx, uuid: str, hosts: list[str], now: Moment | None) -> list[str]:
    """Of these hosts, those that have stopped because their lease ran out."""
    if now is None or leases.lease_of(tx, vvol_row(tx, uuid).profile) is None:
        return []
    held = select(s.holders).where(s.holders.c.vvol == uuid, s.holders.c.host.in_(hosts))
    return [holder.host for holder in tx.db.execute(held).all() if leases.is_over(tx, holder, now)]


def _open_words(name: str, stores: list[str]) -> str:
    if not stores:
        return ""
    return (
        f"; its lease has run out, but datastore {', '.join(stores)} cannot fence it, so that what it still has in "
        f"flight may land later: if that machine is off, nbdvvol bind {name} --force"
    )


def _force(tx: Tx, uuid: str, host: str, name: str, *, lease: bool = False) -> None:
    at_risk = risks.sentences(tx, vvol_row(tx, uuid))
    _move(tx, uuid, host, "forced")
    tx.about.add(uuid)
    if lease:
        text = f"taken over from host {host}, whose lease has run out; every leg fences what it still has in flight"
        tx.event("vvol.lease_over", name, text)
    else:
        tx.event("vvol.forced", name, f"taken from host {host} by force: {'; '.join(at_risk)}")


@transaction
def unbind(tx: Tx, uuid: str, force: bool = False) -> str:
    """Take the VVol from its host. Returns what it waits for, or "" once no host serves it."""
    row = vvol_row(tx, uuid)
    waiting = _take(tx, row, force)
    if force:
        for host in waiting:
            _force(tx, uuid, host, f"{row.vm}/{row.name}")
        if waiting:
            advance_epoch(tx, uuid, row.epoch)  # what they ask for from now on is refused
        return ""
    return _wait_words(tx, row, waiting) if waiting else ""


@transaction
def unreleased(tx: Tx, uuid: str) -> list[str]:
    """Hosts that may still hold the VVol, those it was taken from by force too."""
    return list(tx.db.execute(select(s.holders.c.host).where(s.holders.c.vvol == uuid)).scalars())


@transaction
def home(tx: Tx, uuid: str) -> str:
    """The host of the VVol's VM."""
    query = select(s.vms.c.host).join(s.vvols, s.vvols.c.vm == s.vms.c.name).where(s.vvols.c.uuid == uuid)
    host: str = tx.db.execute(query).scalar_one()
    return host


@transaction
def serving(tx: Tx, uuid: str) -> tuple[str, int] | None:
    """(host, epoch) of the filter that serves a VVol, by its own word."""
    query = select(s.holders.c.host, s.holders.c.epoch).where(s.holders.c.vvol == uuid, s.holders.c.state == "bound")
    row = tx.db.execute(query).one_or_none()
    return (row.host, row.epoch) if row is not None else None


@transaction
def state(tx: Tx, uuid: str, host: str) -> tuple[str, str]:
    """(assigned, binding, bound, releasing, forced or "", why it is not served) of a VVol on a host."""
    mine = select(s.holders.c.state, s.holders.c.error).where(s.holders.c.vvol == uuid, s.holders.c.host == host)
    row = tx.db.execute(mine).one_or_none()
    return (row.state, row.error) if row is not None else ("", "")


@transaction
def give_up_holders(tx: Tx, uuid: str) -> None:
    """The operator's word that no host holds the VVol any more."""
    row = vvol_row(tx, uuid)
    hosts = unreleased(tx, uuid)
    if hosts:
        tx.event(
            "vvol.forced", f"{row.vm}/{row.name}", f"no longer waits for {', '.join(hosts)}, by the operator's word"
        )
        tx.db.execute(delete(s.holders).where(s.holders.c.vvol == uuid))
        for host in hosts:
            touch_holder(tx, host, uuid, row.vm)


@transaction
def released(tx: Tx, host: str, uuid: str, epoch: int) -> None:
    """The host drained what it held of a VVol up to this epoch. A newer binding to the same host stands."""
    query = select(s.holders, s.vvols.c.vm, s.vvols.c.name).join(s.vvols, s.vvols.c.uuid == s.holders.c.vvol)
    row = tx.db.execute(query.where(s.holders.c.vvol == uuid, s.holders.c.host == host)).one_or_none()
    if row is None or row.state in HELD or epoch < row.epoch:
        return
    tx.db.execute(delete(s.holders).where(s.holders.c.vvol == uuid, s.holders.c.host == host))
    tx.touch(host, "vm", row.vm)
    tx.about.add(uuid)
    tx.event("vvol.released", f"{row.vm}/{row.name}", f"released by host {host}, epoch {row.epoch}")


@transaction
def stopped(tx: Tx, host: str, instance: str) -> None:
    """The host's filter ends: it drained and synced all it held and opens nothing any more.

    Its VVols stay bound to it, and another filter of the host gets them under new epochs; but they may be taken
    without asking, because nothing of them runs anywhere."""
    row = tx.db.execute(select(s.hosts).where(s.hosts.c.name == host)).one()
    if row.instance != instance:
        return
    for holder in tx.db.execute(select(s.holders).where(s.holders.c.host == host)).all():
        if holder.state in TOLD:
            _move(tx, holder.vvol, host, "assigned")
            tx.about.add(holder.vvol)
        elif holder.state != "assigned":
            released(tx, host, holder.vvol, holder.epoch)
    tx.event("host.stopped", host, "its filter stopped cleanly; nothing of its VVols runs there")


@transaction
def report(tx: Tx, host: str, exports: list[ExportReport]) -> None:
    """What the host's filter says of its exports; those of an older epoch say nothing any more."""
    for export in exports:
        query = select(s.holders, s.vvols.c.vm, s.vvols.c.name).join(s.vvols, s.vvols.c.uuid == s.holders.c.vvol)
        row = tx.db.execute(query.where(s.holders.c.vvol == export.uuid, s.holders.c.host == host)).one_or_none()
        if row is None or row.epoch != export.epoch or row.state not in TOLD:
            continue
        state = "binding" if export.error else "bound"
        mine = update(s.holders).where(s.holders.c.vvol == export.uuid, s.holders.c.host == host)
        tx.db.execute(mine.values(state=state, facts=export.model_dump_json(), error=export.error))
        if state == "bound":
            logs.settled(tx, host, export.uuid, export.epoch)
        name = f"{row.vm}/{row.name}"
        if export.error and export.error != row.error:
            tx.event("vvol.not_served", name, f"host {host} cannot serve it: {export.error}")
        elif state != row.state:
            tx.event("vvol.bound", name, f"served by host {host} under epoch {row.epoch}")
        tx.about.add(export.uuid)
        tx.changed = True


@transaction
def connect(tx: Tx, hello: Hello) -> Snapshot | Resumed:
    """A host's filter is here. What it no longer holds is released; a new process gets new epochs.

    It resumes when it is the same process and has what the feed may have forgotten; else it gets a snapshot."""
    host = tx.db.execute(select(s.hosts).where(s.hosts.c.name == hello.host)).one()
    fresh = host.instance != hello.instance
    if fresh:
        orders.drop_dead(tx, hello.host)
    logs.noted(tx, hello.host, hello.logs, fresh=fresh)
    holding = {held.uuid: held.epoch for held in hello.held}
    query = select(s.holders, s.vvols.c.vm, s.vvols.c.epoch.label("newest")).join(
        s.vvols, s.vvols.c.uuid == s.holders.c.vvol
    )
    for row in tx.db.execute(query.where(s.holders.c.host == hello.host)).all():
        if row.state not in HELD:
            if row.vvol not in holding:
                released(tx, hello.host, row.vvol, row.epoch)
        elif fresh:
            advance_epoch(tx, row.vvol, row.newest)
            mine = update(s.holders).where(s.holders.c.vvol == row.vvol, s.holders.c.host == hello.host)
            tx.db.execute(mine.values(epoch=row.newest + 1, state="binding", facts="", error=""))
            touch_holder(tx, hello.host, row.vvol, row.vm)
    _legs_gone_from(tx, hello)
    if (host.instance, host.run_dir, host.address) != (hello.instance, hello.run_dir, hello.address):
        values = {"instance": hello.instance, "run_dir": hello.run_dir, "address": hello.address}
        tx.db.execute(update(s.hosts).where(s.hosts.c.name == hello.host).values(**values))
        tx.event("host.filter", hello.host, f"a filter runs in {hello.run_dir or 'an unknown directory'}")
    known = hello.control == tx.identity and not fresh and host.floor <= hello.revision <= tx.revision
    if known and hello.revision > 0:
        return Resumed(revision=hello.revision)
    return feed.snapshot(tx, hello.host)


def _legs_gone_from(tx: Tx, hello: Hello) -> None:
    """What a filter does not hold of legs that were taken out, it has let go of."""
    holding = {held.uuid: held.legs for held in hello.held}
    for leg in tx.db.execute(select(s.legs).where(s.legs.c.life == "leaving")).all():
        if leg.id not in holding.get(leg.vvol, []):
            let_go(tx, hello.host, leg)


def let_go(tx: Tx, host: str, leg: Row[Any]) -> None:
    """Nothing of a leg that was taken out is in flight on a host."""
    if host not in leg.let_go.split("\n"):
        mine = update(s.legs).where(s.legs.c.vvol == leg.vvol, s.legs.c.id == leg.id)
        tx.db.execute(mine.values(let_go=f"{leg.let_go}\n{host}".strip()))
        tx.about.add(leg.vvol)
        tx.changed = True


@transaction
def facts(tx: Tx, host: str, vm: str | None) -> list[tuple[str, str, str, ExportReport | None]]:
    """(VM, name, description, facts) of the VVols a host serves: of one VM, or of all."""
    query = select(s.vvols.c.vm, s.vvols.c.name, s.vvols.c.description, s.holders.c.facts)
    query = query.join(s.holders, s.holders.c.vvol == s.vvols.c.uuid)
    query = query.where(s.holders.c.host == host, s.holders.c.state.in_(HELD), s.vvols.c.state == "ready")
    if vm is not None:
        query = query.where(s.vvols.c.vm == vm)
    rows = tx.db.execute(query.order_by(s.vvols.c.vm, s.vvols.c.name)).all()
    return [(r.vm, r.name, r.description, ExportReport.model_validate_json(r.facts) if r.facts else None) for r in rows]


@transaction
def all_facts(tx: Tx) -> list[tuple[str, str, str, str, ExportReport | None]]:
    """(VM, name, description, host or "", facts) of every VVol, for control's own target."""
    held = (s.holders.c.vvol == s.vvols.c.uuid) & s.holders.c.state.in_(HELD)
    query = select(s.vvols.c.vm, s.vvols.c.name, s.vvols.c.description, s.holders.c.host, s.holders.c.facts)
    rows = tx.db.execute(query.join(s.holders, held, isouter=True).order_by(s.vvols.c.vm, s.vvols.c.name)).all()
    return [
        (r.vm, r.name, r.description, r.host or "", ExportReport.model_validate_json(r.facts) if r.facts else None)
        for r in rows
    ]


@transaction
def notice(tx: Tx, host: str, event: str, subject: str, message: str) -> None:
    """Something a filter tells the event list."""
    tx.event(event, subject, f"host {host}: {message}")
