"""`nbdvvol registry rebuild`: looks at the datastores, decides, and puts a new registry where the old one was.

Nothing on a datastore is changed. The registry that is there is never written to: it is moved aside, under a name with
the time, when the new one is whole. A crash in between leaves `REBUILT_NAME`, which control refuses to overlook.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Iterable
from pathlib import Path

from nbdvvol import farmfile
from nbdvvol.control import rebuild as core
from nbdvvol.control.daemon import only_one
from nbdvvol.control.registry import Registry, rebuilt
from nbdvvol.control.registry.store import REBUILT_NAME, REGISTRY_NAME, with_log
from nbdvvol.datastores.base import sync_folder
from nbdvvol.model.farm import Farm
from nbdvvol.model.rebuild import Rebuilt
from nbdvvol.survey import survey


async def rebuild(file: Path, state: Path, without: Iterable[str], *, dry_run: bool) -> Rebuilt:
    """What a rebuilt registry holds; written, unless it is a dry run or something stands in its way.

    Raises BUSY while control runs, CONFIG for a farm file that is wrong."""
    farm = farmfile.load(file)
    rebuilt.plan(farm)
    with only_one(state):
        found = core.decide(await survey(farm), farm, without, floor=int(time.time()))
        if dry_run or found.blockers:
            return found
        moved = await _write(farm, found, state)
        return found.model_copy(update={"written": True, "moved": moved})


async def _write(farm: Farm, found: Rebuilt, state: Path) -> str:
    """Make the new registry whole, move the old one aside, give the new one its name."""
    fresh = state / REBUILT_NAME
    for leftover in with_log(fresh):
        leftover.unlink(missing_ok=True)
    registry = await Registry.open(fresh)
    try:
        await registry.run(rebuilt.write, farm, found)
    finally:
        await registry.close()
    assert not any(log.exists() for log in with_log(fresh)[1:]), "closing it wrote its log back"
    with fresh.open("rb") as file:
        os.fsync(file.fileno())
    when = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    aside = state / f"{REGISTRY_NAME}.before-rebuild-{when}"
    moved = ""
    for old, new in zip(with_log(state / REGISTRY_NAME), with_log(aside), strict=True):
        if old.exists():
            old.rename(new)
            moved = str(aside)
    sync_folder(str(aside))  # the old one's log must never be found beside the new one
    fresh.rename(state / REGISTRY_NAME)
    sync_folder(str(state / REGISTRY_NAME))
    return moved
