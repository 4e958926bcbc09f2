"""Write-back logs as the rest of Python sees them (docs/cache.md sections 7 to 10): policy, findings, events."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from secrets import token_bytes

ID_BYTES = 16


def fresh_id() -> bytes:
    """A random id, for a log that is formatted or for one life of a log."""
    return token_bytes(ID_BYTES)


class LogVerdict(enum.StrEnum):
    """What was found where a log should be; all but USABLE are refusals (native/log/scan.h)."""

    USABLE = "usable"
    MISSING = "missing"
    FOREIGN = "foreign"
    UNKNOWN_VERSION = "unknown-version"
    OTHER_VVOL = "other-vvol"
    OTHER_LOG = "other-log"
    UNKNOWN_DATA = "unknown-data"
    REGISTRY_OLD = "registry-old"
    CUT = "cut"
    TOO_MANY = "too-many"
    UNREADABLE = "unreadable"
    HANGS = "hangs"
    """Its device has not answered within the deadline. Its object is in use (EBUSY) until it does."""


class LogState(enum.IntEnum):
    """What a log does with writes."""

    CLOSED = 0
    """Refused: every request of the volume fails."""
    RECOVERING = 1
    THROUGH = 2
    """Nothing may be logged: it is not allowed yet, or it drains."""
    SERVING = 3
    FAILED = 4
    """Its device is not trusted: what is logged is carried below, then the log is void."""
    VOID = 5


@dataclass(frozen=True, slots=True)
class LogPolicy:
    """How a volume's log behaves. `held` is the id of the log that the registry says holds data of the volume."""

    age_ms: int = 5000
    """When the oldest logged write is to be carried below."""
    bypass_bytes: int = 128 << 10
    """Writes of so many bytes go below at once; 0: none does for its length."""
    stream_bytes: int = 0
    """... and those of who wrote so many in sequence; 0: no difference."""
    destage_rate: int = 0
    """Bytes a second that are carried below at most, while nobody waits for that; 0: no limit."""
    deadline_ms: int = 0
    """An operation of its device that takes longer counts as failed; 0: none does."""
    held: bytes | None = None
    discard: bool = False
    """Format whatever is there."""
    beside: bool = False
    """Beside a volume that may be in use: attach_log() puts it before it. Not with `held`."""
    fresh: bytes = field(default_factory=fresh_id)
    begin: bytes = field(default_factory=fresh_id)

    def __post_init__(self) -> None:
        for one in (self.fresh, self.begin, self.held or bytes(ID_BYTES)):
            if len(one) != ID_BYTES:
                raise ValueError(f"an id of a log has {ID_BYTES} bytes, not {len(one)}")


@dataclass(frozen=True, slots=True)
class LogFound:
    """What was found when a log was opened; `id` is zeros where there is no log."""

    verdict: LogVerdict
    errno: int
    """UNREADABLE, HANGS: why; else 0."""
    dirty_bytes: int
    records: int
    id: bytes


class LogEventKind(enum.Enum):
    """What a log tells by itself."""

    FAILED = "LOG_FAILED"
    """Its device: what is logged is carried below, then DRAINED follows."""
    LOST = "LOG_LOST"
    """A block can be read nowhere any more: its offset is told, and how many there have been."""
    NEEDS_WORD = "LOG_NEEDS_WORD"
    """It cannot be made void on its device: forget_log() once the registry has that it is never replayed."""
    DRAINED = "LOG_DRAINED"
    """Void after a failure; nobody had asked for it."""


@dataclass(frozen=True, slots=True)
class LogEvent:
    """One event of a volume's log."""

    kind: LogEventKind
    volume: int
    errno: int = 0
    offset: int = 0
    count: int = 0


LOST_SPANS = 1024
"""Of a log, that are told one by one (NV_LOG_LOST_SPANS)."""


@dataclass(frozen=True, slots=True)
class LostSpan:
    """Bytes of a volume that were logged and can be read nowhere any more."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class LogStats:
    """How a log is, and what it has done since it was opened."""

    state: LogState
    ring_bytes: int
    used_bytes: int
    dirty_bytes: int
    """Not carried below yet."""
    lost_bytes: int
    oldest_age_ms: int
    held: int
    """Requests that wait for a failed log to be void."""
    blocked: int
    """Bypasses that had to wait."""
    logged: int
    """Requests."""
    groups: int
    syncs: int
    bypassed: int
    """Requests."""
    tombstones: int
    destaged_bytes: int
    merged_bytes: int
    """Overwritten before they were carried."""
