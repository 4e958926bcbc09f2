"""Words about mirrored VVols that the link, the API and the registry share (docs/mirror.md).

A *stamp* is what stands in a leg's label: {epoch, generation}. The registry's record of a VVol says which legs are
in sync and, of each leg, the newest stamp that is known to be on it (*confirmed*).

The filter asks for a change of a leg's state with `leg_change`; control answers each with `leg_record`: whether it
was done, and always the whole record as it is now. So a lost, repeated or late question or answer does no harm: who
asked looks whether what it wanted is so. All sizes are bytes, all times seconds unless a name says otherwise.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from nbdvvol.model.base import Model
from nbdvvol.model.farm import LEGS_MAX, MirrorConfig

LegState = Literal["in-sync", "syncing", "stale"]
"""As the registry has it."""
Lane = Literal["in-sync", "promoting", "syncing", "failing", "stale", "absent"]
"""As the filter runs it. `promoting`: copied, the registry is being asked; `failing`: fenced here, the registry is
being asked; `absent`: its storage cannot be reached."""
ResyncWish = Literal["auto", "full", "off"]
"""What is to become of a leg. `auto`: copy what differs as soon as its storage is there; `full`: copy everything,
because it is new or by the operator's word; neither means anything to a leg that is in sync. `off`: it is to be stale:
stop a copy that runs; an in-sync leg, while another one is, fails at once (nv_leg_fail), so that it can be removed."""
Wanted = Literal["stale", "syncing", "in-sync", "confirm"]
NotServed = Literal["", "old-registry", "no-leg", "lease", "log-missing", "log-unknown"]
"""Why a VVol is not served, where the status has advice for that: a label, or an epoch served before, is newer than the
registry; no in-sync leg has a valid label; the lease has run out; the write-back log that holds data of it is not to be
had; there is one that holds data of it, and the registry knows nothing of that."""
Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class Stamp(Model):
    """Epoch and generation of a label; ordered by the epoch, then by the generation."""

    epoch: Count = 0
    generation: Count = 0

    def key(self) -> tuple[int, int]:
        """For comparing."""
        return self.epoch, self.generation


class MirrorSpec(Model):
    """How a filter runs a mirrored VVol; a VVol without one has one leg, no intents, and its label is not read."""

    read: Literal["least-outstanding", "primary", "nearest"]
    op_deadline_s: float
    """A leg with an older operation has failed."""
    hold_s: float
    """How long acknowledgements wait for the registry before EIO."""
    intent_idle_s: float
    """A region without requests for so long loses its intent bit."""
    resync_rate: int = 0
    """Bytes a second while clients are served; 0: no limit."""
    repair: bool = True
    """Whether `verify` makes legs alike again, by the first in-sync one."""
    lease_s: float | None = None
    """The filter serves only while control renews its lease, each time for so long; None: for as long as it runs."""


def mirror_spec(config: MirrorConfig) -> MirrorSpec:
    """A profile's mirror, for the filter."""
    return MirrorSpec(
        read=config.read,
        op_deadline_s=config.write_deadline,
        hold_s=config.hold,
        intent_idle_s=config.intent_idle,
        resync_rate=config.resync_rate or 0,
        repair=config.verify == "repair",
        lease_s=config.lease,
    )


class RecordLeg(Model):
    """A leg in the registry's record."""

    id: int
    state: LegState
    stamp: Stamp


class Record(Model):
    """The registry's record of a mirrored VVol: what the leg machine goes by."""

    epoch: int
    """Of the VVol: above the asker's, another host was given it and the asker has to stop."""
    generation: int
    legs: list[RecordLeg] = Field(max_length=LEGS_MAX)


