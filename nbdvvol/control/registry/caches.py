"""Requests on the caches of VVols."""

from __future__ import annotations

from nbdvvol.control.registry.tasks import add_task
from nbdvvol.control.registry.tx import Tx, transaction
from nbdvvol.control.registry.views import find_vvol, vvol_row, vvol_view
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.resources import TaskRef


@transaction
def begin_drain(tx: Tx, vm: str, name: str) -> TaskRef:
    """Queue writing out what the VVol's host alone has of it. Raises NOT_FOUND, CONFLICT."""
    row = find_vvol(tx, vm, name)
    if row.state != "ready":
        raise NvError(Code.CONFLICT, f"VVol {vm}/{name} is {row.state}, not ready", "wait for its task to end")
    task = add_task(tx, "drain-cache", f"{vm}/{name}", row.uuid)
    return TaskRef(task=task, vvol=vvol_view(tx, vvol_row(tx, row.uuid)))
