"""Which write-back log may hold data of a VVol (docs/cache.md section 10), and the steps by which that changes.

While one does, the VVol is pinned to that log's host: another one gets it only after a drain, or by the operator's word
that gives the data up. `log_change` is the compare-and-swap that filters ask for; control/logs.py decides it.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Row, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from nbdvvol.control.logs import Standing, decide
from nbdvvol.control.registry import schema as s
from nbdvvol.control.registry.tx import Tx, now, transaction
from nbdvvol.control.registry.views import HELD, check_ready, find_vvol, kept_view, log_row, vvol_view
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.farm import HostConfig, ProfileConfig
from nbdvvol.model.log import FoundLog, LogChange, LogNote, LogRecord, LogReport, LogSpec
from nbdvvol.model.resources import LogKept, VVol

NONE: dict[str, Any] = {"state": "clean", "log": "", "since": "", "told": "", "dirty_bytes": 0, "oldest_ms": 0}
"""Of a log that holds nothing. `host` and `file` stay: its file may still be there."""


def standing(row: Row[Any] | None) -> Standing:
    """The same, for deciding."""
    if row is None:
        return Standing()
    if row.state != "dirty":
        host = row.host if row.state == "unknown" else ""
        return Standing(row.state, host, "", row.epoch, row.wish == "drain", row.given_up)
    return Standing(row.state, row.host, row.log, row.epoch, row.wish == "drain", row.given_up)


def _set(tx: Tx, uuid: str, **values: object) -> None:
    row = upsert(s.logs).values(vvol=uuid, **values)
    tx.db.execute(row.on_conflict_do_update(index_elements=["vvol"], set_=values))
    tx.about.add(uuid)
    tx.changed = True


def _touch(tx: Tx, uuid: str) -> None:
    """Whoever serves the VVol is to hear of it."""
    holds = select(s.holders.c.host).where(s.holders.c.vvol == uuid, s.holders.c.state.in_(HELD))
    for host in tx.db.execute(holds).scalars():
        tx.touch(host, "vvol", uuid)


# ---- the filter's questions and reports ----


@transaction
def log_change(tx: Tx, host: str, change: LogChange) -> LogRecord:
    """A filter asks for what the registry says of a VVol's log to change."""
    row = tx.db.execute(select(s.vvols).where(s.vvols.c.uuid == change.vvol)).one_or_none()
    if row is None:
        return LogRecord(id=change.id, vvol=change.vvol, refused="unknown", message="there is no such VVol")
    holder = select(s.holders).where(s.holders.c.vvol == row.uuid, s.holders.c.host == host)
    held = tx.db.execute(holder).one_or_none()
    if held is None or held.state == "forced" or held.epoch != change.epoch:
        text = f"host {host} does not hold it under epoch {change.epoch}"
        return LogRecord(id=change.id, vvol=row.uuid, refused="epoch", message=text)
    if held.state not in HELD and change.wanted == "dirty":
        text = f"host {host} is to release it"
        return LogRecord(id=change.id, vvol=row.uuid, refused="draining", message=text)
    known = log_row(tx, row.uuid)
    done = decide(standing(known), host, row.generation, change)
    if done.moved:
        _write(tx, row, known, done.after, change)
    return LogRecord(id=change.id, vvol=row.uuid, refused=done.refused, message=done.message)


def _write(tx: Tx, row: Row[Any], known: Row[Any] | None, after: Standing, change: LogChange) -> None:
    """Write what was decided, by compare-and-swap on the epoch and the generation."""
    same = (s.vvols.c.epoch == row.epoch) & (s.vvols.c.generation == row.generation)
    mine = update(s.vvols).where(s.vvols.c.uuid == row.uuid, same).values(generation=row.generation)
    if tx.db.execute(mine).rowcount != 1:
        raise NvError(Code.STALE, f"VVol {row.vm}/{row.name} moved on meanwhile", "ask again")
    name = f"{row.vm}/{row.name}"
    if after.state == "dirty":
        again = known is not None and known.state == "dirty"
        values = {"epoch": change.epoch, "generation": row.generation, "file": change.file, "discard": False}
        values |= {} if again else {"since": now(), "dirty_bytes": 0, "oldest_ms": 0, "told": ""}
        _set(tx, row.uuid, state="dirty", host=after.host, log=after.log, **values)
        _touch(tx, row.uuid)
        if not again:
            tx.event("log.began", name, f"host {after.host} logs its writes in {change.file}")
        return
    _set(tx, row.uuid, given_up=after.given_up, **NONE)
    _touch(tx, row.uuid)
    if change.wanted == "forget":
        text = f"the log {change.file} has failed and cannot be made void there: it is never replayed"
        tx.event("log.forgotten", name, f"{text}{f'; {change.reason}' if change.reason else ''}")
    else:
        why = f", after it failed: {change.reason}" if change.reason else ""
        tx.event("log.drained", name, f"its log holds nothing any more; all of it is in its storage{why}")


