"""The measuring suite's pure parts: fio's JSON, statistics, bars, comparison, profiles, suites, report."""

from __future__ import annotations

import ctypes
import json
import subprocess
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perf import bars, callgrind, counts, fio, generators, profile, progress, resync, run, sampling, stats, suites
from perf.model import Count, PointResult
from perf.peers import STORAGE
from tests.unit.perf_results import point, result, sample

CAPTURED = Path(__file__).with_name("perf_fio_mixed.json")


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
        made = generators.fio_sample(parsed, "x", 3, None)
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
    @staticmethod
    def verdicts(*points: PointResult, counts: tuple[Count, ...] = ()) -> dict[tuple[str, str], bars.Verdict]:
        return {(v.work, v.label): v for v in bars.judge(result(list(points), counts))}

    def test_they_are_judged_on_the_median_in_their_direction(self) -> None:
        work, cost = "4 KiB random read, depth 32", "server CPU per 4 KiB request, depth 32"
        others = [sample("ceiling", 0, 100, 0.5), sample("nbdkit-file", 0, 10, 6.0)]
        found = self.verdicts(point([sample("nbdvvol", 0, 90, 1.0), *others]))
        assert found[work, "IOPS / socket ceiling"].reached is True
        assert found[work, "IOPS / nbdkit file"].reached is True
        assert found[cost, "read: CPU / nbdkit file"].reached is True
        assert found[work, "IOPS / qemu-nbd's better mode"].reached is None
        found = self.verdicts(point([sample("nbdvvol", 0, 80, 5.0), *others]))
        assert found[work, "IOPS / socket ceiling"].reached is False
        assert found[cost, "read: CPU / nbdkit file"].reached is False

    def test_at_depth_1_the_disk_and_the_socket_are_added(self) -> None:
        rows = (("nbdvvol", 132.0), ("storage", 100.0), ("ceiling", 20.0))
        label = "read, depth 1: latency / (fio's + the socket ceiling's)"
        samples = [sample(peer, 0, 1.0, mean_us=mean_us) for peer, mean_us in rows]
        found = self.verdicts(point(samples, "randread-4k-qd1", "disk"))["O_DIRECT on the real disk", label]
        assert found.measured is not None and found.measured.median == pytest.approx(1.1)
        short = self.verdicts(point(samples[:2], "randread-4k-qd1", "disk"))["O_DIRECT on the real disk", label]
        assert short.measured is None and short.reached is None

    def test_two_reactors_are_held_against_one_at_another_point_of_the_same_round(self) -> None:
        one_reactor = [sample("nbdvvol", r, 1.0, 2.0 * drift) for r, drift in enumerate((1, 5))]
        one = point(one_reactor, "randread-4k-1x32", "scaling")
        two = [sample("nbdvvol-2-reactors", r, 1.0, 1.6 * drift) for r, drift in enumerate((1, 5))]
        four = point([*two, sample("nbdvvol", 0, 1.0, 99.0)], "randread-4k-4x32", "scaling")
        label = "read: IOPS per CPU-second"
        found = self.verdicts(one, four)["4 connections on 2 reactors against 1 on 1", label]
        assert found.measured is not None and found.measured.median == pytest.approx(1.25) and found.reached is True

    def test_counts_have_bars_of_their_own_and_a_published_figure_has_none(self) -> None:
        def count(peer: str, name: str, value: float, work: str) -> Count:
            return Count(peer=peer, work=work, name=name, value=value, tolerance=0.0)

        counts = (
            count("nbdvvol-one-run", bars.INSTRUCTIONS, 1000.0, bars.MAP_LOAD),
            count("nbdvvol-million-runs", bars.INSTRUCTIONS, 1020.0, bars.MAP_LOAD),
            count("nbdvvol", bars.PROCESSORS, 0.006, bars.IDLE_LOAD),
            count("nbdvvol", bars.RESIDENT, 65_536.0, bars.IDLE_LOAD),
        )
        runs = [sample("nbdvvol-one-run", 0, 100.0), sample("nbdvvol-million-runs", 0, 90.0)]
        found = self.verdicts(point(runs, suite="map"), counts=counts)
        rows = {label: verdict for (_, label), verdict in found.items()}
        assert rows["instructions per request / one region"].reached is True
        assert rows["CPU of all processes, % of one"].reached is False
        assert rows["resident KiB per connection"].reached is True
        clock = rows["wall clock: IOPS / one region, depth 32"]
        assert clock.asked == "published" and clock.reached is None
        assert clock.measured is not None and clock.measured.median == pytest.approx(0.9)

    def test_what_is_to_be_no_worse_is_missed_only_beyond_the_noise(self) -> None:
        work, label = "a mirror of 2 legs, 4 KiB random read, depth 32", "IOPS / one leg"

        def found(*rates: float) -> bars.Verdict:
            mirror = [sample("nbdvvol-mirror", turn, rate) for turn, rate in enumerate(rates)]
            leg = [sample("nbdvvol", turn, 100.0) for turn in range(len(rates))]
            return self.verdicts(point([*mirror, *leg], suite="mirror"))[work, label]

        assert found(90.0, 98.0, 101.0).reached is False, "its third quartile is 0.995"
        assert found(90.0, 98.0, 103.0).reached is True and found(90.0, 98.0, 103.0).asked == "≥ 1, within noise"

    def test_a_mirror_is_held_against_one_leg_qemus_and_itself_while_it_copies(self) -> None:
        writes = [sample("nbdvvol-mirror", 0, 60.0, mean_us=50.0), sample("nbdvvol", 0, 100.0)]
        writes.append(sample("qemu-quorum", 0, 10.0))
        meanwhile = [sample("nbdvvol-mirror", 0, 50.0, mean_us=90.0)]
        copies = [resync.copied("nbdvvol-mirror", 0, 0.5, 10**9), resync.copied(STORAGE, 0, 0.45, None)]
        intent = Count(peer="nbdvvol", work=bars.MIRROR_LOAD, name=bars.INTENT, value=0.02, tolerance=0.0)
        found = self.verdicts(
            point(writes, "randwrite-4k-qd32", "mirror"), point(meanwhile, "randwrite-4k-qd32-resync", "mirror"),
            point(copies, "resync", "mirror"), counts=(intent,),
        )  # fmt: skip
        write, copy = "a mirror of 2 legs, 4 KiB random write, depth 32", "resync of a whole leg"
        figures = {
            (write, "IOPS / one leg"): 0.6, (write, "IOPS / QEMU's quorum"): 6.0,
            (write, "a warm region's intent check, % of the instructions"): 2.0,
            (copy, "bytes / fio reading one leg and writing the other"): 0.9,
            (copy, "4 KiB random writes meanwhile, depth 32: p99 / without"): 1.8,
        }  # fmt: skip
        for key, value in figures.items():
            verdict = found[key]
            assert verdict.measured is not None and verdict.measured.median == pytest.approx(value), key
            assert verdict.reached is True, key

    def test_a_suite_of_its_own_is_judged_where_it_was_run(self) -> None:
        hits = [sample("nbdvvol-cache", 0, 95.0), sample("nbdvvol-null", 0, 100.0), sample("nbdkit-cache", 0, 10.0)]
        halves = [sample("nbdvvol-cache-half", 0, 94.0), sample("nbdvvol", 0, 100.0)]
        found = self.verdicts(point([*hits, *halves], "randread-4k-qd32", "cache"))
        assert found["reads that hit the cache, 4 KiB, depth 32", "IOPS / without storage"].reached is True
        assert found["a working set twice the cache's RAM", "randread-4k-qd32: IOPS / no cache"].reached is False
        assert not [work for work, _ in self.verdicts() if "cache" in work]
        assert "cache" in suites.names() and "cache" not in suites.complete()

    def test_every_bar_names_a_point_that_its_suite_has_and_servers_that_take_part(self) -> None:
        for bar in (*bars.BARS, *bars.OWN_BARS):
            suite = suites.load(bar.suite)
            assert {bar.point, bar.against_point or bar.point} <= set(suite.point_names()), f"{bar.suite}/{bar.point}"
            taking_part = {peer.name for peer in run.wanted(run.Options(), suite)}
            taking_part |= {STORAGE} if suite.storage or suite.resync else set()
            assert bar.ours in taking_part and set(bar.against) & taking_part, f"{bar.suite}/{bar.point} {bar.label}"

    def test_every_row_of_the_table_has_a_bar(self) -> None:
        """Rows, and how many figures each asks for: on the unix socket, and for the ratios to peers on TCP."""
        rows = Counter(verdict.work for verdict in bars.judge(result([])))
        assert rows == {
            "4 KiB random read, depth 32": 4, "4 KiB random read, depth 32, TCP": 2,
            "4 KiB random read, depth 256": 3, "4 KiB random read, depth 256, TCP": 1,
            "4 KiB random write, depth 32": 4, "4 KiB random write, depth 32, TCP": 3,
            "256 KiB sequential read, depth 8": 5, "256 KiB sequential read, depth 8, TCP": 3,
            "256 KiB sequential write, depth 8": 4, "256 KiB sequential write, depth 8, TCP": 3,
            "4 KiB random read, depth 1": 2, "4 KiB random read, depth 1, TCP": 2,
            "O_DIRECT on the real disk": 12,
            "server CPU per 4 KiB request, depth 32": 4, "server CPU per 4 KiB request, depth 32, TCP": 4,
            "4 connections on 2 reactors against 1 on 1": 2,
            "1,000 bound exports, one idle connection each": 2,
            "a map of 1,000,000 runs, random order": 2,
            "TLS on TCP, per core": 4,
            "a mirror of 2 legs, 4 KiB random write, depth 32": 3,
            "a mirror of 2 legs, 4 KiB random write, depth 32, O_DIRECT on the real disk": 2,
            "a mirror of 2 legs, 4 KiB random read, depth 32": 2,
            "a mirror of 2 legs, 4 KiB random read, depth 32, O_DIRECT on the real disk": 2,
            "resync of a whole leg": 3, "resync of a whole leg, O_DIRECT on the real disk": 3,
        }  # fmt: skip


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
        found = profile.parse(f"{one:x} 5\n{one + 4:x} 5\n{two:x} 2\n10 9\n", where)
        assert found.own == {"libtwo:one": 10, "libtwo:two": 2, "unknown": 9}
        assert found.calls == {"one": 5, "two": 2}
        assert found.minus(found).instructions == 0 and found.instructions == 21

    def test_the_library_s_memcpy_is_found_where_the_processor_chose_it(self) -> None:
        where = profile.mappings(Path("/proc/self/maps").read_text())
        address = ctypes.cast(ctypes.CDLL(None).memcpy, ctypes.c_void_p).value
        assert address is not None
        assert profile.name_of(address, where) in {("libc:memcpy", True), ("libc:memmove", True)}


