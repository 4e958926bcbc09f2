"""Control dies anywhere and goes on: tasks resume, orders are never doubled, epochs and spaces stay right."""

from __future__ import annotations

import asyncio

import pytest

from nbdvvol.control.registry import bindings, tasks, views, vvols
from nbdvvol.model import link
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.resources import BindVVol, CreateVVol, ResizeVVol, TaskState, VVolState
from tests.unit.control_farm import MIB, PLAIN, TestFarm, running_farm
from tests.unit.fake_filter import FakeFilter

__all__ = ["running_farm"]
pytestmark = pytest.mark.timeout(60)
EMPTY = PLAIN | {"vms": {"vm1": {"vvols": {}}}}


async def _restart(farm: TestFarm) -> None:
    await farm.stop()
    await farm.start()


@pytest.mark.parametrize("step", ["probe", "scrub", "write_meta"])
async def test_creating_goes_on_after_a_restart_of_control(farm: TestFarm, step: str) -> None:
    result = await farm.apply()
    fake = await farm.filter()
    fake.hold_work.add(step)
    await farm.until(lambda: _begun(farm, step))
    await _restart(farm)
    assert (await farm.vvol()).state is VVolState.CREATING
    fake.hold_work.clear()
    await fake.connect(farm.control.links)
    await farm.settle(result)
    vvol = await farm.vvol()
    assert vvol.state is VVolState.READY and fake.serving[vvol.uuid].epoch == vvol.epoch


async def _begun(farm: TestFarm, what: str) -> bool:
    return bool(farm.begun(what))


async def test_a_resumed_task_joins_the_order_that_still_runs(farm: TestFarm) -> None:
    await farm.apply(EMPTY)
    fake = await farm.filter()
    assert (await farm.create("one", 2 * MIB)).state is TaskState.SUCCESS
    fake.hold_work.add("scrub")
    scrubs = len(farm.begun("scrub"))
    creating = asyncio.ensure_future(farm.create("two", 2 * MIB))
    await farm.until(lambda: _count_is(farm, "scrub", scrubs + 1))
    creating.cancel()
    await asyncio.gather(creating, return_exceptions=True)
    await _restart(farm)
    await fake.connect(farm.control.links)
    await asyncio.sleep(0.1)
    assert len(farm.begun("scrub")) == scrubs + 1, "one scrub, however often control starts"
    fake.hold_work.clear()
    await farm.until(lambda: _nothing_lives(farm))
    assert (await farm.vvol("vm1/two")).state is VVolState.READY
    assert len(farm.begun("scrub")) == scrubs + 1


async def _count_is(farm: TestFarm, what: str, count: int) -> bool:
    return len(farm.begun(what)) == count


async def _nothing_lives(farm: TestFarm) -> bool:
    return not await farm.live()


async def test_bytes_of_a_failed_vvol_wait_for_the_order_that_may_still_run(farm: TestFarm) -> None:
    two = EMPTY | {"hosts": {"a": {}, "b": {}}, "vms": {"vm1": {"host": "a", "vvols": {}}}}
    await farm.apply(two)
    slow = await farm.filter("a", "/run/a")
    assert (await farm.create("first", MIB)).state is TaskState.SUCCESS
    slow.hold_work.add("scrub")
    body = CreateVVol(vm="vm1", name="x", size=4 * MIB)
    task = (await farm.control.registry.run(vvols.begin_create, body)).task
    scrubs = len(farm.begun("scrub"))
    await farm.until(lambda: _count_is(farm, "scrub", scrubs + 1))
    await slow.disconnect()
    await farm.filter("b", "/run/b")
    await farm.control.registry.run(tasks.finish, task.id, "error", "given up by a test")
    delete = (await farm.control.registry.run(vvols.begin_delete, "vm1", "x")).task
    await asyncio.sleep(0.2)
    assert (await farm.control.registry.run(views.task, delete.id)).state is TaskState.RUNNING
    assert len(farm.begun("scrub")) == scrubs + 1, "host b must not free what host a may still be zeroing"
    slow.hold_work.clear()
    await slow.connect(farm.control.links)
    assert (await farm.over(delete.id)).state is TaskState.SUCCESS


