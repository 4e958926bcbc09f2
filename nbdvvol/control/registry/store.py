"""The SQLite file behind the registry and the one thread that touches it.

Invariants: every transaction is durable before its caller hears of it (WAL, synchronous=FULL); a file that is
not a sound registry is refused and left as it is; a registry is made whole before it gets its name, so an
empty or missing-in-part file is never mistaken for a new one.
"""

from __future__ import annotations

import asyncio
import json
import os
import struct
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

from pydantic import BaseModel
from sqlalchemy import Connection, Engine, create_engine, event, insert, select, update
from sqlalchemy.exc import DatabaseError
from sqlalchemy.pool import NullPool

from nbdvvol.control.registry import migrations, schema
from nbdvvol.control.registry.tx import Tx, is_transaction, now
from nbdvvol.datastores.base import sync_folder
from nbdvvol.model.errors import Code, NvError

P = ParamSpec("P")
T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
REGISTRY_NAME = "registry.db"
REBUILT_NAME = "registry.rebuilt"
"""A rebuilt registry before it has its name (nbdvvol/rebuild.py)."""
_SQLITE_MAGIC, _SQLITE_HEADER_BYTES, _SQLITE_APPLICATION_ID = b"SQLite format 3\0", 100, 68


@dataclass(frozen=True, slots=True)
class Committed:
    """What a transaction changed: hosts whose state moved, VVols whose tasks should look again, whether a task
    was queued, whether it was no more than a task's progress."""

    hosts: frozenset[str]
    vvols: frozenset[str]
    queued: bool
    progress_only: bool


def _prepare(dbapi: Any, _record: Any) -> None:
    dbapi.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=10000"):
        dbapi.execute(f"PRAGMA {pragma}")


def _engine(path: Path) -> Engine:
    engine = create_engine(f"sqlite:///{path}", poolclass=NullPool)
    event.listen(engine, "connect", _prepare)
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return engine


def with_log(path: Path) -> tuple[Path, ...]:
    """A registry's file and those of its log."""
    return path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")


def _make(path: Path) -> None:
    """Make a whole new registry, then give it its name."""
    fresh = path.with_suffix(".new")
    for leftover in with_log(fresh):
        leftover.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    os.close(descriptor)
    engine = _engine(fresh)
    with engine.connect() as connection, connection.begin():
        connection.exec_driver_sql(f"PRAGMA application_id={schema.APPLICATION_ID}")
        schema.schema.create_all(connection)
        values = {"schema_version": schema.SCHEMA_VERSION, "identity": uuid.uuid4(), "revision": 0}
        rows = [{"key": key, "value": str(value)} for key, value in values.items()]
        connection.execute(insert(schema.meta), rows)
    engine.dispose()  # the last connection's end writes the log back into the file and syncs it
    fresh.rename(path)
    sync_folder(str(path))


def _damaged(path: Path, why: str) -> NoReturn:
    raise NvError(
        Code.INVALID,
        f"the registry {path} is damaged or is not one: {why}",
        "it was left as it is: restore it from a backup, or rebuild it: nbdvvol registry rebuild -f FARM.yaml",
    )


def _refuse_half_rebuilt(path: Path) -> None:
    """An empty registry must not come between the old one, moved aside, and the rebuilt one that has no name yet."""
    rebuilt = path.with_name(REBUILT_NAME)
    if path.name == REGISTRY_NAME and rebuilt.exists():
        raise NvError(
            Code.CONFLICT,
            f"a rebuild of the registry was interrupted: {rebuilt} is there and {path} is not",
            "run it again: nbdvvol registry rebuild -f FARM.yaml --state DIR",
        )


def _check_header(path: Path) -> None:
    """Look before SQLite does: opening another program's database would already change it."""
    with path.open("rb") as file:
        head = file.read(_SQLITE_HEADER_BYTES)
    if not head:
        _damaged(path, "it is empty")
    if len(head) < _SQLITE_HEADER_BYTES or not head.startswith(_SQLITE_MAGIC):
        _damaged(path, "it is no SQLite file")
    (found,) = struct.unpack_from(">I", head, _SQLITE_APPLICATION_ID)
    if found != schema.APPLICATION_ID:
        _damaged(path, f"application id {found:#x}, expected {schema.APPLICATION_ID:#x}")


