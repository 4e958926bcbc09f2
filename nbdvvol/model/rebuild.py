"""Rebuilding a lost registry from what lies on the datastores: the words on disk, the request, what was found.

Each leg's map copy carries `MapWords`: what its VVol is called and which legs it has, as of the map version.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nbdvvol.model.base import Model
from nbdvvol.model.farm import LEGS_MAX, Farm, VVolType
from nbdvvol.model.units import Name


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


class RebuildRequest(Model):
    """Body of POST /v1/registry/rebuild: the farm file, which says what hosts, datastores and VMs there are."""

    farm: Farm
    without: list[Name] = Field(default_factory=list)
    """Datastores that are gone for good: the operator's word that what only they know is lost."""
    dry_run: bool = False


class FoundLeg(Model):
    """A leg of a VVol that is to be rebuilt."""

    id: int
    datastore: str
    state: Literal["in-sync", "stale"]
    epoch: int
    generation: int
    note: str = ""


class FoundVVol(Model):
    """A VVol that was found on the datastores."""

    uuid: str
    vm: str
    name: str
    size: int
    mirror: bool
    legs: list[FoundLeg]
    notes: list[str] = Field(default_factory=list)
    """What is not as it was, or is at risk."""


class RebuildReport(Model):
    """What was found, and whether a registry can be made of it."""

    vvols: list[FoundVVol] = Field(default_factory=list)
    refused: list[str] = Field(default_factory=list)
    """Why not: each with what to do."""
    risks: list[str] = Field(default_factory=list)
    """What `without` puts at risk."""
