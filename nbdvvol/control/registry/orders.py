"""Work orders of tasks, kept until a filter said how they ended.

An order that may still be running somewhere must not be forgotten: a scrub that ends late would zero what was
handed out meanwhile. So an order sticks to its host, keeps its id over a restart of control, and is settled
only by the filter's answer, or because the filter's process is gone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, insert, select

from nbdvvol.control.registry import schema as s
from nbdvvol.control.registry.tasks import LIVE
from nbdvvol.control.registry.tx import Tx, transaction


@dataclass(frozen=True, slots=True)
class Order:
    """A work order."""

    id: int
    host: str
    what: str
    args: dict[str, Any]


def _order(row: Any) -> Order:
    return Order(row.id, row.host, row.what, json.loads(row.args))


@transaction
def outstanding(tx: Tx, task: int, key: str) -> Order | None:
    """The order this task gave under this key, if its outcome is unknown."""
    row = tx.db.execute(select(s.orders).where(s.orders.c.task == task, s.orders.c.key == key)).one_or_none()
    return _order(row) if row is not None else None


@transaction
def give(tx: Tx, task: int, vvol: str, key: str, host: str, what: str, args: dict[str, Any]) -> Order:
    """Write an order down before it is sent."""
    row = {"task": task, "vvol": vvol, "key": key, "host": host, "what": what, "args": json.dumps(args)}
    found = tx.db.execute(insert(s.orders).values(**row)).inserted_primary_key
    assert found is not None, "the orders table numbers its rows"
    return Order(found[0], host, what, args)


@transaction
def settle(tx: Tx, order: int) -> None:
    """The filter answered: nothing of the order runs any more."""
    vvol = tx.db.execute(select(s.orders.c.vvol).where(s.orders.c.id == order)).scalar_one_or_none()
    if vvol is not None:
        tx.db.execute(delete(s.orders).where(s.orders.c.id == order))
        tx.about.add(vvol)
        tx.changed = True


@transaction
def settle_if_over(tx: Tx, order: int) -> None:
    """The filter answered, but nobody listened: the order's task asks again, unless it is over."""
    over = select(s.tasks.c.id).where(s.tasks.c.state.not_in(LIVE))
    query = select(s.orders.c.id).where(s.orders.c.id == order, s.orders.c.task.in_(over))
    if tx.db.execute(query).one_or_none() is not None:
        settle(tx, order)


@transaction
def of_host(tx: Tx, host: str) -> list[Order]:
    """Orders to send (again) to a host that connected."""
    rows = tx.db.execute(select(s.orders).where(s.orders.c.host == host).order_by(s.orders.c.id)).all()
    return [_order(row) for row in rows]


@transaction
def of_vvol(tx: Tx, vvol: str, but_task: int = 0) -> list[str]:
    """Hosts that may still be at work on a VVol for another task than this one."""
    query = select(s.orders.c.host).where(s.orders.c.vvol == vvol, s.orders.c.task != but_task)
    return sorted(set(tx.db.execute(query).scalars()))


def drop_dead(tx: Tx, host: str) -> None:
    """The filter's process is gone and with it what it did; orders of tasks that are over need no answer."""
    live = select(s.tasks.c.id).where(s.tasks.c.state.in_(LIVE))
    tx.db.execute(delete(s.orders).where(s.orders.c.host == host, s.orders.c.task.not_in(live)))
