"""The cache's core: under real threads (its hits take no lock), and its hit ratios beside reference policies."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from perf.cache import offline
from perf.cache.policies import REFERENCES, Arc, Lru, S3Fifo, hits
from perf.cache.traces import all_traces
from perf.generators import build

BLOCKS, REQUESTS, FRAMES = 4000, 40_000, 400


@pytest.mark.parametrize("seed", range(1, 4))
def test_threads_see_one_version_and_none_that_is_too_old(folder: Path, seed: int) -> None:
    """Built with the thread sanitizer: a data race is a failure, too."""
    run = subprocess.run(
        [folder / "nvcache", "4", "60000", str(seed)], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    count_hits, _, count_fills = run.stdout.split()[:3]
    assert int(count_hits) > 10_000 and int(count_fills) > 1000


@pytest.fixture(scope="module")
def cachesim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("perf")
    build(out)
    return out / "cachesim"


def test_hit_ratios_are_those_of_s3_fifo(cachesim: Path) -> None:
    """One bit instead of two costs little, and a scan does not wash the popular blocks out as it does with LRU."""
    for name, trace in all_traces(BLOCKS, REQUESTS).items():
        ratio, _ = offline.replay(cachesim, trace, FRAMES, 1)
        lru, s3_fifo = (hits(make(FRAMES), trace) / len(trace) for make in (Lru, S3Fifo))
        assert ratio > s3_fifo - 0.05, name
        assert ratio >= lru, name


def test_traces_are_the_same_every_time() -> None:
    assert all_traces(500, 2000) == all_traces(500, 2000)


@pytest.mark.parametrize("make", REFERENCES.values(), ids=REFERENCES)
def test_references_hold_what_fits(make: type[Lru | Arc | S3Fifo]) -> None:
    policy = make(100)
    assert [policy.request(block) for block in range(100)] == [False] * 100
    assert all(policy.request(block) for block in range(100))
    assert not policy.request(1000)


def test_the_table_names_every_policy(cachesim: Path) -> None:
    found = offline.run(cachesim, lambda _: None, quick=True)
    page = offline.markdown(found)
    assert all(page.count(f"| {policy} |") == len(all_traces(500, 100)) for policy in offline.POLICIES)
