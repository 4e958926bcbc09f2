"""CPU time and memory of a server and its descendants, read from outside (see perf/native/usage.c)."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

_CPUCLOCK_SCHED = 2
_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """One reading. Differences of two readings mean something; one alone does not."""

    cpu_ns: int
    rss_bytes: int
    rss_anon_bytes: int
    threads: int

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.cpu_ns + other.cpu_ns,
            self.rss_bytes + other.rss_bytes,
            self.rss_anon_bytes + other.rss_anon_bytes,
            self.threads + other.threads,
        )


def _cpu_clock_ns(pid: int) -> int:
    """The process CPU clock of another process, as clock_getcpuclockid(3) makes it."""
    return time.clock_gettime_ns((~pid << 3) | _CPUCLOCK_SCHED)


def _ended_children_ns(pid: int) -> int:
    """Children that ended and were waited for: /proc/PID/stat fields 16 and 17, in clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) * _TICK_NS


def children(pid: int) -> list[int]:
    """Direct children, of every thread."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in task.read_text().split()]
        except OSError:
            continue
    return found


def read(pid: int) -> Usage:
    """Of `pid` and everything below it; nothing if it is gone."""
    try:
        cpu_ns = _cpu_clock_ns(pid) + _ended_children_ns(pid)
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
        )
    except OSError:
        return Usage(0, 0, 0, 0)
    kib = {key: int(status.get(key, "0 kB").split()[0]) << 10 for key in ("VmRSS", "RssAnon")}
    total = Usage(cpu_ns, kib["VmRSS"], kib["RssAnon"], int(status.get("Threads", "0")))
    for child in children(pid):
        total += read(child)
    return total
