"""The registry: durable, whole or refused; compare-and-swap; the change feed; idempotency keys."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import Connection

from nbdvvol.control.registry import (
    Registry,
    bindings,
    farm,
    faults,
    feed,
    migrations,
    orders,
    schema,
    tasks,
    upkeep,
    views,
    vvols,
)
from nbdvvol.control.registry.tx import Tx, transaction
from nbdvvol.model import link
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.farm import Farm
from nbdvvol.model.resources import ApplyRequest, CreateVVol, TaskRef, TaskState
from tests.unit.control_farm import MIB, PLAIN

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[Registry]:
    it = await Registry.open(tmp_path / "registry.db")
    await it.run(farm.apply, ApplyRequest(farm=Farm.model_validate(PLAIN)))
    yield it
    await it.close()


def _hello(
    instance: str = "one", revision: int = 0, control: str = "", held: dict[str, int] | None = None
) -> link.Hello:
    holding = [link.Held(uuid=uuid, epoch=epoch, generation=1, map_version=1) for uuid, epoch in (held or {}).items()]
    return link.Hello(host="local", instance=instance, revision=revision, control=control, held=holding, run_dir="/r")


async def _ready(registry: Registry) -> str:
    """Make vm1/root ready as if its task had done its work; return its UUID."""
    root = await registry.run(views.vvol, "vm1", "root")
    await registry.run(make_ready, root.uuid)
    return root.uuid


@transaction
def make_ready(tx: Tx, uuid: str) -> None:
    """Only for tests: no space, no task, but ready."""
    tx.db.execute(schema.vvols.update().where(schema.vvols.c.uuid == uuid).values(state="ready", task=None))


@transaction
def explode(tx: Tx) -> None:
    """Only for tests: writes, then fails."""
    tx.event("test", "x", "never seen")
    raise NvError(Code.CONFLICT, "no")


async def test_identity_and_rows_survive(tmp_path: Path) -> None:
    first = await Registry.open(tmp_path / "r.db")
    await first.run(farm.apply, ApplyRequest(farm=Farm.model_validate(PLAIN)))
    before = await first.run(views.vvols)
    await first.close()
    second = await Registry.open(tmp_path / "r.db")
    assert second.identity == first.identity
    assert await second.run(views.vvols) == before
    await second.close()


async def test_what_is_committed_survives_a_power_cut(registry: Registry) -> None:
    @transaction
    def settings(tx: Tx) -> dict[str, object]:
        names = ("journal_mode", "synchronous", "foreign_keys")
        return {name: tx.db.exec_driver_sql(f"pragma {name}").scalar_one() for name in names}

    assert await registry.run(settings) == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}, "2 is FULL"


async def test_a_failed_transaction_leaves_nothing(registry: Registry) -> None:
    before = await registry.run(views.events, 0, 100)
    with pytest.raises(NvError, match="no"):
        await registry.run(explode)
    assert await registry.run(views.events, 0, 100) == before


async def test_only_named_transactions_run(registry: Registry) -> None:
    with pytest.raises(AssertionError, match="not a named transaction"):
        await registry.run(feed.snapshot, "local")


@pytest.mark.parametrize("kill_after", [1, 7, 23])
async def test_a_killed_process_loses_no_committed_row(tmp_path: Path, kill_after: int) -> None:
    script = textwrap.dedent("""
        import asyncio, sys
        from pathlib import Path
        from nbdvvol.control.registry import Registry, bindings
        async def main():
            registry = await Registry.open(Path(sys.argv[1]))
            for number in range(10_000):
                await registry.run(bindings.notice, "h", "test", "s", str(number))
                print(number, flush=True)
        asyncio.run(main())
    """)
    path = tmp_path / "r.db"
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:  # noqa: ASYNC220
        assert child.stdout is not None
        told = -1
        while told < kill_after:
            told = int(child.stdout.readline())
        child.kill()
    registry = await Registry.open(path)
    kept = [event.message for event in await registry.run(views.events, 0, 20_000)]
    await registry.close()
    assert [f"host h: {number}" for number in range(told + 1)] == kept[: told + 1]


@pytest.mark.parametrize("how", ["empty", "random", "truncated", "page", "foreign"])
async def test_a_damaged_registry_is_refused_and_left_alone(tmp_path: Path, how: str) -> None:
    path = tmp_path / "r.db"
    registry = await Registry.open(path)
    await registry.run(farm.apply, ApplyRequest(farm=Farm.model_validate(PLAIN)))
    await registry.close()
    whole = path.read_bytes()
    damaged = {
        "empty": b"",
        "random": random.Random(1).randbytes(len(whole)),
        "truncated": whole[: len(whole) // 2 + 100],
        "page": whole[:8192] + b"\xff" * 8192 + whole[16384:],
        "foreign": b"",
    }[how]
    path.write_bytes(damaged)
    if how == "foreign":
        path.unlink()
        with sqlite3.connect(path) as other:
            other.execute("create table cats (name)")
        other.close()
        damaged = path.read_bytes()
    with pytest.raises(NvError, match="damaged or is not one") as refused:
        await Registry.open(path)
    assert refused.value.code is Code.INVALID and "left as it is" in refused.value.hint
    assert path.read_bytes() == damaged


async def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.db"
    await (await Registry.open(path)).close()
    with sqlite3.connect(path) as other:
        other.execute("update meta set value = '99' where key = 'schema_version'")
    other.close()
    with pytest.raises(NvError, match="schema version 99") as refused:
        await Registry.open(path)
    assert refused.value.code is Code.UNSUPPORTED


async def test_an_older_schema_is_migrated_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.db"
    await (await Registry.open(path)).close()
    done: list[int] = []

    def step(number: int) -> object:
        def run(connection: Connection) -> None:
            connection.exec_driver_sql(f"create table step{number} (x)")
            done.append(number)

        return run

    first = schema.SCHEMA_VERSION
    monkeypatch.setattr(migrations, "STEPS", {first: step(first), first + 1: step(first + 1)})
    await (await Registry.open(path)).close()
    await (await Registry.open(path)).close()
    assert done == [first, first + 1]
    with sqlite3.connect(path) as other:
        assert other.execute("select value from meta where key = 'schema_version'").fetchone() == (str(first + 2),)
    other.close()


async def test_a_registry_of_version_1_keeps_its_failed_syncs(tmp_path: Path) -> None:
    path = tmp_path / "r.db"
    registry = await Registry.open(path)
    await registry.run(farm.apply, ApplyRequest(farm=Farm.model_validate(PLAIN)))
    uuid = await _ready(registry)
    await registry.run(bindings.bind, uuid, "local")
    await registry.close()
    with sqlite3.connect(path) as other:
        columns = "select m.name, c.name, c.type, c.[notnull], c.pk from sqlite_master m, pragma_table_info(m.name) c"
        newest = set(other.execute(columns))
        other.execute("drop table faults")
        other.execute("drop table logs")
        other.execute("alter table legs drop column fault_host")
        later = migrations.STEP_3, migrations.STEP_4, migrations.STEP_5
        added = [line.split() for line in (*migrations.STEP_2.strip().split("\n"), *later)]
        for _alter, _table, table, _add, _column, column, *_type in added:
            other.execute(f"alter table {table} drop column {column}")
        other.execute("update datastores set state = 'faulty', detail = 'sync failed: EIO on /fake/local.img'")
        other.execute("update meta set value = '1' where key = 'schema_version'")
    other.close()
    registry = await Registry.open(path)
    [store] = await registry.run(views.datastores)
    assert (store.state, [fault.host for fault in store.faults]) == ("faulty", ["local"])
    assert "EIO on /fake/local.img" in store.faults[0].message
    state = await registry.run(bindings.connect, _hello())
    assert isinstance(state, link.Snapshot) and list(state.state.faults["local"].values()) == [""]
    await registry.run(faults.clear, "local")
    [store] = await registry.run(views.datastores)
    assert (store.state, store.faults) == ("online", [])
    await registry.close()
    with sqlite3.connect(path) as other:
        assert set(other.execute(columns)) == newest, "a migrated registry is like a new one"
    other.close()


async def test_a_registry_that_was_half_made_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "r.new").write_bytes(b"half")
    registry = await Registry.open(tmp_path / "r.db")
    await registry.close()
    assert not (tmp_path / "r.new").exists()


async def test_epoch_and_generation_are_compared_and_swapped(registry: Registry) -> None:
    uuid = await _ready(registry)

    @transaction
    def race(tx: Tx) -> None:
        bindings.advance_epoch(tx, uuid, 0)
        bindings.advance_epoch(tx, uuid, 0)

    with pytest.raises(NvError) as stale:
        await registry.run(race)
    assert stale.value.code is Code.STALE
    assert (await registry.run(views.vvol, "vm1", "root")).epoch == 0, "the loser takes nothing with it"

    @transaction
    def generations(tx: Tx) -> None:
        bindings.advance_generation(tx, uuid, 1)
        bindings.advance_generation(tx, uuid, 1)

    with pytest.raises(NvError, match="generation"):
        await registry.run(generations)


async def test_of_two_binds_at_once_one_wins(registry: Registry) -> None:
    two = PLAIN | {"hosts": {"local": {}, "b": {}}}
    two["vms"] = {"vm1": {"host": "local", "vvols": {"root": {"size": "4MiB"}}}}
    await registry.run(farm.apply, ApplyRequest(farm=Farm.model_validate(two)))
    uuid = await _ready(registry)
    assert await registry.run(bindings.bind, uuid, "local") == ""
    await registry.run(feed.changes, "local", 0)  # it is told
    assert "local" in await registry.run(bindings.bind, uuid, "b")
    assert await registry.run(bindings.unreleased, uuid) == ["local"]
    await registry.run(bindings.released, "local", uuid, 1)
    assert await registry.run(bindings.bind, uuid, "b") == ""
    assert (await registry.run(views.vvol, "vm1", "root")).epoch == 2


async def test_an_old_release_frees_nothing_new(registry: Registry) -> None:
    uuid = await _ready(registry)
    await registry.run(bindings.bind, uuid, "local")
    await registry.run(feed.changes, "local", 0)  # it is told
    await registry.run(bindings.unbind, uuid)
    await registry.run(bindings.released, "local", uuid, 1)
    await registry.run(bindings.bind, uuid, "local")
    await registry.run(feed.changes, "local", 0)  # it is told
    await registry.run(bindings.unbind, uuid)
    await registry.run(bindings.released, "local", uuid, 1)
    assert await registry.run(bindings.unreleased, uuid) == ["local"], "that was the word for epoch 1"
    await registry.run(bindings.released, "local", uuid, 2)
    assert await registry.run(bindings.unreleased, uuid) == []


async def test_force_says_the_risk_and_keeps_the_bytes(registry: Registry) -> None:
    uuid = await _ready(registry)
    await registry.run(bindings.bind, uuid, "local")
    await registry.run(feed.changes, "local", 0)  # it is told
    assert await registry.run(bindings.unbind, uuid, True) == ""
    assert await registry.run(bindings.unreleased, uuid) == ["local"], "its bytes are not free before the host spoke"
    events = await registry.run(views.events, 0, 100)
    assert any("may go on writing" in event.message for event in events)


async def test_a_new_process_gets_new_epochs_and_a_snapshot(registry: Registry) -> None:
    uuid = await _ready(registry)
    await registry.run(bindings.bind, uuid, "local")
    first = await registry.run(bindings.connect, _hello("one"))
    assert isinstance(first, link.Snapshot) and first.state.vvols[uuid].epoch == 2
    again = await registry.run(bindings.connect, _hello("one", first.revision, registry.identity, held={uuid: 2}))
    assert isinstance(again, link.Resumed), "the same process that missed nothing keeps its epochs"
    other = await registry.run(bindings.connect, _hello("two"))
    assert isinstance(other, link.Snapshot) and other.state.vvols[uuid].epoch == 3


async def test_who_was_never_told_needs_no_asking(registry: Registry) -> None:
    two = PLAIN | {"hosts": {"local": {}, "b": {}}}
    await registry.run(farm.apply, ApplyRequest(farm=Farm.model_validate(two | {"vms": {"vm1": {"host": "local"}}})))
    uuid = await _ready(registry)
    assert await registry.run(bindings.bind, uuid, "local") == ""
    assert await registry.run(bindings.bind, uuid, "b") == ""
    assert await registry.run(bindings.unreleased, uuid) == ["b"]
    assert (await registry.run(views.vvol, "vm1", "root")).epoch == 2
    told = await registry.run(feed.changes, "local", 0)
    assert told is not None and told.vvols[uuid] is None
    assert await registry.run(bindings.unbind, uuid) == ""
    assert await registry.run(bindings.unreleased, uuid) == []


@pytest.mark.parametrize("why", ["other control", "too new", "nothing yet", "forgotten"])
async def test_who_cannot_resume_gets_a_snapshot(registry: Registry, why: str) -> None:
    uuid = await _ready(registry)
    first = await registry.run(bindings.connect, _hello("one"))
    control, revision = registry.identity, first.revision
    match why:
        case "other control":
            control = "another"
        case "too new":
            revision += 1000
        case "nothing yet":
            revision = 0
        case "forgotten":
            await registry.run(vvols.begin_delete, "vm1", "root")
            await registry.run(gone, uuid)
            await registry.run(feed.applied, "local", await registry.run(views.revision))
    assert isinstance(await registry.run(bindings.connect, _hello("one", revision, control)), link.Snapshot)


@transaction
def gone(tx: Tx, uuid: str) -> None:
    """Only for tests: a VVol vanishes that the host had heard of."""
    tx.touch("local", "vvol", uuid)
    tx.db.execute(schema.vvols.delete().where(schema.vvols.c.uuid == uuid))


async def test_changes_are_only_what_is_new_in_order(registry: Registry) -> None:
    uuid = await _ready(registry)
    start = (await registry.run(bindings.connect, _hello())).revision
    assert await registry.run(feed.changes, "local", start) is None
    await registry.run(bindings.bind, uuid, "local")
    bound = await registry.run(feed.changes, "local", start)
    assert bound is not None and bound.revision > start
    spec = bound.vvols[uuid]
    assert spec is not None and spec.epoch == 1 and "vm1" in bound.vms and not bound.settings
    assert await registry.run(feed.changes, "local", bound.revision) is None
    await registry.run(bindings.unbind, uuid)
    away = await registry.run(feed.changes, "local", bound.revision)
    assert away is not None and away.vvols == {uuid: None}
    both = await registry.run(feed.changes, "local", start)
    assert both is not None and both.vvols == {uuid: None}, "what piled up is one step to the present"


async def test_a_hello_that_no_longer_holds_releases(registry: Registry) -> None:
    uuid = await _ready(registry)
    await registry.run(bindings.bind, uuid, "local")
    await registry.run(bindings.connect, _hello("one"))
    await registry.run(bindings.unbind, uuid)
    await registry.run(bindings.connect, _hello("one", held={uuid: 2}))
    assert await registry.run(bindings.unreleased, uuid) == ["local"], "it still holds it"
    await registry.run(bindings.connect, _hello("one"))
    assert await registry.run(bindings.unreleased, uuid) == []


async def test_reports_of_an_old_epoch_say_nothing(registry: Registry) -> None:
    uuid = await _ready(registry)
    await registry.run(bindings.bind, uuid, "local")
    await registry.run(feed.changes, "local", 0)  # it is told
    report = link.ExportReport(uuid=uuid, epoch=9, size=1, flags=1, block_min=1, block_preferred=1, block_max=1)
    await registry.run(bindings.report, "local", [report])
    assert await registry.run(bindings.state, uuid, "local") == ("binding", "")
    await registry.run(bindings.report, "local", [report.model_copy(update={"epoch": 1})])
    assert await registry.run(bindings.state, uuid, "local") == ("bound", "")
    await registry.run(bindings.report, "elsewhere", [report.model_copy(update={"epoch": 1, "error": "x"})])
    assert await registry.run(bindings.state, uuid, "local") == ("bound", "")


async def test_a_repeated_key_has_one_effect_also_after_a_restart(tmp_path: Path) -> None:
    body = CreateVVol(vm="vm1", name="more", size=MIB)
    first = await Registry.open(tmp_path / "r.db")
    await first.run(farm.apply, ApplyRequest(farm=Farm.model_validate(PLAIN)))
    answer = await first.run_once("k", TaskRef, vvols.begin_create, body)
    assert await first.run_once("k", TaskRef, vvols.begin_create, body) == answer
    await first.close()
    second = await Registry.open(tmp_path / "r.db")
    assert await second.run_once("k", TaskRef, vvols.begin_create, body) == answer
    with pytest.raises(NvError, match="another request") as conflict:
        await second.run_once("k", TaskRef, vvols.begin_create, body.model_copy(update={"size": 2 * MIB}))
    assert conflict.value.code is Code.CONFLICT
    assert len(await second.run(views.vvols)) == 2
    await second.close()


async def test_a_refused_request_may_be_repeated_with_its_key(registry: Registry) -> None:
    body = CreateVVol(vm="nobody", name="x", size=MIB)
    for _ in range(2):
        with pytest.raises(NvError, match="no VM nobody"):
            await registry.run_once("k", TaskRef, vvols.begin_create, body)


async def test_a_vvol_has_one_task_at_a_time(registry: Registry) -> None:
    with pytest.raises(NvError, match="busy") as busy:
        await registry.run(vvols.begin_delete, "vm1", "root")
    assert busy.value.code is Code.CONFLICT and "watch" in busy.value.hint


async def test_cancelling(registry: Registry) -> None:
    create = next(job for job in await registry.run(tasks.live_jobs) if job.kind == "create")
    assert not await registry.run(tasks.cancel_asked, create.id)
    await registry.run(tasks.cancel, create.id)
    assert await registry.run(tasks.cancel_asked, create.id)
    await registry.run(tasks.finish, create.id, "cancelled", "by request")
    assert (await registry.run(views.task, create.id)).state is TaskState.CANCELLED
    with pytest.raises(NvError, match="over"):
        await registry.run(tasks.cancel, create.id)
    delete = await registry.run(vvols.begin_delete, "vm1", "root")
    with pytest.raises(NvError, match="cannot be taken back"):
        await registry.run(tasks.cancel, delete.task.id)


async def test_orders_outlive_their_task_until_settled(registry: Registry) -> None:
    uuid = (await registry.run(views.vvol, "vm1", "root")).uuid
    job = next(job for job in await registry.run(tasks.live_jobs) if job.kind == "create")
    await registry.run(bindings.connect, _hello("one"))
    order = await registry.run(orders.give, job.id, uuid, "scrub", "local", "scrub", {"x": 1})
    assert await registry.run(orders.outstanding, job.id, "scrub") == order
    assert await registry.run(orders.of_vvol, uuid, job.id) == []
    await registry.run(tasks.finish, job.id, "error", "x")
    assert await registry.run(orders.of_vvol, uuid) == ["local"]
    await registry.run(bindings.connect, _hello("one"))
    assert await registry.run(orders.of_host, "local") == [order], "the same process may still be at it"
    await registry.run(bindings.connect, _hello("two"))
    assert await registry.run(orders.of_vvol, uuid) == [], "a process that is gone writes no more"


async def test_closing_refuses_later_work(tmp_path: Path) -> None:
    registry = await Registry.open(tmp_path / "r.db")
    await registry.close()
    with pytest.raises((NvError, RuntimeError)):
        await registry.run(views.revision)


async def test_old_things_are_forgotten_but_ids_go_on(registry: Registry) -> None:
    for number in range(30):
        await registry.run(bindings.notice, "h", "test", "s", str(number))
    last = (await registry.run(views.events, 0, 1000))[-1].id
    probe = next(job for job in await registry.run(tasks.live_jobs) if job.kind == "probe")
    await registry.run(tasks.finish, probe.id, "success")
    await registry.run(upkeep.prune, 10, 0)
    kept = await registry.run(views.events, 0, 1000)
    assert [event.id for event in kept] == list(range(last - 9, last + 1))
    assert [task.kind for task in await registry.run(views.tasks)] == ["create"], "what is not over stays"
    await registry.run(upkeep.prune, 0, 0)
    await registry.run(bindings.notice, "h", "test", "s", "next")
    assert (await registry.run(views.events, 0, 1000))[0].id == last + 1
