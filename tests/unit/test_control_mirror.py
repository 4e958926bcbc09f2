"""Mirrored VVols on the control side: legs come, fail, are copied to, are replaced and go; who is told what."""

from __future__ import annotations

import asyncio
import uuid as uuids
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from nbdvvol.control.clock import Moment
from nbdvvol.control.mirrorview import StuckCopies
from nbdvvol.control.registry import Registry, bindings, feed, leases, legs, mirrors, schema, stores, views, vvols
from nbdvvol.control.registry import rebuilt as registry_rebuilt
from nbdvvol.control.registry.tx import Tx, transaction
from nbdvvol.datastores import format as disk
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.farm import AdoptConfig, Farm
from nbdvvol.model.link import Snapshot
from nbdvvol.model.mirror import LegChange, LegDoubt, LegRecord, MirrorReport, Stamp
from nbdvvol.model.rebuild import MapWords, Rebuilt, RebuiltLeg, RebuiltStore, RebuiltVVol
from nbdvvol.model.resources import AddLeg, BindVVol, CreateVVol, ResizeVVol, TaskState
from tests.unit import fake_filter
from tests.unit.control_farm import MIB, TestFarm, running_farm
from tests.unit.fake_filter import FakeFilter

__all__ = ["running_farm"]


def _spec(**mirror: Any) -> dict[str, Any]:
    stores = {name: {"kind": "file", "path": f"/fake/{name}.img", "size": "24MiB"} for name in ("a", "b", "s")}
    return {
        "hosts": {"one": {}, "two": {}},
        "datastores": {**stores, "d": {"kind": "dir", "path": "/fake/d"}},
        "profiles": {"gold": {"mirror": {"legs": ["a", "b"], **mirror}}, "plain": {"datastore": "a"}},
        "vms": {"vm1": {"host": "one", "vvols": {"root": {"size": "4MiB", "profile": "gold"}}}},
    }


async def _mirror(farm: TestFarm, **mirror: Any) -> FakeFilter:
    result = await farm.apply(_spec(**mirror))
    fake = await farm.filter("one", "/run/one")
    await farm.settle(result)
    return fake


async def _ask(farm: TestFarm, wanted: Any, leg: int, host: str = "one", **values: Any) -> LegRecord:
    vvol = await farm.vvol()
    base = {"id": 1, "vvol": vvol.uuid, "epoch": vvol.epoch, "generation": vvol.generation, "leg": leg}
    change = LegChange.model_validate({**base, "wanted": wanted, **values})
    return await farm.control.registry.run(legs.leg_change, host, change)


async def _in_sync(farm: TestFarm, leg: int) -> None:
    assert not (await _ask(farm, "syncing", leg)).refused
    now = await farm.vvol()
    stamp = Stamp(epoch=now.epoch, generation=now.generation)
    assert not (await _ask(farm, "in-sync", leg, stamp=stamp)).refused


def _label(farm: TestFarm, store: str, at: int) -> disk.Label:
    return disk.decode_label(bytes(farm.disks.bytes[f"/fake/{store}.img"][at : at + 8192]))


def _words(farm: TestFarm, store: str, at: int) -> MapWords:
    raw = bytes(farm.disks.bytes[f"/fake/{store}.img"][at : at + disk.BITMAP_OFFSET])
    slots = (raw[8192 : 8192 + disk.MAP_SLOT_BYTES], raw[8192 + disk.MAP_SLOT_BYTES :])
    return MapWords.model_validate_json(disk.decode_map(slots).words)


