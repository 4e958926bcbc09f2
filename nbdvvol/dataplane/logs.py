"""Write-back logs over the C library: policies, findings, events, figures (types in log.py)."""

from __future__ import annotations

from typing import Any

from nbdvvol.dataplane.ffi import ffi, lib
from nbdvvol.dataplane.log import (
    ID_BYTES,
    LogEvent,
    LogEventKind,
    LogFound,
    LogPolicy,
    LogState,
    LogStats,
    LogVerdict,
    LostSpan,
)

_KINDS = {getattr(lib, f"NV_EVENT_{kind.value}"): kind for kind in LogEventKind}


def encode_policy(policy: LogPolicy) -> Any:
    """The C form of a policy. Raises OverflowError when a number does not fit its field."""
    out = ffi.new("nv_log_policy *")
    out.id = policy.held or bytes(ID_BYTES)
    out.fresh = policy.fresh
    out.begin = policy.begin
    out.dirty = policy.held is not None
    out.discard = policy.discard
    out.beside = policy.beside
    out.bypass_bytes = policy.bypass_bytes
    out.stream_bytes = policy.stream_bytes
    out.age_ms = policy.age_ms
    out.deadline_ms = policy.deadline_ms
    out.destage_rate = policy.destage_rate
    return out


def decode_found(event: Any) -> LogFound:
    """What LOG_OPENED says."""
    word = ffi.string(lib.nv_log_verdict_word(event.args[0])).decode()
    identity = bytes(ffi.buffer(event.args)[24:40])
    return LogFound(LogVerdict(word), -event.result, event.args[1], event.args[2], identity)


def decode_event(event: Any) -> LogEvent | None:
    """The event if a log tells it by itself."""
    kind = _KINDS.get(event.kind)
    if kind is None or (kind is LogEventKind.DRAINED and event.token != 0):
        return None
    return LogEvent(kind, event.volume, -event.result, event.args[0], event.args[1])


def decode_status(status: Any) -> LogStats:
    """How a log is."""
    figures = {name: int(getattr(status, name)) for name in LogStats.__slots__ if name != "state"}
    return LogStats(state=LogState(status.state), **figures)


def decode_lost(spans: Any, count: int) -> list[LostSpan]:
    """Where what is lost lies."""
    return [LostSpan(int(spans[number].offset), int(spans[number].length)) for number in range(count)]
