"""Mirrored VVols on the real data plane, control played by a record: what control knows before what is acknowledged."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest

from nbdvvol.filter.legplace import Storage
from nbdvvol.model.farm import CacheConfig
from nbdvvol.model.link import LegSpec
from tests.lib.pattern import pattern
from tests.lib.rawio import NbdError
from tests.lib.rawnbd import Closed
from tests.unit.filter_words import MIB, until, vvol
from tests.unit.mirror_rig import META, SIZE, UUID_OF, MirrorRig
from tests.unit.plane_rig import eventually

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[MirrorRig]:
    one = MirrorRig(tmp_path)
    yield one
    one.close()


def follow(rig: MirrorRig) -> None:
    """Control sends what its record says now."""
    rig.want(rig.spec())


def comes_back(rig: MirrorRig, leg: int) -> None:
    eventually(
        "the leg is in sync again", lambda: rig.registry.state_of(leg) == "in-sync" and rig.lane(leg) == "in-sync"
    )


def test_both_legs_get_what_is_written(rig: MirrorRig) -> None:
    rig.serve()
    client = rig.client()
    data = pattern(1, 0, 4 * MIB)
    client.write(MIB, data)
    client.flush()
    assert client.read(MIB, len(data)) == data
    eventually("its labels are known", lambda: {"confirm 1", "confirm 2"} <= set(rig.registry.asked))
    client.disconnect()
    rig.want(None)
    eventually("it is released", lambda: rig.registry.lines[-1] == "released 1 epoch 2")
    assert rig.bytes_of(1) == rig.bytes_of(2) and rig.bytes_of(1)[MIB : 5 * MIB] == data


def test_nothing_is_acknowledged_before_control_knows(rig: MirrorRig) -> None:
    rig.serve()
    client = rig.client()
    client.write(0, b"whole..." * 512)
    rig.away(True)
    rig.fail(2)
    eventually("the leg is lost", lambda: rig.lane(2) == "failing")
    cookie = client.send(1, 4096, 4096, payload=b"missed.." * 512)
    client.stream.expect_silence(0.5)
    assert rig.registry.state_of(2) == "in-sync" and client.read(0, 4096) == b"whole..." * 512
    rig.away(False)
    assert client.wait(cookie).error == 0
    assert "stale 2" in rig.registry.asked
    comes_back(rig, 2)


def test_a_leg_cut_short_behind_our_back_is_lost_not_repaired(rig: MirrorRig) -> None:
    """Repairing what is missing would grow the file, and the rest of it would be read as zeros."""
    rig.serve()
    client = rig.client()
    data = pattern(5, 0, 8 * MIB)
    client.write(0, data)
    client.flush()
    with rig.files[0].open("r+b") as file:
        file.truncate(META)
    for offset in [7 * MIB, *range(0, 7 * MIB, 64 * 1024)]:
        assert client.read(offset, 4096) == data[offset : offset + 4096]
    eventually("the leg is lost", lambda: "stale 1" in rig.registry.asked)
    export = rig.table.get(UUID_OF)
    assert export is not None and export.mirror is not None
    place = export.mirror.places[1]
    eventually("it is said why", lambda: "it was shortened: restore its size" in place.why)
    assert client.read(MIB, 4096) == data[MIB : MIB + 4096]


def test_control_away_for_too_long_is_an_error(tmp_path: Path) -> None:
    rig = MirrorRig(tmp_path, hold_s=0.3)
    rig.serve()
    client = rig.client()
    rig.away(True)
    rig.fail(2)
    with pytest.raises(NbdError):
        client.write(0, b"too late" * 512)
    rig.away(False)
    eventually("control knows, and it goes on", lambda: "in-sync 2" in rig.registry.asked)
    client.write(0, b"goes on." * 512)
    client.flush()
    rig.close()


def test_a_lost_leg_comes_back_and_only_what_differs_is_copied(rig: MirrorRig) -> None:
    rig.serve()
    client = rig.client()
    client.write(0, pattern(3, 0, SIZE))
    client.flush()
    rig.fail(2)
    eventually("control knows", lambda: "stale 2" in rig.registry.asked)
    client.write(8 * MIB, b"degraded" * 512)
    client.flush()
    comes_back(rig, 2)
    follow(rig)
    volume = rig.serve()
    verified = rig.wait(rig.table.verify(UUID_OF, rig.epoch, repair=False))
    assert verified.compared_bytes == SIZE and verified.differed == 0
    assert client.read(8 * MIB, 4096) == b"degraded" * 512
    assert rig.call(rig.plane.mirror_status, volume).copied_bytes <= SIZE
    kinds = [line.split()[1] for line in rig.registry.lines if line.startswith("notice")]
    assert kinds.count("leg_failed") == 1 and kinds.count("leg_in_sync") == 1


def test_a_resync_that_does_not_begin_has_its_leg_opened_anew(rig: MirrorRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed its label may have latched its object: a try on the same opening would fail for ever."""
    rig.serve()
    whole = rig.plane.resync_leg
    openings: list[int] = []

    def fails_once(*args: int, full: bool) -> None:
        export = rig.table.get(UUID_OF)
        assert export is not None and export.mirror is not None
        openings.append(export.mirror.places[2].attempt)
        if len(openings) == 1:
            raise OSError(errno.EIO, "its label cannot be written")
        whole(*args, full=full)

    monkeypatch.setattr(rig.plane, "resync_leg", fails_once)
    rig.fail(2)
    eventually("control knows", lambda: "stale 2" in rig.registry.asked)
    comes_back(rig, 2)
    assert openings == [2, 3]