async def test_a_new_mirror_has_labelled_legs_before_it_is_bound(farm: TestFarm) -> None:
    fake = await _mirror(farm)
    (spec,) = fake.serving.values()
    assert spec.mirror is not None and [(leg.id, leg.datastore, leg.state) for leg in spec.legs] == [
        (1, "a", "in-sync"),
        (2, "b", "in-sync"),
    ]
    for leg in spec.legs:
        label = _label(farm, leg.datastore, leg.meta_offset)
        assert (str(label.vvol), label.leg, label.size, label.syncing) == (spec.uuid, leg.id, 4 * MIB, False)
        assert leg.stamp == Stamp(epoch=label.epoch, generation=label.generation)
        words = _words(farm, leg.datastore, leg.meta_offset)
        assert (words.vm, words.name, [one.datastore for one in words.legs]) == ("vm1", "root", ["a", "b"])
        layout = disk.region_layout(leg.meta_length, spec.size)
        at = leg.meta_offset + layout.intent
        maps = farm.disks.bytes[f"/fake/{leg.datastore}.img"][at : leg.meta_offset + leg.meta_length]
        assert not any(maps), "no intent, nothing dirty"


async def test_a_mirror_may_begin_with_one_leg(farm: TestFarm) -> None:
    await _mirror(farm, legs=["b"])
    vvol = await farm.vvol()
    assert vvol.mirror is not None and [(leg.id, leg.datastore) for leg in vvol.legs] == [(1, "b")]


async def test_a_leg_fails_and_comes_back_by_compare_and_swap(farm: TestFarm) -> None:
    fake = await _mirror(farm)
    before = await farm.vvol()
    asked = await asyncio.gather(*(_ask(farm, "stale", leg, generation=before.generation) for leg in (1, 2)))
    assert sorted(answer.refused for answer in asked) == ["", "generation"], "of two at once one is done"
    after = await farm.vvol()
    assert after.generation == before.generation + 1
    (gone,) = [leg for leg in after.legs if leg.state == "stale"]
    assert gone.lost is not None
    assert (await _ask(farm, "stale", 3 - gone.id)).refused == "last-leg"
    again = await _ask(farm, "stale", gone.id, generation=before.generation)
    assert not again.refused and again.record is not None and again.record.generation == after.generation
    refused = await _ask(farm, "stale", gone.id, host="two")
    assert refused.refused == "epoch" and refused.record == again.record, "a host that does not hold it changes nothing"
    await _in_sync(farm, gone.id)
    whole = await farm.vvol()
    assert [leg.state for leg in whole.legs] == ["in-sync", "in-sync"] and all(leg.lost is None for leg in whole.legs)

    async def told() -> bool:
        return fake.serving[whole.uuid].generation == whole.generation

    await farm.until(told)


async def test_only_a_person_vouches_for_what_a_server_was_asked_before(farm: TestFarm) -> None:
    """A datastore that is back gives cause to try, and is no reason to believe that nothing old can land there."""
    fake = await _mirror(farm)
    vvol = await farm.vvol()
    assert not (await _ask(farm, "stale", 2)).refused
    run = farm.control.registry.run

    def counts() -> tuple[int, int]:
        leg = fake.serving[vvol.uuid].legs[1]
        return leg.asked, leg.tries

    async def told(wanted: tuple[int, int]) -> None:
        async def check() -> bool:
            return counts() == wanted

        await farm.until(check)

    await told((0, 0))
    await run(mirrors.store_is_back, "b")
    await told((0, 1))
    await run(mirrors.resync, "vm1", "root", "2", stop=True)
    await told((0, 2))
    await run(mirrors.resync, "vm1", "root", "2")
    await told((1, 2))


@transaction
def feed_of(tx: Tx, host: str) -> Snapshot:
    """What a filter of this host that starts now is told."""
    return feed.snapshot(tx, host)


