"""Keeping the registry short: old events, tasks that are long over, idempotency keys that nobody repeats."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from sqlalchemy import delete, func, select

from nbdvvol.control.registry import schema as s
from nbdvvol.control.registry.tasks import LIVE
from nbdvvol.control.registry.tx import Tx, transaction

EVENTS_KEPT = 100_000
TASKS_KEPT = 10_000
KEYS_KEPT = timedelta(days=7)


@transaction
def prune(tx: Tx, events_kept: int = EVENTS_KEPT, tasks_kept: int = TASKS_KEPT) -> None:
    """Forget the oldest events, tasks that are over and that nothing names, and old idempotency keys."""
    newest_event = tx.db.execute(select(func.max(s.events.c.id))).scalar() or 0
    tx.db.execute(delete(s.events).where(s.events.c.id <= newest_event - events_kept))
    newest_task = tx.db.execute(select(func.max(s.tasks.c.id))).scalar() or 0
    named = select(s.orders.c.task).union(select(s.vvols.c.task).where(s.vvols.c.task.is_not(None)))
    old = (s.tasks.c.id <= newest_task - tasks_kept) & s.tasks.c.state.not_in(LIVE) & s.tasks.c.id.not_in(named)
    tx.db.execute(delete(s.tasks).where(old))
    before = (datetime.now(UTC) - KEYS_KEPT).isoformat(timespec="milliseconds")
    tx.db.execute(delete(s.idempotency).where(s.idempotency.c.created < before))
