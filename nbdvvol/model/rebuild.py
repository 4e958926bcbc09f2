"""What a leg's map copy says of its VVol, and what a registry that is rebuilt from such copies and labels holds."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nbdvvol.model.base import Model
from nbdvvol.model.farm import LEGS_MAX, VVolType
from nbdvvol.model.mirror import LegState, Stamp
from nbdvvol.model.resources import Problem

FoundKind = Literal["formatted", "directory", "blank", "something else", "unreadable", "damaged"]
"""What a datastore turned out to be. `damaged`: both copies of its header are."""


class LegWords(Model):
    """One of a VVol's legs."""

    id: int
    datastore: str
    uuid: str = ""
    """Of the datastore; empty: a `dir`, which has none."""


class MapWords(Model):
    """What a VVol is, as its map copies say it."""

    vm: str
    name: str
    type: VVolType = VVolType.DATA
    profile: str = ""
    read_only: bool = False
    mirror: bool = False
    next_leg: int = 1
    legs: list[LegWords] = Field(default_factory=list, max_length=LEGS_MAX)


class RebuiltLeg(Model):
    """A leg as a rebuilt registry has it."""

    id: int
    datastore: str
    object: str = ""
    life: Literal["live", "leaving"] = "live"
    """`leaving`: it is no part of the VVol any more; its space is scrubbed and freed."""
    state: LegState = "in-sync"
    stamp: Stamp = Stamp()
    """What its label says."""
    why: str = ""
    """Why it is not in sync, or leaves."""
    slot: int | None = None
    meta_offset: int = 0
    meta_length: int = 0
    label_sequence: int = 0
    map_written: int = 0
    runs: list[tuple[int, int, int, int]] = Field(default_factory=list)
    """Each: offset in the VVol, length, offset in the object, state."""


class RebuiltVVol(Model):
    """A VVol as a rebuilt registry has it."""

    uuid: str
    vm: str
    name: str
    size: int
    type: VVolType = VVolType.DATA
    profile: str = ""
    read_only: bool = False
    mirror: bool = False
    state: Literal["ready", "deleting"] = "ready"
    """`deleting`: the operator gave it up."""
    epoch: int
    generation: int
    map_version: int
    next_leg: int = 1
    legs: list[RebuiltLeg]

    @property
    def full_name(self) -> str:
        """`VM/NAME`."""
        return f"{self.vm}/{self.name}"


class RebuiltStore(Model):
    """What was found on a datastore."""

    name: str
    found: FoundKind | Literal["left out"]
    uuid: str = ""
    size: int = 0
    direct_ok: bool | None = None
    header: str = ""
    """Hex of the newest header copy."""
    extent_size: int = 0
    data_offset: int = 0
    legs: int = 0


class Rebuilt(Model):
    """What a rebuilt registry holds, and what stands in its way."""

    datastores: list[RebuiltStore] = Field(default_factory=list)
    vvols: list[RebuiltVVol] = Field(default_factory=list)
    notes: list[Problem] = Field(default_factory=list)
    """What somebody should know: what is given up, what cannot be rebuilt."""
    blockers: list[Problem] = Field(default_factory=list)
    """What cannot be decided; while there is any, nothing is written."""
    moved: str = ""
    """Where the registry that was there is now."""
    written: bool = False
