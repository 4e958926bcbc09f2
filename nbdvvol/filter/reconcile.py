"""What to do with what control says: pure functions from messages and held state to steps. No I/O.

Rules: a VVol is served only under the epoch that control named last; a newer epoch means that the old one is
drained and released first; an older one than this process has seen is refused (control's registry went back in
time); within an epoch, changes are applied live.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import TypeVar

from nbdvvol.dataplane.log import LogPolicy
from nbdvvol.dataplane.types import (
    CacheMode,
    CachePolicy,
    LegDescription,
    LegState,
    Run,
    RunState,
    VolumeDescription,
    VolumeLimits,
)
from nbdvvol.model.farm import LOG_DEADLINE_S
from nbdvvol.model.link import Delta, HostState, LegSpec, VVolSpec
from nbdvvol.model.log import LogSpec
from nbdvvol.nbd.constants import TransmissionFlag

T = TypeVar("T")

_LEG_STATES = {"in-sync": LegState.IN_SYNC, "stale": LegState.STALE, "syncing": LegState.SYNCING}


class Step(enum.Enum):
    """What one VVol needs."""

    NOTHING = "nothing"
    OPEN = "open"
    RENAME = "rename"
    """Only words changed (name, description): no I/O is touched."""
    LIMIT = "limit"
    """Only limits, shares, the cache's policy or the log's changed: no I/O waits for the change."""
    CHANGE = "change"
    REPLACE = "replace"
    """Drain and release the old epoch, then open under the new one."""
    CLOSE = "close"
    REFUSE = "refuse"
    """Drain what runs; serve nothing: the epoch is older than one seen before."""


def decide(running: VVolSpec | None, wanted: VVolSpec | None, highest_epoch: int) -> Step:
    """The step from what runs to what control wants; `highest_epoch` is the highest this process has served."""
    if wanted is None:
        return Step.NOTHING if running is None else Step.CLOSE
    if wanted.epoch < highest_epoch:
        return Step.REFUSE
    if running is None:
        return Step.OPEN
    if running.epoch != wanted.epoch:
        return Step.REPLACE
    if running == wanted:
        return Step.NOTHING
    if _runs_differ(running, wanted):
        return Step.CHANGE
    policies = (running.qos, running.cache, running.log), (wanted.qos, wanted.cache, wanted.log)
    return Step.LIMIT if policies[0] != policies[1] else Step.RENAME


def _runs_differ(running: VVolSpec, wanted: VVolSpec) -> bool:
    words = {"name": "", "vm": "", "description": "", "type": running.type, "qos": None, "cache": None, "log": None}
    return running.model_copy(update=words) != wanted.model_copy(update=words)


def merge(state: HostState, delta: Delta) -> HostState:
    """The state after a change: whole entries replaced or removed."""
    return HostState(
        host=state.host,
        listen=delta.listen if delta.settings else state.listen,
        tls=delta.tls if delta.settings else state.tls,
        datastores=_merge(state.datastores, delta.datastores),
        vms=_merge(state.vms, delta.vms),
        vvols=_merge(state.vvols, delta.vvols),
        faults={**state.faults, **delta.faults},
    )


def _merge(old: Mapping[str, T], changes: Mapping[str, T | None]) -> dict[str, T]:
    merged = dict(old)
    for key, value in changes.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = value
    return merged


def touched(old: HostState | None, new: HostState) -> set[str]:
    """UUIDs whose VVol, or a datastore it lies on, differs between two states."""
    if old is None:
        return set(new.vvols)
    stores = {name for name in old.datastores | new.datastores if old.datastores.get(name) != new.datastores.get(name)}
    return {
        uuid
        for uuid in old.vvols | new.vvols
        if old.vvols.get(uuid) != new.vvols.get(uuid) or (uuid in new.vvols and stores & _stores(new.vvols[uuid]))
    }


def _stores(spec: VVolSpec) -> set[str]:
    return {leg.datastore for leg in spec.legs}


def describe(
    spec: VVolSpec, objects: Mapping[tuple[str, str], int], *, block_min: int, map_from: int
) -> VolumeDescription:
    """The data plane's description of a VVol; `objects` maps (datastore, object name) to the plane's numbers."""
    return VolumeDescription(
        uuid=bytes.fromhex(spec.uuid.replace("-", "")),
        size=spec.size,
        epoch=spec.epoch,
        generation=spec.generation,
        map_from=map_from,
        map_to=spec.map_version,
        legs=tuple(_leg(leg, objects[leg.datastore, leg.object]) for leg in spec.legs),
        read_only=spec.read_only,
        block_min=block_min,
    )


def limits(spec: VVolSpec) -> VolumeLimits:
    """What the data plane is to hold a VVol to."""
    qos = spec.qos
    if qos is None:
        return VolumeLimits()
    return VolumeLimits(
        iops=qos.iops or 0,
        bandwidth=qos.bandwidth or 0,
        burst_us=round(qos.burst * 1_000_000),
        io_bytes=qos.iops_size or 0,
        shares=qos.shares,
    )


def cache_policy(spec: VVolSpec) -> CachePolicy:
    """What the data plane is to keep of a VVol in the host's cache."""
    cache = spec.cache
    if cache is None:
        return CachePolicy()
    modes = {
        "read": CacheMode.READ,
        "writethrough": CacheMode.WRITETHROUGH,
        "writeback": CacheMode.WRITETHROUGH,  # in RAM, before the log
    }
    return CachePolicy(modes[cache.mode], ahead_bytes=cache.read_ahead, floor_bytes=cache.ram)


def _leg(leg: LegSpec, number: int) -> LegDescription:
    runs = tuple(Run(run.o, run.n, number, run.at, RunState(run.s)) for run in leg.runs)
    return LegDescription(leg.id, _LEG_STATES[leg.state], runs)


def transmission_flags(*, read_only: bool) -> int:
    """What an export offers a client with structured replies; the one place that decides it."""
    flags = (
        TransmissionFlag.HAS_FLAGS
        | TransmissionFlag.SEND_FLUSH
        | TransmissionFlag.SEND_FUA
        | TransmissionFlag.SEND_DF
        | TransmissionFlag.SEND_CACHE
        | TransmissionFlag.CAN_MULTI_CONN
    )
    if read_only:
        return int(flags | TransmissionFlag.READ_ONLY)
    return int(
        flags | TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_FAST_ZERO
    )


def log_policy(spec: LogSpec) -> LogPolicy:
    """What the data plane is told of a VVol's write-back log."""
    held = bytes.fromhex(spec.held) if spec.held else None
    if spec.log is None:
        return LogPolicy(held=held, deadline_ms=round(LOG_DEADLINE_S * 1000))
    return LogPolicy(
        age_ms=round(spec.log.age * 1000),
        bypass_bytes=spec.log.bypass,
        stream_bytes=spec.log.stream,
        destage_rate=spec.log.destage_rate or 0,
        deadline_ms=round(spec.log.deadline * 1000),
        held=held,
        discard=spec.discard,
    )