@pytest.mark.parametrize("held", ["release", "scrub"])
async def test_deleting_goes_on_after_a_restart(farm: TestFarm, held: str) -> None:
    result = await farm.apply()
    fake = await farm.filter()
    await farm.settle(result)
    uuid = (await farm.vvol()).uuid
    if held == "release":
        fake.hold_release = True
    else:
        fake.hold_work.add("scrub")
    task = (await farm.control.registry.run(vvols.begin_delete, "vm1", "root")).task
    await asyncio.sleep(0.1)
    await _restart(farm)
    free = (await farm.control.registry.run(views.datastores))[0].free
    assert free < 12 * MIB, "nothing came back yet"
    fake.hold_work.clear()
    await fake.connect(farm.control.links)
    if held == "release":
        assert fake.serving[uuid].epoch == 1
        await fake.release()
    assert (await farm.over(task.id)).state is TaskState.SUCCESS
    assert (await farm.control.registry.run(views.datastores))[0].free == 15 * MIB


async def test_growing_goes_on_after_a_restart(farm: TestFarm) -> None:
    result = await farm.apply()
    fake = await farm.filter()
    await farm.settle(result)
    fake.hold_work.add("scrub")
    scrubs = len(farm.begun("scrub"))
    ref = await farm.control.registry.run(vvols.begin_resize, "vm1", "root", ResizeVVol(size=7 * MIB))
    await farm.until(lambda: _count_is(farm, "scrub", scrubs + 1))
    assert (await farm.vvol()).size == 4 * MIB
    await _restart(farm)
    fake.hold_work.clear()
    await fake.connect(farm.control.links)
    assert (await farm.over(ref.task.id)).state is TaskState.SUCCESS
    assert (await farm.vvol()).size == 7 * MIB


async def test_a_cancelled_growth_gives_everything_back(farm: TestFarm) -> None:
    result = await farm.apply()
    fake = await farm.filter()
    await farm.settle(result)
    free = (await farm.control.registry.run(views.datastores))[0].free
    fake.hold_work.add("scrub")
    scrubs = len(farm.begun("scrub"))
    ref = await farm.control.registry.run(vvols.begin_resize, "vm1", "root", ResizeVVol(size=7 * MIB))
    await farm.until(lambda: _count_is(farm, "scrub", scrubs + 1))
    await farm.control.registry.run(tasks.cancel, ref.task.id)
    fake.hold_work.clear()
    assert (await farm.over(ref.task.id)).state is TaskState.CANCELLED
    assert (await farm.vvol()).size == 4 * MIB
    assert (await farm.control.registry.run(views.datastores))[0].free == free
    again = await farm.control.registry.run(vvols.begin_resize, "vm1", "root", ResizeVVol(size=15 * MIB))
    over = await farm.over(again.task.id)
    assert over.state is TaskState.ERROR and "NO_SPACE" in over.error
    assert (await farm.control.registry.run(views.datastores))[0].free == free


@pytest.mark.parametrize("kind", ["create", "resize"])
async def test_what_waits_for_a_filter_can_be_taken_back(farm: TestFarm, kind: str) -> None:
    result = await farm.apply()
    fake = await farm.filter()
    await farm.settle(result)
    await fake.disconnect()
    if kind == "create":
        body = CreateVVol(vm="vm1", name="never", size=MIB)
        ref = await farm.control.registry.run(vvols.begin_create, body)
    else:
        ref = await farm.control.registry.run(vvols.begin_resize, "vm1", "root", ResizeVVol(size=6 * MIB))
    await farm.until(lambda: _waits(farm, ref.task.id))
    await farm.control.registry.run(tasks.cancel, ref.task.id)
    assert (await farm.over(ref.task.id)).state is TaskState.CANCELLED
    await fake.connect(farm.control.links)
    await farm.until(lambda: _serves(fake))
    if kind == "create":
        assert (await farm.vvol("vm1/never")).state is VVolState.FAILED
    else:
        assert (await farm.vvol()).size == 4 * MIB and not await farm.live()


async def _waits(farm: TestFarm, number: int) -> bool:
    return "waits for a filter" in (await farm.control.registry.run(views.task, number)).detail


async def _serves(fake: FakeFilter) -> bool:
    return bool(fake.serving)


async def test_a_failed_order_fails_its_task_and_apply_tries_again(farm: TestFarm) -> None:
    fake_result = await farm.apply()
    fake = await farm.filter()
    fake.fail_work["scrub"] = "Input/output error"
    done = [await farm.over(number) for number in fake_result.tasks]
    assert [task.state for task in done] == [TaskState.SUCCESS, TaskState.ERROR]
    assert "Input/output error" in done[1].error
    assert (await farm.vvol()).state is VVolState.FAILED
    status = await farm.control.status()
    assert any(problem.code == "VVOL_FAILED" and "Input/output" in problem.message for problem in status.problems)
    fake.fail_work.clear()
    await farm.settle(await farm.apply())
    assert (await farm.vvol()).state is VVolState.READY


