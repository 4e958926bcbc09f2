"""Requests on the caches of VVols."""

from __future__ import annotations

from nbdvvol.control.registry.tasks import add_task
from nbdvvol.control.registry.tx import Tx, transaction
from nbdvvol.control.registry.views import check_ready, find_vvol
from nbdvvol.control.registry.vvols import task_ref
from nbdvvol.model.resources import TaskRef


@transaction
def begin_drain(tx: Tx, vm: str, name: str) -> TaskRef:
    """Queue writing out what the VVol's host alone has of it. Raises NOT_FOUND, CONFLICT."""
    row = find_vvol(tx, vm, name)
    check_ready(row)
    return task_ref(tx, add_task(tx, "drain-cache", f"{vm}/{name}", row.uuid), row.uuid)
