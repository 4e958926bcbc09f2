"""Mirrors as the rest of Python sees them: descriptions, events and states (docs/mirror.md section 4). No cffi."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

from nbdvvol.dataplane.types import LegState


class ReadPolicy(enum.IntEnum):
    """Which leg answers a read."""

    LEAST_OUTSTANDING = 0
    PRIMARY = 1
    NEAREST = 2


@dataclass(frozen=True, slots=True)
class LegMeta:
    """Where a leg's metadata region lies; object 0: the leg is absent, it has no runs and is stale."""

    object: int = 0
    offset: int = 0
    bitmap_bytes: int = 0


@dataclass(frozen=True, slots=True)
class MirrorDescription:
    """The policy of a mirror, and its legs' metadata in the order of the legs (nv_desc_mirror, nv_desc_meta)."""

    region_shift: int
    op_deadline_ms: int
    hold_deadline_ms: int
    intent_idle_ms: int
    metas: tuple[LegMeta, ...]
    read: ReadPolicy = ReadPolicy.LEAST_OUTSTANDING
    resync_rate: int = 0


class MirrorEventKind(enum.Enum):
    """What a mirror tells (docs/mirror.md section 4 has the arguments)."""

    ATTACHED = "VOLUME_ATTACHED"
    LEG_FAILED = "LEG_FAILED"
    LEG_STOPPED = "LEG_STOPPED"
    RESYNC_DONE = "RESYNC_DONE"
    LEG_CHANGED = "LEG_CHANGED"
    READ_REPAIRED = "READ_REPAIRED"
    FENCED = "VOLUME_FENCED"


@dataclass(frozen=True, slots=True)
class MirrorEvent:
    """One event of a mirror's volume; `result` is 0 or -errno."""

    kind: MirrorEventKind
    volume: int = 0
    result: int = 0
    token: int = 0
    args: tuple[int, ...] = ()


class LaneState(enum.IntEnum):
    """A leg as the data plane runs it."""

    UNUSED = 0
    STALE = 1
    SYNCING = 2
    PROMOTING = 3
    IN_SYNC = 4
    FAILING = 5


@dataclass(frozen=True, slots=True)
class LaneStatus:
    """What the data plane knows of one leg."""

    id: int
    state: LaneState
    outstanding: int
    dirty_regions: int
    reads: int
    latency_ns: int


@dataclass(frozen=True, slots=True)
class MirrorStatus:
    """A mirror, as its owner showed it last."""

    attaching: bool
    frozen: bool
    expired: bool
    fenced: bool
    regions: int
    intents: int
    doubtful: int
    copied_bytes: int
    repairs: int
    legs: tuple[LaneStatus, ...]


@dataclass(frozen=True, slots=True)
class Verified:
    """What comparing the legs found: bytes, and pieces."""

    compared_bytes: int
    differed: int
    repaired: int


# ---- the leg machine ----


class Look(enum.IntEnum):
    """What a look at a leg found."""

    ABSENT = 0
    FOREIGN = 1
    NO_LABEL = 2
    LABEL = 3


@dataclass(frozen=True, slots=True)
class LegLook:
    """A leg's label, or why there is none."""

    look: Look
    syncing: bool = False
    epoch: int = 0
    generation: int = 0


@dataclass(frozen=True, slots=True)
class LegOnRecord:
    """A leg as the registry has it."""

    id: int
    state: LegState
    stamp_epoch: int = 0
    stamp_generation: int = 0


@dataclass(frozen=True, slots=True)
class LegsRecord:
    """The registry's record of a mirrored VVol."""

    epoch: int
    generation: int
    legs: tuple[LegOnRecord, ...]


class Ask(enum.IntEnum):
    """What the registry is asked for."""

    STALE = 1
    SYNCING = 2
    IN_SYNC = 3
    CONFIRM = 4


class Act(enum.IntEnum):
    """What the leg machine wants done."""

    ASK = 1
    OPEN = 2
    FAIL = 3
    RELEASE = 4
    RESYNC = 5
    PROMOTE = 6
    FENCE = 7
    REFUSE = 8


class Why(enum.IntEnum):
    """Why a mirror is not opened, or is given up."""

    OLD_REGISTRY = 1
    NO_LEG = 2
    EPOCH = 3
    LAST_LEG = 4


@dataclass(frozen=True, slots=True)
class LegsAction:
    """One thing to do (nv_legs_action)."""

    kind: Act
    leg: int = 0
    ask: int = 0
    full: bool = False
    why: int = 0
    token: int = 0
    epoch: int = 0
    generation: int = 0
    stamp_epoch: int = 0
    stamp_generation: int = 0


class LegMachine(Protocol):
    """Decides what a mirror's legs may do (native/volume/legs.h). After each call, `next` until it is None."""

    def begin(self, record: LegsRecord, looks: tuple[LegLook, ...]) -> None:
        """Every leg of the record has been looked at."""

    def told(self, record: LegsRecord) -> None:
        """The registry's record came: an answer, or by itself."""

    def ask_again(self) -> None:
        """What was asked may be lost."""

    def event(self, event: MirrorEvent) -> None:
        """An event of the mirror's volume."""

    def looked(self, leg: int, look: LegLook) -> None:
        """A stale leg was looked at."""

    def want_resync(self, leg: int, *, full: bool) -> None:
        """Resync the leg as soon as that is possible."""

    def next(self) -> LegsAction | None:
        """The next thing to do."""
