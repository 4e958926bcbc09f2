"""The mirrored volume in the simulator, with the registry, the links and the leg machine that production has.

A fixed budget of seeds and crash points, every short life of a small mirror, and proof that the judge would see what it
is there for. `make sim SEEDS=A..B` runs any number of seeds; a violation prints a line that replays it.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.lib.pairs import in_pairs

SEEDS = 9_000
CRASH_POINTS = 50_000
SANITIZED = 400
MUTANT_SEEDS = 12_000
FIRST_SEED = {22: 8_001}
"""Where the budget of a mutant begins, if not at 1."""
MUTANTS = {
    1: "a change is acknowledged before the registry knows of the lost leg",
    2: "a write does not wait for its intent",
    3: "intents are cleared without the flush before",
    4: "a read is answered from a leg that is being copied to",
    5: "a flush leaves one leg out",
    6: "an unclean attach forgets the intents that it finds",
    7: "a lost leg's dirty map starts empty",
    8: "a resync begins while an old write to the leg is still in flight",
    9: "a leg that has rebooted is taken back as if nothing had happened",
    10: "the second leg's bytes are taken later, when the client may have changed them",
    11: "legs let hosts of an older epoch through",
    12: "a leg's label is not held against its stamp",
    13: "writes of clients and copies between legs pass each other",
    14: "the cache is hit behind a fence",
    15: "the cache is filled with what was read before a write",
    16: "a fault that is cleared before the mirror has looked is not heard of",
    17: "a leg is labelled for a resync before what it lacks is saved",
    18: "a change that a server has not answered is sent again at once",
    19: "a write has no intent: none is ever written down",
    20: "a log goes on acknowledging behind a fence",
    21: "what a log carries and copies between legs pass each other",
    22: "a FLUSH leaves out what the filter's life before wrote past the log",
    23: "a log that failed counts as void without a word on disk",
    24: "a log goes out with what it holds",
    25: "what the last leg's second failed sync loses is not written once more",
}
LOST_SYNCS = {25}
"""Mutants that every short life with failed syncs is to find, not seeds."""
MET = 20
"""So often at least each trouble is met, and each way out taken, in the budget of seeds."""
TALLY = re.compile(r"^ *(\d+) +[\d.]+ a thousand: (.+)$", re.MULTILINE)
LOSING = sum(5 ** (length - 1) - 4 ** (length - 1) for length in range(1, 6))
"""Sequences of at most 5 of 5 operations that begin with a write and have a flush in vain."""
SEQUENCES = re.compile(r"^(\d+) sequences of operations$", re.MULTILINE)
Hunts = dict[int, Future[subprocess.CompletedProcess[str]]]
FIGURES = re.compile(r"(\d+) (?:seeds|runs), (\d+) answers judged, (\d+) crash points, (\d+) changes")


def nvmirror(binary: Path, *arguments: str, mutant: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the program; the output is what a person needs to replay a violation."""
    environment = os.environ | {"NVSIM_MUTANT": str(mutant)}
    return subprocess.run([str(binary), *arguments], capture_output=True, text=True, timeout=1200, env=environment)


def figures(run: subprocess.CompletedProcess[str]) -> list[int]:
    """Seeds or runs, answers, crash points, changes of the registry."""
    assert run.returncode == 0, run.stderr
    found = FIGURES.match(run.stdout)
    assert found, run.stdout
    return [int(figure) for figure in found.groups()]


def together(runs: list[subprocess.CompletedProcess[str]]) -> list[int]:
    return [sum(column) for column in zip(*map(figures, runs), strict=True)]


