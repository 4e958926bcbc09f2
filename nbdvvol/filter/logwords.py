"""What a write-back log on this host asks and says: its link to control, and its report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from nbdvvol.dataplane.log import LogFound, LogStats
from nbdvvol.model.link import VVolSpec
from nbdvvol.model.log import LOST_MAX, LogChange, LogPhase, LogRecord, LogReport, LostRange


class LogLink(Protocol):
    """The link to control, as far as a log needs it."""

    def ask_log(self, change: LogChange, answer: Callable[[LogRecord], None]) -> None:
        """Ask for a change of what the registry says of a log; no answer comes when control is away."""

    def log(self, report: LogReport) -> None:
        """How a log is; dropped while control is away."""

    def notice(self, event: str, subject: str, message: str) -> None:
        """For the event list."""


def report_of(
    spec: VVolSpec,
    phase: LogPhase,
    why: str,
    file: str,
    found: LogFound | None,
    stats: LogStats | None,
    rate: int,
    lost: list[LostRange],
) -> LogReport:
    """How a log is; what was found counts where it was refused."""
    refused = found if phase == "refused" else None
    held = refused.dirty_bytes if refused is not None else 0
    return LogReport(
        uuid=spec.uuid,
        epoch=spec.epoch,
        state=phase,
        why=why[:1000],
        file=file,
        found=refused.id.hex() if refused is not None and any(refused.id) else "",
        verdict=refused.verdict.value if refused is not None else "",
        ring_bytes=stats.ring_bytes if stats is not None else 0,
        used_bytes=stats.used_bytes if stats is not None else 0,
        dirty_bytes=stats.dirty_bytes if stats is not None else held,
        oldest_age_ms=stats.oldest_age_ms if stats is not None else 0,
        destage_rate=rate,
        lost_bytes=stats.lost_bytes if stats is not None else 0,
        lost=lost[:LOST_MAX],
    )
