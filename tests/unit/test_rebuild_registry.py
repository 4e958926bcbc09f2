"""A registry that is rebuilt from what control wrote on the datastores is the one that was lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from nbdvvol.cli.main import main
from nbdvvol.control.daemon import only_one
from nbdvvol.control.rebuild import EPOCH_STEP
from nbdvvol.control.registry import Registry, legs, mirrors, space, views, vvols
from nbdvvol.control.registry.store import REBUILT_NAME, with_log
from nbdvvol.control.registry.tx import Tx, transaction
from nbdvvol.datastores import format as disk
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.log import LogNote
from nbdvvol.model.mirror import LegChange, Stamp
from nbdvvol.model.rebuild import Rebuilt
from nbdvvol.model.resources import AddLeg, BindVVol, ResizeVVol, TaskState
from nbdvvol.rebuild import rebuild
from tests.unit.control_farm import MIB, TestFarm
from tests.unit.fake_filter import FakeFilter

pytestmark = pytest.mark.timeout(60)
STORES = ("a", "b", "s")
Rows = dict[str, Any]


class LostFarm:
    """A farm whose datastores are files under `folder`, so that they outlive its registry."""

    def __init__(self, farm: TestFarm, folder: Path) -> None:
        self.farm = farm
        self.folder = folder
        self.lost = False
        self.file = folder / "farm.yaml"
        stores: Rows = {name: {"kind": "file", "path": str(folder / f"{name}.img"), "size": "20MiB"} for name in STORES}
        self.spec: Rows = {
            "hosts": {"one": {}, "two": {}},
            "datastores": {**stores, "d": {"kind": "dir", "path": str(folder / "d")}},
            "profiles": {
                "gold": {"mirror": {"legs": ["a", "b"]}},
                "mixed": {"mirror": {"legs": ["d", "a"]}},
                "plain": {"datastore": "s"},
                "files": {"datastore": "d"},
            },
            "vms": {
                "vm1": {
                    "host": "one",
                    "vvols": {
                        "root": {"size": "4MiB", "profile": "gold"},
                        "mixed": {"size": "2MiB", "profile": "mixed"},
                        "solo": {"size": "3MiB", "profile": "plain", "type": "swap"},
                        "file": {"size": "2MiB", "profile": "files"},
                    },
                }
            },
        }

    async def start(self) -> FakeFilter:
        """Apply, and let host one serve it all; host two knows of nothing."""
        result = await self.farm.apply(self.spec)
        fake = await self.farm.filter("one", "/run/one")
        await self.farm.filter("two", "/run/two")
        await self.farm.settle(result)
        return fake

    async def change(self, wanted: Any, leg: int) -> None:
        """What host one asks about a leg of vm1/root, and the labels it writes."""
        vvol = await self.farm.vvol()
        stamp = Stamp(epoch=vvol.epoch, generation=vvol.generation) if wanted == "in-sync" else None
        words = {"id": 1, "vvol": vvol.uuid, "epoch": vvol.epoch, "generation": vvol.generation, "leg": leg}
        change = LegChange(**words, wanted=wanted, stamp=stamp)
        assert not (await self.farm.control.registry.run(legs.leg_change, "one", change)).refused

    async def label(self, *ids: int, syncing: bool = False) -> None:
        """Write labels of this epoch and generation, as the host does, and confirm them."""
        vvol = await self.farm.vvol()
        stamp = Stamp(epoch=vvol.epoch, generation=vvol.generation)
        for number in ids:
            place = await self.farm.control.registry.run(leg_place, vvol.uuid, number)
            data = self.farm.disks.bytes[str(self.folder / f"{place.datastore}.img")]
            at = place.meta_offset
            old = disk.decode_label(bytes(data[at : at + 8192]))
            new = replace(
                old, epoch=stamp.epoch, generation=stamp.generation, sequence=old.sequence + 1, syncing=syncing
            )
            at += disk.PAGE * (new.sequence % 2)
            data[at : at + disk.PAGE] = disk.encode_label(new)
            words = {"id": 1, "vvol": vvol.uuid, "epoch": vvol.epoch, "generation": vvol.generation, "leg": number}
            change = LegChange(**words, wanted="confirm", stamp=stamp)
            await self.farm.control.registry.run(legs.leg_change, "one", change)

    async def lose(self) -> Rows:
        """Stop control; what the datastores hold is in their files now. Returns what the registry knew."""
        await self.farm.end()
        self.lost = True
        (self.folder / "d").mkdir(exist_ok=True)
        for path, data in self.farm.disks.bytes.items():
            Path(path).write_bytes(data)
        self.file.write_text(yaml.safe_dump(self.spec))
        return rows(self.farm.state / "registry.db")

    async def restart(self) -> None:
        """Control, on the registry that was rebuilt."""
        await self.farm.start()
        self.lost = False

    async def idle(self) -> bool:
        """Whether every task is over."""
        return not await self.farm.live()

    async def rebuild(self, *without: str, dry_run: bool = False) -> Rebuilt:
        """As the command does."""
        return await rebuild(self.file, self.farm.state, without, dry_run=dry_run)


@transaction
def leg_place(tx: Tx, uuid: str, leg: int) -> space.LegPlace:
    """Only for tests: where a leg lies."""
    found = space.placement(tx, uuid)
    assert found is not None
    place = found.leg(leg)
    assert place is not None
    return place


def rows(path: Path) -> Rows:
    """What of a registry a rebuild must give again, whatever is only known to be safe left out."""
    with sqlite3.connect(path) as db:
        db.row_factory = sqlite3.Row

        def table(query: str) -> list[Rows]:
            return [dict(row) for row in db.execute(query)]

        areas = table("select datastore, offset, length, owner, state from areas where owner <> '' order by 1, 2")
        owned: list[Rows] = []
        for area in areas:  # adjacent areas of one owner are one or two rows, as they came
            last = owned[-1] if owned else None
            same = last is not None and all(last[key] == area[key] for key in ("datastore", "owner", "state"))
            if last is not None and same and last["offset"] + last["length"] == area["offset"]:
                last["length"] += area["length"]
            else:
                owned.append(area)
        return {
            "vvols": table(
                "select uuid, vm, name, size, type, profile, state, read_only, mirror, map_version, next_leg "
                "from vvols order by vm, name"
            ),
            "legs": table(
                "select vvol, id, datastore, state, object, slot, meta_offset, meta_length, life, map_written "
                "from legs order by vvol, id"
            ),
            "runs": table("select * from runs order by vvol, leg, offset"),
            "areas": owned,
            "datastores": table(
                "select name, uuid, header, use, case when use = 'unused' then 0 else size end as size "
                "from datastores order by name"
            ),
            "epochs": table("select uuid, epoch, generation from vvols order by uuid"),
        }


@pytest.fixture
async def lost(memory: Path) -> AsyncIterator[LostFarm]:
    it = LostFarm(TestFarm(memory / "state"), memory)
    await it.farm.start()
    yield it
    if not it.lost:
        await it.farm.end()


async def _grown_and_degraded(lost: LostFarm) -> None:
    """A farm with a past: a leg was added and copied to, another is stale, VVols grew, one was deleted."""
    await lost.start()
    run = lost.farm.control.registry.run
    assert (await lost.farm.create("gone", MIB, profile="plain")).state is TaskState.SUCCESS
    for name, size in (("root", 6 * MIB), ("solo", 5 * MIB)):
        ref = await run(vvols.begin_resize, "vm1", name, ResizeVVol(size=size))
        assert (await lost.farm.over(ref.task.id)).state is TaskState.SUCCESS
    await lost.farm.over((await run(vvols.begin_delete, "vm1", "gone")).task.id)
    ref = await run(mirrors.begin_add_leg, "vm1", "root", AddLeg(datastore="s"))
    assert (await lost.farm.over(ref.task.id)).state is TaskState.SUCCESS
    await lost.label(1, 2)
    await lost.change("syncing", 3)
    await lost.label(3)
    await lost.change("in-sync", 3)
    await lost.label(1, 2, 3)
    await lost.change("stale", 2)
    await lost.label(1, 3)


async def test_a_rebuilt_registry_is_the_one_that_was_lost(lost: LostFarm) -> None:
    await _grown_and_degraded(lost)
    before = await lost.lose()
    dry = await lost.rebuild(dry_run=True)
    assert not dry.blockers and not dry.written and rows(lost.farm.state / "registry.db") == before
    done = await lost.rebuild()
    assert done.written and rows(Path(done.moved)) == before, "the old one is kept as it was"
    after = rows(lost.farm.state / "registry.db")
    old, new = before.pop("epochs"), after.pop("epochs")
    assert after == before
    for one, other in zip(old, new, strict=True):
        assert other["epoch"] > one["epoch"] and other["generation"] >= one["generation"]
        assert other["epoch"] >= EPOCH_STEP


async def test_it_serves_once_every_host_has_let_go(lost: LostFarm) -> None:
    """Any host may still serve by the lost registry: a VVol is bound when each has said that it does not."""
    await lost.start()
    identity = lost.farm.control.registry.identity
    await lost.lose()
    await lost.rebuild()
    await lost.restart()
    assert lost.farm.control.registry.identity != identity, "no filter resumes from what it had"
    one = await lost.farm.filter("one", "/run/one")
    await asyncio.sleep(0.1)
    assert not one.serving, "host two may still serve them"
    two = await lost.farm.filter("two", "/run/two")
    await lost.farm.until(lambda: _serves(one, 4))
    assert not two.serving
    for spec in one.serving.values():
        assert spec.epoch > EPOCH_STEP
        assert all(leg.state == "in-sync" for leg in spec.legs)
    await lost.farm.until(lost.idle)  # a VVol is busy until control has heard that it is served
    await lost.farm.settle(await lost.farm.apply(lost.spec))
    run = lost.farm.control.registry.run
    ref = await run(vvols.begin_resize, "vm1", "root", ResizeVVol(size=7 * MIB))
    assert (await lost.farm.over(ref.task.id)).state is TaskState.SUCCESS, "its extents are its own again"
    ref = await run(vvols.begin_delete, "vm1", "solo")
    assert (await lost.farm.over(ref.task.id)).state is TaskState.SUCCESS


async def _serves(fake: FakeFilter, count: int) -> bool:
    return len(fake.serving) == count


async def test_the_operator_answers_for_a_host_that_is_gone(lost: LostFarm) -> None:
    await lost.start()
    await lost.lose()
    await lost.rebuild()
    await lost.restart()
    one = await lost.farm.filter("one", "/run/one")

    async def told() -> bool:
        problems = (await lost.farm.control.status()).problems
        return {"vm1/root"} <= {problem.subject for problem in problems if problem.code == "RELEASE_WAITS"}

    await lost.farm.until(told)
    await lost.farm.control.registry.run(vvols.begin_unbind, "vm1", "root", BindVVol(force=True))
    await lost.farm.until(lambda: _serves(one, 1))


async def test_a_leg_that_was_removed_is_freed(lost: LostFarm) -> None:
    await lost.start()
    vvol = await lost.farm.vvol()
    await lost.lose()
    done = await lost.rebuild(f"{vvol.uuid}:2")
    assert [note.code for note in done.notes] == ["LEG_GIVEN_UP"]
    await lost.restart()
    for host in ("one", "two"):
        await lost.farm.filter(host, f"/run/{host}")

    async def freed() -> bool:
        return [leg.id for leg in (await lost.farm.vvol()).legs] == [1] and await lost.idle()

    await lost.farm.until(freed)
    again = await lost.farm.control.registry.run(mirrors.begin_add_leg, "vm1", "root", AddLeg(datastore="b"))
    assert (await lost.farm.over(again.task.id)).state is TaskState.SUCCESS
    assert [leg.id for leg in (await lost.farm.vvol()).legs] == [1, 3], "an id is never given twice"


async def test_a_vvol_that_is_given_up_is_scrubbed(lost: LostFarm) -> None:
    await lost.start()
    solo = await lost.farm.vvol("vm1/solo")
    (lost.spec["vms"]["vm1"]["vvols"]).pop("solo")
    await lost.lose()
    await lost.rebuild(f"{solo.uuid}:1")
    await lost.restart()
    for host in ("one", "two"):
        await lost.farm.filter(host, f"/run/{host}")

    await lost.farm.until(lost.idle)
    assert not any(lost.farm.disks.bytes[str(lost.folder / "s.img")][MIB:]), "scrubbed"
    found = await lost.farm.control.registry.run(views.vvols)
    assert [vvol.full_name for vvol in found] == ["vm1/file", "vm1/mixed", "vm1/root"]


async def test_a_missing_datastore_is_refused_and_nothing_is_written(lost: LostFarm) -> None:
    await lost.start()
    before = await lost.lose()
    (lost.folder / "b.img").unlink()
    refused = await lost.rebuild()
    assert {one.code for one in refused.blockers} == {"DATASTORE_UNREADABLE", "LEG_MISSING"}
    assert not refused.written and rows(lost.farm.state / "registry.db") == before
    assert not (lost.farm.state / REBUILT_NAME).exists()
    done = await lost.rebuild("b")
    assert done.written and [note.code for note in done.notes] == ["LEG_GIVEN_UP"]
    (root,) = [vvol for vvol in done.vvols if vvol.name == "root"]
    assert [(leg.id, leg.state) for leg in root.legs] == [(1, "in-sync")]


async def test_it_is_refused_while_control_runs(lost: LostFarm) -> None:
    await lost.start()
    await lost.lose()
    with only_one(lost.farm.state), pytest.raises(NvError, match="another control") as refused:
        await lost.rebuild()
    assert refused.value.code is Code.BUSY


async def test_the_command_tells_what_it_found_and_what_to_do(
    lost: LostFarm, capsys: pytest.CaptureFixture[str]
) -> None:
    await lost.start()
    await lost.lose()
    words = ["registry", "rebuild", "-f", str(lost.file), "--state", str(lost.farm.state)]

    async def run(*more: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            await asyncio.to_thread(main, [*words, *more])
        return (int(ended.value.code or 0), *capsys.readouterr())

    status, out, _ = await run("--dry-run")
    assert status == 0 and "nothing was written (--dry-run)" in out
    assert [line.split()[0] for line in out.splitlines() if "in-sync" in line] == [
        "vm1/file",
        *["vm1/mixed"] * 2,
        *["vm1/root"] * 2,
        "vm1/solo",
    ]
    (lost.folder / "b.img").rename(lost.folder / "away.img")
    status, out, error = await run("-o", "json")
    assert status == 1 and error.startswith("error: CONFLICT: 2 things are wrong -- nothing was written")
    assert "LEG_MISSING vm1/root" in error and "-- bring datastore b back" in error
    assert [one["code"] for one in json.loads(out)["blockers"]] == ["DATASTORE_UNREADABLE", "LEG_MISSING"]
    status, out, _ = await run("--without", "b")
    assert status == 0 and "LEG_GIVEN_UP vm1/root" in out and f"nbdvvol up -f {lost.file}" in out
    assert len(list(lost.farm.state.glob("registry.db.before-rebuild-*"))) == 1


async def test_a_crash_in_the_middle_never_leaves_an_empty_registry(lost: LostFarm) -> None:
    """Between two renames there is no registry.db: control must not make a new one then."""
    await lost.start()
    before = await lost.lose()
    await lost.rebuild()
    path = lost.farm.state / "registry.db"
    path.rename(lost.farm.state / REBUILT_NAME)
    with pytest.raises(NvError, match="a rebuild of the registry was interrupted"):
        await Registry.open(path)
    await lost.rebuild()
    assert rows(path)["legs"] == before["legs"]


@pytest.mark.parametrize("newer", ["VVol", "growth"])
async def test_an_older_registry_takes_no_space_that_a_newer_one_has_used(lost: LostFarm, newer: str) -> None:
    """The extents that it calls free hold what it does not know of."""
    await lost.start()
    old = lost.folder / "old.db"
    with contextlib.closing(sqlite3.connect(lost.farm.state / "registry.db")) as now, sqlite3.connect(old) as copy:
        now.backup(copy)
    run = lost.farm.control.registry.run
    if newer == "VVol":
        assert (await lost.farm.create("late", MIB, profile="plain")).state is TaskState.SUCCESS
    else:
        ref = await run(vvols.begin_resize, "vm1", "solo", ResizeVVol(size=5 * MIB))
        assert (await lost.farm.over(ref.task.id)).state is TaskState.SUCCESS
    await lost.lose()
    for path in with_log(lost.farm.state / "registry.db"):
        path.unlink(missing_ok=True)
    old.rename(lost.farm.state / "registry.db")
    await lost.restart()
    for host in ("one", "two"):
        await lost.farm.filter(host, f"/run/{host}")
    before = bytes(lost.farm.disks.bytes[str(lost.folder / "s.img")])
    refused = await lost.farm.create("more", MIB, profile="plain")
    assert refused.state is TaskState.ERROR and "older than the datastore" in refused.error
    ref = await lost.farm.control.registry.run(vvols.begin_resize, "vm1", "solo", ResizeVVol(size=6 * MIB))
    assert "older than the datastore" in (await lost.farm.over(ref.task.id)).error
    assert bytes(lost.farm.disks.bytes[str(lost.folder / "s.img")]) == before
    fine = await lost.farm.create("fine", MIB, profile="files")
    assert fine.state is TaskState.SUCCESS, "files of their own are nobody else's"


async def test_nobody_takes_a_vms_bytes_for_metadata(lost: LostFarm) -> None:
    """A VM writes a forged label and map at the head of its disk: in a `dir`, that is the head of its file."""
    await lost.start()
    root = await lost.farm.vvol()
    place = await lost.farm.control.registry.run(leg_place, root.uuid, 1)
    head = lost.farm.disks.bytes[str(lost.folder / "a.img")][place.meta_offset : place.meta_offset + disk.BITMAP_OFFSET]
    (file,) = [path for path in lost.farm.disks.bytes if "vm1-file" in path]
    lost.farm.disks.bytes[file][: len(head)] = head
    before = await lost.lose()
    done = await lost.rebuild()
    assert done.written and rows(lost.farm.state / "registry.db")["legs"] == before["legs"]


@pytest.mark.parametrize("hosts", [1, 2])
async def test_a_vvol_that_may_have_data_in_a_log_is_not_taken_for_whole(lost: LostFarm, hosts: int) -> None:
    """With one host its filter looks; with several the operator says which of them served it last."""
    if hosts == 1:
        lost.spec["datastores"]["s"]["hosts"] = ["one"]
    lost.spec["profiles"]["plain"]["cache"] = {"mode": "writeback", "log": {"path": "/logs", "size": "1MiB"}}
    await lost.start()
    await lost.lose()
    rebuilt = await lost.rebuild()
    assert [note.subject for note in rebuilt.notes if note.code == "LOG_UNCHECKED"] == ["vm1/solo"]
    await lost.restart()
    farm = lost.farm
    await farm.filter("one", "/run/one")
    await farm.filter("two", "/run/two")

    async def served(name: str) -> bool:
        binding = (await farm.vvol(name)).binding
        return binding is not None and binding.state == "bound"

    await farm.until(lambda: served("vm1/root"))
    if hosts == 1:
        await farm.until(lambda: served("vm1/solo"))
        return
    assert not await served("vm1/solo")
    kept = (await farm.vvol("vm1/solo")).log
    assert kept is not None and not kept.known
    assert "LOG_UNCHECKED" in [problem.code for problem in (await farm.control.status()).problems]
    run = farm.control.registry.run
    task = (await run(vvols.begin_bind, "vm1", "solo", BindVVol(host="one"))).task
    refused = await farm.over(task.id)
    assert refused.state is TaskState.ERROR and "the registry was rebuilt" in refused.error
    answer = await run(vvols.begin_bind, "vm1", "solo", BindVVol(host="one", force=True))
    assert any("a write-back log may hold data of it" in risk for risk in answer.risks)
    assert (await farm.over(answer.task.id)).state is TaskState.SUCCESS
    assert (await farm.vvol("vm1/solo")).log is None


async def test_a_log_that_a_host_has_noted_keeps_its_vvol_there(lost: LostFarm) -> None:
    """Its profile has no log any more, so that nothing else tells of it."""
    await lost.start()
    solo = await lost.farm.vvol("vm1/solo")
    await lost.lose()
    assert (await lost.rebuild()).written
    await lost.restart()
    farm = lost.farm
    two = FakeFilter("two", farm.disks, "/run/two")
    note = {"vvol": solo.uuid, "log": "ab" * 16, "file": "/logs/solo", "epoch": solo.epoch, "dirty_bytes": 4096}
    two.logs = [LogNote.model_validate(note)]
    farm.filters.append(two)
    await farm.filter("one", "/run/one")
    assert (await farm.vvol("vm1/solo")).binding is None or not await _serves(farm.filters[-1], 4)
    await two.connect(farm.control.links)
    kept = (await farm.vvol("vm1/solo")).log
    assert kept is not None and (kept.host, kept.known) == ("two", False)

    async def refused() -> bool:
        tasks = await farm.control.registry.run(views.tasks)
        return any(task.state is TaskState.ERROR and "/logs/solo on host two" in task.error for task in tasks)

    await farm.until(refused, 10)
    assert "LOG_PINNED" in [problem.code for problem in (await farm.control.status()).problems]
    task = (await farm.control.registry.run(vvols.begin_bind, "vm1", "solo", BindVVol(host="two"))).task
    assert (await farm.over(task.id)).state is TaskState.SUCCESS
