"""`status`: the farm at a glance, and what is wrong with it, each with a stable code and what to do next."""

from __future__ import annotations

from nbdvvol.control.registry.views import HELD, HostRow
from nbdvvol.model.mirror import NotServed
from nbdvvol.model.observe import HostCounters
from nbdvvol.model.resources import Datastore, Host, Problem, Task, TaskState, VVol, VVolState

FULL_BELOW = 0.05
_NOT_SERVED: dict[NotServed, tuple[str, str]] = {
    "old-registry": (
        "REGISTRY_OLD",
        "stop control, then restore the newer registry.db, or rebuild it: nbdvvol registry rebuild -f FARM.yaml",
    ),
    "no-leg": (
        "NO_VALID_LEG",
        "bring back the storage of a leg that is in sync; its filter tries again by itself",
    ),
    "lease": (
        "LEASE_OVER",
        "look at that host's link to control; it is served again as soon as control renews the lease",
    ),
    "log-missing": (
        "LOG_MISSING",
        "bring it back, and its filter goes on by itself; if it is gone for good: nbdvvol cache discard {vvol}",
    ),
    "log-unknown": (
        "LOG_UNKNOWN",
        "replay it if this host served it last: nbdvvol cache recover {vvol}; else: nbdvvol cache discard {vvol}",
    ),
}
"""Code and advice of each reason not to serve a VVol."""


def host_view(row: HostRow, connected: bool) -> Host:
    """A host as the API shows it."""
    state = {"connected": connected, "instance": row.instance, "vvols": row.vvols, "serving": row.told}
    return Host.model_validate({"name": row.name, "address": row.address} | state)


def problems(hosts: list[Host], datastores: list[Datastore], vvols: list[VVol], tasks: list[Task]) -> list[Problem]:
    """Everything that needs somebody's attention, the worst first."""
    found: list[Problem] = []
    down = {host.name for host in hosts if not host.connected}
    for vvol in vvols:
        found += _vvol_problems(vvol)
    for store in datastores:
        found += _datastore_problems(store)
    for host in hosts:
        if not host.connected:
            found.append(_host_down(host))
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


def cache_problems(vvols: list[VVol], counters: list[HostCounters]) -> list[Problem]:
    """VVols whose profile has a cache, on hosts whose filters have no memory for one."""
    bare = {host.host for host in counters if host.cache.bytes == 0}
    return [
        Problem(
            code="CACHE_OFF",
            subject=vvol.full_name,
            message=f"its profile has a cache, and the filter of host {vvol.binding.host} was started without memory",
            action=f"say hosts.{vvol.binding.host}.cache, such as 256MiB, and start that filter again; until then it "
            "is only slower",
        )
        for vvol in vvols
        if vvol.cache is not None and vvol.binding is not None and vvol.binding.host in bare
    ]


def _host_down(host: Host) -> Problem:
    start = f"start it: nbdvvol filter --host {host.name}"
    if host.serving:
        used = f"; it serves {host.serving} VVols, which go on while its filter runs"
        start += "; if it is gone for good: nbdvvol unbind --force"
    elif host.vvols:
        used = f"; nothing of the {host.vvols} VVols bound to it runs there"
        start += ", or serve them elsewhere: nbdvvol bind --host"
    else:
        used = ""
    return Problem(
        code="HOST_DOWN", subject=host.name, message=f"no filter of host {host.name} is connected{used}", action=start
    )


def _vvol_problems(vvol: VVol) -> list[Problem]:
    """Of a VVol that could not be created, or that its host reports not to serve."""
    if vvol.state is VVolState.FAILED:
        return [
            Problem(
                code="VVOL_FAILED",
                subject=vvol.full_name,
                message=f"it could not be created: {vvol.error}",
                action=f"mend the cause or the farm file and apply it, or: nbdvvol delete vvol {vvol.full_name}",
            )
        ]
    binding = vvol.binding
    if binding is not None and binding.state in HELD and binding.error:
        again = f"mend the cause; the filter of host {binding.host} tries again by itself"
        code, action = _NOT_SERVED.get(binding.why, ("EXPORT_FAILED", again))
        action = action.replace("{vvol}", vvol.full_name)
        message = f"host {binding.host} cannot serve it: {binding.error}"
        return [Problem(code=code, subject=vvol.full_name, message=message, action=action)]
    return []


def _datastore_problems(store: Datastore) -> list[Problem]:
    found = []
    if store.faults:
        hosts = ", ".join(sorted({fault.host for fault in store.faults}))
        found.append(
            Problem(
                code="SYNC_FAILED",
                subject=store.name,
                message=f"host {hosts}: {store.faults[0].message}",
                action=f"check the storage, then accept what may be lost: nbdvvol datastore clear-fault {store.name}",
            )
        )
    elif store.state == "faulty":
        found.append(
            Problem(
                code="DATASTORE_FAULTY",
                subject=store.name,
                message=store.detail,
                action="check that its path is right; nothing was changed",
            )
        )
    if store.state == "missing":
        found.append(
            Problem(
                code="DATASTORE_MISSING",
                subject=store.name,
                message=f"it cannot be opened: {store.detail}",
                action="bring it back, or correct its path and apply; VVols on other datastores are not concerned",
            )
        )
    if store.state == "reconnecting":
        found.append(
            Problem(
                code="REMOTE_LOST",
                subject=store.name,
                message=store.detail,
                action="bring its server back; it is dialled again by itself, and I/O waits as long as `hold` says",
            )
        )
    if store.state == "online" and store.use == "formatted" and store.free < store.size * FULL_BELOW:
        found.append(
            Problem(
                code="DATASTORE_FULL",
                subject=store.name,
                message=f"{store.free} of {store.size} bytes are free",
                action="grow it, or delete VVols that are no longer needed",
            )
        )
    return found


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
