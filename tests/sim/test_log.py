"""The write-back log in the simulator: crashes, torn writes, faulty devices; and proof that bugs are seen."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from tests.lib.pairs import in_pairs

pytestmark = pytest.mark.timeout(500)  # the first test builds the simulators


def run(program: Path, *arguments: str, mutant: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NVSIM_MUTANT": str(mutant)}
    command = [program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, env=environment)


@pytest.mark.parametrize(("first", "last"), [(1, 600), (601, 1200)])
def test_random_lives_keep_every_promise(folder: Path, first: int, last: int) -> None:
    result = run(folder / "nvlog", "--seeds", f"{first}..{last}")
    assert result.returncode == 0, result.stderr
    words = result.stdout.split()
    assert int(words[2]) > 200_000, "requests that were answered"
    assert int(words[4]) > 1000, "crashes"


def test_the_same_with_sanitizers(folder: Path) -> None:
    result = run(folder / "nvlog_sanitized", "--seeds", "5001..5060")
    assert result.returncode == 0, result.stderr


def test_every_short_sequence_of_requests(folder: Path) -> None:
    """Writes, FUA, bypasses, zeroes, trims, flushes, pauses for destaging: in every order, cut off at some steps."""
    for length in ("1", "2", "3"):
        result = run(folder / "nvlog", "--exhaustive", length)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_a_crash_at_every_step(folder: Path, seed: str) -> None:
    result = run(folder / "nvlog", "--every", seed)
    assert result.returncode == 0, result.stderr


MUTANTS = {
    "FUA is answered before the log is durable": (1, "1..300"),
    "the tail moves before what is below is flushed": (2, "1..300"),
    "recovery goes on past damaged data": (3, "1..300"),
    "recovery takes what an earlier life left": (4, "701..1500"),
    "what is not synced is destaged": (5, "601..1400"),
    "of a block the oldest version is carried": (6, "1..300"),
    "a bypass leaves no tombstone": (7, "1..300"),
    "what is settled counts as not covered": (8, "1..300"),
    "a bypass that failed leaves what is below trusted": (9, "1501..2500"),
    "a bypass runs beside a destage write": (10, "1..300"),
    "destaging takes no notice of a bypass": (11, "1..300"),
    "a log that failed counts as void without a word on disk": (12, "301..1300"),
    "a bypass runs beside an older read from below": (13, "1..300"),
    "what cannot be read counts as settled": (14, "1..300"),
    "what comes late is held by a log that is void already": (15, "3401..3700"),
}


Hunts = dict[str, Future[subprocess.CompletedProcess[str]]]


@pytest.fixture(scope="module")
def hunts(request: pytest.FixtureRequest, folder: Path) -> Iterator[Hunts]:
    def hunt(bug: str) -> subprocess.CompletedProcess[str]:
        number, seeds = MUTANTS[bug]
        return run(folder / "nvlog_mutants", "--seeds", seeds, mutant=number)

    with in_pairs(request, "bug", hunt) as found:
        yield found


@pytest.mark.parametrize("bug", MUTANTS)
def test_a_deliberate_bug_is_seen(hunts: Hunts, bug: str) -> None:
    result = hunts[bug].result()
    assert result.returncode != 0 and "VIOLATION" in result.stderr, bug


def test_without_a_bug_the_mutants_binary_finds_nothing(folder: Path) -> None:
    result = run(folder / "nvlog_mutants", "--seeds", "1..100")
    assert result.returncode == 0, result.stderr
