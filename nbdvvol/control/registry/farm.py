"""Applying a farm file: one transaction that writes the whole plan and queues its tasks, or nothing."""

from __future__ import annotations

from sqlalchemy import delete, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from nbdvvol.control.apply import Have, HaveDatastore, HaveVm, HaveVVol, Plan, compare
from nbdvvol.control.registry import bindings, leases, vvols
from nbdvvol.control.registry import schema as s
from nbdvvol.control.registry.stores import touch_store
from nbdvvol.control.registry.tasks import add_task
from nbdvvol.control.registry.tx import Tx, transaction
from nbdvvol.control.registry.views import HELD, vvol_row
from nbdvvol.model.farm import (
    AdoptConfig,
    ControlConfig,
    DatastoreConfig,
    Farm,
    HostConfig,
    ProfileConfig,
    SocketConfig,
    TlsFiles,
)
from nbdvvol.model.resources import ApplyRequest, ApplyResult


def _have(tx: Tx) -> Have:
    have = Have()
    for row in tx.db.execute(select(s.settings)).all():
        if row.key == "control":
            have.control = ControlConfig.model_validate_json(row.doc)
        elif row.key == "tls":
            have.tls = TlsFiles.model_validate_json(row.doc)
    for row in tx.db.execute(select(s.hosts)).all():
        have.hosts[row.name] = HostConfig.model_validate_json(row.config)
    for row in tx.db.execute(select(s.datastores)).all():
        have.datastores[row.name] = HaveDatastore(DatastoreConfig.model_validate_json(row.config), row.use)
    for row in tx.db.execute(select(s.profiles)).all():
        have.profiles[row.name] = ProfileConfig.model_validate_json(row.spec)
    for row in tx.db.execute(select(s.vms)).all():
        have.vms[row.name] = HaveVm(row.host, SocketConfig.model_validate_json(row.socket))
    for row in tx.db.execute(select(s.vvols)).all():
        have.vvols[row.vm, row.name] = HaveVVol(
            uuid=row.uuid,
            size=row.size,
            type=row.type,
            profile=row.profile,
            read_only=row.read_only,
            description=row.description,
            places=vvols.places_now(tx, row),
            mirror=row.mirror,
            adopt=AdoptConfig.model_validate_json(row.adopt) if row.adopt else None,
            state=row.state,
            host=vvols.bound_host(tx, row.uuid),
            busy=row.task is not None,
        )
    return have


def _set(tx: Tx, key: str, doc: str | None) -> None:
    if doc is None:
        tx.db.execute(delete(s.settings).where(s.settings.c.key == key))
        return
    row = upsert(s.settings).values(key=key, doc=doc)
    tx.db.execute(row.on_conflict_do_update(index_elements=["key"], set_={"doc": doc}))


def write_declared(tx: Tx, plan: Plan, farm: Farm) -> None:
    """Write everything of a plan but its VVols."""
    if plan.control is not None:
        _set(tx, "control", plan.control.model_dump_json())
    if plan.tls:
        _set(tx, "tls", farm.tls.model_dump_json() if farm.tls is not None else None)
    for name, host in plan.hosts.items():
        row = upsert(s.hosts).values(name=name, config=host.model_dump_json())
        doc = {"config": host.model_dump_json()}
        tx.db.execute(row.on_conflict_do_update(index_elements=["name"], set_=doc))
    for name, store in plan.datastores.items():
        row = upsert(s.datastores).values(name=name, config=store.model_dump_json())
        doc = {"config": store.model_dump_json(), "state": "unknown", "detail": ""}
        tx.db.execute(row.on_conflict_do_update(index_elements=["name"], set_=doc))
    for name, profile in plan.profiles.items():
        row = upsert(s.profiles).values(name=name, spec=profile.model_dump_json())
        doc = {"spec": profile.model_dump_json()}
        tx.db.execute(row.on_conflict_do_update(index_elements=["name"], set_=doc))
    for name, vm in plan.vms.items():
        values = {"host": vm.host, "socket": vm.socket.model_dump_json()}
        row = upsert(s.vms).values(name=name, **values)
        tx.db.execute(row.on_conflict_do_update(index_elements=["name"], set_=values))


