"""What control decides about the legs of mirrored VVols: pure, no SQL, no clock, no I/O (docs/mirror.md section 3).

`decide` answers a filter's `leg_change`: it is the whole of the registry's compare-and-swap but for the rows.
Invariants, whatever is asked, however often and however late: the generation only grows, and by one for each change of
a leg's state; a stamp only grows and is never above the record; a record that had a leg in sync goes on having one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from nbdvvol.model.mirror import LegChange, LegState, Record, RecordLeg, Stamp

Refusal = Literal["", "epoch", "generation", "last-leg", "state", "unknown"]


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer to a question, and the record as it is afterwards."""

    refused: Refusal
    message: str
    record: Record
    moved: bool = False
    """The leg's state changed, and with it the generation."""
    confirmed: bool = False
    """The leg's stamp was raised."""


def _newer(one: Stamp, other: Stamp) -> bool:
    return one.key() > other.key()


def decide(record: Record, change: LegChange) -> Decision:
    """What becomes of the record. Asked for what is so already, it says yes and changes nothing."""
    leg = next((leg for leg in record.legs if leg.id == change.leg), None)
    if leg is None:
        return Decision("unknown", f"it has no leg {change.leg}", record)
    if change.epoch != record.epoch:
        return Decision("epoch", f"it is under epoch {record.epoch}, not {change.epoch}", record)
    wrong = _wrong_stamp(record, leg, change)
    if wrong:
        return Decision("state", wrong, record)
    if change.wanted == "confirm":
        return _with(record, leg, leg.state, change.stamp)
    if change.wanted == leg.state:
        return _with(record, leg, leg.state, change.stamp)
    if change.generation != record.generation:
        text = f"it is at generation {record.generation}, not {change.generation}"
        return Decision("generation", text, record)
    if (leg.state, change.wanted) not in STEPS:
        return Decision("state", f"leg {leg.id} is {leg.state}: it cannot become {change.wanted}", record)
    if leg.state == "in-sync" and in_sync(record.legs) == [leg.id]:
        return Decision("last-leg", f"leg {leg.id} is the only one in sync", record)
    return _with(record, leg, change.wanted, change.stamp)


STEPS = {("in-sync", "stale"), ("syncing", "stale"), ("stale", "syncing"), ("syncing", "in-sync")}
"""A leg is copied to before it counts again."""


def in_sync(legs: Iterable[RecordLeg]) -> list[int]:
    """Ids of the legs that are in sync."""
    return [leg.id for leg in legs if leg.state == "in-sync"]


def _wrong_stamp(record: Record, leg: RecordLeg, change: LegChange) -> str:
    if change.stamp is None:
        return f"{change.wanted} needs a stamp" if change.wanted in ("in-sync", "confirm") else ""
    if _newer(change.stamp, Stamp(epoch=record.epoch, generation=record.generation)):
        return f"stamp {change.stamp.key()} is above the record's {record.epoch, record.generation}"
    if change.wanted == "in-sync" and _newer(leg.stamp, change.stamp):
        return f"stamp {change.stamp.key()} is below what is known to be on leg {leg.id}: {leg.stamp.key()}"
    return ""


def _with(record: Record, leg: RecordLeg, state: LegState, stamp: Stamp | None) -> Decision:
    """The record with one leg changed: a new state raises the generation, a stamp only rises."""
    raised = stamp is not None and _newer(stamp, leg.stamp)
    new = leg.model_copy(update={"state": state, "stamp": stamp if raised else leg.stamp})
    moved = state != leg.state
    legs = [new if one.id == leg.id else one for one in record.legs]
    after = record.model_copy(update={"legs": legs, "generation": record.generation + moved})
    return Decision("", "", after, moved, raised)


@dataclass(frozen=True, slots=True)
class Standing:
    """A leg, as far as the policy of spares looks at it."""

    id: int
    datastore: str
    state: LegState
    lost_s: float | None
    """How long it has not been in sync and not been copied to; None: it is or it does."""
    replaces: int | None
    leaving: bool = False


def spare_due(legs: Sequence[Standing], after_s: float) -> int | None:
    """The leg that was lost for longest beyond `after_s` and has no replacement yet; None: no spare is needed."""
    live = [leg for leg in legs if not leg.leaving]
    replaced = {leg.replaces for leg in live}
    lost = [leg for leg in live if leg.lost_s is not None and leg.lost_s >= after_s and leg.id not in replaced]
    if not lost or not in_sync_standing(live):
        return None
    return max(lost, key=lambda leg: leg.lost_s or 0.0).id


def free_spare(legs: Sequence[Standing], spares: Sequence[str], usable: Iterable[str]) -> str | None:
    """The first of `spares` that is usable and holds no leg of the VVol."""
    taken = {leg.datastore for leg in legs}
    return next((name for name in spares if name in set(usable) and name not in taken), None)


def in_sync_standing(legs: Iterable[Standing]) -> bool:
    """Whether there is a leg to copy from."""
    return any(leg.state == "in-sync" for leg in legs)


def replaced_by_now(legs: Sequence[Standing]) -> list[int]:
    """Legs that a spare has taken the place of: it is in sync, and they are not."""
    done = {leg.replaces for leg in legs if leg.state == "in-sync" and leg.replaces is not None and not leg.leaving}
    return [leg.id for leg in legs if leg.id in done and leg.state != "in-sync" and not leg.leaving]
