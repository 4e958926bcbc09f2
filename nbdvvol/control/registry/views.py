"""Rows as the API's models, and the reading transactions that answer GET."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import ColumnElement, Row, Select, func, select

from nbdvvol.control.registry import faults
from nbdvvol.control.registry import schema as s
from nbdvvol.control.registry.tx import Tx, transaction
from nbdvvol.control.uris import attach_lines, socket_path, tcp_uri, unix_uri
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.farm import DatastoreConfig, HostConfig, MirrorConfig, ProfileConfig, SocketConfig, VVolType
from nbdvvol.model.link import ExportReport
from nbdvvol.model.mirror import NotServed, Stamp
from nbdvvol.model.resources import (
    Binding,
    Datastore,
    Event,
    ExportUri,
    Leg,
    LogKept,
    Profile,
    Region,
    Task,
    TaskState,
    Vm,
    VVol,
    VVolState,
)

HELD = ("assigned", "binding", "bound")
TOLD = ("binding", "bound")
"""Of these, a filter may serve the VVol."""
FEW = 100
REGION_STATES: tuple[Literal["mapped", "zero", "write-protected"], ...] = ("mapped", "zero", "write-protected")


def vvol_row(tx: Tx, uuid: str) -> Row[Any]:
    """A VVol's row. Raises NOT_FOUND."""
    row = tx.db.execute(select(s.vvols).where(s.vvols.c.uuid == uuid)).one_or_none()
    if row is None:
        raise NvError(Code.NOT_FOUND, f"no VVol {uuid}", "list them: nbdvvol get vvols")
    return row


def find_vvol(tx: Tx, vm: str, name: str) -> Row[Any]:
    """A VVol's row by its full name. Raises NOT_FOUND."""
    row = tx.db.execute(select(s.vvols).where(s.vvols.c.vm == vm, s.vvols.c.name == name)).one_or_none()
    if row is None:
        raise NvError(Code.NOT_FOUND, f"no VVol {vm}/{name}", "list them: nbdvvol get vvols")
    return row


def check_ready(row: Row[Any]) -> None:
    """Raise CONFLICT for a VVol that is being created or deleted, or could not be created."""
    if row.state != "ready":
        raise NvError(Code.CONFLICT, f"VVol {row.vm}/{row.name} is {row.state}, not ready", "wait for its task to end")


RunTuple = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class LegRows:
    """Legs and visible runs of some VVols, read in two queries however many there are."""

    legs: dict[str, list[Row[Any]]]
    runs: dict[tuple[str, int], list[RunTuple]]


def leg_rows(tx: Tx, rows: Sequence[Row[Any]]) -> LegRows:
    """Legs of these VVols; (offset, length, at, state) of the runs that lie inside each VVol's size."""
    sizes = {row.uuid: row.size for row in rows}
    legs: dict[str, list[Row[Any]]] = {uuid: [] for uuid in sizes}
    runs: dict[tuple[str, int], list[RunTuple]] = {}
    query = select(s.legs, s.datastores.c.fences).join(s.datastores, s.datastores.c.name == s.legs.c.datastore)
    for leg in tx.db.execute(_of(query, s.legs.c.vvol, rows).order_by(s.legs.c.id)):
        if leg.vvol in legs:
            legs[leg.vvol].append(leg)
            runs[leg.vvol, leg.id] = []
    for run in tx.db.execute(_of(select(s.runs), s.runs.c.vvol, rows).order_by(s.runs.c.offset)):
        size = sizes.get(run.vvol, 0)
        if run.offset < size:
            runs[run.vvol, run.leg].append((run.offset, min(run.length, size - run.offset), run.at, run.state))
    return LegRows(legs, runs)


def _of(query: Select[Any], column: ColumnElement[str], rows: Sequence[Row[Any]]) -> Select[Any]:
    """Narrow a query to some VVols; when they are many, reading all is quicker."""
    return query.where(column.in_([row.uuid for row in rows])) if len(rows) <= FEW else query


def profile_specs(tx: Tx) -> dict[str, ProfileConfig]:
    """Every profile, by name."""
    return {row.name: ProfileConfig.model_validate_json(row.spec) for row in tx.db.execute(select(s.profiles))}


