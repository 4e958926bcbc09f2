"""The life of a VVol through control, with a filter that speaks the link in-process."""

from __future__ import annotations

import pytest

from nbdvvol.control.registry import views, vvols
from nbdvvol.datastores import format as disk
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.resources import BindVVol, ResizeVVol, TaskState, VVolState
from tests.unit.control_farm import MIB, PLAIN, TestFarm, running_farm

__all__ = ["running_farm"]
pytestmark = pytest.mark.timeout(30)


async def test_apply_makes_a_served_vvol(farm: TestFarm) -> None:
    result = await farm.apply()
    fake = await farm.filter()
    await farm.settle(result)
    vvol = await farm.vvol()
    assert vvol.state is VVolState.READY
    assert vvol.binding is not None and (vvol.binding.state, vvol.binding.host) == ("bound", "local")
    assert vvol.uri == "nbd+unix:///root?socket=/run/fake/vms/vm1.sock"
    assert sum(region.length for region in vvol.legs[0].regions) == vvol.size == 4 * MIB
    assert fake.serving[vvol.uuid].epoch == vvol.epoch == 1
    header = disk.decode_header(bytes(farm.disks.bytes["/fake/local.img"][:8192]))
    assert str(header.registry) == farm.control.registry.identity
    page = bytes(farm.disks.bytes["/fake/local.img"][header.directory_offset :][: disk.PAGE])
    entries, damaged = disk.decode_page(page, 0)
    assert not damaged and [str(entry.vvol) for entry in entries.values()] == [vvol.uuid]
    at = entries[0].offset
    label = disk.decode_label(bytes(farm.disks.bytes["/fake/local.img"][at : at + 8192]))
    assert (str(label.vvol), label.size) == (vvol.uuid, 4 * MIB)


async def test_apply_again_changes_nothing(farm: TestFarm) -> None:
    result = await farm.apply()
    await farm.filter()
    await farm.settle(result)
    before = await farm.control.registry.run(views.revision)
    again = await farm.apply()
    assert {change.action for change in again.changes} == {"keep"} and not again.tasks
    assert await farm.control.registry.run(views.revision) == before


async def test_deleted_bytes_are_zero_before_another_has_them(farm: TestFarm) -> None:
    await farm.apply(PLAIN | {"vms": {"vm1": {"vvols": {}}}})
    fake = await farm.filter()
    assert (await farm.create("one", 8 * MIB)).state is TaskState.SUCCESS
    one = await farm.vvol("vm1/one")
    data = farm.disks.bytes["/fake/local.img"]
    for region in one.legs[0].regions:
        data[region.object_offset : region.object_offset + region.length] = b"x" * region.length
    fake.hold_release = True
    scrubs = len(farm.begun("scrub"))
    task = (await farm.control.registry.run(vvols.begin_delete, "vm1", "one")).task
    two = await farm.create("two", 8 * MIB)
    assert two.state is TaskState.ERROR and "NO_SPACE" in two.error
    assert len(farm.begun("scrub")) == scrubs, "nothing is scrubbed while a filter may still write to it"
    await fake.release()
    assert (await farm.over(task.id)).state is TaskState.SUCCESS
    assert not any(data[MIB:])
    again = await farm.control.registry.run(vvols.begin_delete, "vm1", "two")
    assert (await farm.over(again.task.id)).state is TaskState.SUCCESS
    assert (await farm.create("three", 8 * MIB)).state is TaskState.SUCCESS


async def test_growing_live(farm: TestFarm) -> None:
    result = await farm.apply()
    fake = await farm.filter()
    await farm.settle(result)
    ref = await farm.control.registry.run(vvols.begin_resize, "vm1", "root", ResizeVVol(size=6 * MIB))
    assert (await farm.over(ref.task.id)).state is TaskState.SUCCESS
    vvol = await farm.vvol()
    assert (vvol.size, vvol.generation, vvol.map_version, vvol.epoch) == (6 * MIB, 2, 2, 1)
    assert len(vvol.legs[0].regions) == 1, "the next extents were free: grown in place"
    await farm.until(lambda: _size_is(fake, vvol.uuid, 6 * MIB))
    with pytest.raises(NvError, match="only grows") as smaller:
        await farm.control.registry.run(vvols.begin_resize, "vm1", "root", ResizeVVol(size=MIB))
    assert smaller.value.code is Code.INVALID


async def _size_is(fake: object, uuid: str, size: int) -> bool:
    return bool(fake.serving[uuid].size == size)  # type: ignore[attr-defined]


async def test_a_move_to_another_host_waits_for_release(farm: TestFarm) -> None:
    two = PLAIN | {"hosts": {"a": {}, "b": {}}, "vms": {"vm1": {"host": "a", "vvols": {"root": {"size": "4MiB"}}}}}
    result = await farm.apply(two)
    one, other = await farm.filter("a", "/run/a"), await farm.filter("b", "/run/b")
    await farm.settle(result)
    one.hold_release = True
    ref = await farm.control.registry.run(vvols.begin_bind, "vm1", "root", BindVVol(host="b"))
    await farm.until(lambda: _waits(farm, ref.task.id))
    assert not other.serving, "two hosts never serve one VVol"
    await one.release()
    assert (await farm.over(ref.task.id)).state is TaskState.SUCCESS
    vvol = await farm.vvol()
    assert vvol.binding is not None and (vvol.binding.host, vvol.epoch) == ("b", 2)
    assert other.serving[vvol.uuid].epoch == 2 and "vm1" in other.state.vms


async def _waits(farm: TestFarm, number: int) -> bool:
    return "release" in (await farm.control.registry.run(views.task, number)).detail
