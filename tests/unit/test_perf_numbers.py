"""The measuring suite's pure parts: fio's JSON, statistics, bars, comparison, profiles, suites, report."""

from __future__ import annotations

import ctypes
import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perf import bars, compare, counts, fio, generators, profile, report, stats, suites
from perf.model import Count, Latency, Machine, PointResult, Result, Sample

CAPTURED = Path(__file__).with_name("perf_fio_mixed.json")


def sample(peer: str, turn: int, iops: float, cpu_us: float | None = 2.0, mean_us: float = 50.0) -> Sample:
    latency = Latency(
        mean_us=mean_us, p50_us=mean_us, p90_us=mean_us, p99_us=2 * mean_us, p999_us=3 * mean_us, max_us=9 * mean_us
    )
    return Sample(
        peer=peer, round=turn, requests=int(iops), iops=iops, bytes_per_s=iops * 4096, latency=latency,
        server_cpu_us=cpu_us, rss_anon_bytes=1 << 20,
    )  # fmt: skip


def point(samples: list[Sample], name: str = "randread-4k-qd32", suite: str = "core") -> PointResult:
    return PointResult(
        suite=suite, point=name, generator="loadgen", backend="tmpfs", transport="unix", spec={"depth": "32"},
        samples=tuple(samples),
    )  # fmt: skip


def result(points: list[PointResult], counts: tuple[Count, ...] = (), load: float = 0.0) -> Result:
    machine = Machine(
        cpu="one", cpus=2, memory_bytes=1 << 30, kernel="6", mitigations="", governor="", virtual="kvm", disk="",
        versions={"fio": "fio-3.33"},
    )  # fmt: skip
    return Result(
        started="2026-01-01T00:00:00+00:00", commit="abc", quick=False, rounds=5, seconds=1.0, load_before=load,
        machine=machine, points=tuple(points), counts=counts,
    )  # fmt: skip


class TestFio:
    def test_a_captured_report_reads_as_what_fio_said(self) -> None:
        parsed = fio.parse_file(CAPTURED)
        raw = json.loads(CAPTURED.read_text())["jobs"][0]
        (job,) = parsed.jobs
        assert parsed.version == "fio-3.33"
        assert job.name == "mixed"
        assert job.read.total_ios == raw["read"]["total_ios"] > 0
        assert job.write.iops == raw["write"]["iops"] > 0
        assert job.read.clat_ns.at(99) == raw["read"]["clat_ns"]["percentile"]["99.000000"]
        assert job.read.lat_ns.count == raw["read"]["lat_ns"]["N"]
        assert job.sync.total_ios == raw["sync"]["total_ios"] > 0
        assert job.requests == sum(raw[part]["total_ios"] for part in ("read", "write", "sync"))
        assert [d.total_ios for d in job.directions] == [job.read.total_ios, job.write.total_ios]

    def test_it_becomes_a_sample_with_the_worst_percentile_and_the_weighted_mean(self) -> None:
        parsed = fio.parse_file(CAPTURED)
        (job,) = parsed.jobs
        made = generators.fio_sample(parsed, "x", 3, None, 1.0)
        assert made.requests == job.requests and made.round == 3 and made.server_cpu_us is None
        assert made.latency.p99_us == max(job.read.clat_ns.at(99), job.write.clat_ns.at(99)) / 1000
        low, high = sorted((job.read.lat_ns.mean / 1000, job.write.lat_ns.mean / 1000))
        assert low <= made.latency.mean_us <= high
        assert made.iops == pytest.approx(job.requests / (job.read.runtime_ms / 1000))

    def test_warnings_before_the_json_are_skipped(self) -> None:
        assert fio.parse("fio: engine says hello\n" + CAPTURED.read_text()).jobs[0].name == "mixed"

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("", "no JSON"),
            ("fio: bad option", "no JSON"),
            ('{"fio version": "fio-3.33", "jobs": []}', "no jobs"),
            ('{"fio version": "fio-3.33"}', "unknown shape"),
            ('{"fio version": "x", "jobs": [{"jobname": "a"}]} {"fio version": "x"}', "--status-interval"),
            ('{"fio version": "x", "jobs": [{"jobname": "a", "error": 5}]}', "job a failed with error 5"),
        ],
    )
    def test_what_is_no_report_is_refused_with_the_reason(self, text: str, says: str) -> None:
        with pytest.raises(fio.FioError, match=says):
            fio.parse(text)

    def test_a_direction_without_samples_has_percentile_zero(self) -> None:
        assert fio.LatencyNs().at(99) == 0.0


