"""What else a machine did while a suite was measured: its figures are worth as much as it was left alone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from perf import machine, usage
from perf.model import Stamp


def busy_s(text: str) -> float:
    """Processor seconds of all processes and kernel threads, from /proc/stat; what interrupts took is nobody's."""
    user, nice, system = (int(field) for field in text.splitlines()[0].split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def own_s(servers: Iterable[int]) -> float:
    """Processor seconds of this process, of all below it, and of `servers` that left it to become daemons."""
    below = tree(os.getpid())
    return sum(usage.read(pid).cpu_ns for pid in {os.getpid(), *(set(servers) - below)}) / 1e9


def tree(pid: int) -> set[int]:
    """A process and all that descend from it."""
    return {pid}.union(*(tree(child) for child in usage.children(pid)))


class Watch:
    """Looks at the machine when a suite begins and when it has been measured."""

    def __init__(self) -> None:
        self._load = os.getloadavg()[0]
        self._started = datetime.now(UTC)
        self._ticks = machine.processor_ticks()
        self._busy = self._read()
        self._own = own_s(())
        self._at = time.monotonic()

    @staticmethod
    def _read() -> float:
        return busy_s(Path("/proc/stat").read_text())

    def stamp(self, commit: str, rounds: int, seconds: float, servers: Iterable[int]) -> Stamp:
        """Of the time since then; `servers` still run. Kernel threads count as others."""
        took = (time.monotonic() - self._at) * (os.cpu_count() or 1)
        others = self._read() - self._busy - (own_s(servers) - self._own)
        return Stamp(
            started=self._started.isoformat(timespec="seconds"), commit=commit, rounds=rounds, seconds=seconds,
            load_before=self._load, stolen=machine.stolen_since(self._ticks), others=max(0.0, others / took),
        )  # fmt: skip