NO_POLICY = ProfileConfig()
"""Of a VVol that names no profile."""


def log_row(tx: Tx, uuid: str) -> Row[Any] | None:
    """What is known of a VVol's log; None: nothing ever was."""
    return tx.db.execute(select(s.logs).where(s.logs.c.vvol == uuid)).one_or_none()


def log_rows(tx: Tx) -> dict[str, Row[Any]]:
    """What is known of logs, by the UUID of their VVol."""
    return {row.vvol: row for row in tx.db.execute(select(s.logs)).all()}


def kept_view(row: Row[Any]) -> LogKept:
    """The same, of a row that is not clean."""
    return LogKept(
        host=row.host,
        log=row.log,
        file=row.file,
        known=row.state == "dirty",
        since=datetime.fromisoformat(row.since) if row.since else None,
        size=row.size,
        dirty_bytes=row.dirty_bytes,
        oldest_age_ms=row.oldest_ms,
        told=datetime.fromisoformat(row.told) if row.told else None,
        draining=row.wish == "drain",
    )


def vvol_views(tx: Tx, rows: Sequence[Row[Any]]) -> list[VVol]:
    """VVols as the API shows them."""
    found = leg_rows(tx, rows)
    specs = profile_specs(tx)
    logs = log_rows(tx)
    bindings: dict[str, tuple[Binding, str]] = {}
    query = select(s.holders, s.hosts.c.run_dir).join(s.hosts, s.hosts.c.name == s.holders.c.host)
    for holder in tx.db.execute(_of(query.where(s.holders.c.state != "forced"), s.holders.c.vvol, rows)):
        if holder.vvol not in bindings or holder.state in HELD:
            told = {"error": holder.error, "why": why_not_served(holder.facts, holder.error)}
            binding = Binding.model_validate({"host": holder.host, "epoch": holder.epoch, "state": holder.state} | told)
            bindings[holder.vvol] = binding, holder.run_dir
    return [
        _vvol_view(row, found, bindings.get(row.uuid), specs.get(row.profile, NO_POLICY), logs.get(row.uuid))
        for row in rows
    ]


def why_not_served(facts: str, error: str) -> NotServed:
    """The reason in a host's last report, while that says that it does not serve the VVol."""
    return ExportReport.model_validate_json(facts).why if error and facts else ""


def vvol_view(tx: Tx, row: Row[Any]) -> VVol:
    """A VVol as the API shows it."""
    return vvol_views(tx, [row])[0]


def mirror_policy(spec: ProfileConfig, row: Row[Any]) -> MirrorConfig:
    """How a mirrored VVol of a profile is run; by the defaults, where the profile says nothing (any more)."""
    return spec.mirror or MirrorConfig(legs=[row.datastore])


def _vvol_view(
    row: Row[Any], found: LegRows, bound: tuple[Binding, str] | None, spec: ProfileConfig, log: Row[Any] | None
) -> VVol:
    legs = [
        Leg(
            id=leg.id,
            datastore=leg.datastore,
            state=leg.state,
            object=leg.object,
            adopted=leg.adopted,
            life=leg.life,
            stamp=Stamp(epoch=leg.epoch, generation=leg.generation),
            resync=leg.resync,
            lost=leg.lost or None,
            why=leg.why,
            replaces=leg.replaces,
            fences=row.mirror and leg.fences,
            doubt=leg.doubt and leg.state != "in-sync",
            regions=[
                Region(offset=o, length=n, object_offset=at, state=REGION_STATES[state])
                for o, n, at, state in found.runs[row.uuid, leg.id]
            ],
        )
        for leg in found.legs[row.uuid]
    ]
    binding, run_dir = bound if bound is not None else (None, "")
    held = binding is not None and binding.state in HELD
    return VVol(
        uuid=row.uuid,
        vm=row.vm,
        name=row.name,
        size=row.size,
        type=VVolType(row.type),
        profile=row.profile,
        qos=spec.qos,
        cache=spec.caching,
        log=kept_view(log) if log is not None and log.state != "clean" else None,
        mirror=mirror_policy(spec, row) if row.mirror else None,
        differed=row.differed,
        state=VVolState(row.state),
        error=row.error,
        read_only=row.read_only,
        description=row.description,
        epoch=row.epoch,
        generation=row.generation,
        map_version=row.map_version,
        binding=binding,
        legs=legs,
        uri=unix_uri(run_dir, row.vm, row.name) if held else "",
    )