def _touch_declared(tx: Tx, plan: Plan, have: Have) -> None:
    every = tx.db.execute(select(s.hosts.c.name)).scalars().all()
    for host in every if plan.tls else plan.hosts:
        tx.touch(host, "settings", "")
    for row in tx.db.execute(select(s.datastores)).all():
        if row.name in plan.datastores or plan.hosts:
            touch_store(tx, row)
            for host in every:
                tx.touch(host, "datastore", row.name)
    for name, profile in plan.profiles.items():
        old = have.profiles.get(name)
        if profile.mirror is None or profile.mirror.lease is None:
            leases.forget(tx, name)
        if old is not None and (old.qos, old.cache, old.mirror) != (profile.qos, profile.cache, profile.mirror):
            for uuid in tx.db.execute(select(s.vvols.c.uuid).where(s.vvols.c.profile == name)).scalars().all():
                bindings.touch_holders(tx, uuid)
    _touch_logs(tx, plan, have)
    for name, vm in plan.vms.items():
        tx.touch(vm.host, "vm", name)
        if name in have.vms:
            tx.touch(have.vms[name].host, "vm", name)
        for host in tx.db.execute(
            select(s.holders.c.host).join(s.vvols, s.vvols.c.uuid == s.holders.c.vvol).where(s.vvols.c.vm == name)
        ).scalars():
            tx.touch(host, "vm", name)


def _touch_logs(tx: Tx, plan: Plan, have: Have) -> None:
    """Hosts whose folder for logs is another one."""
    for name, config in plan.hosts.items():
        before = have.hosts.get(name)
        if before is not None and before.logs != config.logs:
            mine = select(s.holders.c.vvol).where(s.holders.c.host == name, s.holders.c.state.in_(HELD))
            for uuid in tx.db.execute(mine).scalars().all():
                tx.touch(name, "vvol", uuid)


@transaction
def apply(tx: Tx, request: ApplyRequest) -> ApplyResult:
    """Compare, and unless it is a dry run, write the plan and queue its tasks. All or nothing."""
    have = _have(tx)
    plan = compare(have, request.farm)
    result = ApplyResult(changes=plan.changes)
    if request.dry_run:
        return result
    write_declared(tx, plan, request.farm)
    _touch_declared(tx, plan, have)
    for name in plan.datastores:
        result.tasks.append(add_task(tx, "probe", name, datastore=name).id)
    for body in plan.create:
        result.tasks.append(vvols.insert_vvol(tx, body).id)
    for uuid, kind, text, read_only in plan.describe:
        row = vvol_row(tx, uuid)
        values = {"type": kind, "description": text, "read_only": read_only}
        bindings.advance_generation(tx, uuid, row.generation, **values)
        bindings.touch_holders(tx, uuid)
    for uuid, profile in plan.profile_of:
        tx.db.execute(update(s.vvols).where(s.vvols.c.uuid == uuid).values(profile=profile))
        if leases.lease_of(tx, profile) is None:
            leases.forget(tx, profile)
        bindings.touch_holders(tx, uuid)
    for uuid, body in plan.retry:
        result.tasks.append(vvols.retry_create(tx, vvol_row(tx, uuid), body).id)
    for uuid, size in plan.resize:
        task = vvols.start_resize(tx, vvol_row(tx, uuid), size)
        if task is not None:
            result.tasks.append(task.id)
    for uuid, host in plan.bind:
        result.tasks.append(vvols.start_bind(tx, vvol_row(tx, uuid), host).id)
    if any(change.action in ("create", "update") for change in plan.changes):
        tx.event("farm.applied", "farm", f"{len(plan.changes)} entries, {len(result.tasks)} tasks")
    return result


@transaction
def host_names(tx: Tx) -> dict[str, HostConfig]:
    """Every host's configuration."""
    rows = tx.db.execute(select(s.hosts.c.name, s.hosts.c.config))
    return {name: HostConfig.model_validate_json(config) for name, config in rows}