class TestSuites:
    def test_every_suite_reads_and_has_points(self) -> None:
        for name in suites.names():
            suite = suites.load(name)
            names = suite.point_names()
            assert names and len(set(names)) == len(names)
            assert all(suite.spec(p) for p in names)

    def test_fios_jobs_cover_what_was_asked_for(self) -> None:
        """Random and sequential, read, write, mixed 70/30, 4 KiB to 1 MiB, depth 1 to 256, 1 to 16 connections."""
        found = [suites.load(name) for name in suites.names()]
        jobs = [suite.spec(one) for suite in found if suite.generator == "fio" for one in suite.point_names()]
        kinds = {job["rw"] for job in jobs}
        assert kinds >= {"randread", "randwrite", "read", "write", "randrw", "randtrim", "trimwrite"}
        assert {job["rwmixread"] for job in jobs if job["rw"] == "randrw"} == {"70"}
        sizes = {suites.bytes_of(job["bs"]) for job in jobs if "bs" in job}
        assert (min(sizes), max(sizes)) == (4 << 10, 1 << 20)
        depths = {int(job["iodepth"]) for job in jobs}
        assert (min(depths), max(depths)) == (1, 256)
        assert max(int(job.get("numjobs", "1")) for job in jobs) == 16
        assert {job["fsync"] for job in jobs if "fsync" in job} >= {"1", "32"}
        assert any("loops" in job and "verify_backlog" in job for job in jobs), "a long verification"
        assert {suite.backend for suite in found} == {"tmpfs", "disk", "null"}

    def test_every_server_that_was_named_takes_part(self) -> None:
        asked = "nbdkit-file nbdkit-memory nbdkit-null qemu-nbd-uring qemu-nbd-threads qemu-storage-daemon nbd-server"
        beside = "nbdkit-cache nbdkit-writeback qemu-writeback ceiling"
        found = [suites.load(name) for name in suites.names()]
        took = {peer.name for suite in found for peer in run.wanted(run.Options(), suite)}
        assert took >= {*asked.split(), *beside.split()}
        assert {suite.name for suite in found if suite.storage} >= {"core", "disk", "writeback"}

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

    def test_a_resync_is_a_point_and_its_load_generator_knows_nothing_of_it(self) -> None:
        suite = suites.load("mirror")
        assert suite.point_names()[-1] == suites.RESYNC and suite.spec(suites.RESYNC)
        meanwhile = suite.points["randread-4k-qd32-resync"]
        assert meanwhile.resyncing and not any("resync" in word for word in meanwhile.arguments())
        assert meanwhile.arguments() == suite.points["randread-4k-qd32"].arguments()

    @pytest.mark.parametrize("text", ["", "k", "4q", "-1", "4 k"])
    def test_what_is_no_size_is_refused(self, text: str) -> None:
        with pytest.raises(suites.SuiteError, match="not a size"):
            suites.bytes_of(text)

    def test_an_unknown_suite_names_those_there_are(self) -> None:
        with pytest.raises(suites.SuiteError, match="core"):
            suites.load("nonsense")