def task_view(row: Row[Any]) -> Task:
    """A task as the API shows it."""
    return Task(
        id=row.id,
        kind=row.kind,
        subject=row.subject,
        state=TaskState(row.state),
        progress=row.progress / 1000,
        detail=row.detail,
        error=row.error,
        created=row.created,
        updated=row.updated,
    )


def _datastore_view(tx: Tx, row: Row[Any]) -> Datastore:
    config = DatastoreConfig.model_validate_json(row.config)
    areas = s.areas.c
    total = select(func.coalesce(func.sum(areas.length), 0)).where(areas.datastore == row.name)
    if row.use == "formatted":
        free = tx.db.execute(total.where(areas.state.in_(("clean", "dirty")))).scalar_one()
    elif row.use == "adopted":
        free = row.size - tx.db.execute(total).scalar_one() if config.kind != "dir" else row.size
    else:
        free = row.size
    failed = faults.of_datastore(tx, row.name)
    sound = row.state in ("online", "unknown")
    return Datastore(
        name=row.name,
        kind=config.kind,
        path=config.uri or config.path or "",
        uuid=row.uuid,
        size=row.size,
        free=max(free, 0),
        extent_size=config.extent_size,
        hosts=config.hosts,
        use=row.use,
        fences=row.fences,
        state="faulty" if failed and sound else row.state,
        detail=f"host {failed[0].host}: {failed[0].message}" if failed and sound else row.detail,
        faults=failed,
    )


@transaction
def vvols(tx: Tx) -> list[VVol]:
    """Every VVol, by name."""
    return vvol_views(tx, tx.db.execute(select(s.vvols).order_by(s.vvols.c.vm, s.vvols.c.name)).all())


@transaction
def vvol(tx: Tx, vm: str, name: str) -> VVol:
    """One VVol. Raises NOT_FOUND."""
    return vvol_view(tx, find_vvol(tx, vm, name))


@transaction
def resolve(tx: Tx, name: str) -> VVol:
    """A VVol by `VM/NAME`, UUID or a short name that only one has. Raises NOT_FOUND, or CONFLICT with the choices."""
    vm, slash, short = name.partition("/")
    if slash:
        return vvol_view(tx, find_vvol(tx, vm, short))
    rows = tx.db.execute(select(s.vvols).where((s.vvols.c.name == name) | (s.vvols.c.uuid == name.lower()))).all()
    if not rows:
        raise NvError(Code.NOT_FOUND, f"no VVol {name}", "list them: nbdvvol get vvols")
    if len(rows) > 1:
        names = ", ".join(sorted(f"{row.vm}/{row.name}" for row in rows))
        raise NvError(Code.CONFLICT, f"{name} names {len(rows)} VVols: {names}", "write VM/NAME")
    return vvol_view(tx, rows[0])


@transaction
def datastores(tx: Tx) -> list[Datastore]:
    """Every datastore, by name."""
    return [_datastore_view(tx, row) for row in tx.db.execute(select(s.datastores).order_by(s.datastores.c.name)).all()]


@transaction
def profiles(tx: Tx) -> list[Profile]:
    """Every profile, by name."""
    rows = tx.db.execute(select(s.profiles).order_by(s.profiles.c.name)).all()
    return [Profile(name=row.name, spec=ProfileConfig.model_validate_json(row.spec)) for row in rows]


@transaction
def vms(tx: Tx) -> list[Vm]:
    """Every VM, by name."""
    query = select(s.vms, s.hosts.c.run_dir).join(s.hosts, s.hosts.c.name == s.vms.c.host).order_by(s.vms.c.name)
    names: dict[str, list[str]] = {}
    for vm, name in tx.db.execute(select(s.vvols.c.vm, s.vvols.c.name).order_by(s.vvols.c.name)):
        names.setdefault(vm, []).append(name)
    return [
        Vm(
            name=row.name,
            host=row.host,
            socket=socket_path(row.run_dir, row.name) if row.run_dir else "",
            socket_config=SocketConfig.model_validate_json(row.socket),
            vvols=names.get(row.name, []),
        )
        for row in tx.db.execute(query)
    ]


