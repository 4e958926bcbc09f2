"""Failed syncs in the registry: which host latches what, which VVols may not move, and the operator's word."""

from __future__ import annotations

from typing import Any

import pytest

from nbdvvol.control.registry import bindings, stores, views, vvols
from nbdvvol.model import link
from nbdvvol.model.errors import NvError
from nbdvvol.model.resources import BindVVol, TaskRef, TaskState
from tests.unit.control_farm import MIB, TestFarm, running_farm
from tests.unit.fake_filter import FakeFilter

__all__ = ["running_farm"]
pytestmark = pytest.mark.timeout(30)
TWO: dict[str, Any] = {
    "hosts": {"a": {}, "b": {}},
    "datastores": {"s": {"kind": "file", "path": "/fake/s", "size": "16MiB"}, "d": {"kind": "dir", "path": "/fake/d"}},
    "vms": {
        "vm1": {"host": "a", "vvols": {"root": {"size": "1MiB", "datastore": "s"}}},
        "vm2": {"host": "b", "vvols": {"root": {"size": "1MiB", "datastore": "s"}}},
    },
}


async def two_hosts(farm: TestFarm) -> tuple[FakeFilter, FakeFilter]:
    result = await farm.apply(TWO)
    pair = await farm.filter("a", "/run/a"), await farm.filter("b", "/run/b")
    await farm.settle(result)
    return pair


async def fail(farm: TestFarm, fake: FakeFilter, number: str = "one", datastore: str = "s", obj: str = "") -> None:
    """A sync fails on this filter's host, and control lists it there."""
    await fake.say(link.Fault(id=number, datastore=datastore, object=obj, message=f"a sync of {datastore}{obj} failed"))
    await farm.until(lambda: lists(fake, datastore, number))


async def lists(fake: FakeFilter, datastore: str, number: str) -> bool:
    return number in fake.state.faults.get(datastore, {})


async def begin_bind(farm: TestFarm, vm: str, name: str, host: str, *, force: bool = False) -> TaskRef:
    return await farm.control.registry.run(vvols.begin_bind, vm, name, BindVVol(host=host, force=force))


async def clear(farm: TestFarm, name: str = "s") -> None:
    ref = await farm.control.registry.run(stores.begin_clear_fault, name)
    assert (await farm.over(ref.task.id)).state is TaskState.SUCCESS


async def codes(farm: TestFarm) -> set[str]:
    return {problem.code for problem in (await farm.control.status()).problems}


async def test_a_fault_is_its_hosts_until_it_is_cleared(farm: TestFarm) -> None:
    one, other = await two_hosts(farm)
    await fail(farm, one)
    await one.say(link.Fault(id="one", datastore="s", message="said again"))
    assert not other.state.faults.get("s"), "the other host's own syncs are good"
    store = next(store for store in await farm.control.registry.run(views.datastores) if store.name == "s")
    assert (store.state, [fault.host for fault in store.faults]) == ("faulty", ["a"])
    assert store.faults[0].message in store.detail
    assert await codes(farm) == {"SYNC_FAILED"}
    await one.die()
    fresh = await farm.filter("a", "/run/a")
    assert fresh.state.faults == {"s": {"one": ""}}, "a new process latches it again"
    await farm.stop()
    await farm.start()
    await fresh.connect(farm.control.links)
    assert "SYNC_FAILED" in await codes(farm)
    await clear(farm)
    assert fresh.state.faults == {"s": {}} and await codes(farm) == {"HOST_DOWN"}
    assert (await farm.control.registry.run(views.datastores))[1].state == "online"


async def test_clearing_waits_until_the_host_has_cleared(farm: TestFarm) -> None:
    one, _ = await two_hosts(farm)
    await fail(farm, one)
    one.hold_applied = True
    ref = await farm.control.registry.run(stores.begin_clear_fault, "s")
    await farm.until(lambda: _waits_for(farm, ref.task.id, "host a to hear of it"))
    one.hold_applied = False
    await one.say(link.Applied(revision=one.revision))
    assert (await farm.over(ref.task.id)).state is TaskState.SUCCESS