async def test_a_restarted_filter_serves_nothing_until_confirmed(farm: TestFarm) -> None:
    result = await farm.apply()
    first = await farm.filter()
    await farm.settle(result)
    uuid = (await farm.vvol()).uuid
    await first.die()
    second = await farm.filter()
    assert isinstance(second.heard[0], link.Snapshot) and second.serving[uuid].epoch == 2
    await farm.until(lambda: _bound_at(farm, 2))


async def _bound_at(farm: TestFarm, epoch: int) -> bool:
    binding = (await farm.vvol()).binding
    return binding is not None and binding.state == "bound" and binding.epoch == epoch


async def test_a_filter_resumes_after_control_restarts(farm: TestFarm) -> None:
    result = await farm.apply()
    fake = await farm.filter()
    await farm.settle(result)
    await asyncio.sleep(0.05)
    await _restart(farm)
    fake.heard.clear()
    await fake.connect(farm.control.links)
    assert isinstance(fake.heard[0], link.Resumed)
    assert (await farm.vvol()).epoch == 1, "a filter that went on serving keeps its epochs"


async def test_a_second_filter_of_a_host_is_refused_while_the_first_lives(farm: TestFarm) -> None:
    result = await farm.apply()
    first = await farm.filter()
    await farm.settle(result)
    second = await farm.filter()
    assert "connected already" in second.refused
    assert (await farm.vvol()).epoch == 1 and first.serving
    await first.disconnect()
    third = await farm.filter()
    assert not third.refused


async def test_a_filter_may_claim_no_other_host(farm: TestFarm) -> None:
    two = PLAIN | {"hosts": {"a": {}, "b": {}}, "vms": {"vm1": {"host": "a", "vvols": {}}}}
    await farm.apply(two)
    liar = await farm.filter("a")
    await liar.disconnect()
    liar.host = "b"
    mine, theirs = type(liar._pipe).pair()  # type: ignore[union-attr]
    serving = asyncio.ensure_future(farm.control.links.serve("a", theirs))
    await mine.send(link.Hello(host="b", instance="x").model_dump_json())
    refusal = link.from_control.validate_json(await mine.receive())
    assert isinstance(refusal, link.Refused) and "may not claim" in refusal.reason
    await serving


@pytest.mark.parametrize(
    "nonsense", ["", "{}", '{"kind": "applied", "revision": 3}', '{"kind": "welcome"}', "[" * 5000]
)
async def test_nonsense_on_the_link_is_refused(farm: TestFarm, nonsense: str) -> None:
    await farm.apply()
    fake = await farm.filter()
    await fake.disconnect()
    mine, theirs = type(fake._pipe).pair()  # type: ignore[union-attr]
    serving = asyncio.ensure_future(farm.control.links.serve("local", theirs))
    await mine.send(nonsense)
    assert isinstance(link.from_control.validate_json(await mine.receive()), link.Refused)
    await serving
    assert not farm.control.links.connected


async def test_unbinding_waits_and_force_does_not(farm: TestFarm) -> None:
    result = await farm.apply()
    fake = await farm.filter()
    await farm.settle(result)
    await fake.disconnect()
    ref = await farm.control.registry.run(vvols.begin_unbind, "vm1", "root", BindVVol())
    await asyncio.sleep(0.1)
    assert (await farm.control.registry.run(views.task, ref.task.id)).state is TaskState.RUNNING
    forced = await farm.control.registry.run(vvols.begin_unbind, "vm1", "root", BindVVol(force=True))
    assert forced.task.id == ref.task.id
    assert (await farm.over(ref.task.id)).state is TaskState.SUCCESS
    delete = (await farm.control.registry.run(vvols.begin_delete, "vm1", "root")).task
    await asyncio.sleep(0.1)
    assert (await farm.control.registry.run(views.task, delete.id)).state is TaskState.RUNNING, "its bytes wait"
    await fake.connect(farm.control.links)
    assert (await farm.over(delete.id)).state is TaskState.SUCCESS


async def test_deleting_by_force_believes_the_operator(farm: TestFarm) -> None:
    result = await farm.apply()
    fake = await farm.filter()
    await farm.settle(result)
    await fake.disconnect()
    delete = (await farm.control.registry.run(vvols.begin_delete, "vm1", "root", True)).task
    fresh = await farm.filter()
    assert (await farm.over(delete.id)).state is TaskState.SUCCESS
    assert not fresh.serving