class TestStatistics:
    def test_ratios_are_paired_by_round_so_that_drift_cancels(self) -> None:
        drift = [1.0, 5.0, 0.7, 3.0, 1.2]
        samples = [sample("a", r, 200_000 * d) for r, d in enumerate(drift)]
        samples += [sample("b", r, 100_000 * d) for r, d in enumerate(drift)]
        found = stats.ratio(samples, "a", ["b"], stats.iops)
        assert found is not None
        assert found.median == found.low == found.high == pytest.approx(2.0)
        assert found.count == 5

    def test_of_several_others_the_best_of_each_round_counts(self) -> None:
        samples = [sample("a", 0, 100), sample("b", 0, 50), sample("c", 0, 25), sample("b", 1, 10)]
        samples += [sample("a", 1, 100), sample("c", 1, 20)]
        found = stats.ratio(samples, "a", ["b", "c"], stats.iops)
        assert found is not None and (found.median, found.count) == (3.5, 2)
        least = stats.ratio(samples, "a", ["b", "c"], stats.iops, "min")
        assert least is not None and least.median == 7.0

    def test_rounds_that_one_side_lacks_do_not_count(self) -> None:
        samples = [sample("a", 0, 100), sample("a", 1, 100), sample("b", 1, 50)]
        found = stats.ratio(samples, "a", ["b"], stats.iops)
        assert found is not None and found.count == 1
        assert stats.ratio(samples, "a", ["nobody"], stats.iops) is None

    def test_a_sample_without_the_metric_does_not_count(self) -> None:
        assert stats.ratio([sample("a", 0, 1, None), sample("b", 0, 1)], "a", ["b"], stats.cpu_us) is None

    @given(st.lists(st.floats(min_value=0.1, max_value=1e9), min_size=1))
    def test_a_summary_is_ordered_and_lies_within_its_values(self, values: list[float]) -> None:
        found = stats.summarise(values)
        assert found is not None
        slack = 1e-9 * max(values)
        assert min(values) - slack <= found.low <= found.median + slack
        assert found.median <= found.high + slack <= max(values) + 2 * slack

    def test_nothing_has_no_summary(self) -> None:
        assert stats.summarise([]) is None


class TestBars:
    def test_they_are_judged_on_the_median_in_their_direction(self) -> None:
        samples = [sample("nbdvvol", 0, 90, 1.0), sample("ceiling", 0, 100, 0.5), sample("nbdkit-file", 0, 10, 6.0)]
        verdicts = {v.bar.label: v for v in bars.judge([point(samples)])}
        assert verdicts["IOPS / socket ceiling"].reached is True
        assert verdicts["IOPS / nbdkit file"].reached is True
        assert verdicts["CPU per request / nbdkit file"].reached is True
        assert verdicts["IOPS / qemu-nbd's better mode"].reached is None
        slow = [sample("nbdvvol", 0, 80, 5.0), *samples[1:]]
        verdicts = {v.bar.label: v for v in bars.judge([point(slow)])}
        assert verdicts["IOPS / socket ceiling"].reached is False
        assert verdicts["CPU per request / nbdkit file"].reached is False

    def test_every_bar_names_a_point_that_its_suite_has(self) -> None:
        for bar in bars.BARS:
            assert bar.point in suites.load(bar.suite).point_names(), f"{bar.suite}/{bar.point}"


