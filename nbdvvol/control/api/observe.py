"""Routes that look at the hosts while they work: counters, traces, and Prometheus' `/metrics`."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import PlainTextResponse

from nbdvvol.control.metrics import render
from nbdvvol.control.registry import views
from nbdvvol.control.service import Control
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.observe import HostCounters, Trace, TraceCount, TraceEvery, TraceSeconds
from nbdvvol.model.resources import Reactor

LISTEN_EVERY_S = 0.2


def observe_routes(control: Control) -> APIRouter:
    """GET routes."""
    router = APIRouter()

    @router.get("/v1/counters")
    async def counters() -> list[HostCounters]:
        """What every host's filter has counted by now; hosts that do not answer are left out."""
        return await control.counters()

    @router.get("/v1/reactors")
    async def reactors() -> list[Reactor]:
        """Every data plane thread of every host that answers."""
        return await control.reactors()

    @router.get("/v1/vvols/{vm}/{name}/trace")
    async def trace(
        request: Request,
        vm: str,
        name: str,
        seconds: Annotated[TraceSeconds, Query()] = 5.0,
        count: Annotated[TraceCount, Query()] = 1000,
        every: Annotated[TraceEvery, Query()] = 1,
    ) -> Trace:
        """Record a VVol's requests from now on, until there are enough or the time is over; hanging up ends it."""
        return await _while_heard(request, asyncio.create_task(control.trace(vm, name, seconds, count, every)))

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics(accept: Annotated[str, Header()] = "") -> Response:
        """Everything that counts or has a level, in Prometheus' text form (or OpenMetrics, when asked for)."""
        content, kind = render(await control.status(), await control.registry.run(views.task_counts), accept)
        return Response(content, media_type=kind)

    return router


async def _while_heard(request: Request, work: asyncio.Task[Trace]) -> Trace:
    """The work's result; the work ends when the client hangs up."""
    try:
        while not work.done():
            await asyncio.wait([work], timeout=LISTEN_EVERY_S)
            if await request.is_disconnected():
                break
        else:
            return work.result()
    finally:
        work.cancel()
    raise NvError(Code.UNAVAILABLE, "the client has hung up")
