"""A VVol whose creation failed: applying the file again makes it as it is declared now, wherever it had got to."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from nbdvvol.control.registry import views, vvols
from nbdvvol.model.resources import TaskState, VVolState
from tests.unit.control_farm import MIB, PLAIN, TestFarm, running_farm
from tests.unit.fake_filter import FakeFilter

__all__ = ["running_farm"]
pytestmark = pytest.mark.timeout(30)


async def begin(farm: TestFarm) -> FakeFilter:
    """Datastores and a filter, no VVol yet."""
    result = await farm.apply(_root("1MiB") | {"vms": {}})
    fake = await farm.filter()
    await farm.settle(result)
    return fake


async def _fails(farm: TestFarm, spec: dict[str, Any]) -> str:
    """Apply; the last task fails. Returns its error."""
    tasks_ = [await farm.over(number) for number in (await farm.apply(spec)).tasks]
    assert tasks_[-1].state is TaskState.ERROR and (await farm.vvol()).state is VVolState.FAILED
    return tasks_[-1].error


def _root(size: str, store: str = "local", **more: Any) -> dict[str, Any]:
    second = {"kind": "dir", "path": "/fake/dir"}
    return PLAIN | {
        "datastores": PLAIN["datastores"] | {"pool": second},
        "vms": {"vm1": {"vvols": {"root": {"size": size, "datastore": store, **more}}}},
    }


async def test_what_never_got_a_place_is_created_as_the_file_says_now(farm: TestFarm) -> None:
    await begin(farm)
    assert "NO_SPACE" in await _fails(farm, _root("1GiB"))
    uuid = (await farm.vvol()).uuid
    [change] = [c for c in (await farm.apply(_root("2MiB"), dry_run=True)).changes if c.kind == "vvol"]
    assert (change.action, change.detail) == ("update", "try again to create it: 2MiB on datastore local")
    await farm.settle(await farm.apply(_root("2MiB", description="small")))
    vvol = await farm.vvol()
    assert (vvol.uuid, vvol.state, vvol.size, vvol.description) == (uuid, VVolState.READY, 2 * MIB, "small")


@pytest.mark.parametrize("then", [("2MiB", "local"), ("4MiB", "pool"), ("4MiB", "local")])
@pytest.mark.parametrize("first", ["local", "pool"])
async def test_what_had_a_place_gives_it_back_when_the_file_says_another(
    farm: TestFarm, first: str, then: tuple[str, str]
) -> None:
    fake = await begin(farm)
    kind = "scrub" if first == "local" else "file_create"
    fake.fail_work[kind] = "Input/output error"
    assert "Input/output error" in await _fails(farm, _root("4MiB", first))
    fake.fail_work.clear()
    fake.hold_work.add("file_remove" if first == "pool" else "scrub")
    result = await farm.apply(_root(*then))
    await asyncio.sleep(0.05)
    again = await farm.apply(_root(*then))
    assert not again.tasks, "what is under way is not begun twice"
    await farm.stop()
    await farm.start()
    fake.hold_work.clear()
    await fake.connect(farm.control.links)
    await farm.settle(result)
    vvol = await farm.vvol()
    size = int(then[0].removesuffix("MiB")) * MIB
    assert (vvol.state, vvol.size, vvol.legs[0].datastore) == (VVolState.READY, size, then[1])
    assert len(fake.serving) == 1 and vvol.legs[0].regions[-1].offset + vvol.legs[0].regions[-1].length == size
    files = [name for name in farm.disks.bytes if name.startswith("/fake/dir/")]
    assert len(files) == (then[1] == "pool")
    ref = await farm.control.registry.run(vvols.begin_delete, "vm1", "root")
    assert (await farm.over(ref.task.id)).state is TaskState.SUCCESS
    [local] = [store for store in await farm.control.registry.run(views.datastores) if store.name == "local"]
    assert local.use == "unused" or local.free == local.size - MIB, "all but its head is free again"


async def test_giving_back_may_fail_too_and_is_tried_again(farm: TestFarm) -> None:
    fake = await begin(farm)
    fake.fail_work["scrub"] = "Input/output error"
    await _fails(farm, _root("4MiB"))
    await _fails(farm, _root("2MiB"))  # the directory of the datastore cannot be scrubbed either
    fake.fail_work.clear()
    fake.fail_work["write_meta"] = "Input/output error"
    await _fails(farm, _root("2MiB"))
    await _fails(farm, _root("3MiB"))
    fake.fail_work.clear()
    await farm.settle(await farm.apply(_root("4MiB")))
    vvol = await farm.vvol()
    assert (vvol.state, vvol.size) == (VVolState.READY, 4 * MIB)
    data = farm.disks.bytes["/fake/local.img"]
    region = vvol.legs[0].regions[0]
    assert not any(data[region.object_offset : region.object_offset + region.length])


async def test_a_datastore_that_grows_with_the_file_is_looked_at_before_it_is_used(farm: TestFarm) -> None:
    await begin(farm)
    assert "NO_SPACE" in await _fails(farm, _root("20MiB"))
    grown = _root("20MiB")
    grown["datastores"] = grown["datastores"] | {"local": PLAIN["datastores"]["local"] | {"size": "32MiB"}}
    await farm.settle(await farm.apply(grown))
    assert (await farm.vvol()).state is VVolState.READY


async def test_a_vvol_at_work_never_keeps_a_file_from_being_applied(farm: TestFarm) -> None:
    """`up` applies its file first: a task that only its filter can end must not refuse it."""
    fake = await begin(farm)
    fake.hold_work.add("scrub")
    result = await farm.apply(_root("4MiB"))
    for other in (_root("8MiB"), _root("4MiB", "pool")):
        again = await farm.apply(other)
        assert [c.detail for c in again.changes if c.kind == "vvol"] == [
            "is being created as it was declared before; apply again then"
        ]
    fake.hold_work.clear()
    await farm.settle(result)
    fake.hold_work.add("scrub")
    ref = await farm.control.registry.run(vvols.begin_delete, "vm1", "root")
    [change] = [c for c in (await farm.apply(_root("4MiB"))).changes if c.kind == "vvol"]
    assert "is being deleted" in change.detail
    fake.hold_work.clear()
    assert (await farm.over(ref.task.id)).state is TaskState.SUCCESS
    await farm.settle(await farm.apply(_root("4MiB")))
    fake.hold_work.add("scrub")
    growing = await farm.apply(_root("6MiB"))
    [change] = [c for c in (await farm.apply(_root("8MiB"))).changes if c.kind == "vvol"]
    assert "keeps its 4MiB while a task has it" in change.detail
    fake.hold_work.clear()
    await farm.settle(growing)
    await farm.settle(await farm.apply(_root("8MiB")))
    assert (await farm.vvol()).size == 8 * MIB