class TestCompare:
    @staticmethod
    def run(ours: float, jitter: float = 0.01, drift: float = 1.0) -> Result:
        wobble = [1 - jitter, 1 - jitter / 2, 1.0, 1 + jitter / 2, 1 + jitter]
        samples = [sample("nbdvvol", r, ours * w * drift, 2.0) for r, w in enumerate(wobble)]
        samples += [sample("ceiling", r, 500_000 * drift, 1.0) for r in range(5)]
        return result([point(samples)])

    def test_a_machine_five_times_slower_is_no_regression(self) -> None:
        changes = compare.compare(self.run(400_000), self.run(400_000, drift=0.2))
        assert changes and not any(c.regression or c.improvement for c in changes)

    def test_a_loss_beyond_noise_is_one(self) -> None:
        changes = compare.compare(self.run(400_000), self.run(340_000))
        assert [c.what for c in changes if c.regression] == ["IOPS / ceiling"]
        assert "REGRESSION" in compare.table(changes)

    def test_the_same_loss_in_noisy_rounds_is_not(self) -> None:
        assert not any(c.regression for c in compare.compare(self.run(400_000, 0.3), self.run(340_000, 0.3)))

    def test_a_gain_is_an_improvement(self) -> None:
        changes = compare.compare(self.run(340_000), self.run(400_000))
        assert [c.what for c in changes if c.improvement] == ["IOPS / ceiling"]

    @staticmethod
    def counted(value: float) -> Result:
        count = Count(peer="nbdvvol", work="read-4k-qd32", name="instructions", value=value, tolerance=0.01)
        return result([], (count,))

    def test_counts_are_compared_with_their_own_tolerance(self) -> None:
        old = self.counted(300.0)
        assert not compare.compare(old, self.counted(302.0))[0].regression
        assert compare.compare(old, self.counted(304.0))[0].regression
        assert compare.compare(old, self.counted(290.0))[0].improvement

    def test_something_out_of_nothing_is_a_regression(self) -> None:
        assert compare.compare(self.counted(0.0), self.counted(0.5))[0].regression
        assert not compare.compare(self.counted(0.0), self.counted(0.0))[0].regression

    def test_runs_that_share_nothing_cannot_be_compared(self) -> None:
        with pytest.raises(compare.CompareError, match="nothing to compare"):
            compare.compare(self.run(1.0), self.counted(1.0))

    def test_a_busy_machine_is_said(self) -> None:
        assert "load 3.0" in " ".join(compare.warnings(result([]), result([], load=3.0)))

    def test_a_file_that_is_no_result_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "x.json"
        path.write_text('{"format": 99}')
        with pytest.raises(compare.CompareError, match="not a result file"):
            compare.load(path)
        with pytest.raises(compare.CompareError, match="No such file"):
            compare.load(tmp_path / "y.json")

    def test_a_result_survives_its_file(self, tmp_path: Path) -> None:
        path = tmp_path / "r.json"
        before = self.run(400_000)
        path.write_text(before.model_dump_json())
        assert compare.load(path) == before