def test_a_release_that_fails_is_tried_again_after_a_rest(rig: MirrorRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last leg in sync may refuse its label for long: nothing is gained by asking as fast as it refuses."""
    rig.serve()
    client = rig.client()
    whole = rig.plane.release_leg
    at_s: list[float] = []
    refuses = True

    def release(*args: int) -> None:
        at_s.append(asyncio.get_running_loop().time())
        if refuses:
            raise OSError(errno.EIO, "the label of the last leg in sync cannot be written")
        whole(*args)

    monkeypatch.setattr(rig.plane, "release_leg", release)
    rig.fail(2)
    eventually("control knows", lambda: "stale 2" in rig.registry.asked)
    cookie = client.send(1, 0, 4096, payload=b"is held." * 512)
    eventually("it is tried again, and again", lambda: len(at_s) >= 4)
    refuses = False
    assert client.wait(cookie).error == 0
    comes_back(rig, 2)
    rests_s = [later - sooner for sooner, later in pairwise(at_s)]
    for rest_s, least_s in zip(rests_s, (0.2, 0.4, 0.8), strict=False):
        assert rest_s >= least_s


def test_what_comes_while_a_mirror_closes_starts_nothing(rig: MirrorRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A release that rests, and an answer of control that came late."""
    rig.serve()
    export = rig.table.get(UUID_OF)
    assert export is not None and export.mirror is not None
    mirror, closes = export.mirror, rig.plane.close_volume
    released: list[int] = []
    failures: list[object] = []

    def release(*args: int) -> None:
        released.append(args[1])
        raise OSError(errno.EIO, "the label of the last leg in sync cannot be written")

    async def closes_late(volume: int) -> None:
        rig.registry.record.legs[0].state = "stale"
        rig.registry.record.generation += 1
        mirror.follow(rig.spec())
        await closes(volume)

    monkeypatch.setattr(rig.plane, "release_leg", release)
    monkeypatch.setattr(rig.plane, "close_volume", closes_late)
    rig.call(rig.loop.set_exception_handler, lambda _, context: failures.append(context))
    rig.fail(2)
    eventually("it could not be released", lambda: released)
    rig.want(None)
    eventually("it is let go", lambda: rig.registry.lines[-1] == "released 1 epoch 2")
    count = len(released)
    time.sleep(1.0)
    assert len(released) == count and failures == []


async def test_what_opens_when_nobody_waits_for_it_any_more_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mirror that closes while a leg is being opened: its object must not stay open, nor its claim stand."""
    held, opens, released = object(), asyncio.Event(), list[object]()

    class Objects:
        async def release(self, one: object) -> None:
            released.append(one)

    async def acquire(*_: object) -> object:
        await opens.wait()
        return held

    storage = Storage(cast("Any", None), cast("Any", Objects()), lambda _: None)
    monkeypatch.setattr(storage, "_acquire", acquire)
    leg = LegSpec(id=1, datastore="a", state="in-sync", runs=[])
    spec = vvol(1, legs=[leg])
    opening = asyncio.create_task(storage.open(storage.place(spec, leg), spec, lambda _: None))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    opens.set()
    await until(lambda: released == [held])


def test_only_the_operator_ends_a_doubt(rig: MirrorRig) -> None:
    """A server that timed out may still work on old requests; that its datastore is back says nothing of that."""
    rig.serve()
    export = rig.table.get(UUID_OF)
    assert export is not None and export.mirror is not None
    place = export.mirror.places[2]

    def wanted(**counts: int) -> None:
        spec = rig.spec()
        legs = [leg.model_copy(update=counts) if leg.id == 2 else leg for leg in spec.legs]
        rig.want(spec.model_copy(update={"legs": legs}))

    place.doubted = True
    rig.fail(2)
    eventually("a person is asked", lambda: "restart it" in place.why)
    wanted(tries=1)
    eventually("it was told", lambda: place.spec.tries == 1)
    time.sleep(1.0)
    assert place.doubted and rig.lane(2) == "stale" and rig.registry.state_of(2) == "stale"
    wanted(tries=1, asked=1)
    comes_back(rig, 2)


def test_a_doubt_that_control_has_written_down_keeps_a_leg_away(rig: MirrorRig) -> None:
    """Another filter had it: nothing is opened, nothing copied, until a person says so, or its server fences."""
    for leg in rig.registry.record.legs:
        leg.state = "stale" if leg.id == 2 else "in-sync"

    def wanted(**of_leg: object) -> None:
        spec = rig.spec()
        legs = [leg.model_copy(update=of_leg) if leg.id == 2 else leg for leg in spec.legs]
        rig.want(spec.model_copy(update={"legs": legs}))

    wanted(doubt=True)
    eventually("it serves", lambda: rig._volume() is not None)
    export = rig.table.get(UUID_OF)
    assert export is not None and export.mirror is not None
    place = export.mirror.places[2]
    eventually("a person is asked", lambda: "restart it" in place.why)
    wanted(doubt=True, tries=1)
    eventually("it was told", lambda: place.spec.tries == 1)
    assert place.held is None and place.attempt == 0 and "syncing 2" not in rig.registry.asked
    rig.away(True)
    rig.away(False)
    wanted(doubt=False, tries=1, asked=1)
    comes_back(rig, 2)


def test_a_leg_that_is_absent_is_stale_before_anything_is_served(rig: MirrorRig) -> None:
    rig.serve()
    rig.client().write(0, b"both legs" * 512)
    rig.want(None)
    eventually("it is released", lambda: rig.registry.lines[-1] == "released 1 epoch 2")
    away = rig.files[1].rename(rig.files[1].with_suffix(".away"))
    rig.registry.record.epoch = rig.epoch = 3
    rig.serve()
    assert rig.registry.state_of(2) == "stale" and "stale 2" in rig.registry.asked
    rig.client().write(MIB, b"alone..." * 512)
    away.rename(rig.files[1])
    comes_back(rig, 2)


def test_a_registry_older_than_the_labels_is_refused(rig: MirrorRig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.serve()
    rig.want(None)
    eventually("it is released", lambda: rig.registry.lines[-1] == "released 1 epoch 2")
    rig.registry.record.generation = 1
    rig.registry.record.epoch = 3
    for leg in rig.registry.record.legs:
        leg.stamp.epoch = 2
    rig.serve()
    rig.want(None)
    eventually("it is released", lambda: rig.registry.lines[-1] == "released 1 epoch 3")
    rig.stop_table()
    rig.call(rig._start)  # a process that has not seen epoch 3
    rig.registry.record.epoch = 2
    machines: list[int] = []
    make = rig.plane.leg_machine
    monkeypatch.setattr(rig.plane, "leg_machine", lambda epoch: machines.append(epoch) or make(epoch))
    rig.want(rig.spec())
    eventually("it is tried again", lambda: len(machines) > 1 and "newer than the registry" in rig.error())
    assert len(machines) < 10, "after a while, and not as fast as it fails"
    export = rig.table.get(UUID_OF)
    assert export is not None and export.why == "old-registry"


def test_a_newer_epoch_fences(rig: MirrorRig) -> None:
    rig.serve()
    client = rig.client()
    client.write(0, b"epoch 2." * 512)
    rig.registry.record.epoch = 3
    rig.fail(2)
    eventually("it stops", lambda: rig._volume() is None)
    with pytest.raises((NbdError, Closed, OSError)):
        client.write(0, b"epoch 2?" * 512)
    assert rig.registry.record.generation == 1


def test_without_a_lease_nothing_is_served(tmp_path: Path) -> None:
    rig = MirrorRig(tmp_path, lease_s=5.0)
    rig.registry.leases[UUID_OF] = 1.0
    rig.serve()
    rig.client().write(0, b"with it." * 512)
    rig.fail(2)
    eventually("control knows", lambda: "stale 2" in rig.registry.asked)
    comes_back(rig, 2)
    follow(rig)
    assert attempts(rig) == {1: 1, 2: 2}
    del rig.registry.leases[UUID_OF]
    eventually("it stops", lambda: rig._volume() is None)
    rig.registry.leases[UUID_OF] = 30.0
    eventually("it serves again", lambda: rig._volume() is not None)
    assert attempts(rig) == {1: 2, 2: 3}, "a server that knows claims would refuse an attempt that is not newer"
    rig.close()


def attempts(rig: MirrorRig) -> dict[int, int]:
    """By leg, which opening of it in this epoch the present one is."""
    export = rig.table.get(UUID_OF)
    assert export is not None and export.mirror is not None
    return {number: place.attempt for number, place in export.mirror.places.items()}


def test_a_leg_that_is_to_be_removed_is_taken_out_of_use_but_never_the_last(tmp_path: Path) -> None:
    rig = MirrorRig(tmp_path, legs=3)
    rig.serve()
    client = rig.client()
    client.write(0, b"3 copies" * 512)
    for leg in (2, 3):
        rig.wishes[leg] = "off"
        follow(rig)
        eventually(f"leg {leg} is out of use", lambda leg=leg: rig.registry.state_of(leg) == "stale")
        client.write(0, b"go on..." * 512)
    assert rig.registry.reasons[-1] == "taken out of use by request"
    rig.wishes[1] = "off"
    follow(rig)
    client.write(4096, b"the last" * 512)
    client.flush()
    assert (rig.lane(1), rig.registry.state_of(1)) == ("in-sync", "in-sync")
    assert client.read(4096, 4096) == b"the last" * 512
    rig.close()


def test_a_mirror_is_cached_above_its_legs(tmp_path: Path) -> None:
    """One copy in RAM for all of them: right while a leg goes and comes, and ended by a fence as the legs are."""
    rig = MirrorRig(tmp_path, cache_bytes=2 * MIB)
    volume = rig.serve(cache=CacheConfig(mode="read"))
    client = rig.client()
    data = pattern(7, 0, MIB)
    client.write(0, data)
    assert client.read(0, MIB) == client.read(0, MIB) == data
    found = rig.call(rig.plane.cache_stats, volume)
    assert (found.hits, found.misses, found.ahead) == (256, 256, 0)
    rig.fail(2)
    eventually("control knows", lambda: "stale 2" in rig.registry.asked)
    client.write(4096, b"degraded" * 512)
    assert client.read(0, 3 * 4096) == data[:4096] + b"degraded" * 512 + data[8192 : 3 * 4096]
    comes_back(rig, 2)
    client.flush()
    hits = rig.call(rig.plane.cache_stats, volume).hits
    assert client.read(0, MIB)[4096:8192] == b"degraded" * 512
    assert rig.call(rig.plane.cache_stats, volume).hits - hits >= 255, "copying to a leg drops nothing"
    rig.call(rig.plane.fence_volume, volume)
    with pytest.raises((NbdError, Closed)):
        client.read(0, 4096)
    rig.close()


def test_eight_legs_of_which_seven_are_lost_and_come_back(tmp_path: Path) -> None:
    rig = MirrorRig(tmp_path, legs=8)
    try:
        rig.serve()
        client = rig.client()
        data = [pattern(number, 0, MIB) for number in range(8)]
        client.write(0, data[0])
        client.flush()
        for leg in range(2, 9):
            rig.fail(leg)
            client.write((leg - 1) * MIB, data[leg - 1])
        client.flush()
        assert client.read(0, 8 * MIB) == b"".join(data)
        for leg in range(2, 9):
            assert f"stale {leg}" in rig.registry.asked
            comes_back(rig, leg)
        client.disconnect()
        rig.want(None)
        eventually("it is released", lambda: rig.registry.lines[-1] == "released 1 epoch 2")
        assert rig.bytes_of(1)[: 8 * MIB] == b"".join(data)
        assert all(rig.bytes_of(leg) == rig.bytes_of(1) for leg in range(2, 9))
    finally:
        rig.close()