class LegChange(Model):
    """Filter → control: change a leg's state, if the VVol still is at this epoch and generation.

    `stale`: it missed, or will miss, a write. `syncing`: it gets writes and is being copied to. `in-sync`: its copy is
    whole and labelled with `stamp`. `confirm`: its label says `stamp`, durably; only raises what is known, and the
    generation asked with does not matter."""

    kind: Literal["leg_change"] = "leg_change"
    id: int
    """Numbers the questions of one connection; the answer names it."""
    vvol: str
    epoch: Count
    generation: Count
    leg: int
    wanted: Wanted
    stamp: Stamp | None = None
    """For `in-sync` and `confirm`."""
    reason: str = Field(default="", max_length=1000)
    """Why, for the event list: such as `write: Connection timed out`."""
    doubt: bool = False
    """For `stale`: as in `LegDoubt`, written down with it."""


class LegDoubt(Model):
    """Filter → control: whether what a leg's server was asked may still be carried out, late, over what is copied.

    Of a leg that is not in sync, on a remote export. Said when it changes, and again at each connect where control has
    it otherwise. It outlives the filter: a filter that has seen everything end takes it back, or has made the server
    drop the rest by a new claim; else it is the operator's word that ends it."""

    kind: Literal["leg_doubt"] = "leg_doubt"
    vvol: str
    epoch: Count
    leg: int
    doubt: bool


class LegRecord(Model):
    """Control → filter: the answer to a `leg_change`, done or not."""

    kind: Literal["leg_record"] = "leg_record"
    id: int
    vvol: str
    refused: Literal["", "epoch", "generation", "last-leg", "state", "unknown"] = ""
    """"": done, or it was so already. `epoch`: the VVol was given another one, or was taken from this host: stop it.
    `generation`: something changed meanwhile, look at the record. `last-leg`: no other leg is in sync. `state`: the
    leg's state allows no such step (stale → in-sync), or the stamp is above the record. `unknown`: there is no such
    VVol or leg."""
    message: str = ""
    record: Record | None = None
    """None only when the VVol is unknown."""


class LegProgress(Model):
    """A leg as the filter runs it."""

    id: int
    lane: Lane
    why: str = ""
    """Why it is not in sync: such as `write: Connection timed out`, `waits: 3 old operations have not ended`."""
    dirty_bytes: int = 0
    """That are not copied yet."""
    copied_bytes: int = 0
    """By the copy that runs, since it began."""
    rate: int = 0
    """Bytes a second of it, smoothed."""
    eta_s: float | None = None
    """Until it is in sync at that rate; None: unknown."""
    outstanding: int = 0
    """Operations that have not ended, late ones on a failed leg included."""
    reads: int = 0
    latency_ns: int = 0
    """Of a read, smoothed."""


class MirrorReport(Model):
    """Filter → control: how a mirrored VVol is. Sent when something changed, each second while something is copied."""

    kind: Literal["mirror"] = "mirror"
    uuid: str
    epoch: int
    state: Literal["attaching", "serving", "frozen", "expired", "fenced"]
    """`frozen`: acknowledgements wait for the registry to know of a failed leg; `expired`: for longer than it may hold
    them, so that clients get errors; `fenced`: a newer epoch exists."""
    region_bytes: int = 0
    intent_regions: int = 0
    """Whose intent bit is set."""
    doubtful_regions: int = 0
    """That an unclean attach has not reconciled yet."""
    repairs: int = 0
    """Reads that one leg could not answer, and that were mended from another."""
    legs: list[LegProgress] = Field(default_factory=list, max_length=LEGS_MAX)


class Renew(Model):
    """Filter → control: renew the leases of these VVols (UUID → epoch): of those that have one, each third of it.

    The filter's time runs from before it asked, on a clock that goes on while the machine sleeps (CLOCK_BOOTTIME)."""

    kind: Literal["renew"] = "renew"
    id: int
    vvols: dict[str, int]


class Leased(Model):
    """Control → filter: the answer to `renew`: seconds from the moment of asking. What it leaves out is not renewed."""

    kind: Literal["leased"] = "leased"
    id: int
    vvols: dict[str, float]


class VerifyResult(Model):
    """Result of the work `verify`."""

    compared_bytes: int
    differed: int
    """Pieces in which in-sync legs differed."""
    repaired: int


def verify_args(uuid: str, epoch: int, repair: bool) -> dict[str, Any]:
    """Arguments of the work `verify`."""
    return {"vvol": uuid, "epoch": epoch, "repair": repair}
