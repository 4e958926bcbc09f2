"""A run of the write-back log on io_uring and real files, cut at the boundaries of its records and inside of them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.sim.test_log import run

pytestmark = pytest.mark.timeout(500)  # the first test builds the simulators


def cut(folder: Path, files: Path, cuts: int, mutant: int = 0) -> subprocess.CompletedProcess[str]:
    return run(folder / ("nvlogcut_mutants" if mutant else "nvlogcut"), str(files), "1", str(cuts), mutant=mutant)


def test_every_cut_is_recovered_with_what_was_promised(folder: Path, tmp_path: Path) -> None:
    """Each time what was durable, and all, none, some or torn parts of the rest; then recovery from real files."""
    result = cut(folder, tmp_path, 700)
    assert result.returncode == 0, result.stderr
    words = result.stdout.split()
    assert int(words[2]) >= 700, "records whose boundaries there are to be cut at"
    assert int(words[6]) >= 500, "cuts"


@pytest.mark.parametrize(
    "mutant", [1, 2, 3, 7], ids=["FUA too early", "tail too early", "damaged data", "no tombstone"]
)
def test_a_deliberate_bug_is_seen_in_the_real_run_too(folder: Path, tmp_path: Path, mutant: int) -> None:
    result = cut(folder, tmp_path, 700, mutant)
    assert result.returncode != 0 and "VIOLATION" in result.stderr