async def test_what_was_never_told_needs_no_release(farm: TestFarm) -> None:
    result = await farm.apply()
    fake = await farm.filter()
    await farm.settle(result)
    uuid = (await farm.vvol()).uuid
    await fake.disconnect()
    await farm.control.registry.run(bindings.unbind, uuid)
    fake.serving.clear()
    await fake.connect(farm.control.links)
    await farm.until(lambda: _released(farm, uuid))


async def _released(farm: TestFarm, uuid: str) -> bool:
    return not await farm.control.registry.run(bindings.unreleased, uuid)


async def test_a_broken_transaction_names_its_code(farm: TestFarm) -> None:
    with pytest.raises(NvError) as unknown:
        await farm.control.registry.run(views.resolve, "nothing")
    assert unknown.value.code is Code.NOT_FOUND


async def test_a_bind_that_waits_can_be_forced(farm: TestFarm) -> None:
    two = PLAIN | {"hosts": {"a": {}, "b": {}}, "vms": {"vm1": {"host": "a", "vvols": {"root": {"size": "1MiB"}}}}}
    result = await farm.apply(two)
    one, other = await farm.filter("a", "/run/a"), await farm.filter("b", "/run/b")
    await farm.settle(result)
    await one.disconnect()
    ref = await farm.control.registry.run(vvols.begin_bind, "vm1", "root", BindVVol(host="b"))
    await asyncio.sleep(0.1)
    assert not other.serving
    forced = await farm.control.registry.run(vvols.begin_bind, "vm1", "root", BindVVol(host="b", force=True))
    assert forced.task.id == ref.task.id
    assert (await farm.over(ref.task.id)).state is TaskState.SUCCESS
    assert [spec.epoch for spec in other.serving.values()] == [3], "one for taking it away, one for giving it"
    await one.connect(farm.control.links)
    await farm.until(lambda: _nothing_serves(one))


async def _nothing_serves(fake: FakeFilter) -> bool:
    return not fake.serving


async def test_a_notice_about_nothing_harms_nothing(farm: TestFarm) -> None:
    await farm.apply()
    fake = await farm.filter()
    await fake.say(link.Notice(event="datastore_missing", subject="nowhere", message="x"))
    await fake.say(link.Fault(id="1", datastore="nowhere", message="x"))
    await fake.say(link.Notice(event="vvol_failed", subject="local", message="y"))
    await farm.until(lambda: _told(farm, "vvol_failed"))
    assert (await farm.control.status()).problems == []


async def _told(farm: TestFarm, kind: str) -> bool:
    return any(event.kind == kind for event in await farm.control.registry.run(views.events, 0, 1000))


async def _has_problem(farm: TestFarm, code: str) -> bool:
    return any(problem.code == code for problem in (await farm.control.status()).problems)


async def _is_bound(farm: TestFarm) -> bool:
    binding = (await farm.vvol()).binding
    return binding is not None and (binding.state, binding.why, binding.error) == ("bound", "", "")


async def test_status_names_what_is_wrong(farm: TestFarm) -> None:
    result = await farm.apply()
    fake = await farm.filter()
    await farm.settle(result)
    assert (await farm.control.status()).problems == []
    vvol = await farm.vvol()
    bad = link.ExportReport(
        uuid=vvol.uuid, epoch=1, size=0, flags=0, block_min=1, block_preferred=1, block_max=1, error="no such file"
    )
    await fake.say(link.Exports(exports=[bad]))
    await farm.until(lambda: _has_problem(farm, "EXPORT_FAILED"))
    for why, code in (
        ("old-registry", "REGISTRY_OLD"),
        ("no-leg", "NO_VALID_LEG"),
        ("lease", "LEASE_OVER"),
    ):
        told = link.ExportReport.model_validate(bad.model_dump() | {"why": why})
        await fake.say(link.Exports(exports=[told]))
        await farm.until(lambda code=code: _has_problem(farm, code))
        binding = (await farm.vvol()).binding
        assert binding is not None and (binding.why, binding.error) == (why, "no such file")
    good = bad.model_copy(update={"error": "", "size": vvol.size})
    await fake.say(link.Exports(exports=[good]))
    await farm.until(lambda: _is_bound(farm))
    assert (await farm.control.status()).problems == []
    await fake.die()
    await farm.until(lambda: _has_problem(farm, "HOST_DOWN"))
    await farm.control.registry.run(bindings.unbind, vvol.uuid)
    assert await _has_problem(farm, "RELEASE_WAITS")
    assert all(problem.action for problem in (await farm.control.status()).problems)
