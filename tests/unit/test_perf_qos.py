"""The experiment on limits: its arithmetic, bars, pages and result file. (Its subject is judged in simulated time, too:
tests/sim.)"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from perf import bars, charts, compare, limits, qos, readme, report, results, run
from perf.__main__ import app
from perf.model import Count, Latency, PointResult, Result, Sample
from perf.peers import OURS
from tests.unit.perf_results import result, steady


@pytest.mark.parametrize(
    ("limit", "depth", "connections", "seconds"),
    [("iops-2000", 1, 1, 0.0007), ("iops-2000", 32, 4, 0.0704), ("bandwidth-64MiB", 32, 1, 0.03765)],
)
def test_the_bound_is_the_documented_one(limit: str, depth: int, connections: int, seconds: float) -> None:
    (found,) = [one for one in qos.LIMITS if one.name == limit]
    assert qos.bound_s(found, depth, connections) == pytest.approx(seconds)


def limited(name: str, iops: float, p999_us: float, depth: int = 8) -> PointResult:
    """2,000 a second asked for, 17.6 ms the longest wait."""
    latency = Latency(mean_us=1000, p50_us=1500, p90_us=2000, p99_us=3000, p999_us=p999_us, max_us=90_000)
    spec = {"block": "4k", "depth": str(depth), "connections": "4", limits.REACTORS: "2", limits.SECONDS: "10"}
    return PointResult(
        suite="qos", point=name, generator="loadgen", backend="tmpfs", transport="unix",
        spec={**spec, limits.LIMIT: "iops 2000", limits.ASKED: "2000", limits.BOUND: "17600"},
        samples=(Sample(peer=OURS, round=0, requests=20010, iops=iops, latency=latency),),
    )  # fmt: skip


def shared(shares: int, iops: float) -> PointResult:
    """One of VVols with 400 shares together."""
    spec = {limits.SECONDS: "10", limits.SHARES: str(shares), limits.OF: "400"}
    return limited(f"shares-{shares}-of-400", iops, 4000).model_copy(update={"spec": spec})


MEASURED = (limited("a", 2001, 4400), limited("b", 1980, 8800), shared(300, 74_000), shared(100, 26_000))


def judged(*points: PointResult) -> dict[str, tuple[str, float, bool | None]]:
    """Bars of limits and shares: what is asked, the figure, whether it is reached."""
    found = [verdict for verdict in bars.judge(result([*points])) if verdict.work.startswith(("limits", "shares"))]
    return {v.label: (v.asked, round(v.measured.median, 4), v.reached) for v in found if v.measured}


def test_what_got_through_and_what_waited_longest_is_held_to_bars() -> None:
    assert judged(*MEASURED) == {
        "obtained / asked, the least": ("≥ 0.95", 0.99, True),
        "obtained / asked, the most": ("≤ 1.05", 1.0005, True),
        "p99.9 latency / its bound, depth 8, the longest": ("≤ 1", 0.5, True),
        "300 of 400: obtained / its part": ("≥ 0.95", 0.9867, True),
        "100 of 400: obtained / its part": ("≥ 0.95", 1.04, True),
    }


def test_a_limit_that_does_not_hold_misses_its_bar() -> None:
    missed = judged(limited("few", 1880, 4000), limited("many", 2120, 18_000), shared(300, 70_000), shared(100, 30_000))
    assert {label for label, (_, _, reached) in missed.items() if reached is False} == {
        "obtained / asked, the least",
        "obtained / asked, the most",
        "p99.9 latency / its bound, depth 8, the longest",
        "300 of 400: obtained / its part",
    }


def test_what_one_request_waits_is_published() -> None:
    """Its bound is little more than the machine takes to wake up."""
    shown = judged(limited("one", 2000, 35_200, depth=1), limited("many", 2000, 8800))
    assert shown["p99.9 latency / its bound, depth 1, the longest"] == ("published", 2.0, None)
    assert shown["p99.9 latency / its bound, depth 8, the longest"] == ("≤ 1", 0.5, True)


def test_a_run_without_them_asks_for_nothing() -> None:
    assert judged() == {} and limits.tables([]) == []


@pytest.mark.parametrize("page", [report.markdown, lambda shown: readme.bar_page(shown, "perf/results/x.json", "../")])
def test_a_page_has_a_row_for_each_case(page: Callable[[Result], str]) -> None:
    lines = page(result([*MEASURED])).splitlines()
    assert "| iops 2000 | 4k | 8 | 4 | 2 | 2,000 | 1,980 | 0.9900 | 1.50 | 8.80 | 90.00 | 17.60 | 0.50 |" in lines
    assert "| 300 of 400 | 74,000 | 100,000 | 0.9867 | 1.50 | 4.00 |" in lines
    assert any("10 s under each load" in line for line in lines)
    assert not any(line.startswith("#### ") for line in lines), "no table of servers for it"


def test_a_chart_shows_every_limit(tmp_path: Path) -> None:
    (chart,) = charts.write(result([*MEASURED]), tmp_path)
    assert chart.name == "qos.png"
    with Image.open(chart) as picture:
        assert picture.width > 500 and len(picture.getcolors() or []) > 2


def test_what_comes_further_from_its_limit_is_worse() -> None:
    old, new = (result([limited("a", rate, 1), shared(300, 75_000)]) for rate in (2001, 2130))
    found = {change.where: change.regression for change in compare.compare(old, new)}
    assert found == {"qos/a": True, "qos/shares-300-of-400": False}
    assert not any(change.regression for change in compare.compare(new, old))


def test_it_replaces_its_like_in_a_result_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is replaced by thin air; the rest is the command's own."""
    count = Count(peer=OURS, work="read", name="instructions", value=1.0, tolerance=0.01)
    core = steady("randread-4k-qd32", "core", {OURS: 80_000, "ceiling": 100_000})
    file = tmp_path / "r.json"
    file.write_text(results.dump(result([core, limited("old", 1, 1)], (count,))))
    empty = result([]).model_copy(update={"complete": False})
    monkeypatch.setattr(run, "run_suites", lambda options, chosen, say: empty)
    monkeypatch.setattr(qos, "with_limits", lambda options, seconds, say: MEASURED[:2])
    monkeypatch.setattr(qos, "with_shares", lambda options, seconds, say: MEASURED[2:])
    done = CliRunner().invoke(app, ["qos", "--into", str(file)])
    assert done.exit_code == 0, done.output
    both = results.load(file)
    assert [point.point for point in both.points] == [core.point, *(point.point for point in MEASURED)]
    assert both.counts == (count,) and both.rounds == 5
    assert both.stamp("qos").seconds == 10 and both.stamp("qos").rounds == 1 and both.stamp("qos").others is not None
    assert "| iops 2000 |" in file.with_suffix(".md").read_text()


@pytest.mark.parametrize("what", [["--quick"], ["--out", "y.json"]])
def test_only_a_measurement_at_full_length_is_joined(tmp_path: Path, what: list[str]) -> None:
    done = CliRunner().invoke(app, ["qos", "--into", str(tmp_path / "r.json"), *what])
    assert done.exit_code == 2 and "--into takes a measurement at full length" in done.output
