"""The plain volume in the simulator: a fixed budget of seeds, and proof that the judge would see what it is there for.

`make sim SEEDS=A..B` runs more; a violation prints the seed and a line that replays it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.lib.pairs import in_pairs

SEEDS = 2000
FIRST_SEED = {10: 1501, 18: 1001}
"""Where the budget of a mutant begins that few seeds see, if not at 1."""
MUTANTS = {
    1: "FLUSH is answered without a sync",
    2: "FUA writes are not durable",
    3: "overlapping writes run in any order",
    4: "a failed sync is forgotten at the next flush",
    5: "a flush joins a sync that was already submitted",
    6: "requests are parsed after the client hung up",
    7: "a write's memory is reused while it is under way",
    8: "a traced request keeps moments of an earlier one",
    9: "a fill forgets writes that came between",
    10: "what was cached before an interruption is found",
    11: "trims and zeroes drop nothing",
    12: "a write drops blocks at its end and not at its beginning",
    13: "a frame is reused while a reply is sent from it",
    14: "reads do not look into the log",
    15: "blocks written in part are merged in any order",
    16: "zeros under a tombstone are a mere hint",
    17: "more is waited for than a client owes",
    18: "requests go on while a log goes in or out",
    19: "a log goes out with what it holds",
}

Hunts = dict[int, Future[subprocess.CompletedProcess[str]]]


def nvsim(binary: Path, seeds: range, *more: str, mutant: int = 0) -> subprocess.CompletedProcess[str]:
    """Run some seeds; the output is what a person needs to replay a violation."""
    command = [str(binary), "--seeds", f"{seeds.start}..{seeds.stop - 1}", *more]
    environment = os.environ | {"NVSIM_MUTANT": str(mutant)}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.timeout(600)
def test_no_violation(folder: Path) -> None:
    halves = (range(1, SEEDS // 2 + 1), range(SEEDS // 2 + 1, SEEDS + 1))
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda seeds: nvsim(folder / "nvsim", seeds), halves))
    for run in runs:
        assert run.returncode == 0, run.stderr
    answers = sum(int(run.stdout.split(" seeds, ")[1].split()[0]) for run in runs)
    assert answers > 50 * SEEDS, "a simulation in which hardly anything is answered proves nothing"


def test_a_seed_is_the_same_run_every_time(folder: Path) -> None:
    """Also when other seeds ran before it in the same process, at other addresses."""
    alone = nvsim(folder / "nvsim", range(40, 41), "--trace").stdout
    after = nvsim(folder / "nvsim", range(36, 41), "--trace").stdout
    assert alone.count("\n") > 100
    assert alone.rsplit("\n", 2)[0] in after


@pytest.fixture(scope="module")
def hunts(request: pytest.FixtureRequest, folder: Path) -> Iterator[Hunts]:
    def hunt(mutant: int) -> subprocess.CompletedProcess[str]:
        first = FIRST_SEED.get(mutant, 1)
        return nvsim(folder / "nvsim_mutants", range(first, first + SEEDS), mutant=mutant)

    with in_pairs(request, "mutant", hunt) as found:
        yield found


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda number: MUTANTS[number].replace(" ", "-"))
def test_the_judge_sees(folder: Path, hunts: Hunts, mutant: int) -> None:
    """Each deliberate bug (native/sim/mutants.c) is a violation within the budget, with a replay line that works."""
    run = hunts[mutant].result()
    assert run.returncode != 0 and "VIOLATION: " in run.stderr, f"survived: {MUTANTS[mutant]}"
    replay = run.stderr.split("replay: ")[1].split("\n")[0].split()
    seed = int(replay[2].split("..")[0])
    again = nvsim(folder / "nvsim_mutants", range(seed, seed + 1), mutant=mutant)
    violation = run.stderr[run.stderr.index("VIOLATION: ") :].split("\n")[0]
    assert violation in again.stderr


def test_without_a_mutant_the_mutants_binary_is_clean(folder: Path) -> None:
    run = nvsim(folder / "nvsim_mutants", range(1, 101))
    assert run.returncode == 0, run.stderr