@transaction
def reported(tx: Tx, host: str, reports: list[LogReport]) -> None:
    """What a host said last of its logs: what `--force` would lose, when the host answers no more."""
    for report in reports:
        mine = update(s.logs).where(s.logs.c.vvol == report.uuid, s.logs.c.host == host, s.logs.c.state == "dirty")
        figures = {"dirty_bytes": report.dirty_bytes, "oldest_ms": report.oldest_age_ms, "size": report.ring_bytes}
        tx.db.execute(mine.values(told=now(), **figures))


# ---- what hosts have noted ----


def noted(tx: Tx, host: str, notes: list[LogNote], *, fresh: bool) -> None:
    """A host's filter is here, and says which logs there may hold data. A registry that was rebuilt knows of none, an
    old one of others: the VVol is kept to that host until the operator has a word on it. `fresh`: a new process."""
    for note in notes:
        row = tx.db.execute(select(s.vvols).where(s.vvols.c.uuid == note.vvol)).one_or_none()
        if row is not None and row.state == "ready" and _is_news(tx, host, row, note):
            _take_note(tx, host, row, note, fresh=fresh)


def _is_news(tx: Tx, host: str, row: Row[Any], note: LogNote) -> bool:
    """The registry may have forgotten of it. A host from which the VVol was taken in order, as far as the registry
    knows, has noted what is empty, or was given up."""
    known = standing(log_row(tx, row.uuid))
    if note.epoch <= known.given_up or (known.state == "dirty" and (known.host, known.log) == (host, note.log)):
        return False
    if known.holds and note.epoch <= known.epoch:
        return False
    return note.epoch > row.epoch or _holder_state(tx, host, row.uuid) not in ("", "forced")


def _holder_state(tx: Tx, host: str, uuid: str) -> str:
    mine = select(s.holders.c.state).where(s.holders.c.vvol == uuid, s.holders.c.host == host)
    return tx.db.execute(mine).scalar_one_or_none() or ""


def _take_note(tx: Tx, host: str, row: Row[Any], note: LogNote, *, fresh: bool) -> None:
    mine = select(s.holders).where(s.holders.c.vvol == row.uuid, s.holders.c.host == host)
    holder = tx.db.execute(mine.where(s.holders.c.state.in_(HELD), s.holders.c.epoch == note.epoch)).one_or_none()
    serves = holder is not None and not fresh  # it is in use now, by this registry's own word
    told = {"told": now(), "dirty_bytes": note.dirty_bytes} if note.dirty_bytes is not None else {"told": ""}
    values = {"log": note.log, "file": note.file, "epoch": note.epoch, "generation": note.generation, "since": now()}
    _set(tx, row.uuid, state="dirty" if serves else "unknown", host=host, discard=False, wish="", **values, **told)
    _touch(tx, row.uuid)
    text = f"host {host} has noted that its log {note.file} may hold data of it, logged under epoch {note.epoch}"
    tx.event("log.noted", f"{row.vm}/{row.name}", f"{text}; the registry knew nothing of it")


def settled(tx: Tx, host: str, uuid: str, epoch: int) -> None:
    """The host serves the VVol, under an epoch that is newer than what it had noted: its log holds nothing, or the
    operator had a word on it."""
    mine = (s.logs.c.state == "unknown") & (s.logs.c.host == host) & (s.logs.c.epoch < epoch)
    tx.db.execute(update(s.logs).where(s.logs.c.vvol == uuid, mine).values(**NONE))


# ---- what it means for others ----


