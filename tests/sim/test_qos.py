"""Limits and shares in simulated time: exact, whatever the machine is busy with.

`nvqos --seeds A..B` judges random worlds (native/sim/qos_judge.h): no window holds more than burst and rate allow, no
request waits longer than the documented bound, everything is answered, a close or stop is never held up.
"""

from __future__ import annotations

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SEEDS = 600
MUTANTS = {
    1: "a limit is looked at, but not charged",
    2: "bytes cost nothing",
    3: "who ends while it waits keeps its place",
    4: "the timer of those who wait is never armed",
    5: "nobody waits longer than half the time",
    6: "a timer is never replaced by an earlier one",
}
SHARES_IGNORED = 7
SERVED_FIRST = 8
LINE = re.compile(r"(.*): (\d+\.\d+)(?:, each of them at least (\d+\.\d+))?")


def nvqos(binary: Path, *arguments: str, mutant: int = 0) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"NVSIM_MUTANT": str(mutant)}
    return subprocess.run([str(binary), *arguments], capture_output=True, text=True, timeout=300, env=environment)


def ratios(text: str) -> list[float]:
    """What each line's case got, as a part of what it should get."""
    found = [LINE.fullmatch(line) for line in text.splitlines()]
    assert all(found), text
    return [float(match[2]) for match in found if match]


@pytest.mark.timeout(600)
def test_no_violation(folder: Path) -> None:
    halves = (f"1..{SEEDS // 2}", f"{SEEDS // 2 + 1}..{SEEDS}")
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda seeds: nvqos(folder / "nvqos", "--seeds", seeds), halves))
    for run in runs:
        assert run.returncode == 0, run.stderr
    answers = sum(int(run.stdout.split(" seeds, ")[1].split()[0]) for run in runs)
    assert answers > 500 * SEEDS, "a simulation in which hardly anything is answered proves nothing"


@pytest.mark.timeout(600)
def test_limits_hold_over_ten_seconds(folder: Path) -> None:
    """The rate to the last request, and once the burst of 100 ms on top: 1 % of 10 s."""
    run = nvqos(folder / "nvqos", "--hold")
    assert run.returncode == 0, run.stderr
    found = ratios(run.stdout)
    assert len(found) == 2 * 2 * 2 * 2 * 2, "limits, depths, connections, reactors, directions"
    assert all(0.999 <= ratio <= 1.0101 for ratio in found), run.stdout


@pytest.mark.timeout(600)
def connections(text: str) -> list[float]:
    """What the connection that got least was given, as a part of an equal one, of each line's volume."""
    found = [LINE.fullmatch(line) for line in text.splitlines()]
    return [float(match[3]) for match in found if match]


def test_a_busy_reactor_is_divided_by_shares(folder: Path) -> None:
    """Also between volumes of one and of six connections. A volume with few connections sometimes has nothing that
    has arrived yet, and leaves that part to the others. Within a volume connections get equal parts."""
    run = nvqos(folder / "nvqos", "--shares")
    assert run.returncode == 0, run.stderr
    found = ratios(run.stdout)
    assert len(found) == 2 * (2 + 2 + 2 + 3 + 4)
    assert all(0.95 <= ratio <= 1.05 for ratio in found), run.stdout
    assert all(0.95 <= ratio <= 1.01 for ratio in connections(run.stdout)), run.stdout


def test_the_shares_are_what_divides_it(folder: Path) -> None:
    run = nvqos(folder / "nvqos_mutants", "--shares", mutant=SHARES_IGNORED)
    assert run.returncode == 0, run.stderr
    assert any(not 0.95 <= ratio <= 1.05 for ratio in ratios(run.stdout)), run.stdout


def test_who_was_not_served_goes_first_in_the_next_turn(folder: Path) -> None:
    run = nvqos(folder / "nvqos_mutants", "--shares", mutant=SERVED_FIRST)
    assert run.returncode == 0, run.stderr
    assert all(0.95 <= ratio <= 1.05 for ratio in ratios(run.stdout)), run.stdout
    assert any(ratio < 0.9 for ratio in connections(run.stdout)), run.stdout


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda number: MUTANTS[number].replace(" ", "-"))
def test_the_judge_sees(folder: Path, mutant: int) -> None:
    """Each deliberate bug (native/sim/qos_mutants.c) is a violation within the budget, with a line that replays it."""
    run = nvqos(folder / "nvqos_mutants", "--seeds", f"1..{SEEDS}", mutant=mutant)
    assert run.returncode != 0 and "VIOLATION: " in run.stderr, f"survived: {MUTANTS[mutant]}"
    replay = run.stderr.split("replay: ")[1].split("\n")[0].split()
    again = nvqos(folder / "nvqos_mutants", *replay[1:], mutant=mutant)
    violation = run.stderr[run.stderr.index("VIOLATION: ") :].split("\n")[0]
    assert violation in again.stderr


def test_without_a_mutant_the_mutants_binary_is_clean(folder: Path) -> None:
    run = nvqos(folder / "nvqos_mutants", "--seeds", "1..50")
    assert run.returncode == 0, run.stderr
