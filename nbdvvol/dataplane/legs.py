"""Mirrors over the C library: descriptions, events, states, and the leg machine (types in mirror.py)."""

from __future__ import annotations

import struct
from typing import Any

from nbdvvol.dataplane.ffi import ffi, lib
from nbdvvol.dataplane.mirror import (
    Act,
    LaneState,
    LaneStatus,
    LegLook,
    LegsAction,
    LegsRecord,
    MirrorDescription,
    MirrorEvent,
    MirrorEventKind,
    MirrorStatus,
)

_MIRROR = struct.Struct("=IIIII4xQ")
_META = struct.Struct("=QQI4x")
_KINDS = {getattr(lib, f"NV_EVENT_{kind.value}"): kind for kind in MirrorEventKind}
_NUMBERS = {kind: number for number, kind in _KINDS.items()}
_ARGS = 5


def encode_mirror(mirror: MirrorDescription) -> bytes:
    """What follows the legs of a description. Raises struct.error when a number does not fit its field."""
    policy = _MIRROR.pack(
        mirror.region_shift,
        mirror.read,
        mirror.op_deadline_ms,
        mirror.hold_deadline_ms,
        mirror.intent_idle_ms,
        mirror.resync_rate,
    )
    return policy + b"".join(_META.pack(meta.offset, meta.bitmap_bytes, meta.object) for meta in mirror.metas)


def decode_event(event: Any) -> MirrorEvent | None:
    """The event if it is a mirror's."""
    kind = _KINDS.get(event.kind)
    return None if kind is None else MirrorEvent(kind, event.volume, event.result, event.token, tuple(event.args))


def decode_status(status: Any) -> MirrorStatus:
    """How a mirror is."""
    legs = []
    for index in range(status.leg_count):
        leg = status.legs[index]
        state = LaneState(leg.state)
        legs.append(LaneStatus(leg.id, state, leg.outstanding, leg.dirty_regions, leg.reads, leg.latency_ns))
    return MirrorStatus(
        attaching=bool(status.flags & lib.NV_MIRROR_ATTACHING),
        frozen=bool(status.flags & lib.NV_MIRROR_FROZEN),
        expired=bool(status.flags & lib.NV_MIRROR_EXPIRED),
        fenced=bool(status.flags & lib.NV_MIRROR_FENCED),
        regions=status.regions,
        intents=status.intents,
        doubtful=status.doubtful,
        copied_bytes=status.copied_bytes,
        repairs=status.repairs,
        legs=tuple(legs),
    )


class Legs:
    """The leg machine of one mirror at one epoch (mirror.LegMachine)."""

    def __init__(self, epoch: int) -> None:
        pointer = lib.nv_legs_create(epoch)
        if pointer == ffi.NULL:
            raise MemoryError("no memory for a leg machine")
        self._legs = ffi.gc(pointer, lib.nv_legs_free)

    def begin(self, record: LegsRecord, looks: tuple[LegLook, ...]) -> None:
        """Every leg of the record has been looked at."""
        assert len(looks) == len(record.legs)
        encoded = ffi.new("nv_leg_look[]", max(len(looks), 1))
        for index, look in enumerate(looks):
            _encode_look(encoded[index], look)
        lib.nv_legs_begin(self._legs, _encode_record(record), encoded)

    def told(self, record: LegsRecord) -> None:
        """The registry's record came."""
        lib.nv_legs_told(self._legs, _encode_record(record))

    def ask_again(self) -> None:
        """What was asked may be lost."""
        lib.nv_legs_ask_again(self._legs)

    def event(self, event: MirrorEvent) -> None:
        """An event of the mirror's volume."""
        encoded = ffi.new("nv_event *")
        encoded.kind, encoded.result, encoded.token = _NUMBERS[event.kind], event.result, event.token
        encoded.volume = event.volume
        for index, value in enumerate(event.args[:_ARGS]):
            encoded.args[index] = value
        lib.nv_legs_event(self._legs, encoded)

    def looked(self, leg: int, look: LegLook) -> None:
        """A stale leg was looked at."""
        encoded = ffi.new("nv_leg_look *")
        _encode_look(encoded, look)
        lib.nv_legs_looked(self._legs, leg, encoded)

    def want_resync(self, leg: int, *, full: bool) -> None:
        """Resync the leg as soon as that is possible."""
        lib.nv_legs_want_resync(self._legs, leg, full)

    def next(self) -> LegsAction | None:
        """The next thing to do."""
        out = ffi.new("nv_legs_action *")
        if not lib.nv_legs_next(self._legs, out):
            return None
        return LegsAction(
            Act(out.kind),
            leg=out.leg,
            ask=out.ask,
            full=bool(out.full),
            why=out.why,
            token=out.token,
            epoch=out.epoch,
            generation=out.generation,
            stamp_epoch=out.stamp_epoch,
            stamp_generation=out.stamp_generation,
        )


def _encode_look(out: Any, look: LegLook) -> None:
    out.look, out.syncing, out.epoch, out.generation = look.look, look.syncing, look.epoch, look.generation


def _encode_record(record: LegsRecord) -> Any:
    out = ffi.new("nv_legs_record *")
    out.epoch, out.generation, out.leg_count = record.epoch, record.generation, len(record.legs)
    for index, leg in enumerate(record.legs):
        at = out.legs[index]
        at.id, at.state = leg.id, leg.state
        at.stamp_epoch, at.stamp_generation = leg.stamp_epoch, leg.stamp_generation
    return out
