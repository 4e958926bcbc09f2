"""Mirrors in the words of their neighbours: control's records and reports, the data plane's descriptions. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from nbdvvol.dataplane.mirror import LegOnRecord, LegsRecord, MirrorDescription, MirrorStatus, ReadPolicy
from nbdvvol.dataplane.types import LegDescription, LegState, Run, RunState, VolumeDescription
from nbdvvol.filter.legplace import LegPlace, layout_of, meta_of
from nbdvvol.model.link import VVolSpec
from nbdvvol.model.mirror import Lane, LegProgress, MirrorReport, Record

STATES = {"in-sync": LegState.IN_SYNC, "stale": LegState.STALE, "syncing": LegState.SYNCING}
_READS = {
    "least-outstanding": ReadPolicy.LEAST_OUTSTANDING,
    "primary": ReadPolicy.PRIMARY,
    "nearest": ReadPolicy.NEAREST,
}


def record_of(record: Record) -> LegsRecord:
    """Control's answer, for the leg machine."""
    legs = tuple(LegOnRecord(leg.id, STATES[leg.state], leg.stamp.epoch, leg.stamp.generation) for leg in record.legs)
    return LegsRecord(record.epoch, record.generation, legs)


def record_of_spec(spec: VVolSpec) -> LegsRecord:
    """The record that came with what control wants."""
    legs = tuple(LegOnRecord(leg.id, STATES[leg.state], leg.stamp.epoch, leg.stamp.generation) for leg in spec.legs)
    return LegsRecord(spec.epoch, spec.generation, legs)


def shift_of(spec: VVolSpec) -> int:
    """The size of a region, as a power of two: one that fits every leg's metadata."""
    return max((layout_of(leg, spec.size).region_shift for leg in spec.legs if leg.meta_length), default=22)


def describe_mirror(
    spec: VVolSpec,
    known: LegsRecord,
    places: Mapping[int, LegPlace],
    shift: int,
    block_min: int,
    map_from: int,
    map_to: int,
) -> VolumeDescription:
    """The data plane's description of a mirrored VVol; a leg that is not `described` is absent."""
    assert spec.mirror is not None
    states = {leg.id: leg.state for leg in known.legs}
    legs, metas = [], []
    for place in places.values():
        meta = meta_of(place, spec.size)
        in_sync = states.get(place.id) == LegState.IN_SYNC and meta.object != 0
        runs = tuple(
            Run(run.o, run.n, meta.object, run.at, RunState(run.s)) for run in place.spec.runs if meta.object != 0
        )
        legs.append(LegDescription(place.id, LegState.IN_SYNC if in_sync else LegState.STALE, runs))
        metas.append(meta)
    policy = spec.mirror
    mirror = MirrorDescription(
        region_shift=shift,
        op_deadline_ms=max(round(policy.op_deadline_s * 1000), 1),
        hold_deadline_ms=round(policy.hold_s * 1000),
        intent_idle_ms=round(policy.intent_idle_s * 1000),
        metas=tuple(metas),
        read=_READS[policy.read],
        resync_rate=policy.resync_rate,
    )
    return VolumeDescription(
        uuid=bytes.fromhex(spec.uuid.replace("-", "")),
        size=spec.size,
        epoch=spec.epoch,
        generation=known.generation,
        map_from=map_from,
        map_to=map_to,
        legs=tuple(legs),
        read_only=spec.read_only,
        block_min=block_min,
        mirror=mirror,
    )


def report_of(
    spec: VVolSpec,
    status: MirrorStatus,
    shift: int,
    lanes: Mapping[int, Lane],
    whys: Mapping[int, str],
    since: Mapping[int, int],
    rates: Mapping[int, float],
    *,
    dead: bool,
) -> MirrorReport:
    """How a mirror is, for control. `since`: regions that were to be copied when a leg's copy began."""
    found = {leg.id: leg for leg in status.legs}
    legs = []
    for number, lane in lanes.items():
        seen = found.get(number)
        progress = LegProgress(id=number, lane=lane, why=whys.get(number, ""))
        if seen is not None:
            dirty = seen.dirty_regions << shift
            rate = rates.get(number, 0.0)
            progress.dirty_bytes = min(dirty, spec.size)
            progress.outstanding, progress.reads, progress.latency_ns = seen.outstanding, seen.reads, seen.latency_ns
            if number in since:
                progress.copied_bytes = max(since[number] - seen.dirty_regions, 0) << shift
                progress.rate = int(rate)
                progress.eta_s = dirty / rate if rate else None
        legs.append(progress)
    if dead or status.fenced:
        state = "fenced"
    elif status.expired:
        state = "expired"
    elif status.frozen:
        state = "frozen"
    else:
        state = "attaching" if status.attaching else "serving"
    return MirrorReport.model_validate(
        {
            "uuid": spec.uuid,
            "epoch": spec.epoch,
            "state": state,
            "region_bytes": 1 << shift,
            "intent_regions": status.intents,
            "doubtful_regions": status.doubtful,
            "repairs": status.repairs,
            "legs": legs,
        }
    )