async def test_a_doubt_about_a_leg_outlives_filters_until_a_person_or_a_copy_ends_it(farm: TestFarm) -> None:
    """Written down with the loss of the leg, before anything is acknowledged that it misses."""
    await _mirror(farm)
    vvol = await farm.vvol()
    run = farm.control.registry.run
    said = LegDoubt(vvol=vvol.uuid, epoch=vvol.epoch, leg=2, doubt=True)

    async def doubt() -> tuple[bool, bool]:
        spec = (await run(feed_of, "one")).state.vvols[vvol.uuid]
        shown = (await farm.vvol()).legs[1].doubt
        return spec.legs[1].doubt, shown

    await run(legs.leg_doubt, "one", said)
    assert await doubt() == (False, False), "a leg that is in sync is not doubted"
    assert not (await _ask(farm, "stale", 2, doubt=True)).refused
    assert await doubt() == (True, True)
    await run(mirrors.store_is_back, "b")
    assert await doubt() == (True, True), "that its server is there again says nothing of old requests"
    for other in (("two", {}), ("one", {"epoch": vvol.epoch - 1}), ("one", {"leg": 3})):
        await run(legs.leg_doubt, other[0], said.model_copy(update={"doubt": False, **other[1]}))
    assert await doubt() == (True, True), "it is the holder's to say"
    await run(mirrors.resync, "vm1", "root", "2")
    assert await doubt() == (False, False), "a person's word"
    await run(legs.leg_doubt, "one", said)
    assert await doubt() == (True, True)
    await run(legs.leg_doubt, "one", said.model_copy(update={"doubt": False}))
    assert await doubt() == (False, False), "the filter has seen everything end"
    await run(legs.leg_doubt, "one", said)
    assert not (await _ask(farm, "syncing", 2)).refused
    assert await doubt() == (False, False)


