"""The write-back log in the simulator: crashes, torn writes, faulty devices; and proof that bugs are seen."""

from __future__ import annotations

import os
import re
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


def test_many_requests_at_once_over_storage_that_keeps_memory(folder: Path) -> None:
    """More reads than the log has memory for, and a leg that hangs while it has what was carried."""
    result = run(folder / "nvlog", "--crowd", "1..500")
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[6]) > 100, "openings that hung"
    result = run(folder / "nvlog_sanitized", "--crowd", "1..15")
    assert result.returncode == 0, result.stderr


def test_chains_of_events_that_hardly_ever_come_by_chance(folder: Path) -> None:
    """It fails between a write past it and its tombstone; a sync hangs that is waited for after its reads have; what is
    lost holds its tail, and nobody overwrites that."""
    result = run(folder / "nvlog", "--chains", "1..20")
    assert result.returncode == 0, result.stderr


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


def test_a_rate_of_destaging_is_held_and_holds_nobody_up(folder: Path) -> None:
    """In simulated time: nothing outruns it; a full log, a drain, another rate and the log's end do not wait for it."""
    for program in ("nvlog", "nvlog_mutants"):
        result = run(folder / program, "--pace", "1..10")
        assert result.returncode == 0, result.stderr


PACE_MUTANTS = {"a rate counts in a full log, too": 18, "... and in one that is drained": 19, "no rate counts": 20}


@pytest.mark.parametrize("paced", PACE_MUTANTS)
def test_a_deliberate_bug_in_the_rate_is_seen(folder: Path, paced: str) -> None:
    result = run(folder / "nvlog_mutants", "--pace", "1..10", mutant=PACE_MUTANTS[paced])
    assert result.returncode != 0 and "VIOLATION" in result.stderr, paced


FULL_WAIT_MS = 100
"""What a batch may take; who waits for room waits for the end of one."""
FULL_RATE = 1.5
"""Beside the writers' own 16 writes below there are 16 that make room."""
HALVES = 800
"""Of a thousand records; the others begin while nothing is under way, and take what there is."""
CROWD = "--crowd"
MUTANTS = {
    "when the log has failed, older versions are carried as well": (24, "1..20", "--chains"),
    "a log is well whose tail what is lost holds for ever": (25, "1..1", "--chains"),
    "memory of what was carried is free while storage still uses it": (22, "1..100", CROWD),
    "of those that wait for memory to read into one is woken at a time": (23, "1..100", CROWD),
    "a sync and the superblock have no deadline": (21, "401..500"),
    "reads have no deadline": (26, "1..300"),
    "a read that was given up goes below, to what is older": (27, "1..300"),
    "what failed and may yet come to be in the log haunts no block": (31, "1..100", CROWD),
    "an opening has no deadline": (28, "1..100"),
    "an opening that was given up goes on when its device answers": (29, "1..100"),
    "a small record waits for what no client sends": (30, "1..20"),
    "FUA is answered before the log is durable": (1, "1..300"),
    "the tail moves before what is below is flushed": (2, "1..300"),
    "recovery goes on past damaged data": (3, "1..300"),
    "recovery takes what an earlier life left": (4, "1601..1700"),
    "what is not synced is destaged": (5, "801..900"),
    "of a block the oldest version is carried": (6, "1..300"),
    "a bypass leaves no tombstone": (7, "1..300"),
    "what is settled counts as not covered": (8, "1..300"),
    "a bypass that failed leaves what is below trusted": (9, "1501..2500"),
    "a bypass runs beside a destage write": (10, "1..300"),
    "destaging takes no notice of a bypass": (11, "1..300"),
    "a log that failed counts as void without a word on disk": (12, "301..1300"),
    "a bypass runs beside an older read from below": (13, "1..300"),
    "what cannot be read counts as settled": (14, "1..300"),
    "what comes late is held by a log that is void already": (15, "1..20", CROWD),
}


Hunts = dict[str, Future[subprocess.CompletedProcess[str]]]


@pytest.fixture(scope="module")
def hunts(request: pytest.FixtureRequest, folder: Path) -> Iterator[Hunts]:
    def hunt(bug: str) -> subprocess.CompletedProcess[str]:
        number, seeds, *worlds = MUTANTS[bug]
        return run(folder / "nvlog_mutants", *(worlds or ["--seeds"]), seeds, mutant=number)

    with in_pairs(request, "bug", hunt) as found:
        yield found


def of_a_full_log(program: Path, mutant: int = 0) -> tuple[float, int]:
    """By the simulated clock: the rate of writes over that without a log, and the longest wait in milliseconds."""
    result = run(program, "64", mutant=mutant)
    found = re.fullmatch(r"(\d+) writes a second, (\d+) without a log, longest wait (\d+) ms\n", result.stdout)
    assert result.returncode == 0 and found, result.stdout + result.stderr
    rate, without, longest_ms = (int(word) for word in found.groups())
    return rate / without, longest_ms


def test_a_full_log_is_faster_than_none_and_nobody_waits_for_long(folder: Path) -> None:
    rate, longest_ms = of_a_full_log(folder / "nvlogfull")
    assert rate >= FULL_RATE and longest_ms <= FULL_WAIT_MS


def test_a_record_begins_beside_others_when_it_is_half_of_all(folder: Path) -> None:
    """Single writes, and a device that answers none: records of 1, 1, 1 and 2 blocks, and then four are under way."""
    result = run(folder / "nvlogfull", "--records")
    assert (result.returncode, result.stdout) == (0, "1 2 3 3 4 4 4 4 4 4 4 4 4 4 4 4\n"), result.stderr


def test_records_become_halves_where_one_writer_came_first(folder: Path) -> None:
    """
    16 writers: eight blocks at the device while eight come again. Before records were cut, one and fifteen stayed what
    they were: not one of a thousand had eight.
    """
    result = run(folder / "nvlogfull", "--sizes")
    assert result.returncode == 0 and int(result.stdout) >= HALVES, result.stderr


def test_somebody_waits_for_long_where_all_that_is_logged_is_one_batch(folder: Path) -> None:
    assert of_a_full_log(folder / "nvlogfull_mutants", mutant=16)[1] > FULL_WAIT_MS


def test_it_is_slower_where_a_full_log_is_carried_like_a_calm_one(folder: Path) -> None:
    assert of_a_full_log(folder / "nvlogfull_mutants", mutant=17)[0] < FULL_RATE


@pytest.mark.parametrize("bug", MUTANTS)
def test_a_deliberate_bug_is_seen(hunts: Hunts, bug: str) -> None:
    result = hunts[bug].result()
    assert result.returncode != 0 and "VIOLATION" in result.stderr, bug


def test_without_a_bug_the_mutants_binary_finds_nothing(folder: Path) -> None:
    result = run(folder / "nvlog_mutants", "--seeds", "1..100")
    assert result.returncode == 0, result.stderr
