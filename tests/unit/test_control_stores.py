"""Datastores: adoption, directories, formatting; whose bytes are never touched."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from nbdvvol.control.registry import views, vvols
from nbdvvol.datastores import format as disk
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.farm import AdoptConfig
from nbdvvol.model.resources import BindVVol, CreateVVol, ResizeVVol, Task, TaskState
from tests.unit.control_farm import MIB, TestFarm, running_farm

__all__ = ["running_farm"]
pytestmark = pytest.mark.timeout(30)


def _spec(vvols: dict[str, Any] | None = None, **store: Any) -> dict[str, Any]:
    return {"datastores": {"s": {"path": "/fake/s", **store}}, "vms": {"vm1": {"vvols": vvols or {}}}}


async def _adopt(farm: TestFarm, name: str, **adopt: Any) -> Task:
    body = CreateVVol(vm="vm1", name=name, adopt=AdoptConfig(datastore="s", **adopt))
    return await farm.over((await farm.control.registry.run(vvols.begin_create, body)).task.id)


async def _delete(farm: TestFarm, name: str) -> Task:
    return await farm.over((await farm.control.registry.run(vvols.begin_delete, "vm1", name)).task.id)


async def test_adopted_bytes_are_never_touched(farm: TestFarm) -> None:
    content = bytes(range(256)) * 4096 * 8 + b"an odd tail"
    farm.disks.bytes["/fake/s"] = bytearray(content)
    result = await farm.apply(_spec({"old": {"adopt": {"datastore": "s"}}}, kind="block"))
    await farm.filter()
    await farm.settle(result)
    vvol = await farm.vvol("vm1/old")
    assert vvol.size == len(content) and vvol.legs[0].adopted
    assert [(r.offset, r.object_offset) for r in vvol.legs[0].regions] == [(0, 0)]
    assert (await _delete(farm, "old")).state is TaskState.SUCCESS
    assert farm.disks.bytes["/fake/s"] == content
    assert not farm.begun("scrub") and not farm.begun("write_meta")
    assert (await farm.control.registry.run(views.datastores))[0].use == "unused"


async def test_parts_are_adopted_without_overlap(farm: TestFarm) -> None:
    farm.disks.bytes["/fake/s"] = bytearray(b"z" * (8 * MIB))
    await farm.apply(_spec(kind="block"))
    await farm.filter()
    assert (await _adopt(farm, "a", offset=MIB, length=MIB)).state is TaskState.SUCCESS
    overlap = await _adopt(farm, "b", offset=2 * MIB - 1, length=MIB)
    assert overlap.state is TaskState.ERROR and "CONFLICT" in overlap.error and "adopted already" in overlap.error
    outside = await _adopt(farm, "c", offset=7 * MIB, length=2 * MIB)
    assert outside.state is TaskState.ERROR and "INVALID" in outside.error
    assert (await _adopt(farm, "d", offset=2 * MIB)).state is TaskState.SUCCESS
    (region,) = (await farm.vvol("vm1/d")).legs[0].regions
    assert (region.object_offset, region.length) == (2 * MIB, 6 * MIB)
    with pytest.raises(NvError, match="adopted") as grow:
        await farm.control.registry.run(vvols.begin_resize, "vm1", "a", ResizeVVol(size=2 * MIB))
    assert grow.value.code is Code.UNSUPPORTED
    assert set(farm.disks.bytes["/fake/s"]) == {ord("z")}


async def test_new_vvols_and_adopted_bytes_never_share_a_datastore(farm: TestFarm) -> None:
    farm.disks.bytes["/fake/s"] = bytearray(8 * MIB)
    await farm.apply(_spec(kind="block"))
    await farm.filter()
    assert (await _adopt(farm, "a", length=MIB)).state is TaskState.SUCCESS
    with pytest.raises(NvError, match="never both"):
        await farm.create("b", MIB)
    assert (await _delete(farm, "a")).state is TaskState.SUCCESS
    assert (await farm.create("b", MIB)).state is TaskState.SUCCESS
    with pytest.raises(NvError, match="never both"):
        await _adopt(farm, "c", length=MIB)


@pytest.mark.parametrize("force", [False, True])
async def test_only_blank_devices_are_formatted_unless_forced(farm: TestFarm, force: bool) -> None:
    farm.disks.bytes["/fake/s"] = bytearray(8 * MIB)
    farm.disks.bytes["/fake/s"][100:104] = b"data"
    await farm.apply(_spec(kind="block", format="force" if force else "blank"))
    await farm.filter()
    task = await farm.create("a", MIB)
    if force:
        assert task.state is TaskState.SUCCESS
    else:
        assert "CONFLICT" in task.error and "force" in task.error
        assert bytes(farm.disks.bytes["/fake/s"][100:104]) == b"data"


async def test_another_farms_datastore_is_neither_formatted_nor_adopted(farm: TestFarm) -> None:
    other = disk.plan_header(uuid.uuid4(), uuid.uuid4(), MIB, 8 * MIB)
    farm.disks.bytes["/fake/s"] = bytearray(disk.encode_header(other) * 2 + bytes(8 * MIB - 8192))
    before = bytes(farm.disks.bytes["/fake/s"])
    await farm.apply(_spec(kind="block"))
    await farm.filter()
    assert "another farm's datastore" in (await farm.create("a", MIB)).error
    assert "not for adoption" in (await _adopt(farm, "b")).error
    assert bytes(farm.disks.bytes["/fake/s"]) == before


async def test_a_swapped_device_is_noticed(farm: TestFarm) -> None:
    farm.disks.bytes["/fake/s"] = bytearray(8 * MIB)
    await farm.apply(_spec(kind="block"))
    fake = await farm.filter()
    assert (await farm.create("a", MIB)).state is TaskState.SUCCESS
    await fake.disconnect()
    farm.disks.bytes["/fake/s"] = bytearray(8 * MIB)
    await farm.filter()
    await farm.until(lambda: _is_faulty(farm))
    problems = (await farm.control.status()).problems
    assert any(p.code == "DATASTORE_FAULTY" and "all zero" in p.message for p in problems)


async def _is_faulty(farm: TestFarm) -> bool:
    return (await farm.control.registry.run(views.datastores))[0].state == "faulty"


async def test_a_file_datastore_grows(farm: TestFarm) -> None:
    await farm.apply(_spec(kind="file", size="8MiB"))
    await farm.filter()
    assert (await farm.create("a", 5 * MIB)).state is TaskState.SUCCESS
    assert "NO_SPACE" in (await farm.create("b", 4 * MIB)).error
    await farm.settle(await farm.apply(_spec(kind="file", size="16MiB")))
    assert len(farm.disks.bytes["/fake/s"]) == 16 * MIB
    assert (await farm.create("c", 4 * MIB)).state is TaskState.SUCCESS
    with pytest.raises(NvError, match="shrink") as smaller:
        await farm.apply(_spec(kind="file", size="8MiB"))
    assert smaller.value.code is Code.CONFLICT


@pytest.mark.parametrize("change", [{"path": "/fake/elsewhere"}, {"kind": "block"}, {"extent_size": "2MiB"}])
async def test_a_datastore_in_use_stays_what_it_is(farm: TestFarm, change: dict[str, Any]) -> None:
    farm.disks.bytes["/fake/s"] = bytearray(8 * MIB)
    await farm.apply(_spec(kind="file"))
    await farm.filter()
    assert (await farm.create("a", MIB)).state is TaskState.SUCCESS
    with pytest.raises(NvError, match="cannot change"):
        await farm.apply(_spec(**({"kind": "file"} | change)))


async def test_a_dir_holds_a_file_for_each_leg(farm: TestFarm) -> None:
    result = await farm.apply(_spec({"root": {"size": "3MiB"}}, kind="dir"))
    fake = await farm.filter()
    await farm.settle(result)
    vvol = await farm.vvol()
    path = f"/fake/s/vm1-root-{vvol.uuid}.img"
    assert vvol.legs[0].object == path.rpartition("/")[2]
    assert {key: len(data) for key, data in farm.disks.bytes.items()} == {path: 3 * MIB}
    ref = await farm.control.registry.run(vvols.begin_resize, "vm1", "root", ResizeVVol(size=5 * MIB))
    assert (await farm.over(ref.task.id)).state is TaskState.SUCCESS
    assert len(farm.disks.bytes[path]) == fake.serving[vvol.uuid].size == 5 * MIB
    assert (await _delete(farm, "root")).state is TaskState.SUCCESS
    assert not farm.disks.bytes


async def test_a_file_of_a_dir_is_adopted(farm: TestFarm) -> None:
    farm.disks.bytes["/fake/s/old.img"] = bytearray(b"q" * MIB)
    await farm.apply(_spec({"new": {"size": "1MiB"}}, kind="dir"))
    await farm.filter()
    assert (await _adopt(farm, "old", file="old.img")).state is TaskState.SUCCESS
    assert "adopted already" in (await _adopt(farm, "again", file="old.img")).error
    own = (await farm.vvol("vm1/new")).legs[0].object
    assert "belongs to a VVol" in (await _adopt(farm, "own", file=own)).error
    assert "missing" in (await _adopt(farm, "none", file="none.img")).error
    for name in ("../etc/passwd", "..", "a/b", ""):
        with pytest.raises(NvError, match="plain name"):
            await _adopt(farm, "evil", file=name)
    assert (await _delete(farm, "old")).state is TaskState.SUCCESS
    assert farm.disks.bytes["/fake/s/old.img"] == b"q" * MIB


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"profiles": {"gold": {"mirror": {"legs": ["s", "s"]}}}}, "datastore s is named twice"),
        (
            {"profiles": {"gold": {"cache": {"mode": "writeback"}}}},
            "profile gold: mode writeback needs a log",
        ),
        ({"datastores": {"far": {"kind": "nbd"}}}, "datastore far: kind nbd needs a uri"),
        ({"datastores": {"far": {"kind": "nbd", "uri": "http://x/y"}}}, "scheme 'http'"),
        ({"datastores": {"far": {"kind": "nbd", "uri": "nbd://x/y", "io": "direct"}}}, "a server decides for itself"),
        ({"datastores": {"far": {"kind": "nbd", "uri": "nbd://x/y", "size": "1MiB"}}}, "size is for kind file"),
        ({"datastores": {"t": {"kind": "dir", "path": "/t", "hold": "1s"}}}, "has no hold"),
        (
            {"datastores": {"a": {"kind": "nbd", "uri": "nbd://x/y"}, "b": {"kind": "nbd", "uri": "nbd://x:10809/y"}}},
            "same place",
        ),
        ({"datastores": {"t": {"kind": "dir", "path": "/fake/x/../s"}}}, "same place"),
        ({"datastores": {"t": {"kind": "dir", "path": "relative"}}}, "not absolute"),
        ({"profiles": {"p": {"datastore": "nowhere"}}}, "no datastore nowhere"),
        ({"vms": {"vm1": {"host": "nowhere", "vvols": {}}}}, "no host nowhere"),
        ({"vms": {"vm1": {"vvols": {"a": {"size": 1000}}}}}, "not a multiple of 512"),
        ({"vms": {"vm1": {"vvols": {"a": {"size": "1MiB", "profile": "none"}}}}}, "no profile none"),
        ({"vms": {"vm1": {"vvols": {"a": {}}}}}, "neither a size nor bytes to adopt"),
    ],
)
async def test_what_cannot_be_is_refused_by_name_and_changes_nothing(
    farm: TestFarm, spec: dict[str, Any], words: str
) -> None:
    base = {"datastores": {"s": {"kind": "dir", "path": "/fake/s"}}, "vms": {}}
    whole = base | spec
    if "datastores" in spec:
        whole["datastores"] = base["datastores"] | spec["datastores"]
    with pytest.raises(NvError, match=words):
        await farm.apply(whole)
    assert not await farm.control.registry.run(views.datastores), "all or nothing"


async def test_a_dry_run_says_everything_and_does_nothing(farm: TestFarm) -> None:
    spec = _spec({"root": {"size": "1MiB"}}, kind="dir")
    told = await farm.apply(spec, dry_run=True)
    assert {(c.action, c.kind, c.name) for c in told.changes} == {
        ("create", "host", "local"),
        ("create", "datastore", "s"),
        ("create", "vm", "vm1"),
        ("create", "vvol", "vm1/root"),
    }
    assert not await farm.control.registry.run(views.vvols)
    assert (await farm.apply(spec)).changes == told.changes


async def test_absence_deletes_nothing(farm: TestFarm) -> None:
    result = await farm.apply(_spec({"root": {"size": "1MiB"}}, kind="dir"))
    await farm.filter()
    await farm.settle(result)
    told = await farm.apply({"vms": {}})
    assert ("absent", "vvol", "vm1/root") in {(c.action, c.kind, c.name) for c in told.changes}
    assert (await farm.vvol()).binding is not None


async def test_a_host_must_see_what_it_serves(farm: TestFarm) -> None:
    hosts: dict[str, Any] = {"a": {}, "b": {}}
    vms = {"vm1": {"host": "a", "vvols": {"root": {"size": "1MiB"}}}}
    seen = {"s": {"kind": "dir", "path": "/fake/s", "hosts": ["a"]}}
    with pytest.raises(NvError, match="which host a does not see") as blind:
        store = seen["s"] | {"hosts": ["b"]}
        await farm.apply({"hosts": hosts, "datastores": {"s": store}, "vms": vms})
    assert blind.value.code is Code.INVALID
    result = await farm.apply({"hosts": hosts, "datastores": seen, "vms": vms})
    await farm.filter("a")
    await farm.settle(result)
    with pytest.raises(NvError, match="which host b does not see"):
        await farm.control.registry.run(vvols.begin_bind, "vm1", "root", BindVVol(host="b"))
    with pytest.raises(NvError, match="serves vm1/root") as taken:
        await farm.apply({"hosts": hosts, "datastores": {"s": seen["s"] | {"hosts": ["b"]}}, "vms": vms})
    assert taken.value.code is Code.CONFLICT
