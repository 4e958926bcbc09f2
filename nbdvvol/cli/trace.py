"""`trace`: the next requests of a VVol, one by one, and where their time goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from nbdvvol.cli.options import Output, OutputOption, RunOption, VVolArgument

if TYPE_CHECKING:
    from nbdvvol.model.observe import CommandTimes, Trace

SLOWEST = 5


def register(app: typer.Typer) -> None:
    """Add this verb."""
    app.command()(trace)


def trace(
    name: VVolArgument,
    seconds: Annotated[float, typer.Option(min=0.001, max=60.0, help="How long to wait for requests.")] = 5.0,
    count: Annotated[int, typer.Option(min=1, max=10_000, help="End after so many.")] = 1000,
    every: Annotated[int, typer.Option(min=1, max=1_000_000, help="Record one of so many, over a longer time.")] = 1,
    output: OutputOption = Output.TABLE,
    run: RunOption = None,
) -> None:
    """Record a VVol's next requests and print where their time goes; -o json and yaml have each single one.

    Stages: `parse` until a request that has arrived is read; `submit` until its storage is asked (it waits for its
    VVol's limits, its payload, memory, requests that it overlaps); `complete` until the storage has answered; `send`
    until the kernel has the reply."""
    from nbdvvol.cli.client import Client
    from nbdvvol.cli.output import emit

    with Client.connect(run) as client:
        found = client.trace(name, seconds=seconds, count=count, every=every)
    if output is Output.TABLE:
        _print(found, count)
    else:
        emit(found, output)


def _print(found: Trace, count: int) -> None:
    from nbdvvol.cli.output import amount, duration, table
    from nbdvvol.model.observe import STAGES

    print(_headline(found, count))
    if not found.requests:
        return
    print()
    heads = ("command", "requests", "errors", "bytes", "stage", "p50", "p90", "p99", "max")
    table(heads, (row for one in found.commands for row in _rows(one)))
    print(f"\nslowest of {len(found.requests)}:")
    slowest = sorted(found.requests, key=lambda request: request.stages()["total"], reverse=True)[:SLOWEST]
    table(
        ("command", "offset", "length", "at", *STAGES, "error"),
        (
            (
                "+".join((r.command, *r.flags)),
                r.offset,
                amount(r.length),
                duration(r.received_ns),
                *map(duration, r.stages().values()),
                r.error or "",
            )
            for r in slowest
        ),
    )


def _headline(found: Trace, count: int) -> str:
    each = f"one of {found.every} requests, " if found.every > 1 else ""
    text = f"{found.vvol} on host {found.host}: {each}{len(found.requests)} recorded in {found.seconds:.3f} s"
    if found.ended == "count":
        text += f"; ended at --count {count}"
    elif found.ended == "closed":
        text += "; ended early, because the VVol was closed, moved or opened anew"
    if found.dropped:
        text += f"; {found.dropped} more came too fast to be recorded"
    return text


def _rows(times: CommandTimes) -> list[tuple[object, ...]]:
    from nbdvvol.cli.output import amount, duration
    from nbdvvol.model.observe import STAGES, StageTimes

    rows = []
    for stage in STAGES:
        took = getattr(times, stage)
        assert isinstance(took, StageTimes), "each stage has its times"
        about = (times.command, times.requests, times.errors, amount(times.bytes)) if stage == "parse" else (" ",) * 4
        rows.append((*about, stage, *(duration(ns) for ns in (took.p50_ns, took.p90_ns, took.p99_ns, took.max_ns))))
    return rows