@dataclass(frozen=True, slots=True)
class HostRow:
    """A host as the registry knows it; whether it is connected, the link knows."""

    name: str
    config: HostConfig
    instance: str
    run_dir: str
    address: str
    vvols: int
    told: int
    """Of its VVols, those that its filter may still serve when it is not connected."""


@transaction
def hosts(tx: Tx) -> list[HostRow]:
    """Every host, by name."""

    def counts(states: tuple[str, ...]) -> dict[str, int]:
        here = select(s.holders.c.host, func.count()).where(s.holders.c.state.in_(states)).group_by(s.holders.c.host)
        return dict(tx.db.execute(here).all())

    held, told = counts(HELD), counts(TOLD)
    return [
        HostRow(
            row.name,
            HostConfig.model_validate_json(row.config),
            row.instance,
            row.run_dir,
            row.address,
            held.get(row.name, 0),
            told.get(row.name, 0),
        )
        for row in tx.db.execute(select(s.hosts).order_by(s.hosts.c.name)).all()
    ]


@transaction
def tasks(tx: Tx, limit: int = 1000) -> list[Task]:
    """The newest tasks, oldest of them first."""
    rows = tx.db.execute(select(s.tasks).order_by(s.tasks.c.id.desc()).limit(limit)).all()
    return [task_view(row) for row in reversed(rows)]


@transaction
def task_counts(tx: Tx) -> dict[TaskState, int]:
    """How many tasks are in each state; old ones that are over are forgotten."""
    found: dict[str, int] = dict(tx.db.execute(select(s.tasks.c.state, func.count()).group_by(s.tasks.c.state)).all())
    return {state: found.get(state.value, 0) for state in TaskState}


@transaction
def task(tx: Tx, task_id: int) -> Task:
    """One task. Raises NOT_FOUND."""
    row = tx.db.execute(select(s.tasks).where(s.tasks.c.id == task_id)).one_or_none()
    if row is None:
        raise NvError(Code.NOT_FOUND, f"no task {task_id}", "list them: nbdvvol get tasks")
    return task_view(row)


@transaction
def events(tx: Tx, after: int, limit: int) -> list[Event]:
    """Events with ids above `after`, oldest first."""
    rows = tx.db.execute(select(s.events).where(s.events.c.id > after).order_by(s.events.c.id).limit(limit)).all()
    return [
        Event.model_validate(
            {"id": row.id, "time": row.time, "kind": row.kind, "subject": row.subject, "message": row.message}
        )
        for row in rows
    ]


@transaction
def revision(tx: Tx) -> int:
    """The revision of the last change."""
    return tx.revision


@transaction
def export_uri(tx: Tx, vm: str, name: str) -> ExportUri:
    """Where to attach a VVol. Raises NOT_FOUND, or UNAVAILABLE while no host serves it."""
    view = vvol_view(tx, find_vvol(tx, vm, name))
    if view.binding is None or view.binding.state not in HELD:
        raise NvError(
            Code.UNAVAILABLE, f"VVol {view.full_name} is bound to no host", f"bind it: nbdvvol bind {view.full_name}"
        )
    host = tx.db.execute(select(s.hosts).where(s.hosts.c.name == view.binding.host)).one()
    tcp = tcp_uri(HostConfig.model_validate_json(host.config).listen, host.address, vm, name)
    if not view.uri:
        raise NvError(
            Code.UNAVAILABLE,
            f"the filter of host {host.name} was never here",
            f"start it: nbdvvol filter --host {host.name}",
        )
    lines = attach_lines(view.uri, tcp, view.full_name, host.run_dir, vm, name)
    return ExportUri(vvol=view.full_name, uri=view.uri, host=host.name, identity=view.uuid, lines=lines)


@transaction
def setting(tx: Tx, key: str) -> dict[str, Any] | None:
    """`control` or `tls` of the farm file as last applied."""
    doc = tx.db.execute(select(s.settings.c.doc).where(s.settings.c.key == key)).scalar_one_or_none()
    return json.loads(doc) if doc is not None else None
