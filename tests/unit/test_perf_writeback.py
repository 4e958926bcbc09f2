"""The measuring suite's write-back log: its servers over slow storage, and what fio writes beside them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from perf import generators, logged, run, suites
from perf.generators import PointError, serving
from perf.peers import BY_NAME, NBDKIT_LOG, OURS_LOG, OURS_LOG_FULL, OURS_SLOW, QEMU_LOG, STORAGE
from perf.servers import Place, Running, ServerError, free_port
from perf.suites import Load
from tests.lib.procs import wait_until
from tests.unit.perf_results import sample

SIZE = 32 << 20
WRITES = ["--mix", "write=100", "--block", "4k"]


@pytest.fixture
def place(tools: Path) -> Iterator[Place]:
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="nv"))
    store = Path(tempfile.mkdtemp(dir=run.ROOT / "build", prefix="nbdvvol-perf-"))
    run.fill(store / "disk.img", SIZE)
    yield Place(folder, "disk", "unix", store / "disk.img", SIZE, free_port(), tools)
    shutil.rmtree(folder)
    shutil.rmtree(store)


def load(tools: Path, server: Running, depth: int, count: int) -> None:
    out = generators.loadgen_json(tools / "loadgen", server, [*WRITES, "--depth", str(depth), "--count", str(count)])
    assert out["requests"] == count


def test_a_log_answers_before_slow_storage_has_it_and_no_log_behind_it(place: Place, tools: Path) -> None:
    """Told by what the backend has when the client has its answers, and not by a clock."""
    before = place.file.read_bytes()
    with serving(BY_NAME[OURS_SLOW], place) as server:
        load(tools, server, 1, 20)
        through = place.file.read_bytes()
    assert through != before
    place.socket.unlink()
    with serving(BY_NAME[OURS_LOG], place) as server:
        load(tools, server, 1, 20)
        assert place.file.read_bytes() == through
        assert place.file.with_suffix(".log").stat().st_size == 8 * SIZE


def test_a_full_log_carries_on(place: Place, tools: Path) -> None:
    with serving(BY_NAME[OURS_LOG_FULL], place) as server:
        assert place.file.with_suffix(".log").stat().st_size == SIZE // 4
        load(tools, server, 16, 3 * (SIZE // 4) // 4096)


@pytest.mark.parametrize("name", [OURS_SLOW, OURS_LOG, QEMU_LOG])
def test_the_slow_backend_ends_with_its_server(place: Place, name: str) -> None:
    slow = place.folder / "slow"
    with serving(BY_NAME[name], place) as server:
        assert generators.usage.children(server.pid) and slow.exists()
        backend = generators.usage.children(server.pid)[0]
    wait_until("the backend has ended", lambda: not Path(f"/proc/{backend}").exists(), 10)


def test_a_backend_that_does_not_start_is_told(place: Place) -> None:
    (place.folder / "slow").mkdir()
    place.file.unlink()
    with pytest.raises(ServerError), serving(BY_NAME[OURS_SLOW], place):
        pass


def test_a_log_is_made_of_zeros_that_are_there(tmp_path: Path) -> None:
    logged.make_log(tmp_path / "log", (1 << 20) + 4096)
    made = tmp_path / "log"
    assert made.stat().st_size == (1 << 20) + 4096 and not any(made.read_bytes())
    assert made.stat().st_blocks * 512 >= 1 << 20


def test_fio_writes_records_as_large_as_the_logs_and_counts_their_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    point = Load(mix="write=100", block="4k", depth=16, group=4)
    said = generators.log_arguments(point, Path("/log"), SIZE, 0.5)
    assert {"--rw=write", "--bs=20480", "--iodepth=4", "--direct=1"} <= set(said)
    one = Load(mix="write=100", block="4k", depth=1, group=1)
    assert {"--bs=8192", "--iodepth=1"} <= set(generators.log_arguments(one, Path("/log"), SIZE, 0.5))
    monkeypatch.setattr(generators, "run_fio", lambda *_: None)
    monkeypatch.setattr(generators, "fio_sample", lambda *_: sample(STORAGE, 2, 1000.0))
    found = generators.storage(point, Path("/log"), SIZE, True, 2, 0.5)
    assert found is not None and (found.iops, found.requests) == (4000.0, 4000)


def test_only_those_that_a_point_names_take_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(generators, "loadgen", lambda *arguments: asked.append(arguments[3]))
    monkeypatch.setattr(generators, "storage", lambda *arguments: asked.append(STORAGE))
    options, suite = run.Options(build=tmp_path), suites.load("writeback")
    server = Running(os.getpid(), Place(tmp_path, "disk", "unix", tmp_path / "f", SIZE, 0, tmp_path), "")
    for name in (OURS_SLOW, OURS_LOG, OURS_LOG_FULL, NBDKIT_LOG, QEMU_LOG):
        run._one(options, suite, "sustained-4k-qd16", name, server, 0)
    assert run._storage(options, suite, "sustained-4k-qd16", tmp_path / "f", SIZE, 0) is None
    assert asked == [OURS_SLOW, OURS_LOG_FULL]
    run._storage(options, suite, "randwrite-4k-qd16", tmp_path / "f", SIZE, 0)
    assert asked[-1] == STORAGE


def test_a_point_may_begin_long_before_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[list[str]] = []

    def told(tool: Path, running: Running, arguments: list[str], limit_s: float) -> dict[str, object]:
        said.append(arguments)
        raise PointError("enough")

    monkeypatch.setattr(generators, "loadgen_json", told)
    server = Running(os.getpid(), Place(tmp_path, "disk", "unix", tmp_path / "f", SIZE, 0, tmp_path), "")
    for warmup in (None, 3.0):
        with pytest.raises(PointError):
            generators.loadgen(tmp_path, server, Load(mix="write=100", block="4k", depth=1, warmup=warmup), "x", 0, 1)
    assert [words[words.index("--warmup") + 1] for words in said] == ["0.05", "3.0"]
    assert all(words.count("--warmup") == 1 and "--only" not in words for words in said)