@transaction
def kept(tx: Tx, uuid: str) -> LogKept | None:
    """What a log may hold of a VVol; None: nothing."""
    row = log_row(tx, uuid)
    return kept_view(row) if row is not None and row.state != "clean" else None


def holds(row: Row[Any]) -> str:
    """For people: what is known of what a log holds. "" for nothing."""
    return kept_view(row).words() if row.state != "clean" else ""


def pinned_to(tx: Tx, uuid: str) -> str:
    """The host whose log may hold data of a VVol; "" where none does, or nobody knows which."""
    row = log_row(tx, uuid)
    return row.host if row is not None and row.state == "dirty" else ""


def kept_by(tx: Tx, uuid: str) -> str:
    """The same, also where the registry has it by that host's note alone."""
    row = log_row(tx, uuid)
    return row.host if row is not None and row.state != "clean" else ""


def check_pin(tx: Tx, row: Row[Any], host: str) -> None:
    """Raise CONFLICT when a log that no host is there to drain holds data, and `host` is another one's."""
    log = log_row(tx, row.uuid)
    if log is None or log.state == "clean" or log.host == host:
        return
    serves = select(s.holders.c.host).where(s.holders.c.vvol == row.uuid, s.holders.c.host == log.host)
    if log.state == "dirty" and tx.db.execute(serves.where(s.holders.c.state.in_(HELD))).one_or_none() is not None:
        return
    raise refusal(f"{row.vm}/{row.name}", host, log)


@transaction
def refuse_elsewhere(tx: Tx, vm: str, name: str, host: str | None, connected: frozenset[str]) -> None:
    """Raise CONFLICT when a VVol is to go to another host than the one whose log holds data of it, and that host is not
    there to drain it. `host` None: its VM's."""
    row = find_vvol(tx, vm, name)
    wanted = host or tx.db.execute(select(s.vms.c.host).where(s.vms.c.name == vm)).scalar_one()
    log = log_row(tx, row.uuid)
    if log is not None and log.state == "dirty" and log.host != wanted and log.host not in connected:
        raise refusal(f"{vm}/{name}", wanted, log)
    check_pin(tx, row, wanted)


def refusal(name: str, host: str, log: Row[Any]) -> NvError:
    """Why a VVol does not go to a host."""
    if log.state == "unknown" and not log.host:
        hint = f"name the host that served it last, and say that: nbdvvol bind {name} --host HOST --force"
    else:
        hint = f"start the filter of host {log.host} and bind it there, or give that data up: "
        hint += f"nbdvvol bind {name} --host {host} --force"
    return NvError(Code.CONFLICT, f"VVol {name} cannot be served by host {host}: {holds(log)}", hint)


def give_up(tx: Tx, row: Row[Any], why: str) -> None:
    """The operator's word: what the log holds is lost, and never replayed."""
    log = log_row(tx, row.uuid)
    if log is None or log.state == "clean":
        return
    told = holds(log)
    given_up = max(log.given_up, row.epoch) if log.state == "dirty" or log.host else log.given_up
    _set(tx, row.uuid, wish="", given_up=given_up, **NONE)
    _touch(tx, row.uuid)
    tx.event("log.given_up", f"{row.vm}/{row.name}", f"{why}: {told}")


def wish_drain(tx: Tx, uuid: str) -> bool:
    """Have what the log holds carried below, and nothing more logged. False: it holds nothing."""
    row = log_row(tx, uuid)
    if row is None or row.state != "dirty":
        return False
    if row.wish != "drain":
        _set(tx, uuid, wish="drain")
        _touch(tx, uuid)
    return True


def unwish(tx: Tx, uuid: str) -> None:
    """Its drain is over, or taken back."""
    row = log_row(tx, uuid)
    if row is not None and row.wish:
        _set(tx, uuid, wish="")
        _touch(tx, uuid)


@transaction
def drain(tx: Tx, uuid: str) -> None:
    """Have the log drained; what is written meanwhile goes to the storage."""
    wish_drain(tx, uuid)


@transaction
def resume(tx: Tx, uuid: str) -> None:
    """Log again, as the profile says."""
    unwish(tx, uuid)


