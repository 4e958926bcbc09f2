"""A result file of suites that were measured at different times: how it is put together, and what its pages say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from perf import neighbours, readme, report, results, run, usage
from perf.__main__ import app
from perf.bars import IDLE_LOAD, PROCESSORS
from perf.model import COUNTS, Count, Result
from perf.progress import Progress
from perf.results import ResultError, joined
from tests.unit.perf_results import result, stamp, steady

IDLE = Count(peer="nbdvvol", work=IDLE_LOAD, name=PROCESSORS, value=0.004, tolerance=1.0)


def first(**changes: object) -> Result:
    """Two suites and a count, all at commit `abc`."""
    core = steady("randread-4k-qd32", "core", {"nbdvvol": 80_000, "ceiling": 100_000})
    disk = steady("randread-4k-qd32", "disk", {"nbdvvol": 50_000, "storage": 100_000})
    return result([core, disk], (IDLE,)).model_copy(update=changes)


def later() -> Result:
    """One of them again, at commit `def`, on a busier machine."""
    disk = steady("randread-4k-qd32", "disk", {"nbdvvol": 125_000, "storage": 100_000})
    of = {"commit": "def", "complete": False, "stamps": {"disk": stamp("def", 7, others=0.2)}}
    return result([disk]).model_copy(update={**of, "started": "2026-01-01T12:07:00+00:00"})


class TestJoined:
    def test_a_suite_replaces_its_like_as_a_whole_and_keeps_its_own_stamp(self) -> None:
        both = joined(first(), later(), ["core", "disk"])
        assert [point.suite for point in both.points] == ["core", "disk"]
        assert both.points[0] == first().points[0] and both.points[1] == later().points[0]
        assert both.counts == (IDLE,) and both.complete
        assert {name: both.stamp(name).commit for name in both.measured()} == {
            "core": "abc", "disk": "def", COUNTS: "abc",
        }  # fmt: skip

    def test_the_older_file_need_not_have_stamps_and_the_order_of_suites_stays(self) -> None:
        scaling = result([steady("randread-4k-4x32", "scaling", {"nbdvvol": 1.0})])
        twice = joined(joined(first(), scaling), later())
        assert twice.measured() == ["core", "disk", "scaling", COUNTS]
        assert twice.stamp("core") == first().stamp("core")

    def test_who_was_left_out_of_a_suite_goes_with_it(self) -> None:
        old = first(skipped={"disk/x": "not installed", "disk": "no room", "core/y": "gone"})
        new = later().model_copy(update={"skipped": {"disk/z": "too old"}})
        assert joined(old, new).skipped == {"core/y": "gone", "disk/z": "too old"}

    def test_it_is_complete_when_every_suite_and_the_counts_are_there(self) -> None:
        assert not joined(first(), later(), ["core", "disk", "tcp"]).complete
        assert not joined(first(counts=()), later(), ["core", "disk"]).complete

    def test_figures_of_two_machines_or_of_a_quick_run_are_refused(self) -> None:
        other = first().machine.model_copy(update={"kernel": "7"})
        with pytest.raises(ResultError, match="kernel was 7 and is 6; use a new file"):
            joined(first(machine=other), later())
        with pytest.raises(ResultError, match="leave --quick out"):
            joined(first(quick=True), later())

    def test_it_survives_its_file(self, tmp_path: Path) -> None:
        both = joined(first(), later())
        (tmp_path / "r.json").write_text(results.dump(both))
        assert results.load(tmp_path / "r.json") == both


class TestPages:
    def test_the_report_says_when_and_of_what_each_suite_was_measured(self) -> None:
        lines = report.markdown(joined(first(), later())).splitlines()
        assert "| core | 2026-01-01 00:00 | abc | 5 | 1 |  | 0.0% |" in lines
        assert "| disk | 2026-01-01 12:07 | def | 5 | 1 | 20.0% | 0.0% |" in lines
        assert "**The machine was not idle: others took 20% of the processors during disk.**" in lines

    def test_a_load_counts_where_nobody_looked_at_others(self) -> None:
        stamps = {"core": stamp("abc", 0, others=None, load=2.0), "disk": stamp("abc", 1, load=2.0)}
        (warning,) = report.warnings(first(stamps=stamps))
        assert warning == "The machine was not idle: load 2.0 before core."

    def test_the_front_page_names_every_commit_with_its_suites(self) -> None:
        page = readme.front_page(joined(first(), later()), "perf/results/x.json", "")
        assert "2026-01-01, commit abc: core, counts; 2026-01-01, commit def: disk; on 2 × one" in page
        assert "| *tmpfs, unix socket*, commit abc |" in page
        assert "| *O_DIRECT on the real disk, unix socket*, commit def |" in page
        assert "2026-01-01, commit abc; on 2 × one" in readme.front_page(first(), "perf/results/x.json", "")


class TestNeighbours:
    def test_time_of_all_processes_without_waiting_and_interrupts(self) -> None:
        ticks = os.sysconf("SC_CLK_TCK")
        assert neighbours.busy_s(f"cpu  {ticks} {2 * ticks} {3 * ticks} 999 999 999 999 0 0 0\ncpu0 1 1 1\n") == 6.0

    def test_what_a_child_and_a_daemon_use_is_our_own(self) -> None:
        """A process that is not below this one counts where it is named."""
        burn = "import time\nwhile time.process_time() < 0.2: pass"
        before = neighbours.own_s(())
        subprocess.run([sys.executable, "-c", burn], check=True)
        assert neighbours.own_s(()) - before >= 0.2 - 2 / os.sysconf("SC_CLK_TCK")
        assert neighbours.own_s([1]) - neighbours.own_s(()) >= usage.read(1).cpu_ns / 1e9 * 0.5
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
            assert {os.getpid(), child.pid} <= neighbours.tree(os.getpid())

    def test_a_stamp_is_of_the_time_that_was_watched(self) -> None:
        found = neighbours.Watch().stamp("abc", 3, 0.7, ())
        assert (found.commit, found.rounds, found.seconds) == ("abc", 3, 0.7)
        assert found.others is not None and found.others >= 0 and 0 <= found.stolen <= 1


class TestCommand:
    @pytest.mark.parametrize("what", [["--peer", "nbdvvol"], ["--point", "x"], ["--quick"], ["--out", "y.json"]])
    def test_only_whole_suites_are_joined(self, tmp_path: Path, what: list[str]) -> None:
        done = CliRunner().invoke(app, ["run", "--into", str(tmp_path / "r.json"), *what])
        assert done.exit_code == 2 and "--into takes whole suites" in done.output

    def test_counts_are_joined_as_a_whole_too(self, tmp_path: Path) -> None:
        done = CliRunner().invoke(app, ["counts", "--into", str(tmp_path / "r.json"), "--quick"])
        assert done.exit_code == 2 and "--into takes what a complete run counts" in done.output

    def test_a_run_adds_its_suite_to_the_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "r.json"
        file.write_text(results.dump(first()))
        monkeypatch.setattr(run, "run", lambda options, say: later())
        done = CliRunner().invoke(app, ["run", "--suite", "disk", "--into", str(file)])
        assert done.exit_code == 0, done.output
        both = results.load(file)
        assert both.measured() == ["core", "disk", COUNTS] and both.stamp("disk").commit == "def"
        assert "| disk | 2026-01-01 12:07 | def |" in file.with_suffix(".md").read_text()


def test_a_suite_that_ran_has_a_stamp(tools: Path, tmp_path: Path) -> None:
    """With the real load generator and ceiling, for a moment."""
    options = run.Options(
        peers=["ceiling"],
        points=["randread-4k-qd32"],
        rounds=1,
        seconds=0.05,
        size=1 << 20,
        build=tools,
        tmpfs=tmp_path,
    )
    found = run.Measured()
    run.run_suite(options, run.suites.load("core"), Progress({"loadgen": 1}, lambda _: None), found)
    assert found.stamps["core"].rounds == 1 and found.stamps["core"].others is not None
    assert [point.point for point in found.points] == ["randread-4k-qd32"]
