"""The measuring suite's mirror: the server it starts, what it tells of its resyncs, and fio's copy beside it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdvvol.dataplane.types import LegState
from perf import fio, generators, mirrored, peers, resync, run
from perf.generators import PointError, serving
from perf.model import Backend
from perf.peers import BY_NAME, OURS_MIRROR, STORAGE
from perf.servers import Place, Running, free_port

SIZE = 64 << 20


@pytest.fixture
def place(tools: Path) -> Iterator[Place]:
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="nv"))
    store = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="nv"))
    yield Place(folder, "tmpfs", "unix", store / "m.img", SIZE, free_port(), tools)
    shutil.rmtree(folder)
    shutil.rmtree(store)


def fake(folder: Path, legs: tuple[Path, ...] = (), backend: Backend = "tmpfs") -> Running:
    place = Place(folder, backend, "unix", folder / "f", SIZE, 0, folder)
    return Running(os.getpid(), place, "", legs, folder / "resyncs")


def test_a_mirror_is_described_with_its_metadata_behind_its_bytes() -> None:
    desc = mirrored.describe(SIZE, (5, 6))
    assert [(leg.id, leg.state, leg.runs[0].object) for leg in desc.legs] == [
        (1, LegState.IN_SYNC, 5),
        (2, LegState.IN_SYNC, 6),
    ]
    assert desc.mirror is not None and {meta.offset for meta in desc.mirror.metas} == {SIZE}
    assert mirrored.meta_bytes(SIZE) >= 2 * desc.mirror.metas[0].bitmap_bytes


def test_it_copies_a_whole_leg_at_a_signal_beside_fio(place: Place) -> None:
    with serving(BY_NAME[OURS_MIRROR], place) as server:
        assert server.resyncs is not None
        ours, limit = resync.measure(server, OURS_MIRROR, 3)
        assert (ours.peer, limit.peer, ours.round, ours.requests) == (OURS_MIRROR, STORAGE, 3, 1)
        assert ours.iops > 0 and limit.iops > 0 and ours.server_cpu_us and limit.server_cpu_us is None


def test_what_was_copied_is_what_the_other_leg_has(place: Place) -> None:
    with serving(BY_NAME[OURS_MIRROR], place) as server:
        assert server.resyncs is not None
        with server.legs[1].open("r+b") as leg:
            leg.write(b"\xff" * (1 << 20))
        with resync.running(server, server.resyncs):
            pass
        first, second = (leg.read_bytes()[:SIZE] for leg in server.legs)
    assert first == second and first[: 1 << 20] != b"\xff" * (1 << 20)


def test_a_resync_that_ends_before_the_load_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = fake(tmp_path)
    log = tmp_path / "resyncs"

    def told(pid: int, what: int) -> None:
        assert (pid, what) == (os.getpid(), signal.SIGUSR1)
        log.write_text(json.dumps({"began": True}) + "\n")

    monkeypatch.setattr("perf.resync.os.kill", told)
    end = json.dumps({"seconds": 1.0}) + "\n"
    with pytest.raises(PointError, match="was over before"), resync.running(server, log):
        log.write_text(log.read_text() + end)


def test_half_a_line_is_not_read_and_an_error_is_passed_on(tmp_path: Path) -> None:
    log = tmp_path / "resyncs"
    assert resync._lines(log) == []
    log.write_text('{"began": true}\n{"seco')
    assert resync._lines(log) == [{"began": True}]
    log.write_text('{"error": "LEG_STOPPED: Input/output error"}\n')
    with pytest.raises(PointError, match="Input/output error"):
        resync._wait(log, 2)


def test_fio_reads_one_leg_and_writes_the_other() -> None:
    arguments = resync.copy_arguments((Path("/a"), Path("/b")), 1 << 30, True)
    assert arguments[-6:] == [
        "--name=read",
        "--rw=read",
        "--filename=/a",
        "--name=write",
        "--rw=write",
        "--filename=/b",
    ]
    assert {"--direct=1", "--bs=1m", f"--size={1 << 30}"} <= set(arguments)
    jobs = [{"jobname": kind, kind: {"total_ios": 1, "runtime": ms}} for kind, ms in (("read", 400), ("write", 700))]
    report = fio.parse(json.dumps({"fio version": "fio-3.33", "jobs": jobs}))
    assert resync.fio_seconds(report) == pytest.approx(0.7), "the copy is through when both are"


def test_a_copy_is_one_request() -> None:
    made = resync.copied("x", 2, 0.5, 250_000_000)
    assert (made.requests, made.iops, made.latency.p99_us, made.server_cpu_us) == (1, 2.0, 500_000.0, 250_000.0)
    with pytest.raises(PointError, match="0 s"):
        resync.copied("x", 2, 0, None)


def test_servers_of_several_files_make_their_own(tmp_path: Path) -> None:
    for name in (OURS_MIRROR, peers.QUORUM):
        folder = tmp_path / name
        folder.mkdir()
        plan = BY_NAME[name].plan(fake(folder).place)
        assert len(plan.legs) == BY_NAME[name].legs == 2 and plan.prefill
        assert all(leg.stat().st_size >= SIZE for leg in plan.legs) and not (folder / "f").exists()
        assert (plan.resyncs is not None) == (name == OURS_MIRROR)


def test_only_who_can_copy_is_measured_while_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(generators, "loadgen", lambda *arguments: asked.append(arguments[3]))
    options, suite = run.Options(build=tmp_path), run.suites.load("mirror")
    place = fake(tmp_path).place
    plain = Running(os.getpid(), place, "")
    assert run._one(options, suite, "randread-4k-qd32-resync", "nbdvvol", plain, 0) == []
    assert run._one(options, suite, run.RESYNC, "nbdvvol", plain, 0) == [] and asked == []
    run._one(options, suite, "randread-4k-qd32", "nbdvvol", plain, 0)
    assert asked == ["nbdvvol"]
