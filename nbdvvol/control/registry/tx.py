"""One transaction as the named transactions see it: the connection, the change feed, the event list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Concatenate, ParamSpec, TypeVar

from sqlalchemy import Connection, insert, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from nbdvvol.control.registry import schema

P = ParamSpec("P")
T = TypeVar("T")


def now() -> str:
    """The time as the registry keeps it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(slots=True)
class Tx:
    """Inside one transaction."""

    db: Connection
    identity: str
    touched: set[str] = field(default_factory=set)
    changed: bool = False
    progressed: bool = False
    queued: bool = False
    """A task was queued."""
    about: set[str] = field(default_factory=set)
    """VVols whose waiting tasks should look again; "" stands for tasks without one."""
    _revision: int = 0

    def meta(self, key: str) -> str:
        """A value of the meta table."""
        value: str = self.db.execute(select(schema.meta.c.value).where(schema.meta.c.key == key)).scalar_one()
        return value

    def counter(self, key: str) -> int:
        """Raise a counter of the meta table by one and return it."""
        value = int(self.meta(key)) + 1
        self.db.execute(update(schema.meta).where(schema.meta.c.key == key).values(value=str(value)))
        return value

    @property
    def revision(self) -> int:
        """The revision so far; `touch` moves it on by one a transaction."""
        return self._revision or int(self.meta("revision"))

    def touch(self, host: str, kind: str, key: str) -> None:
        """An entry (datastore, vm, vvol, settings) of this host's state changed."""
        if not self._revision:
            self._revision = self.counter("revision")
        row = upsert(schema.touched).values(host=host, kind=kind, key=key, revision=self._revision)
        self.db.execute(
            row.on_conflict_do_update(index_elements=["host", "kind", "key"], set_={"revision": self._revision})
        )
        self.touched.add(host)

    def event(self, kind: str, subject: str, message: str) -> None:
        """Add to the event list."""
        self.db.execute(insert(schema.events).values(time=now(), kind=kind, subject=subject, message=message))
        self.changed = True


_names: set[Callable[..., object]] = set()


def transaction(function: Callable[Concatenate[Tx, P], T]) -> Callable[Concatenate[Tx, P], T]:
    """Mark a function as a named transaction: part of the registry's interface."""
    _names.add(function)
    return function


def is_transaction(function: Callable[..., object]) -> bool:
    """Whether the function was marked."""
    return function in _names
