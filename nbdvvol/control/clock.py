"""The clock that leases run on: it goes on while the machine sleeps, and nobody can set it."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Moment:
    """A moment of this machine's present boot; moments of different boots cannot be compared."""

    boot: str
    ms: int


@functools.cache
def _boot() -> str:
    return _BOOT_ID.read_text(encoding="ascii").strip()


def moment() -> Moment:
    """Now."""
    return Moment(_boot(), time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000)
