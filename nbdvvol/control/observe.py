"""Looking at the hosts: their counters at this moment, and traces of a VVol's requests, summed up.

Nothing of it is kept: each question goes to the filters, so the answer is as fresh as it can be, a restart of control
loses nothing, and it costs nothing while nobody asks.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import structlog

from nbdvvol.control.link import Links, question_id
from nbdvvol.model import link
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.observe import STAGES, CommandTimes, HostCounters, StageTimes, Trace, TracedRequest
from nbdvvol.model.resources import VVol

log = structlog.get_logger()
LOOK_TIMEOUT_S = 2.0
TRACE_GRACE_S = 10.0
"""How much longer than it lasts a trace may take to arrive."""


async def counters(links: Links) -> list[HostCounters]:
    """Counters of every host whose filter answers, by host. One that does not is left out."""
    found = await asyncio.gather(*(_counters(links, host) for host in sorted(links.connected)))
    return [one for one in found if one is not None]


async def _counters(links: Links, host: str) -> HostCounters | None:
    try:
        answer = await links.ask(host, link.Look(id=question_id()), link.Counters, LOOK_TIMEOUT_S)
    except NvError as error:
        if error.code is not Code.UNAVAILABLE:  # else it has just left, or is about to come
            log.warning("no counters of this host", host=host, error=str(error))
        return None
    return answer.counters


async def trace(links: Links, vvol: VVol, seconds: float, count: int, every: int) -> Trace:
    """Have the VVol's host record requests. Raises UNAVAILABLE when nobody serves it, BUSY, TIMEOUT."""
    if vvol.binding is None or vvol.binding.state != "bound":
        state = f"is {vvol.binding.state} on host {vvol.binding.host}" if vvol.binding else "is bound to no host"
        raise NvError(Code.UNAVAILABLE, f"VVol {vvol.full_name} {state}, so it has no requests", "see `nbdvvol status`")
    host = vvol.binding.host
    order = link.TraceOrder(id=question_id(), uuid=vvol.uuid, seconds=seconds, count=count, every=every)
    answer = await links.ask(host, order, link.Traced, seconds + TRACE_GRACE_S)
    if answer.report is None:
        code = Code(answer.code) if answer.code in Code.__members__ else Code.INTERNAL
        raise NvError(code, f"host {host} cannot trace VVol {vvol.full_name}: {answer.error}", answer.hint)
    commands = summary(answer.report.requests)
    return Trace(vvol=vvol.full_name, host=host, commands=commands, **dict(answer.report))


def summary(requests: Sequence[TracedRequest]) -> list[CommandTimes]:
    """All requests of a command together, the commonest command first."""
    by_command: dict[str, list[TracedRequest]] = {}
    for request in requests:
        by_command.setdefault(request.command, []).append(request)
    found = sorted(by_command.items(), key=lambda item: (-len(item[1]), item[0]))
    return [
        CommandTimes(
            command=command,
            requests=len(some),
            errors=sum(request.error != 0 for request in some),
            bytes=sum(request.length for request in some if request.error == 0),
            **{stage: times([request.stages()[stage] for request in some]) for stage in STAGES},
        )
        for command, some in found
    ]


def times(durations_ns: Sequence[int]) -> StageTimes:
    """Percentiles by nearest rank: each is a duration that occurred."""
    ranked = sorted(durations_ns)

    def at(percent: int) -> int:
        return ranked[math.ceil(len(ranked) * percent / 100) - 1]

    return StageTimes(p50_ns=at(50), p90_ns=at(90), p99_ns=at(99), max_ns=ranked[-1])
