"""`status`: how the farm is, what is wrong, what to do next."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from nbdvvol.cli.options import Output, OutputOption, RunOption

if TYPE_CHECKING:
    from nbdvvol.model.resources import Status


def register(app: typer.Typer) -> None:
    """Add this noun's commands."""
    app.command()(status)


def status(
    problems_only: Annotated[bool, typer.Option("-x", help="Only what is wrong; exit 1 if anything is.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again and again: rates, until Ctrl-C.")] = False,
    every_s: Annotated[float, typer.Option("--every", metavar="SECONDS", min=0.2, help="With --watch: how often.")] = 2,
    output: OutputOption = Output.TABLE,
    run: RunOption = None,
) -> None:
    """Print the farm's hosts, datastores and VVols, what they have done, running tasks and problems.

    With --watch: what VVols, datastores and reactors do per second."""
    from nbdvvol.cli.client import Client
    from nbdvvol.cli.output import emit

    before: Status | None = None
    with Client.connect(run) as client:
        while True:
            found = client.status()
            if watch and sys.stdout.isatty():
                print("\x1b[H\x1b[2J", end="")
            if output is Output.TABLE:
                _print(found, problems_only, live=watch, before=before)
                before = found
            else:
                emit(found.problems if problems_only else found, output)
            sys.stdout.flush()
            if not watch:
                raise typer.Exit(int(problems_only and bool(found.problems)))
            time.sleep(every_s)


def _print(found: Status, problems_only: bool, *, live: bool, before: Status | None) -> None:
    from nbdvvol.cli.counters import tables
    from nbdvvol.cli.output import table

    if not problems_only:
        print(f"nbdvvol {found.version}, revision {found.revision}")
        _print_things(found, live)
        for heads, rows in tables(found.counters, (before.counters if before else []) if live else None):
            print()
            table(heads, rows)
        print()
    if not found.problems:
        print("all is well")
    for problem in found.problems:
        print(f"{problem.code} {problem.subject}: {problem.message}\n  do: {problem.action}")


def _print_things(found: Status, live: bool) -> None:
    """What there is; while it is watched, only what goes on."""
    from nbdvvol.cli.get import Kind, columns
    from nbdvvol.cli.mirror import HEADS, leg_rows
    from nbdvvol.cli.output import table

    things: list[tuple[Kind, Sequence[object]]] = [
        (Kind.HOSTS, found.hosts),
        (Kind.DATASTORES, found.datastores),
        (Kind.VVOLS, found.vvols),
    ]
    active = [task for task in found.tasks if task.state in ("queued", "running")]
    legs = list(leg_rows(found.vvols))
    for kind, items in [*([] if live else things), (Kind.TASKS, active)]:
        if items:
            heads, row = columns(kind)
            print()
            table(heads, map(row, items))
        if kind is Kind.TASKS and legs:
            print()
            table(HEADS, legs)