class TestProfile:
    def test_addresses_get_the_names_of_the_functions_they_lie_in(self, tmp_path: Path) -> None:
        source = tmp_path / "two.c"
        source.write_text("int one(int x) { return x + 1; }\nint two(int x) { return one(x) * 2; }\n")
        library = tmp_path / "libtwo.so"
        subprocess.run(["gcc", "-O0", "-shared", "-fPIC", "-o", library, source], check=True, timeout=60)
        listed = subprocess.run(["nm", library], capture_output=True, text=True, check=True).stdout
        starts = {line.split()[2]: int(line.split()[0], 16) for line in listed.splitlines() if " T " in line}
        loaded = ctypes.CDLL(str(library))
        where = profile.mappings(Path("/proc/self/maps").read_text())
        one = ctypes.cast(loaded.one, ctypes.c_void_p).value
        two = ctypes.cast(loaded.two, ctypes.c_void_p).value
        assert one is not None and two is not None and two - one == starts["two"] - starts["one"]
        found = profile.parse(f"{one:x} 5 5\n{one + 4:x} 5 0\n{two:x} 2 1\n10 9 9\n", where)
        assert found.own == {"libtwo:one": 10, "libtwo:two": 2, "unknown": 9}
        assert found.calls == {"one": 5, "two": 1}
        assert found.minus(found).instructions == 0 and found.instructions == 21

    def test_the_library_s_memcpy_is_found_where_the_processor_chose_it(self) -> None:
        where = profile.mappings(Path("/proc/self/maps").read_text())
        address = ctypes.cast(ctypes.CDLL(None).memcpy, ctypes.c_void_p).value
        assert address is not None
        assert profile.name_of(address, where) in {("libc:memcpy", True), ("libc:memmove", True)}


def test_perf_stat_is_read_by_event_and_lacks_none_silently() -> None:
    text = (
        "24,,raw_syscalls:sys_enter,1000,100.00,,\n"
        "<not supported>,,io_uring:io_uring_queue_async_work,0,100.00,,\n"
        "7,,context-switches,1000,100.00,,\nloadgen said something, too\n"
    )
    assert counts.parse_perf_stat(text) == {"system calls": 24, "context switches": 7}


class TestSuites:
    def test_every_suite_reads_and_has_points(self) -> None:
        for name in suites.names():
            suite = suites.load(name)
            names = suite.point_names()
            assert names and len(set(names)) == len(names)
            assert all(suite.spec(p) for p in names)

    def test_a_load_becomes_a_command_line(self) -> None:
        load = suites.Load(mix="read=100", block="4k", depth=8, sequential=True, spin_us=0)
        text = " ".join(load.arguments())
        assert "--mix read=100" in text and "--sequential" in text and "--spin-us 0" in text
        assert "--verify" not in text and "--batch" not in text

    def test_the_storage_ceiling_does_the_same_work_or_none(self) -> None:
        mixed = suites.Load(mix="read=70,write=30", block="4k", depth=8)
        arguments = generators.storage_arguments(mixed, Path("/f"), 1 << 20, True, 0.2)
        assert arguments is not None
        assert {"--rw=randrw", "--rwmixread=70", "--bs=4096", "--iodepth=8", "--direct=1"} <= set(arguments)
        flushing = suites.Load(mix="write=50,flush=50", block="4k", depth=1)
        assert generators.storage_arguments(flushing, Path("/f"), 1, False, 1) is None

    @pytest.mark.parametrize("text", ["", "k", "4q", "-1", "4 k"])
    def test_what_is_no_size_is_refused(self, text: str) -> None:
        with pytest.raises(suites.SuiteError, match="not a size"):
            suites.bytes_of(text)

    def test_an_unknown_suite_names_those_there_are(self) -> None:
        with pytest.raises(suites.SuiteError, match="core"):
            suites.load("nonsense")


class TestReport:
    def test_it_says_what_was_measured_and_what_was_lost(self) -> None:
        samples = [sample("nbdvvol", r, 80_000) for r in range(3)] + [sample("ceiling", r, 100_000) for r in range(3)]
        text = report.markdown(result([point(samples)], TestCompare.counted(312.5).counts, load=2.0))
        assert "| nbdvvol | 80,000 |" in text and "0.80 (0.80–0.80)" in text
        assert "| ≥ 0.85 | 0.80 (0.80–0.80) | **no** |" in text
        assert "load 2.0" in text and "| instructions | 312.5 |" in text

    def test_a_quick_run_says_so(self) -> None:
        quick = result([point([sample("nbdvvol", 0, 1.0)])]).model_copy(update={"quick": True})
        assert "nothing about speed" in report.markdown(quick)
