"""`status`: the farm at a glance, and what is wrong with it, each with a stable code and what to do next."""

from __future__ import annotations

from nbdvvol.control.registry.views import Finding, HostRow
from nbdvvol.model.resources import Datastore, Host, Problem, Task, TaskState, VVol

FULL_BELOW = 0.05


def host_view(row: HostRow, connected: bool) -> Host:
    """A host as the API shows it."""
    return Host(name=row.name, connected=connected, address=row.address, instance=row.instance, vvols=row.vvols)


def problems(
    hosts: list[Host], datastores: list[Datastore], vvols: list[VVol], tasks: list[Task], findings: list[Finding]
) -> list[Problem]:
    """Everything that needs somebody's attention, the worst first."""
    found: list[Problem] = []
    down = {host.name for host in hosts if not host.connected}
    for finding in findings:
        found += _vvol_problems(finding)
    for store in datastores:
        found += _datastore_problems(store)
    for host in hosts:
        if not host.connected:
            used = f"; it serves {host.vvols} VVols, which go on while its filter runs" if host.vvols else ""
            found.append(
                Problem(
                    code="HOST_DOWN",
                    subject=host.name,
                    message=f"no filter of host {host.name} is connected{used}",
                    action=f"start it: nbdvvol filter {host.name}; if it is gone for good: nbdvvol unbind --force",
                )
            )
    for vvol in vvols:
        if vvol.binding is not None and vvol.binding.state == "releasing" and vvol.binding.host in down:
            found.append(
                Problem(
                    code="RELEASE_WAITS",
                    subject=vvol.full_name,
                    message=f"host {vvol.binding.host} should release it but is not connected",
                    action=f"start that filter, or, if it runs no more: nbdvvol unbind {vvol.full_name} --force",
                )
            )
    return found + _task_problems(tasks)


def _vvol_problems(finding: Finding) -> list[Problem]:
    if finding.state == "failed":
        return [
            Problem(
                code="VVOL_FAILED",
                subject=finding.vvol,
                message=f"it could not be created: {finding.error}",
                action=f"mend the cause and apply again, or: nbdvvol delete vvol {finding.vvol}",
            )
        ]
    if finding.export_error:
        return [
            Problem(
                code="EXPORT_FAILED",
                subject=finding.vvol,
                message=f"host {finding.host} cannot serve it: {finding.export_error}",
                action=f"mend the cause; the filter of host {finding.host} tries again by itself",
            )
        ]
    return []


def _datastore_problems(store: Datastore) -> list[Problem]:
    if store.state == "missing":
        return [
            Problem(
                code="DATASTORE_MISSING",
                subject=store.name,
                message=f"it cannot be opened: {store.detail}",
                action="bring it back, or correct its path and apply; VVols on other datastores are not concerned",
            )
        ]
    if store.state == "faulty":
        sync = store.detail.startswith("sync failed")
        return [
            Problem(
                code="SYNC_FAILED" if sync else "DATASTORE_FAULTY",
                subject=store.name,
                message=store.detail,
                action=f"check the storage, then accept what may be lost: nbdvvol datastore clear-fault {store.name}"
                if sync
                else "check that its path is right; nothing was changed",
            )
        ]
    if store.use == "formatted" and store.size and store.free < store.size * FULL_BELOW:
        return [
            Problem(
                code="DATASTORE_FULL",
                subject=store.name,
                message=f"{store.free} of {store.size} bytes are free",
                action="grow it, or delete VVols that are no longer needed",
            )
        ]
    return []


def _task_problems(tasks: list[Task]) -> list[Problem]:
    """The last task of a subject, if it failed."""
    last: dict[tuple[str, str], Task] = {(task.kind, task.subject): task for task in tasks}
    return [
        Problem(
            code="TASK_FAILED",
            subject=task.subject,
            message=f"task {task.id} ({task.kind}) failed: {task.error}",
            action="mend the cause and ask again",
        )
        for task in last.values()
        if task.state is TaskState.ERROR and task.kind in ("resize", "delete", "unbind", "clear-fault")
    ]