class TestProgress:
    def test_it_tells_what_is_left_by_what_was_measured(self) -> None:
        said: list[str] = []
        made = progress.Progress({"loadgen": 100, "fio": 20}, said.append)
        made.step("loadgen", 10, 60.0, "core 1 a")
        assert made.left_s() == 90 * 6.0 + 20 * progress.GUESS_S
        made.step("fio", 5, 300.0, "fio 1 b")
        assert made.left_s() == 90 * 6.0 + 15 * 60.0
        assert said == ["  [10/120, 9 min left] core 1 a", "  [15/120, 24 min left] fio 1 b"]


def test_strace_s_summary_is_read_by_name() -> None:
    text = (
        "    calls syscall\n--------- ----------------\n      517 io_uring_enter\n        2 read\n"
        "--------- ----------------\n      519 total\n"
    )
    assert counts.parse_strace(text) == {"io_uring_enter": 517, "read": 2}


def test_callgrind_s_costs_are_summed_by_file_without_what_was_called() -> None:
    text = (
        "version: 1\npositions: line\nevents: Ir\nsummary: 99\n\nob=/x/nvsim\nfl=/r/native/nbd/receive.c\n"
        "fn=parse\n10 5\n"
        "fi=/r/native/sim/../nbd/wire.h\n11 7\nfe=/r/native/nbd/receive.c\n12 1\ncfi=/r/native/sim/disk.c\ncfn=read\n"
        "calls=3 40\n13 1000\n14 2\n\nfl=/r/native/sim/disk.c\nfn=read\n40 900\n"
    )
    costs = callgrind.parse(text)
    assert costs == {"/r/native/nbd/receive.c": 8, "/r/native/nbd/wire.h": 7, "/r/native/sim/disk.c": 900}
    assert callgrind.rooms(costs) == {"nbd": 15}


