"""The measuring server over our data plane, and how a run is put together: rounds, failures, room for files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from perf import generators, plane, run, suites
from perf.generators import PointError, serving
from perf.model import Latency, Sample
from perf.peers import (
    BY_NAME,
    OURS,
    OURS_AGAIN,
    OURS_HALF,
    OURS_MILLION_RUNS,
    OURS_ONE_RUN,
    OURS_TWO,
    STORAGE,
    Peer,
)
from perf.progress import Progress
from perf.servers import Place, Plan, free_port

SIZE = 8 << 20


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir="/tmp", prefix="nv"))
    yield path
    shutil.rmtree(path)


class TestPlane:
    def test_a_shuffled_map_covers_the_object_once_and_neighbours_are_strangers(self) -> None:
        runs = plane.shuffled(SIZE, 1024, 5)
        assert [r.offset for r in runs] == list(range(0, SIZE, SIZE // 1024))
        assert sorted(r.object_offset for r in runs) == [r.offset for r in runs]
        together = sum(a.object_offset + a.length == b.object_offset for a, b in pairwise(runs))
        assert together < 10 and {r.object for r in runs} == {5}
        assert runs == plane.shuffled(SIZE, 1024, 5)

    @pytest.mark.parametrize("count", [3, 4096])
    def test_runs_are_whole_blocks(self, count: int) -> None:
        with pytest.raises(ValueError, match="cannot be cut"):
            plane.shuffled(SIZE, count, 0)

    def test_it_serves_what_it_says_with_every_byte_where_the_map_has_it(self, tools: Path, folder: Path) -> None:
        file = folder / "disk"
        run.fill(file, SIZE)
        place = Place(folder, "tmpfs", "unix", file, SIZE, free_port(), tools)
        peer = Peer("x", frozenset(), frozenset(), lambda p: plan_of(p, file), "python3")
        verify = ["--verify", "--mix", "read=50,write=50", "--depth", "16", "--count", "2000"]
        with serving(peer, place) as server:
            out = generators.loadgen_json(tools / "loadgen", server, verify)
        assert out["verified"] > 500

    def test_without_a_file_reads_are_zeros_and_writes_are_lost(self, tools: Path, folder: Path) -> None:
        place = Place(folder, "null", "unix", folder / "none", SIZE, free_port(), tools)
        with serving(BY_NAME[OURS], place) as server:
            out = generators.loadgen_json(tools / "loadgen", server, ["--mix", "read=50,write=50", "--count", "500"])
            assert out["requests"] == 500
            with pytest.raises(PointError, match="VERIFY FAILED"):
                lost = ["--verify", "--mix", "read=50,write=50", "--count", "2000", "--span", "64k"]
                generators.loadgen_json(tools / "loadgen", server, lost)


def plan_of(place: Place, file: Path) -> Plan:
    made = BY_NAME[OURS_ONE_RUN].plan(place)
    command = list(made.command)
    command[command.index("--runs") + 1] = "256"
    return Plan(command, environment=made.environment)


def some_sample(peer: str, turn: int) -> Sample:
    latency = Latency(mean_us=1, p50_us=1, p90_us=1, p99_us=1, p999_us=1, max_us=1)
    return Sample(peer=peer, round=turn, requests=1, iops=1.0, latency=latency)


class TestRuns:
    @staticmethod
    def suite(**how: object) -> suites.Suite:
        points = {name: {"mix": "read=100", "block": "4k", "depth": 1} for name in ("a", "b")}
        made = {"generator": "loadgen", "backend": "tmpfs", "transport": "unix", "points": points, "name": "s", **how}
        return suites.Suite.model_validate(made)

    def test_rounds_go_through_points_and_points_through_servers(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        order: list[str] = []

        def one(options: object, suite: object, point: str, peer: str, server: object, turn: int) -> list[Sample]:
            order.append(f"{turn}{point}{peer}")
            if (peer, point, turn) == ("y", "a", 0):
                raise PointError("lost")
            return [some_sample(peer, turn)]

        monkeypatch.setattr(run, "_one", one)
        monkeypatch.setattr(run, "wanted", lambda options, suite: [])
        options = run.Options(rounds=2, size=4096, tmpfs=tmp_path)
        real = run.field_of

        @run.contextmanager
        def with_two(*arguments: object) -> Iterator[object]:
            with real(*arguments) as field:  # type: ignore[arg-type]
                server = SimpleNamespace(pid=os.getpid())
                field.running.update({"x": server, "y": server})  # type: ignore[dict-item]
                yield field

        monkeypatch.setattr(run, "field_of", with_two)
        found = run.Measured()
        run.run_suite(options, self.suite(), Progress({"loadgen": 4}, lambda _: None), found)
        first, second = found.points
        assert order == ["0ax", "0ay", "0bx", "0by", "1ax", "1by", "1bx"]
        assert first.failures == ("y: lost",) and [s.peer for s in first.samples] == ["x", "x"]
        assert not second.failures and len(second.samples) == 4
        assert not list(tmp_path.iterdir())

    def test_each_round_begins_with_another_server(self) -> None:
        assert [run.in_turn("abc", turn) for turn in (0, 1, 2, 3)] == [list(w) for w in ("abc", "bca", "cab", "abc")]
        assert run.in_turn([], 1) == []

    def test_a_cache_is_compared_on_the_file_of_who_has_none(self, tools: Path) -> None:
        """It keeps what it reads of it, and the other one serves it meanwhile."""
        with tempfile.TemporaryDirectory(dir=run.ROOT / "build", prefix="nbdvvol-perf-") as disk:
            options = run.Options(build=tools, disk=Path(disk), size=8 << 20)
            skipped: dict[str, str] = {}
            suite = self.suite(peers=(OURS, OURS_AGAIN, OURS_HALF), backend="disk")
            with run.field_of(options, suite, print, skipped) as field:
                assert not skipped and set(field.running) == {OURS, OURS_AGAIN, OURS_HALF}
                assert len({server.place.file for server in field.running.values()}) == 1
                assert len(list(Path(disk).rglob("*.img"))) == 1
                for server in field.running.values():
                    out = generators.loadgen_json(
                        tools / "loadgen",
                        server,
                        ["--mix", "read=100", "--block", "4k", "--depth", "4", "--count", "100"],
                    )
                    assert out["requests"] == 100

    def test_forms_of_ours_take_part_where_they_are_named_only(self) -> None:
        names = [p.name for p in run.wanted(run.Options(), self.suite())]
        assert OURS in names and not {OURS_TWO, OURS_ONE_RUN, OURS_MILLION_RUNS} & set(names)
        named = self.suite(peers=(OURS, OURS_TWO))
        assert [p.name for p in run.wanted(run.Options(), named)] == [OURS, OURS_TWO]
        assert [p.name for p in run.wanted(run.Options(peers=[OURS_TWO]), named)] == [OURS_TWO]

    def test_the_storage_takes_part_where_the_suite_says_so(self) -> None:
        assert run.with_storage(run.Options(), self.suite(storage=True))
        assert not run.with_storage(run.Options(peers=[OURS]), self.suite(storage=True))
        assert run.with_storage(run.Options(peers=[STORAGE]), self.suite(storage=True))
        assert not run.with_storage(run.Options(), self.suite())

    def test_a_suite_whose_files_do_not_fit_is_left_out_with_the_reason(self, tmp_path: Path) -> None:
        options = run.Options(size=1 << 60, tmpfs=tmp_path)
        found = run.Measured()
        said: list[str] = []
        run.run_suite(options, self.suite(), Progress({"loadgen": 1}, said.append), found)
        assert not found.points and not found.stamps
        assert "use a smaller --size" in found.skipped["s"] and "MiB free" in said[-1]

    def test_points_without_a_bar_need_fewer_rounds(self) -> None:
        assert run.rounds_of(run.Options(rounds=5), self.suite(rounds_max=2)) == 2
        assert run.rounds_of(run.Options(rounds=1), self.suite(rounds_max=2)) == 1

    def test_a_run_knows_how_much_it_measures(self) -> None:
        options = run.Options(peers=[OURS, STORAGE], rounds=3)
        assert run.measurements(options, [self.suite(storage=True), self.suite()]) == {"loadgen": 2 * 3 * 2 + 2 * 3}

    def test_a_run_of_everything_is_complete_and_no_other(self) -> None:
        assert run.Options().complete
        assert not run.Options(suites=["core"]).complete and not run.Options(peers=[OURS]).complete
        assert not run.Options(points=["a"]).complete and not run.Options().quickened().complete

    def test_a_file_is_filled_to_the_byte(self, tmp_path: Path) -> None:
        run.fill(tmp_path / "x", (1 << 20) + 5)
        assert (tmp_path / "x").stat().st_size == (1 << 20) + 5
        assert (tmp_path / "x").stat().st_blocks * 512 >= 1 << 20