async def _waits_for(farm: TestFarm, number: int, words: str) -> bool:
    return words in (await farm.control.registry.run(views.task, number)).detail


async def test_clearing_does_not_wait_for_a_host_that_is_away(farm: TestFarm) -> None:
    one, _ = await two_hosts(farm)
    await fail(farm, one)
    await one.disconnect()
    await clear(farm)
    await one.connect(farm.control.links)
    await farm.until(lambda: _empty(one))


async def _empty(fake: FakeFilter) -> bool:
    return fake.state.faults == {"s": {}}


async def test_what_may_have_lost_bytes_moves_only_by_the_operators_word(farm: TestFarm) -> None:
    one, other = await two_hosts(farm)
    await fail(farm, one)
    ref = await begin_bind(farm, "vm1", "root", "b")
    await farm.until(lambda: _waits_for(farm, ref.task.id, "nbdvvol datastore clear-fault s"))
    uuid = (await farm.vvol("vm1/root")).uuid
    assert uuid in one.serving and uuid not in other.serving, "it is not taken away before that"
    await clear(farm)
    assert (await farm.over(ref.task.id)).state is TaskState.SUCCESS
    assert uuid not in one.serving and uuid in other.serving


async def test_force_is_the_operators_word(farm: TestFarm) -> None:
    one, other = await two_hosts(farm)
    await fail(farm, one)
    ref = await begin_bind(farm, "vm1", "root", "b")
    await farm.until(lambda: _waits_for(farm, ref.task.id, "clear-fault"))
    forced = await begin_bind(farm, "vm1", "root", "b", force=True)
    assert forced.task.id == ref.task.id
    assert (await farm.over(ref.task.id)).state is TaskState.SUCCESS
    assert (await farm.vvol("vm1/root")).uuid in other.serving
    said = [event.message for event in await farm.control.registry.run(views.events, 0, 1000)]
    assert any("sync that failed on host a" in text and "accepted" in text for text in said)


async def test_what_never_was_on_that_host_moves_freely(farm: TestFarm) -> None:
    one, other = await two_hosts(farm)
    await fail(farm, one)
    uuid = (await farm.vvol("vm2/root")).uuid
    ref = await begin_bind(farm, "vm2", "root", "a")
    assert (await farm.over(ref.task.id)).state is TaskState.SUCCESS
    assert uuid in one.serving
    back = await begin_bind(farm, "vm2", "root", "b")
    await farm.until(lambda: _waits_for(farm, back.task.id, "clear-fault"))
    assert uuid not in other.serving, "it shares the fate of what is latched there"
    await clear(farm)
    assert (await farm.over(back.task.id)).state is TaskState.SUCCESS


async def test_a_deleted_file_takes_its_fault_with_it(farm: TestFarm) -> None:
    one, _ = await two_hosts(farm)
    assert (await farm.create("file", MIB, datastore="d")).state is TaskState.SUCCESS
    obj = (await farm.vvol("vm1/file")).legs[0].object
    await fail(farm, one, datastore="d", obj=obj)
    root = await begin_bind(farm, "vm1", "root", "b")
    assert (await farm.over(root.task.id)).state is TaskState.SUCCESS, "another datastore is not concerned"
    ref = await farm.control.registry.run(vvols.begin_delete, "vm1", "file")
    assert (await farm.over(ref.task.id)).state is TaskState.SUCCESS
    await farm.until(lambda: _gone(one))
    assert await codes(farm) == set()


async def _gone(fake: FakeFilter) -> bool:
    return fake.state.faults == {"d": {}}


async def test_clearing_nothing_is_no_error(farm: TestFarm) -> None:
    await two_hosts(farm)
    await clear(farm)
    with pytest.raises(NvError, match="no datastore"):
        await farm.control.registry.run(stores.begin_clear_fault, "ghost")


