"""Exports follow control: order of drain and release, failures of one that harm no other, live changes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import nbdvvol.filter.exports as exports_module
from nbdvvol.dataplane.types import CacheMode, CachePolicy, CacheTotals, VolumeLimits
from nbdvvol.filter.claims import ClaimBook
from nbdvvol.filter.exports import ExportTable
from nbdvvol.filter.lognotes import LogBook
from nbdvvol.filter.objects import ObjectTable
from nbdvvol.filter.syncfaults import FaultBook
from nbdvvol.model.errors import NvError
from nbdvvol.model.farm import CacheConfig, QosConfig
from tests.unit.fake_plane import FakePlane
from tests.unit.filter_words import MIB, Reports, dir_store, file_store, host_state, until, uuid_of, vvol


class Bench:
    """A table over a fake plane."""

    def __init__(self, run_dir: Path) -> None:
        self.plane = FakePlane()
        self.reports = Reports()
        self.faults = FaultBook(run_dir)
        self.objects = ObjectTable(self.plane, self.faults)
        self.objects.farm = "farm"
        self.table = ExportTable(self.plane, self.objects, self.reports, ClaimBook(run_dir), LogBook(run_dir))

    async def take(self, *parts: object) -> None:
        for export in self.table.take(host_state(*parts)):  # type: ignore[arg-type]
            await asyncio.wait_for(export.settled.wait(), 5)


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    monkeypatch.setattr(exports_module, "RETRY_MIN_S", 0.05)
    bench = Bench(tmp_path_factory.mktemp("run"))
    yield bench
    if bench.plane.closing is not None:
        bench.plane.closing.set()
    await bench.table.stop()
    await bench.table.close_all()
    assert bench.plane.volumes == {} and bench.plane.objects == {}
    bench.objects.shutdown()


@pytest.fixture
def local(tmp_path: Path) -> Path:
    path = tmp_path / "local.img"
    path.write_bytes(bytes(8 * MIB))
    return path


async def test_up_and_down(bench: Bench, local: Path) -> None:
    await bench.take(vvol(1), vvol(2, at=MIB), file_store(local))
    assert len(bench.plane.objects) == 1 and len(bench.plane.volumes) == 2
    assert sorted(bench.reports.lines) == ["export 1 epoch 1 ok", "export 2 epoch 1 ok"]
    report = bench.reports.exports[uuid_of(1)]
    assert (report.size, report.block_min, report.block_preferred, report.block_max) == (MIB, 1, 4096, 32 * MIB)
    assert [held.uuid for held in bench.table.held()] == [uuid_of(1), uuid_of(2)]
    await bench.take(vvol(2, at=MIB), file_store(local))
    assert bench.reports.lines[-1] == "released 1 epoch 1" and len(bench.plane.objects) == 1
    await bench.take(file_store(local))
    assert bench.reports.lines[-1] == "released 2 epoch 1" and bench.plane.objects == {}


async def test_a_newer_epoch_drains_and_releases_the_old_one_first(bench: Bench, local: Path) -> None:
    await bench.take(vvol(1), file_store(local))
    bench.plane.closing = asyncio.Event()
    taking = asyncio.create_task(bench.take(vvol(1, epoch=2), file_store(local)))
    await asyncio.sleep(0.05)
    export = bench.table.get(uuid_of(1))
    assert export is not None and export.volume is None  # withdrawn: nobody enters
    assert [held.epoch for held in bench.table.held()] == [1]  # but still held: it drains
    assert bench.reports.lines == ["export 1 epoch 1 ok"]
    bench.plane.closing.set()
    await taking
    assert bench.reports.lines[1:] == ["released 1 epoch 1", "export 1 epoch 2 ok"]
    # Drained, then durable, then let go: another host may serve it from here on.
    assert [line.split()[0] for line in bench.plane.log] == ["open", "close", "sync", "open"]
    assert export.volume is not None


async def test_an_older_epoch_is_refused(bench: Bench, local: Path) -> None:
    await bench.take(vvol(1, epoch=5), file_store(local))
    await bench.take(vvol(1, epoch=4), file_store(local))
    export = bench.table.get(uuid_of(1))
    assert export is not None and export.volume is None and "epoch 5" in export.error
    report = export.report()
    assert report is not None and report.why == "old-registry", "the status says what to do"
    assert bench.plane.volumes == {}
    await bench.take(file_store(local))
    await bench.take(vvol(1, epoch=4), file_store(local))  # it is remembered although the VVol was gone
    assert bench.plane.volumes == {}
    await bench.take(vvol(1, epoch=6), file_store(local))
    assert len(bench.plane.volumes) == 1


async def test_a_missing_datastore_is_reported_and_tried_again(bench: Bench, local: Path, tmp_path: Path) -> None:
    late = tmp_path / "late.img"
    await bench.take(vvol(1), vvol(2, store="late"), file_store(local), file_store(late, "late"))
    assert bench.reports.exports[uuid_of(1)].error == ""
    assert "late.img is missing" in bench.reports.exports[uuid_of(2)].error
    assert "notice datastore_missing late" in bench.reports.lines
    assert "notice vvol_failed vm1/disk2" in bench.reports.lines
    late.write_bytes(bytes(MIB))
    await until(lambda: bench.reports.exports[uuid_of(2)].error == "")
    assert bench.reports.lines.count("notice datastore_missing late") == 1
    assert len(bench.plane.volumes) == 2


async def test_a_vvol_that_never_came_up_is_released_too(bench: Bench, tmp_path: Path) -> None:
    store = file_store(tmp_path / "nothing.img")
    await bench.take(vvol(1, epoch=7), store)
    await bench.take(store)
    assert bench.reports.lines[-1] == "released 1 epoch 7"


async def test_a_map_beyond_the_object_is_refused(bench: Bench, local: Path) -> None:
    await bench.take(vvol(1, at=8 * MIB), file_store(local))
    assert f"the map needs {9 * MIB}" in bench.reports.exports[uuid_of(1)].error
    with local.open("ab") as file:
        file.truncate(9 * MIB)
    await until(lambda: bench.plane.volumes)


async def test_growing_live(bench: Bench, local: Path) -> None:
    await bench.take(vvol(1, size=8 * MIB), file_store(local))
    export = bench.table.get(uuid_of(1))
    assert export is not None
    volume = export.volume
    with local.open("ab") as file:
        file.truncate(16 * MIB)
    await bench.take(vvol(1, size=16 * MIB, map_version=2, generation=2), file_store(local))
    assert export.volume == volume and bench.plane.log[-1] == f"change {volume}"
    assert bench.reports.exports[uuid_of(1)].size == 16 * MIB and export.facts("x").size == 16 * MIB
    assert bench.plane.objects[2].size == 16 * MIB


async def test_a_change_onto_another_object_keeps_the_old_one_until_it_is_done(bench: Bench, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(MIB))
    await bench.take(vvol(1, store="nas", obj="a"), dir_store(tmp_path))
    await bench.take(vvol(1, store="nas", obj="b", map_version=2), dir_store(tmp_path))
    assert len(bench.plane.objects) == 1 and bench.plane.log[-1].startswith("change")


async def test_a_failed_change_leaves_what_runs(bench: Bench, local: Path) -> None:
    await bench.take(vvol(1), file_store(local))
    await bench.take(vvol(1, size=64 * MIB, map_version=2), file_store(local))
    export = bench.table.get(uuid_of(1))
    assert export is not None and export.volume is not None and export.facts("x").size == MIB
    assert "notice vvol_failed vm1/disk1" in bench.reports.lines
    assert bench.reports.exports[uuid_of(1)].error == ""


async def test_a_description_changes_no_io(bench: Bench, local: Path) -> None:
    await bench.take(vvol(1), file_store(local))
    await bench.take(vvol(1, description="words"), file_store(local))
    export = bench.table.get(uuid_of(1))
    assert export is not None and export.facts("x").description == "words"
    assert [line.split()[0] for line in bench.plane.log] == ["open"]


async def test_limits_come_and_go_without_a_change_of_the_map(bench: Bench, local: Path) -> None:
    await bench.take(vvol(1, qos=QosConfig(iops=50)), file_store(local))
    (number,) = bench.plane.volumes
    assert bench.plane.limits[number] == VolumeLimits(iops=50), "in force before any client"
    lines = len(bench.plane.log)
    await bench.take(vvol(1, qos=QosConfig(bandwidth=1 << 20, burst=1.0), description="new"), file_store(local))
    assert bench.plane.limits[number] == VolumeLimits(bandwidth=1 << 20, burst_us=1_000_000)
    await bench.take(vvol(1), file_store(local))
    assert bench.plane.limits[number] == VolumeLimits()
    assert bench.plane.log[lines:] == [f"limit {number}"] * 2
    await bench.take(vvol(1, size=2 * MIB, map_version=2, qos=QosConfig(iops=7)), file_store(local))
    assert bench.plane.limits[number] == VolumeLimits(iops=7)
    assert bench.plane.log[-2:] == [f"limit {number}", f"change {number}"]


READ = CacheConfig(mode="read", ram=1 << 20)


async def test_a_cache_comes_and_goes_without_a_change_of_the_map(bench: Bench, local: Path) -> None:
    await bench.take(vvol(1, cache=READ), vvol(2, at=MIB), file_store(local))
    first, second = sorted(bench.plane.volumes)
    policy = CachePolicy(CacheMode.READ, ahead_bytes=512 << 10, floor_bytes=1 << 20)
    assert bench.plane.caches == {first: policy}, "and what has no cache is not touched"
    lines = len(bench.plane.log)
    through = CacheConfig(mode="writethrough", read_ahead=0)
    await bench.take(vvol(1, cache=through, description="new"), vvol(2, at=MIB), file_store(local))
    assert bench.plane.caches[first] == CachePolicy(CacheMode.WRITETHROUGH)
    await bench.take(vvol(1), vvol(2, at=MIB, cache=through), file_store(local))
    assert bench.plane.caches == {first: CachePolicy(), second: CachePolicy(CacheMode.WRITETHROUGH)}
    assert {line.split()[0] for line in bench.plane.log[lines:]} == {"cache"}, "nothing is opened or drained"


@pytest.mark.parametrize("why", ["no memory", "refused"])
async def test_a_vvol_that_gets_no_cache_is_served_all_the_same(bench: Bench, local: Path, why: str) -> None:
    if why == "refused":
        bench.plane.fail_cache = "no memory for a cache policy"
    else:
        bench.plane.cache = CacheTotals()
    await bench.take(vvol(1, cache=READ), file_store(local))
    assert bench.reports.exports[uuid_of(1)].error == "" and len(bench.plane.volumes) == 1
    assert ("notice cache_failed vm1/disk1" in bench.reports.lines) == (why == "refused")


async def test_control_changes_its_mind_while_one_hangs(bench: Bench, local: Path) -> None:
    await bench.take(vvol(1), vvol(2, at=MIB), file_store(local))
    bench.plane.closing = asyncio.Event()
    bench.table.take(host_state(vvol(2, at=MIB), file_store(local)))
    await asyncio.sleep(0.02)
    [two] = bench.table.take(host_state(vvol(2, at=MIB, map_version=2), file_store(local)))[1:]
    await asyncio.wait_for(two.settled.wait(), 1)  # its neighbour is not held up
    bench.table.take(host_state(vvol(1, epoch=2), vvol(2, at=MIB, map_version=2), file_store(local)))
    bench.plane.closing.set()
    await until(lambda: "export 1 epoch 2 ok" in bench.reports.lines)
    assert "released 1 epoch 1" in bench.reports.lines


async def test_alignment_of_a_direct_object(bench: Bench, local: Path) -> None:
    await bench.take(vvol(1), file_store(local, direct=True))
    report = bench.reports.exports[uuid_of(1)]
    assert report.block_min in (512, 4096) and report.block_preferred == 4096
    [desc] = bench.plane.volumes.values()
    assert desc.block_min == report.block_min


@pytest.mark.parametrize("direct", [False, True])
async def test_every_attach_forgets_cached_pages(
    bench: Bench, local: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    forgotten: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, offset, length, advice: forgotten.append((offset, length)))
    store = file_store(local, direct=direct)
    await bench.take(vvol(1, at=MIB), vvol(2, at=3 * MIB), store)  # the object stays open: disk2 needs it
    await bench.take(vvol(2, at=3 * MIB), store)
    forgotten.clear()
    await bench.take(vvol(1, at=MIB, epoch=3), vvol(2, at=3 * MIB), store)
    assert forgotten == ([] if direct else [(MIB, MIB)])


async def test_one_object_has_one_mode(bench: Bench, local: Path) -> None:
    await bench.take(vvol(1), file_store(local))
    with pytest.raises(NvError, match="open buffered and cannot be direct"):
        await bench.objects.acquire(file_store(local, direct=True), "")


async def test_a_fault_stays_with_its_object_until_it_is_cleared(bench: Bench, local: Path) -> None:
    await bench.take(vvol(1), vvol(2, at=MIB), file_store(local))
    [number] = bench.plane.objects
    bench.table.sync_failed(number, 5)
    bench.table.sync_failed(number, 5)
    assert bench.reports.lines[-1] == "fault local/" and bench.reports.lines.count("fault local/") == 1
    [fault] = bench.faults.unheard()
    assert str(local) in fault.message and "errno 5" in fault.message
    await bench.take(file_store(local))
    assert bench.plane.objects == {}
    await bench.take(vvol(1, epoch=2), file_store(local))
    [again] = bench.plane.objects
    assert bench.plane.log.count(f"latch_fault {again}") == 1, "the object is another one, its fault is not"
    bench.faults.take({"local": {fault.id: ""}})  # control lists it
    bench.objects.follow_faults()
    assert f"clear_fault {again}" not in bench.plane.log
    bench.faults.take({})  # and no more: the operator cleared it
    bench.objects.follow_faults()
    assert bench.plane.log[-1] == f"clear_fault {again}"
    bench.table.sync_failed(again, 5)
    assert [one.id != fault.id for one in bench.faults.unheard()] == [True], "a new failure is another fault"


async def test_faults_of_a_directory_are_its_files_own(bench: Bench, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(MIB))
    bench.faults.take({"nas": {"one": "b"}, "other": {"two": "a"}})
    await bench.take(vvol(1, store="nas", obj="a"), vvol(2, store="nas", obj="b"), dir_store(tmp_path))
    open_files = {number: Path(f"/proc/self/fd/{held.fd}") for number, held in bench.plane.objects.items()}
    by_file = {str(link.readlink()): number for number, link in open_files.items()}
    latched = [line for line in bench.plane.log if line.startswith("latch")]
    assert latched == [f"latch_fault {by_file[str(tmp_path / 'b')]}"]


async def test_a_last_sync_that_fails_is_told_before_the_release(bench: Bench, local: Path) -> None:
    await bench.take(vvol(1), file_store(local))
    bench.plane.fail_sync = True
    await bench.take(file_store(local))
    assert bench.reports.lines[-2:] == ["fault local/", "released 1 epoch 1"]
    bench.plane.fail_sync = False


async def test_what_did_not_close_is_no_clean_end(bench: Bench, local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await bench.take(vvol(1), vvol(2, at=MIB), file_store(local))
    await bench.table.stop()
    real = bench.plane.close_volume
    first = min(bench.plane.volumes)

    async def close(volume: int) -> None:
        if volume == first:
            raise OSError(5, "it hangs")
        await real(volume)

    monkeypatch.setattr(bench.plane, "close_volume", close)
    assert not await bench.table.close_all()
    monkeypatch.undo()
    assert await bench.table.close_all()
