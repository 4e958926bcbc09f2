"""What each host needs to know: whole, or as the ordered changes since a revision.

The feed keeps no old values: `touched` says when an entry last changed, its value is read when it is sent. So
changes that pile up while a filter is away become one, and a filter can resume from any revision it had. What is read
counts as told: a VVol that was only assigned to a host may be served there from then on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Row, delete, func, select, update

from nbdvvol.control.policy import opens_direct
from nbdvvol.control.registry import faults, logs
from nbdvvol.control.registry import schema as s
from nbdvvol.control.registry.tx import Tx, transaction
from nbdvvol.control.registry.views import (
    HELD,
    NO_POLICY,
    LegRows,
    leg_rows,
    log_rows,
    mirror_policy,
    profile_specs,
)
from nbdvvol.model.check import place_of
from nbdvvol.model.farm import (
    DatastoreConfig,
    DatastoreKind,
    HostConfig,
    ProfileConfig,
    SocketConfig,
    TlsFiles,
    VVolType,
)
from nbdvvol.model.link import (
    DatastoreSpec,
    Delta,
    HostState,
    LegSpec,
    RunSpec,
    Snapshot,
    VmSpec,
    VVolSpec,
    remote_spec,
)
from nbdvvol.model.log import LogSpec
from nbdvvol.model.mirror import Stamp, mirror_spec


def sees(config: DatastoreConfig, host: str) -> bool:
    """Whether the host sees the datastore."""
    return config.hosts is None or host in config.hosts


def datastore_spec(tx: Tx, row: Row[Any]) -> DatastoreSpec:
    """How a filter opens this datastore."""
    config = DatastoreConfig.model_validate_json(row.config)
    host_count = tx.db.execute(select(func.count()).select_from(s.hosts)).scalar_one()
    return DatastoreSpec(
        name=row.name,
        kind=config.kind,
        path=place_of(config) if config.kind is DatastoreKind.NBD else config.path or "",
        remote=remote_spec(config),
        uuid=row.uuid if row.use == "formatted" else "",
        size=row.size,
        direct=opens_direct(config, host_count, row.direct_ok),
        adopted=row.use == "adopted",
    )


def _vvol_spec(row: Row[Any], found: LegRows, policy: ProfileConfig, log: LogSpec | None) -> VVolSpec:
    legs = [
        LegSpec(
            id=leg.id,
            datastore=leg.datastore,
            state=leg.state,
            object=leg.object,
            adopted=leg.adopted,
            runs=[RunSpec(o=o, n=n, at=at, s=state) for o, n, at, state in found.runs[row.uuid, leg.id]],
            stamp=Stamp(epoch=leg.epoch, generation=leg.generation),
            meta_offset=leg.meta_offset,
            meta_length=leg.meta_length,
            resync=leg.resync,
            asked=leg.asked,
            tries=leg.tries,
            doubt=leg.doubt,
            fences=leg.fences,
        )
        for leg in found.legs[row.uuid]
        if leg.life == "live"
    ]
    return VVolSpec(
        uuid=row.uuid,
        vm=row.vm,
        name=row.name,
        size=row.size,
        type=VVolType(row.type),
        description=row.description,
        read_only=row.read_only,
        epoch=row.held_epoch,
        generation=row.generation,
        map_version=row.map_version,
        legs=legs,
        qos=policy.qos,
        cache=policy.caching,
        log=log,
        mirror=mirror_spec(mirror_policy(policy, row)) if row.mirror else None,
    )


def _datastores(tx: Tx, host: str) -> dict[str, DatastoreSpec]:
    rows = tx.db.execute(select(s.datastores)).all()
    return {
        row.name: datastore_spec(tx, row) for row in rows if sees(DatastoreConfig.model_validate_json(row.config), host)
    }


def _vms(tx: Tx, host: str) -> dict[str, VmSpec]:
    here = (
        select(s.vvols.c.vm)
        .join(s.holders, s.holders.c.vvol == s.vvols.c.uuid)
        .where(s.holders.c.host == host, s.holders.c.state.in_(HELD))
    )
    rows = tx.db.execute(select(s.vms).where((s.vms.c.host == host) | s.vms.c.name.in_(here))).all()
    return {row.name: VmSpec(name=row.name, socket=SocketConfig.model_validate_json(row.socket)) for row in rows}


def _tell_vvols(tx: Tx, host: str, only: Iterable[str] | None = None) -> dict[str, VVolSpec]:
    """The VVols this host is to serve, by UUID; it counts as told of them."""
    query = select(s.vvols, s.holders.c.epoch.label("held_epoch")).join(s.holders, s.holders.c.vvol == s.vvols.c.uuid)
    query = query.where(s.holders.c.host == host, s.holders.c.state.in_(HELD), s.vvols.c.state == "ready")
    if only is not None:
        query = query.where(s.vvols.c.uuid.in_(list(only)))
    rows = tx.db.execute(query).all()
    named = s.holders.c.vvol.in_(select(s.vvols.c.uuid).where(s.vvols.c.state == "ready"))
    if only is not None:
        named = s.holders.c.vvol.in_([row.uuid for row in rows])
    assigned = update(s.holders).where(s.holders.c.host == host, s.holders.c.state == "assigned", named)
    tx.db.execute(assigned.values(state="binding"))
    found = leg_rows(tx, rows)
    specs, known = profile_specs(tx), log_rows(tx)
    config, _ = host_settings(tx, host)
    told = {}
    for row in rows:
        policy = specs.get(row.profile, NO_POLICY)
        log = logs.log_spec(row, known.get(row.uuid), host, config, policy)
        told[row.uuid] = _vvol_spec(row, found, policy, log)
    return told


def host_settings(tx: Tx, host: str) -> tuple[HostConfig, TlsFiles | None]:
    """The host's own configuration and the farm's TLS files."""
    config = tx.db.execute(select(s.hosts.c.config).where(s.hosts.c.name == host)).scalar_one()
    tls = tx.db.execute(select(s.settings.c.doc).where(s.settings.c.key == "tls")).scalar_one_or_none()
    return HostConfig.model_validate_json(config), TlsFiles.model_validate_json(tls) if tls else None


def snapshot(tx: Tx, host: str) -> Snapshot:
    """The whole state of a host, as of the current revision."""
    config, tls = host_settings(tx, host)
    state = HostState(
        host=host,
        listen=config.listen,
        tls=tls,
        datastores=_datastores(tx, host),
        vms=_vms(tx, host),
        vvols=_tell_vvols(tx, host),
        faults=faults.of_host(tx, host),
    )
    return Snapshot(revision=tx.revision, state=state)


@transaction
def changes(tx: Tx, host: str, since: int) -> Delta | None:
    """What changed for a host after `since`, as one step to the current revision; None when nothing did."""
    query = select(s.touched.c.kind, s.touched.c.key).where(s.touched.c.host == host, s.touched.c.revision > since)
    rows = tx.db.execute(query).all()
    if not rows:
        return None
    keys: dict[str, list[str]] = {"settings": [], "datastore": [], "vm": [], "vvol": [], "faults": []}
    for kind, key in rows:
        keys[kind].append(key)
    delta = Delta(revision=tx.revision)
    if keys["settings"]:
        config, tls = host_settings(tx, host)
        delta.settings, delta.listen, delta.tls = True, config.listen, tls
    if keys["datastore"]:
        stores = _datastores(tx, host)
        delta.datastores = {key: stores.get(key) for key in keys["datastore"]}
    if keys["vm"]:
        known = _vms(tx, host)
        delta.vms = {key: known.get(key) for key in keys["vm"]}
    if keys["vvol"]:
        held = _tell_vvols(tx, host, keys["vvol"])
        delta.vvols = {key: held.get(key) for key in keys["vvol"]}
    if keys["faults"]:
        standing = faults.of_host(tx, host)
        delta.faults = {key: standing.get(key, {}) for key in keys["faults"]}
    return delta


@transaction
def applied(tx: Tx, host: str, revision: int) -> None:
    """The filter runs everything up to `revision`: entries that are gone need not be remembered for it."""
    gone = select(s.touched.c.key).where(
        s.touched.c.host == host,
        s.touched.c.kind == "vvol",
        s.touched.c.revision <= revision,
        s.touched.c.key.not_in(select(s.vvols.c.uuid)),
    )
    keys = tx.db.execute(gone).scalars().all()
    if keys:
        tx.db.execute(delete(s.touched).where(s.touched.c.host == host, s.touched.c.key.in_(keys)))
        tx.db.execute(update(s.hosts).where(s.hosts.c.name == host).values(floor=revision))