class TestSampling:
    SCRIPT = (
        "filter \n\tffffffff81 copy_to_iter+0x20 ([kernel.kallsyms])\n\tffffffff82 sys_recv ([kernel.kallsyms])\n"
        "\t    7f0001 recv+0x1 (/usr/lib/libc.so.6)\n\t    7f0002 [unknown] ([unknown])\n\n"
        "filter \n\t    7f0003 nv_conn_parse (/x/_native.abi3.so)\n\t    7f0004 junk (/x/y)\n\n"
        "filter \n\t    7f0003 nv_conn_parse (/x/_native.abi3.so)\n\n"
    )

    def test_stacks_keep_the_kernel_whole_and_of_the_user_the_innermost(self) -> None:
        assert sampling.parse_script(self.SCRIPT) == {
            ("kernel", "libc:recv", "sys_recv", "copy_to_iter"): 1,
            ("user", "_native:nv_conn_parse"): 2,
        }

    def test_shares_and_the_table(self) -> None:
        found = sampling.shares(sampling.parse_script(self.SCRIPT))
        assert (found.total, found.kernel) == (3, 1)
        assert found.own == {"copy_to_iter": 1, "_native:nv_conn_parse": 2} and found.under["sys_recv"] == 1
        text = sampling.table(found, 3.0)
        assert "3 samples, 33% in the kernel; 3.00 µs" in text
        assert "| _native:nv_conn_parse | 66.7% | 66.7% | 2.000 |" in text

    def test_the_flame_graph_is_as_wide_as_its_samples(self) -> None:
        svg = ElementTree.fromstring(sampling.flame(sampling.parse_script(self.SCRIPT), "a <title>"))
        widths = {group[0].text: float(group[1].attrib["width"]) for group in svg if group.tag.endswith("}g")}
        assert widths["user 66.7%"] == widths["_native:nv_conn_parse 66.7%"] == pytest.approx(800)
        assert widths["copy_to_iter 33.3%"] == pytest.approx(400)