async def test_that_a_server_fences_is_told_to_whoever_has_a_leg_there(
    farm: TestFarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A leg in doubt is claimed then, and needs no person's word."""
    fake = await _mirror(farm)
    vvol = await farm.vvol()
    assert not (await _ask(farm, "stale", 2, doubt=True)).refused
    probe = fake_filter.DOERS["probe"]
    monkeypatch.setitem(fake_filter.DOERS, "probe", lambda *args: probe(*args) | {"fences": True})
    await farm.control.links.probe("b", "one")

    async def told() -> bool:
        leg = fake.serving[vvol.uuid].legs[1]
        return leg.fences and leg.doubt

    await farm.until(told)


async def test_a_whole_copy_that_has_begun_goes_on_where_it_was(farm: TestFarm) -> None:
    """Its dirty map is durable with its label; a label from before says nothing of that."""
    await _mirror(farm)
    run = farm.control.registry.run
    assert not (await _ask(farm, "stale", 2)).refused
    await run(mirrors.resync, "vm1", "root", "2", full=True)
    before = await farm.vvol()
    assert not (await _ask(farm, "syncing", 2)).refused
    old, new = (Stamp(epoch=before.epoch, generation=before.generation + more) for more in (0, 1))
    for stamp, wish in ((old, "full"), (new, "auto")):
        assert not (await _ask(farm, "confirm", 2, stamp=stamp)).refused
        assert (await farm.vvol()).legs[1].resync == wish
    assert not (await _ask(farm, "stale", 2, reason="write: EIO")).refused
    assert (await farm.vvol()).legs[1].resync == "auto"


async def test_a_host_from_which_it_was_taken_by_force_is_answered_with_the_newer_epoch(farm: TestFarm) -> None:
    fake = await _mirror(farm)
    before = await farm.vvol()
    await fake.disconnect()
    await farm.control.registry.run(vvols.begin_unbind, "vm1", "root", BindVVol(force=True))
    answer = await _ask(farm, "stale", 1, epoch=before.epoch, generation=before.generation)
    assert answer.refused == "epoch" and answer.record is not None and answer.record.epoch > before.epoch
    assert all(leg.state == "in-sync" for leg in (await farm.vvol()).legs)


async def test_legs_are_added_copied_to_and_removed(farm: TestFarm) -> None:
    fake = await _mirror(farm)
    run = farm.control.registry.run
    with pytest.raises(NvError, match="lies on datastore a already"):
        await run(mirrors.begin_add_leg, "vm1", "root", AddLeg(datastore="a"))
    for number, store in ((3, "s"), (4, "d")):
        ref = await run(mirrors.begin_add_leg, "vm1", "root", AddLeg(datastore=store))
        assert (await farm.over(ref.task.id)).state is TaskState.SUCCESS
        (spec,) = fake.serving.values()
        leg = spec.legs[number - 1]
        assert (leg.id, leg.state, leg.resync, leg.datastore) == (number, "stale", "full", store)
        key = "/fake/s.img" if store == "s" else f"/fake/d/{leg.object}"
        label = disk.decode_label(bytes(farm.disks.bytes[key][leg.meta_offset : leg.meta_offset + 8192]))
        assert label.syncing and (label.epoch, label.generation) == (0, 0), "below anything that is confirmed"
        assert sum(run.n for run in leg.runs) == spec.size and all(run.at >= leg.meta_length for run in leg.runs)
    await _in_sync(farm, 3)
    ref = await run(mirrors.begin_remove_leg, "vm1", "root", "a")
    await asyncio.sleep(0.05)
    (spec,) = fake.serving.values()
    assert [leg.resync for leg in spec.legs if leg.id == 1] == ["off"], "its host is asked to take it out of use first"
    assert not (await _ask(farm, "stale", 1, reason="by request")).refused
    assert (await farm.over(ref.task.id)).state is TaskState.SUCCESS

    async def freed() -> bool:
        return [leg.id for leg in (await farm.vvol()).legs] == [2, 3, 4]

    await farm.until(freed)
    (spec,) = fake.serving.values()
    assert [leg.id for leg in spec.legs] == [2, 3, 4]
    assert [one.id for one in _words(farm, "b", spec.legs[0].meta_offset).legs] == [2, 3, 4]
    assert not any(farm.disks.bytes["/fake/a.img"][MIB:]), "what it had was scrubbed"
    ref = await run(mirrors.begin_add_leg, "vm1", "root", AddLeg(datastore="a"))
    await farm.over(ref.task.id)
    assert [leg.id for leg in (await farm.vvol()).legs] == [2, 3, 4, 5], "an id is never given twice"


async def test_a_leg_that_may_be_in_use_is_not_freed(farm: TestFarm) -> None:
    fake = await _mirror(farm)
    assert not (await _ask(farm, "stale", 2)).refused
    await fake.disconnect()
    ref = await farm.control.registry.run(mirrors.begin_remove_leg, "vm1", "root", "2")
    assert (await farm.over(ref.task.id)).state is TaskState.SUCCESS
    await asyncio.sleep(0.1)
    (job,) = await farm.live()
    assert job.kind == "free-leg"
    assert (await farm.vvol()).legs[1].life == "leaving"
    await fake.connect(farm.control.links)
    assert (await farm.over(job.id)).state is TaskState.SUCCESS
    assert [leg.id for leg in (await farm.vvol()).legs] == [1]


@pytest.mark.parametrize("told", ["before", "with its release"])
async def test_space_of_a_leg_in_doubt_is_not_reused_without_the_operators_word(farm: TestFarm, told: str) -> None:
    """An old write of its server would land in what somebody else has there by then."""
    fake = await _mirror(farm)
    vvol = await farm.vvol()
    run = farm.control.registry.run
    assert not (await _ask(farm, "stale", 2, doubt=told == "before")).refused
    fake.unsure = told != "before"
    ref = await run(mirrors.begin_remove_leg, "vm1", "root", "2")
    assert (await farm.over(ref.task.id)).state is TaskState.SUCCESS
    (job,) = await farm.live()

    def scrubbed() -> int:
        return sum(args["store"]["name"] == "b" for args in farm.begun("scrub"))

    before = scrubbed()
    await farm.until(lambda: _waits_for_word(farm, job.id))
    ref = await run(stores.begin_clear_fault, "b")
    assert (await farm.over(ref.task.id)).state is TaskState.SUCCESS
    await run(legs.leg_released, "one", vvol.uuid, 2, fake.unsure)  # again, as at a connect: it counted once
    assert (await farm.over(job.id)).state is TaskState.SUCCESS
    assert scrubbed() == before + 1 and [leg.id for leg in (await farm.vvol()).legs] == [1]


async def _waits_for_word(farm: TestFarm, task: int) -> bool:
    return "clear-fault b" in (await farm.control.watch_task(task, 0.0)).detail


async def test_a_vvol_with_a_leg_in_doubt_is_not_freed_without_the_operators_word(farm: TestFarm) -> None:
    await _mirror(farm)
    run = farm.control.registry.run
    assert not (await _ask(farm, "stale", 2, doubt=True)).refused
    ref = await run(vvols.begin_delete, "vm1", "root")
    await farm.until(lambda: _waits_for_word(farm, ref.task.id))
    await run(stores.begin_clear_fault, "b")
    assert (await farm.over(ref.task.id)).state is TaskState.SUCCESS


async def test_the_last_leg_in_sync_stays(farm: TestFarm) -> None:
    await _mirror(farm)
    assert not (await _ask(farm, "stale", 1)).refused
    with pytest.raises(NvError, match="the only copy") as refused:
        await farm.control.registry.run(mirrors.begin_remove_leg, "vm1", "root", "b")
    assert refused.value.code is Code.CONFLICT


async def test_a_single_copy_becomes_a_mirror_while_nobody_serves_it(farm: TestFarm) -> None:
    await _mirror(farm)
    run = farm.control.registry.run
    assert (await farm.create("solo", 2 * MIB, profile="plain")).state is TaskState.SUCCESS
    with pytest.raises(NvError, match="serves VVol vm1/solo as a single copy"):
        await run(mirrors.begin_add_leg, "vm1", "solo", AddLeg(datastore="b"))
    await farm.over((await run(vvols.begin_unbind, "vm1", "solo", BindVVol())).task.id)
    ref = await run(mirrors.begin_add_leg, "vm1", "solo", AddLeg(datastore="b"))
    assert (await farm.over(ref.task.id)).state is TaskState.SUCCESS
    solo = await farm.vvol("vm1/solo")
    assert solo.mirror is not None and [leg.state for leg in solo.legs] == ["in-sync", "stale"]


@transaction
def _as_before_legs_were_numbered_from_1(tx: Tx, uuid: str) -> None:
    """A registry of an earlier program: its single copies are leg 0."""
    tx.db.execute(update(schema.legs).where(schema.legs.c.vvol == uuid).values(id=0))
    tx.db.execute(update(schema.runs).where(schema.runs.c.vvol == uuid).values(leg=0))
    tx.db.execute(update(schema.vvols).where(schema.vvols.c.uuid == uuid).values(next_leg=1))


async def test_a_single_copy_that_is_leg_0_is_served_and_gets_a_number_before_it_is_a_mirror(farm: TestFarm) -> None:
    fake = await _mirror(farm)
    run = farm.control.registry.run
    await farm.create("solo", 2 * MIB, profile="plain")
    await farm.over((await run(vvols.begin_unbind, "vm1", "solo", BindVVol())).task.id)
    old = await farm.vvol("vm1/solo")
    await run(_as_before_legs_were_numbered_from_1, old.uuid)
    await farm.over((await run(vvols.begin_bind, "vm1", "solo", BindVVol())).task.id)
    assert [leg.id for leg in fake.serving[old.uuid].legs] == [0]
    await farm.over((await run(vvols.begin_unbind, "vm1", "solo", BindVVol())).task.id)
    ref = await run(mirrors.begin_add_leg, "vm1", "solo", AddLeg(datastore="b"))
    assert (await farm.over(ref.task.id)).state is TaskState.SUCCESS
    await farm.over((await run(vvols.begin_bind, "vm1", "solo", BindVVol())).task.id)
    spec = fake.serving[old.uuid]
    assert [(leg.id, leg.datastore, leg.state) for leg in spec.legs] == [(1, "a", "in-sync"), (2, "b", "stale")]
    for leg in spec.legs:
        label = _label(farm, leg.datastore, leg.meta_offset)
        assert (str(label.vvol), label.leg, label.syncing) == (spec.uuid, leg.id, leg.id == 2)
        assert leg.stamp.key() <= (label.epoch, label.generation) <= (spec.epoch, spec.generation)
        assert [one.id for one in _words(farm, leg.datastore, leg.meta_offset).legs] == [1, 2]
    assert [run.at for run in spec.legs[0].runs] == [region.object_offset for region in old.legs[0].regions]
    ref = await run(mirrors.begin_add_leg, "vm1", "solo", AddLeg(datastore="s"))
    await farm.over(ref.task.id)
    assert [leg.id for leg in (await farm.vvol("vm1/solo")).legs] == [1, 2, 3]


async def test_a_mirror_grows_on_every_leg_and_is_deleted_from_every_leg(farm: TestFarm) -> None:
    fake = await _mirror(farm)
    run = farm.control.registry.run
    ref = await run(vvols.begin_resize, "vm1", "root", ResizeVVol(size=6 * MIB))
    assert (await farm.over(ref.task.id)).state is TaskState.SUCCESS
    (spec,) = fake.serving.values()
    assert all(sum(one.n for one in leg.runs) == 6 * MIB for leg in spec.legs)
    ref = await run(vvols.begin_delete, "vm1", "root")
    assert (await farm.over(ref.task.id)).state is TaskState.SUCCESS
    for store in ("a", "b"):
        assert not any(farm.disks.bytes[f"/fake/{store}.img"][MIB:]), "scrubbed"


async def test_a_spare_takes_the_place_of_a_lost_leg(farm: TestFarm) -> None:
    await _mirror(farm, spares=["s"], **{"spare-after": "0s"})
    run = farm.control.registry.run
    assert not (await _ask(farm, "stale", 2, reason="write: EIO")).refused
    await run(mirrors.tend)
    await run(mirrors.tend)

    async def added() -> bool:
        return [leg.life for leg in (await farm.vvol()).legs] == ["live"] * 3 and not await farm.live()

    await farm.until(added)
    spare = (await farm.vvol()).legs[2]
    assert (spare.datastore, spare.replaces) == ("s", 2)
    await _in_sync(farm, 3)
    await run(mirrors.tend)

    async def replaced() -> bool:
        return [leg.id for leg in (await farm.vvol()).legs] == [1, 3]

    await farm.until(replaced)


async def test_a_spare_takes_the_place_of_a_leg_whose_copy_does_not_go_on(farm: TestFarm) -> None:
    """The registry has it as copied to, its host has not come further for too long."""
    await _mirror(farm, spares=["s"], **{"spare-after": "60s"})
    run = farm.control.registry.run
    assert not (await _ask(farm, "stale", 2, reason="write: EIO")).refused
    assert not (await _ask(farm, "syncing", 2)).refused
    vvol = await farm.vvol()
    await run(mirrors.tend, {(vvol.uuid, 2): 59.0})
    assert not await farm.live()
    await run(mirrors.tend, {(vvol.uuid, 2): 61.0})

    async def added() -> bool:
        return [(leg.id, leg.life) for leg in (await farm.vvol()).legs[2:]] == [(3, "live")]

    await farm.until(added)
    assert (await farm.vvol()).legs[2].replaces == 2


def test_how_long_a_copy_has_not_gone_on() -> None:
    stuck = StuckCopies()

    def look(at_s: float, lane: str, why: str = "write: EIO") -> float | None:
        leg = {"id": 2, "lane": lane, "why": why}
        report = MirrorReport.model_validate({"uuid": "v", "epoch": 1, "state": "serving", "legs": [leg]})
        return stuck.look([report], at_s).get(("v", 2))

    assert look(0.0, "syncing") is None
    assert (look(5.0, "absent"), look(10.0, "stale"), look(65.0, "absent")) == (0.0, 5.0, 60.0)
    assert look(70.0, "stale", "") is None, "it is about to begin"
    assert look(75.0, "stale") == 0.0
    assert stuck.look([], 80.0) == {} and look(85.0, "stale") == 0.0, "nobody said so meanwhile"


async def test_verification_is_done_by_the_host_and_told(farm: TestFarm) -> None:
    await _mirror(farm)
    ref = await farm.control.registry.run(mirrors.begin_verify, "vm1", "root")
    done = await farm.over(ref.task.id)
    assert done.state is TaskState.SUCCESS and "2 pieces of 1MiB differed" in done.detail


async def test_a_lease_that_ran_out_frees_a_mirror_only_where_every_leg_fences(farm: TestFarm) -> None:
    fake = await _mirror(farm, lease="10s")
    run = farm.control.registry.run
    vvol = await farm.vvol()
    given = await run(leases.renew, "one", {vvol.uuid: vvol.epoch, str(uuids.uuid4()): 1}, Moment("x", 1000))
    assert given == {vvol.uuid: 10.0}
    await fake.disconnect()
    early, late = Moment("x", 11_999), Moment("x", 12_000)
    assert "host one to release it" in await run(bindings.bind, vvol.uuid, "two", False, early)
    assert await run(leases.renew, "one", {vvol.uuid: vvol.epoch}, early) == {}, "it is to be released"
    waits = await run(bindings.bind, vvol.uuid, "two", False, late)
    assert "cannot fence" in waits and "--force" in waits
    other_boot = await run(bindings.bind, vvol.uuid, "two", False, Moment("y", 900_000))
    assert "lease has run out" not in other_boot, "nobody knows how long ago it was given"
    await run(bindings.bind, vvol.uuid, "two", True)
    bound = (await farm.vvol()).binding
    assert bound is not None and bound.host == "two" and bound.epoch > vvol.epoch


async def test_adopted_bytes_are_one_copy(farm: TestFarm) -> None:
    await _mirror(farm)
    body = CreateVVol(vm="vm1", name="old", adopt=AdoptConfig(datastore="s"), profile="gold")
    with pytest.raises(NvError, match="adopted bytes are one copy"):
        await farm.control.registry.run(vvols.begin_create, body)


async def test_after_a_rebuild_a_stale_leg_behind_a_server_is_in_doubt(tmp_path: Path) -> None:
    """Whether something old is under way there was known to the registry that is lost."""
    stores = {
        "a": {"kind": "file", "path": "/fake/a.img", "size": "24MiB"},
        "far": {"kind": "nbd", "uri": "nbd://127.0.0.1:1/e"},
    }
    spec = {"hosts": {"one": {}}, "datastores": stores, "vms": {"vm1": {"host": "one"}}}
    legs_found = [
        RebuiltLeg(id=number, datastore=store, state=state, slot=0, meta_offset=MIB, meta_length=MIB)
        for number, store, state in ((1, "a", "in-sync"), (2, "a", "stale"), (3, "far", "stale"), (4, "far", "in-sync"))
    ]
    for leg in legs_found:
        leg.slot = leg.id
    rebuilt = Rebuilt(
        datastores=[RebuiltStore(name=name, found="formatted", extent_size=MIB, data_offset=MIB) for name in stores],
        vvols=[RebuiltVVol(uuid="v", vm="vm1", name="root", size=MIB, mirror=True, epoch=9, generation=9, map_version=1,
                           legs=legs_found)],
    )  # fmt: skip
    registry = await Registry.open(tmp_path / "registry.db")
    await registry.run(registry_rebuilt.write, Farm.model_validate(spec), rebuilt)
    vvol = await registry.run(views.resolve, "vm1/root")
    assert [(leg.id, leg.doubt) for leg in vvol.legs] == [(1, False), (2, False), (3, True), (4, False)]
    await registry.close()
