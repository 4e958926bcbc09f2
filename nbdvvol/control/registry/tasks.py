"""Task rows: long work that survives a restart. A VVol has at most one task at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from sqlalchemy import insert, select, update

from nbdvvol.control.registry import schema as s
from nbdvvol.control.registry.tx import Tx, now, transaction
from nbdvvol.control.registry.views import task_view, vvol_row
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.resources import Task

LIVE = ("queued", "running")
CANCELLABLE = ("create", "resize", "bind", "add-leg", "remove-leg", "verify", "drain-cache")

TELLING = ("verify", "drain-cache")
"""What these said last is their result."""


@dataclass(frozen=True, slots=True)
class Job:
    """What the task machine needs to run a task."""

    id: int
    kind: str
    subject: str
    vvol: str
    args: dict[str, Any]
    cancel: bool


def add_task(tx: Tx, kind: str, subject: str, vvol: str = "", *, claim: bool = True, **args: object) -> Task:
    """Queue a task; a VVol's task claims the VVol, unless it changes nothing that others change.

    Raises CONFLICT when another task has it."""
    when = now()
    row = {
        "kind": kind,
        "subject": subject,
        "vvol": vvol,
        "args": json.dumps(args),
        "state": "queued",
        "created": when,
        "updated": when,
    }
    key = tx.db.execute(insert(s.tasks).values(**row)).inserted_primary_key
    assert key is not None, "the tasks table numbers its rows"
    if vvol and claim:
        mine = update(s.vvols).where(s.vvols.c.uuid == vvol, s.vvols.c.task.is_(None)).values(task=key[0])
        if tx.db.execute(mine).rowcount != 1:
            holder = vvol_row(tx, vvol).task
            running = tx.db.execute(select(s.tasks.c.kind).where(s.tasks.c.id == holder)).scalar_one()
            raise NvError(
                Code.CONFLICT,
                f"VVol {subject} is busy: task {holder} ({running}) is not done",
                f"wait for it: nbdvvol task watch {holder}, or take it back: nbdvvol task cancel {holder}",
            )
    tx.changed = tx.queued = True
    return task_view(tx.db.execute(select(s.tasks).where(s.tasks.c.id == key[0])).one())


@transaction
def live_jobs(tx: Tx) -> list[Job]:
    """Tasks that are not done, oldest first."""
    rows = tx.db.execute(select(s.tasks).where(s.tasks.c.state.in_(LIVE)).order_by(s.tasks.c.id)).all()
    return [Job(row.id, row.kind, row.subject, row.vvol, json.loads(row.args), row.cancel) for row in rows]


@transaction
def progress(tx: Tx, task_id: int, fraction: float, detail: str) -> None:
    """Say how far a task is."""
    thousandths = max(0, min(1000, round(fraction * 1000)))
    mine = update(s.tasks).where(s.tasks.c.id == task_id, s.tasks.c.state.in_(LIVE))
    tx.db.execute(mine.values(state="running", progress=thousandths, detail=detail, updated=now()))
    tx.progressed = True


@transaction
def finish(tx: Tx, task_id: int, state: str, error: str = "") -> None:
    """A task is done: success, error or cancelled. Its VVol is free for the next one."""
    row = tx.db.execute(select(s.tasks).where(s.tasks.c.id == task_id)).one()
    if row.state not in LIVE:
        return
    values: dict[str, object] = {"state": state, "error": error, "updated": now()}
    if state == "success":
        values |= {"progress": 1000, "detail": row.detail if row.kind in TELLING else ""}
    tx.db.execute(update(s.tasks).where(s.tasks.c.id == task_id).values(**values))
    tx.db.execute(update(s.vvols).where(s.vvols.c.task == task_id).values(task=None))
    if state != "success":
        tx.event(f"task.{state}", row.subject, f"task {task_id} ({row.kind}): {error or state}")
    tx.changed = True


@transaction
def cancel(tx: Tx, task_id: int) -> Task:
    """Ask a task to stop. Raises NOT_FOUND, or CONFLICT when it is done or cannot be taken back."""
    row = tx.db.execute(select(s.tasks).where(s.tasks.c.id == task_id)).one_or_none()
    if row is None:
        raise NvError(Code.NOT_FOUND, f"no task {task_id}", "list them: nbdvvol get tasks")
    if row.state not in LIVE:
        raise NvError(Code.CONFLICT, f"task {task_id} is over: {row.state}", "")
    if row.kind not in CANCELLABLE:
        raise NvError(Code.CONFLICT, f"task {task_id}: {row.kind} cannot be taken back once begun", "let it finish")
    tx.db.execute(update(s.tasks).where(s.tasks.c.id == task_id).values(cancel=True, updated=now()))
    tx.about.add(row.vvol)
    tx.changed = True
    return task_view(tx.db.execute(select(s.tasks).where(s.tasks.c.id == task_id)).one())


@transaction
def cancel_asked(tx: Tx, task_id: int) -> bool:
    """Whether somebody asked this task to stop."""
    return bool(tx.db.execute(select(s.tasks.c.cancel).where(s.tasks.c.id == task_id)).scalar_one())
