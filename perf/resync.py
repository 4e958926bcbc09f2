"""A mirror that copies a whole leg: how long that takes, beside fio on the same files; and its clients meanwhile."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from perf import fio, usage
from perf.generators import PointError, run_fio
from perf.model import Latency, Sample
from perf.peers import STORAGE
from perf.servers import Running

BLOCK = "1m"
"""What the data plane copies at once, and in parallel (native/include/limits.h)."""
DEPTH = 4
LIMIT_S = 120.0
POLL_S = 0.005


def _lines(log: Path) -> list[dict[str, float | bool | str]]:
    whole = log.read_text().rpartition("\n")[0] if log.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def _wait(log: Path, count: int) -> dict[str, float | bool | str]:
    """The log's line of that number, counted from 1. Raises PointError when it does not come, or tells of an error."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        lines = _lines(log)
        if lines and "error" in lines[-1]:
            raise PointError(f"the resync failed: {lines[-1]['error']}")
        if len(lines) >= count:
            return lines[count - 1]
        time.sleep(POLL_S)
    raise PointError(f"the resync did not come so far within {LIMIT_S:.0f} s")


@contextmanager
def running(server: Running, log: Path) -> Iterator[None]:
    """A resync runs for the length of the block, and is over afterwards. Raises PointError if it was over before."""
    before = len(_lines(log))
    os.kill(server.pid, signal.SIGUSR1)
    _wait(log, before + 1)
    yield
    over = len(_lines(log)) > before + 1
    _wait(log, before + 2)
    if over:
        raise PointError("the resync was over before the load was: larger files, or a shorter measurement")


def copy_arguments(legs: Sequence[Path], size: int, direct: bool) -> list[str]:
    """fio reading one file and writing the other at once, as a mirror's copy does."""
    common = [
        "--ioengine=io_uring", f"--size={size}", f"--bs={BLOCK}", f"--iodepth={DEPTH}", f"--direct={int(direct)}",
        "--allow_file_create=0",
    ]  # fmt: skip
    jobs = [
        (f"--name={kind}", f"--rw={kind}", f"--filename={leg}")
        for kind, leg in zip(("read", "write"), legs, strict=True)
    ]
    return [*common, *(word for job in jobs for word in job)]


def copied(peer: str, turn: int, seconds: float, cpu_ns: int | None) -> Sample:
    """One copy of a whole leg, as a sample of one request."""
    if seconds <= 0:
        raise PointError(f"a copy of a leg took {seconds} s")
    us = seconds * 1e6
    latency = Latency(mean_us=us, p50_us=us, p90_us=us, p99_us=us, p999_us=us, max_us=us)
    cpu_us = cpu_ns / 1000 if cpu_ns is not None else None
    return Sample(peer=peer, round=turn, requests=1, iops=1 / seconds, latency=latency, server_cpu_us=cpu_us)


def fio_seconds(report: fio.Report) -> float:
    """Until both directions were through."""
    return max(d.runtime_ms for job in report.jobs for d in job.directions) / 1000


def measure(server: Running, peer: str, turn: int) -> list[Sample]:
    """fio's copy, then the mirror's, over the same files: both begin with what the other left in memory."""
    assert server.resyncs is not None
    place = server.place
    report = run_fio(copy_arguments(server.legs, place.size, place.direct), {}, LIMIT_S)
    limit = copied(STORAGE, turn, fio_seconds(report), None)
    before, count = usage.read(server.pid), len(_lines(server.resyncs))
    os.kill(server.pid, signal.SIGUSR1)
    seconds = float(_wait(server.resyncs, count + 2)["seconds"])
    cost = usage.read(server.pid).cpu_ns - before.cpu_ns
    return [copied(peer, turn, seconds, cost), limit]