def check_growth(tx: Tx, row: Row[Any], profile: ProfileConfig) -> None:
    """Raise CONFLICT where a VVol with a log in use could not grow: from the middle of a block."""
    held = select(s.holders.c.host).where(s.holders.c.vvol == row.uuid, s.holders.c.state.in_(HELD))
    used = profile.logging is not None or pinned_to(tx, row.uuid)
    if row.size % 4096 and used and tx.db.execute(held).first() is not None:
        raise NvError(
            Code.CONFLICT,
            f"VVol {row.vm}/{row.name} has {row.size} bytes, no multiple of 4096, and a write-back log: while that is "
            "in use it cannot grow",
            f"unbind it first: nbdvvol unbind {row.vm}/{row.name}",
        )


# ---- the operator's word on a log that cannot be used ----


@transaction
def discard(tx: Tx, vm: str, name: str) -> VVol:
    """Give up what any log holds of a VVol, and let the one in its place be overwritten. Raises CONFLICT while it is
    served with its log."""
    row = find_vvol(tx, vm, name)
    check_ready(row)
    log = log_row(tx, row.uuid)
    serves = select(s.holders.c.error).where(s.holders.c.vvol == row.uuid, s.holders.c.state == "bound")
    if log is not None and log.state == "dirty" and tx.db.execute(serves).first() is not None:
        raise NvError(
            Code.CONFLICT,
            f"VVol {vm}/{name} is served, and its log on host {log.host} is in use",
            f"have it carried to the storage instead: nbdvvol cache drain {vm}/{name}",
        )
    give_up(tx, row, "discarded by the operator")
    _set(tx, row.uuid, discard=True, wish="", given_up=row.epoch)
    _touch(tx, row.uuid)
    tx.event("log.discard", f"{vm}/{name}", "by request, what lies in the place of its log may be overwritten")
    return vvol_view(tx, row)


@transaction
def recover(tx: Tx, vm: str, name: str, found: FoundLog) -> VVol:
    """Take a log that the registry knows nothing of as the VVol's: what it holds is replayed over the storage.

    Raises UNAVAILABLE when no host has found one, CONFLICT when another log holds data of it."""
    row = find_vvol(tx, vm, name)
    check_ready(row)
    if not found.log:
        raise NvError(
            Code.UNAVAILABLE,
            f"no host tells of a log that holds data of VVol {vm}/{name} and is unknown to the registry",
            f"bind it to the host that served it last: nbdvvol bind {vm}/{name} --host HOST",
        )
    known = log_row(tx, row.uuid)
    if known is not None and known.state == "dirty":
        raise NvError(
            Code.CONFLICT, f"VVol {vm}/{name}: {holds(known)}", f"give that up first: nbdvvol cache discard {vm}/{name}"
        )
    values = {"file": found.file, "epoch": row.epoch, "generation": row.generation, "since": now(), "discard": False}
    _set(tx, row.uuid, state="dirty", host=found.host, log=found.log, wish="", **values)
    _touch(tx, row.uuid)
    text = f"by request, the log {found.file} on host {found.host} is taken as its own"
    tx.event("log.recovered", f"{vm}/{name}", text)
    return vvol_view(tx, row)


@transaction
def left_behind(tx: Tx, uuid: str) -> tuple[str, str]:
    """(host, file) of the log that a VVol which is deleted had last; empty: it had none."""
    row = log_row(tx, uuid)
    return (row.host, row.file) if row is not None else ("", "")


# ---- what a host is told ----


def log_spec(
    row: Row[Any], log: Row[Any] | None, host: str, config: HostConfig, policy: ProfileConfig
) -> LogSpec | None:
    """How a host runs a VVol's log; None: it has none."""
    wanted = policy.logging if not row.read_only else None
    folder = (wanted.path or config.logs) if wanted is not None else None
    held = log is not None and log.state == "dirty" and log.host == host
    word = log is not None and (log.discard or log.given_up)  # on what a note of the host's may name
    if folder is None and not held and not word:
        return None
    return LogSpec(
        on=folder is not None and (log is None or log.wish != "drain"),
        folder=folder or "",
        log=wanted if folder is not None else None,
        held=log.log if log is not None and held else "",
        file=log.file if log is not None and held else "",
        discard=log is not None and log.discard,
        given_up=log.given_up if log is not None else 0,
    )