async def test_a_cleanly_stopped_host_needs_no_force(farm: TestFarm) -> None:
    one, other = await two_hosts(farm)
    before = (await farm.vvol("vm1/root")).epoch
    await one.stop()
    await farm.until(lambda: _binding_is(farm, "a", "assigned"))
    [problem] = (await farm.control.status()).problems
    assert problem.code == "HOST_DOWN" and "nothing of the 1 VVols" in problem.message and "bind" in problem.action
    assert "force" not in problem.action
    ref = await begin_bind(farm, "vm1", "root", "b")
    assert (await farm.over(ref.task.id)).state is TaskState.SUCCESS
    vvol = await farm.vvol("vm1/root")
    assert vvol.uuid in other.serving and vvol.epoch > before
    back = await farm.filter("a", "/run/a")
    assert not back.serving, "its filter starts again and finds nothing to serve"


async def _binding_is(farm: TestFarm, host: str, state: str) -> bool:
    binding = (await farm.vvol("vm1/root")).binding
    return binding is not None and (binding.host, binding.state) == (host, state)


async def test_a_stopped_filter_that_starts_again_serves_what_is_still_its_own(farm: TestFarm) -> None:
    one, _ = await two_hosts(farm)
    before = (await farm.vvol("vm1/root")).epoch
    await one.stop()
    await farm.stop()
    await farm.start()
    fresh = await farm.filter("a", "/run/a")
    await farm.until(lambda: _binding_is(farm, "a", "bound"))
    assert [spec.epoch for spec in fresh.serving.values()] == [before + 1]
    fresh.hold_release = True
    ref = await begin_bind(farm, "vm1", "root", "b")
    await farm.until(lambda: _waits_for(farm, ref.task.id, "host a to release it"))
    await fresh.release()
    assert (await farm.over(ref.task.id)).state is TaskState.SUCCESS, "what runs again must be asked again"


async def test_a_killed_host_needs_force(farm: TestFarm) -> None:
    one, other = await two_hosts(farm)
    await one.die()
    ref = await begin_bind(farm, "vm1", "root", "b")
    await farm.until(lambda: _waits_for(farm, ref.task.id, "host a to release it"))
    assert (await farm.vvol("vm1/root")).uuid not in other.serving


async def test_a_stop_ends_what_was_being_released(farm: TestFarm) -> None:
    one, other = await two_hosts(farm)
    one.hold_release = True
    ref = await begin_bind(farm, "vm1", "root", "b")
    await farm.until(lambda: _waits_for(farm, ref.task.id, "host a to release it"))
    await one.stop()
    assert (await farm.over(ref.task.id)).state is TaskState.SUCCESS
    assert (await farm.vvol("vm1/root")).uuid in other.serving


async def test_a_host_that_was_never_told_needs_no_force(farm: TestFarm) -> None:
    """Bound by mistake to a host without a filter, and taken back at once."""
    result = await farm.apply(TWO)
    one = await farm.filter("a", "/run/a")
    for number in result.tasks[:-1]:
        await farm.over(number)
    assert (await farm.over((await begin_bind(farm, "vm1", "root", "b")).task.id)).state is TaskState.SUCCESS
    assert (await farm.over((await begin_bind(farm, "vm1", "root", "a")).task.id)).state is TaskState.SUCCESS
    await farm.until(lambda: _binding_is(farm, "a", "bound"))
    assert len(one.serving) == 1
    late = await farm.filter("b", "/run/b")
    assert {spec.vm for spec in late.serving.values()} == {"vm2"}


async def test_a_stopped_hosts_vvol_can_be_deleted(farm: TestFarm) -> None:
    one, _ = await two_hosts(farm)
    await one.stop()
    ref = await farm.control.registry.run(vvols.begin_delete, "vm1", "root")
    assert (await farm.over(ref.task.id)).state is TaskState.SUCCESS, "host b sees the datastore and scrubs it"


async def test_an_old_farewell_says_nothing_of_the_filter_that_came_after(farm: TestFarm) -> None:
    one, _ = await two_hosts(farm)
    await one.disconnect()
    fresh = await farm.filter("a", "/run/a")
    await farm.control.registry.run(bindings.stopped, "a", one.instance)
    assert await _binding_is(farm, "a", "bound") and fresh.serving
