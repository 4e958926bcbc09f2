"""What a leg's map copy says of its VVol, so that a lost registry could be rebuilt from the datastores."""

from __future__ import annotations

from pydantic import Field

from nbdvvol.model.base import Model
from nbdvvol.model.farm import LEGS_MAX, VVolType


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