def _check(path: Path, connection: Connection) -> None:
    result = connection.exec_driver_sql("PRAGMA quick_check").scalar_one()
    if result != "ok":
        _damaged(path, str(result))


class Registry:
    """The open registry. Create it by `await Registry.open(path)` inside the event loop that uses it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.identity = ""
        self.on_commit: Callable[[Committed], None] | None = None
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="registry")
        self._db: Connection | None = None

    @classmethod
    async def open(cls, path: Path) -> Registry:
        """Open, or make, the registry at `path`. Raises INVALID when it is damaged, UNSUPPORTED when newer."""
        registry = cls(path)
        try:
            await registry._loop.run_in_executor(registry._thread, registry._open)
        except BaseException:
            registry._thread.shutdown()
            raise
        return registry

    def _open(self) -> None:
        if not self.path.exists():
            _refuse_half_rebuilt(self.path)
            _make(self.path)
        _check_header(self.path)
        try:
            connection = _engine(self.path).connect()
            _check(self.path, connection)
            connection.rollback()
            with connection.begin():
                rows = dict(connection.execute(select(schema.meta.c.key, schema.meta.c.value)).all())
                found = int(rows["schema_version"])
                reached = migrations.migrate(connection, found)
                if reached != found:
                    row = update(schema.meta).where(schema.meta.c.key == "schema_version")
                    connection.execute(row.values(value=str(reached)))
            self.identity = rows["identity"]
        except (DatabaseError, KeyError) as error:
            _damaged(self.path, str(getattr(error, "orig", None) or error))
        self._db = connection

    async def close(self) -> None:
        """Finish the transaction that runs, close the file."""

        def shut() -> None:
            if self._db is not None:
                self._db.close()
                self._db.engine.dispose()
                self._db = None

        await self._loop.run_in_executor(self._thread, shut)
        self._thread.shutdown()

    async def run(self, name: Callable[Concatenate[Tx, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a named transaction; it is durable on return. Raises its NvError after a rollback."""
        assert is_transaction(name), f"{name} is not a named transaction"
        return await self._loop.run_in_executor(self._thread, lambda: self._transact(name, *args, **kwargs))

    async def run_once(
        self, key: str | None, answer: type[M], name: Callable[Concatenate[Tx, P], M], *args: P.args, **kwargs: P.kwargs
    ) -> M:
        """`run`, but a key seen before gives that time's `answer` and no second effect.

        Raises CONFLICT when the key came with another request."""
        if key is None:
            return await self.run(name, *args, **kwargs)
        assert is_transaction(name), f"{name} is not a named transaction"
        request = json.dumps([name.__name__, [_plain(arg) for arg in args], {k: _plain(v) for k, v in kwargs.items()}])

        def once(tx: Tx) -> M:
            table = schema.idempotency
            seen = tx.db.execute(select(table).where(table.c.key == key)).one_or_none()
            if seen is None:
                result = name(tx, *args, **kwargs)
                row = {"key": key, "request": request, "answer": result.model_dump_json(), "created": now()}
                tx.db.execute(insert(table).values(**row))
                return result
            if seen.request != request:
                raise NvError(
                    Code.CONFLICT,
                    f"Idempotency-Key {key} was used for another request at {seen.created}",
                    "use a new key for a new request",
                )
            return answer.model_validate_json(seen.answer)

        return await self._loop.run_in_executor(self._thread, lambda: self._transact(once))

    def _transact(self, name: Callable[Concatenate[Tx, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        if self._db is None:
            raise NvError(Code.UNAVAILABLE, "the registry is closed", "control is stopping; try again")
        tx = Tx(self._db, self.identity)
        with self._db.begin():
            result = name(tx, *args, **kwargs)
        if tx.changed or tx.touched or tx.progressed:
            only_progress = not (tx.changed or tx.touched)
            committed = Committed(frozenset(tx.touched), frozenset(tx.about), tx.queued, only_progress)
            self._loop.call_soon_threadsafe(self._publish, committed)
        return result

    def _publish(self, committed: Committed) -> None:
        if self.on_commit is not None:
            self.on_commit(committed)


def _plain(value: object) -> object:
    return json.loads(value.model_dump_json()) if isinstance(value, BaseModel) else value
