"""Comparing two result files: what is a regression, what is noise, and the command's exit status."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from perf import compare, results
from perf.__main__ import app
from perf.model import Count, Result
from tests.unit.perf_results import point, result, sample


def run(ours: float, jitter: float = 0.01, drift: float = 1.0) -> Result:
    wobble = [1 - jitter, 1 - jitter / 2, 1.0, 1 + jitter / 2, 1 + jitter]
    samples = [sample("nbdvvol", r, ours * w * drift, 2.0) for r, w in enumerate(wobble)]
    samples += [sample("ceiling", r, 500_000 * drift, 1.0) for r in range(5)]
    return result([point(samples)])


def test_a_machine_five_times_slower_is_no_regression() -> None:
    changes = compare.compare(run(400_000), run(400_000, drift=0.2))
    assert changes and not any(c.regression or c.improvement for c in changes)


def test_a_loss_beyond_noise_is_one() -> None:
    changes = compare.compare(run(400_000), run(340_000))
    assert [c.what for c in changes if c.regression] == ["IOPS / ceiling"]
    assert "REGRESSION" in compare.table(changes)


def test_the_same_loss_in_noisy_rounds_is_not() -> None:
    assert not any(c.regression for c in compare.compare(run(400_000, 0.3), run(340_000, 0.3)))


def test_a_gain_is_an_improvement() -> None:
    changes = compare.compare(run(340_000), run(400_000))
    assert [c.what for c in changes if c.improvement] == ["IOPS / ceiling"]


def counted(value: float, peer: str = "nbdvvol") -> Result:
    count = Count(peer=peer, work="read-4k-qd32", name="instructions", value=value, tolerance=0.01)
    return result([], (count,))


def test_counts_are_compared_with_their_own_tolerance() -> None:
    old = counted(300.0)
    assert not compare.compare(old, counted(302.0))[0].regression
    assert compare.compare(old, counted(304.0))[0].regression
    assert compare.compare(old, counted(290.0))[0].improvement


def test_something_out_of_nothing_is_a_regression() -> None:
    assert compare.compare(counted(0.0), counted(0.5))[0].regression
    assert not compare.compare(counted(0.0), counted(0.0))[0].regression


def test_runs_that_share_nothing_cannot_be_compared() -> None:
    with pytest.raises(compare.CompareError, match="nothing to compare"):
        compare.compare(run(1.0), counted(1.0))


def test_a_run_of_few_rounds_is_said() -> None:
    short = result([]).model_copy(update={"rounds": 2})
    assert compare.warnings(result([]), short) == ["the second run had 2 rounds: its noise is not known"]


def test_a_busy_machine_is_said() -> None:
    assert "load 3.0" in " ".join(compare.warnings(result([]), result([], load=3.0)))


def test_only_our_own_counts_are_judged() -> None:
    with pytest.raises(compare.CompareError, match="nothing to compare"):
        compare.compare(counted(1.0, "nbdkit-file"), counted(9.0, "nbdkit-file"))


def test_a_point_that_ours_fails_now_is_a_regression() -> None:
    good, limit = sample("nbdvvol", 0, 100.0), sample("ceiling", 0, 200.0)
    old = result([point([good, limit])])
    for new in (
        result([point([limit], failures=("nbdvvol: no reply",))]),
        result([point([limit])]).model_copy(update={"skipped": {"core/nbdvvol": "did not start"}}),
    ):
        (change,) = compare.compare(old, new)
        assert change.regression and change.what == "answered at all"


def test_a_run_that_was_not_asked_about_ours_says_nothing() -> None:
    old = result([point([sample("nbdvvol", 0, 100.0), sample("ceiling", 0, 200.0)])])
    with pytest.raises(compare.CompareError, match="nothing to compare"):
        compare.compare(old, result([point([sample("ceiling", 0, 200.0)])]))


def test_forms_of_ours_are_compared_with_each_other_where_nobody_else_takes_part() -> None:
    def scaling(two: float) -> Result:
        samples = [sample("nbdvvol", 0, 100.0), sample("nbdvvol-2-reactors", 0, two)]
        return result([point(samples, "randread-4k-4x32", "scaling")])

    changes = compare.compare(scaling(200.0), scaling(100.0))
    assert {c.where for c in changes if c.regression} == {"scaling/randread-4k-4x32 nbdvvol-2-reactors"}


@pytest.mark.parametrize(
    ("new", "status", "says"),
    [(340_000, 1, "1 of 3 figures got worse beyond noise"), (400_000, 0, ""), (460_000, 0, "")],
    ids=["worse", "same", "better"],
)
def test_the_command_fails_on_a_regression_only(tmp_path: Path, new: float, status: int, says: str) -> None:
    files = [tmp_path / "old.json", tmp_path / "new.json"]
    for file, rate in zip(files, (400_000, new), strict=True):
        file.write_text(results.dump(run(rate)))
    done = CliRunner().invoke(app, ["compare", *map(str, files)])
    assert done.exit_code == status and says in done.output
    assert "| core/randread-4k-qd32 | IOPS / ceiling |" in done.output


def test_the_command_refuses_what_is_no_result(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert done.exit_code == 2 and "No such file" in done.output