@pytest.mark.timeout(1200)
def test_no_violation(folder: Path) -> None:
    """At least 2,000 seeds and 50,000 points at which a process, a host's right to serve, or the power ended."""
    halves = (f"1..{SEEDS // 2}", f"{SEEDS // 2 + 1}..{SEEDS}")
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda seeds: nvmirror(folder / "nvmirror", "--seeds", seeds), halves))
    seeds, answers, crashes, changes = together(runs)
    assert seeds == SEEDS
    assert crashes >= CRASH_POINTS
    assert answers > 50 * SEEDS, "a simulation in which hardly anything is answered proves nothing"
    assert changes > SEEDS, "nor does one in which legs hardly ever fail or come back"
    met: Counter[str] = Counter()
    for run in runs:
        met.update({what: int(count) for count, what in TALLY.findall(run.stdout)})
    assert len(met) > 50
    assert {what: count for what, count in met.items() if count < MET} == {}, "troubles that are hardly ever met"


@pytest.mark.timeout(1200)
def test_no_violation_under_sanitizers(folder: Path) -> None:
    halves = (f"1..{SANITIZED // 2}", f"{SANITIZED // 2 + 1}..{SANITIZED}")
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda seeds: nvmirror(folder / "nvmirror_sanitized", "--seeds", seeds), halves))
    assert together(runs)[0] == SANITIZED


@pytest.mark.timeout(1200)
def test_every_short_life(folder: Path) -> None:
    """All sequences of at most 3 of 12 operations, each with every choice of what its power cuts lose."""
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda part: nvmirror(folder / "nvmirror", "--exhaustive", part), ("0/2", "1/2")))
    lives, answers, crashes, _ = together(runs)
    assert sum(int(SEQUENCES.findall(run.stdout)[0]) for run in runs) == 12**3 + 12**2 + 12 + 1
    assert lives > 4 * (12**3 + 12**2 + 12 + 1), "hurried and not, with the leg that fails missing in the end and there"
    assert crashes >= lives
    assert answers > lives


def test_every_short_life_in_which_the_last_leg_in_sync_loses_what_it_has_not_written_down(folder: Path) -> None:
    run = nvmirror(folder / "nvmirror", "--lost-syncs", "0/1")
    assert figures(run)[0] >= 8 * LOSING, "either leg stays, the other is missing in the end or there, hurried or not"
    assert int(SEQUENCES.findall(run.stdout)[0]) == LOSING


def test_a_seed_is_the_same_run_every_time(folder: Path) -> None:
    """Also when other seeds ran before it in the same process, at other addresses."""
    alone = nvmirror(folder / "nvmirror", "--seeds", "40..40", "--trace").stdout.split("1 seeds, ")[0]
    after = nvmirror(folder / "nvmirror", "--seeds", "36..40", "--trace").stdout
    assert alone.count("\n") > 100
    assert alone in after


@pytest.fixture(scope="module")
def hunts(request: pytest.FixtureRequest, folder: Path) -> Iterator[Hunts]:
    def hunt(mutant: int) -> subprocess.CompletedProcess[str]:
        if mutant in LOST_SYNCS:
            return nvmirror(folder / "nvmirror_mutants", "--lost-syncs", "0/1", mutant=mutant)
        first = FIRST_SEED.get(mutant, 1)
        seeds = f"{first}..{first + MUTANT_SEEDS - 1}"
        return nvmirror(folder / "nvmirror_mutants", "--seeds", seeds, mutant=mutant)

    with in_pairs(request, "mutant", hunt) as found:
        yield found


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda number: MUTANTS[number].replace(" ", "-"))
def test_the_judge_sees(folder: Path, hunts: Hunts, mutant: int) -> None:
    """Each deliberate bug (native/sim/mirror_mutants.c) is a violation within the budget, and its line replays it."""
    run = hunts[mutant].result()
    assert run.returncode != 0 and "VIOLATION: " in run.stderr, f"survived: {MUTANTS[mutant]}"
    replay = run.stderr.split("replay: ")[1].split("\n")[0].split()
    again = nvmirror(folder / "nvmirror_mutants", *replay[1:], mutant=mutant)
    violation = run.stderr[run.stderr.index("VIOLATION: ") :].split("\n")[0]
    assert violation in again.stderr


def test_without_a_mutant_the_mutants_binary_is_clean(folder: Path) -> None:
    figures(nvmirror(folder / "nvmirror_mutants", "--seeds", "1..100"))
