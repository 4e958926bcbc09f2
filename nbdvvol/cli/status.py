"""`status`: how the farm is, what is wrong, what to do next."""

from __future__ import annotations

import sys
import time
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
    watch: Annotated[float | None, typer.Option(metavar="SECONDS", min=0.2, help="Print again this often.")] = None,
    output: OutputOption = Output.TABLE,
    run: RunOption = None,
) -> None:
    """Print the farm's hosts, datastores, VVols, running tasks and problems."""
    from nbdvvol.cli.client import Client
    from nbdvvol.cli.output import emit

    with Client.connect(run) as client:
        while True:
            found = client.status()
            if watch and sys.stdout.isatty():
                print("\x1b[H\x1b[2J", end="")
            if output is Output.TABLE:
                _print(found, problems_only)
            else:
                emit(found.problems if problems_only else found, output)
            sys.stdout.flush()
            if not watch:
                raise typer.Exit(int(problems_only and bool(found.problems)))
            time.sleep(watch)


def _print(found: Status, problems_only: bool) -> None:
    from nbdvvol.cli.get import Kind, columns
    from nbdvvol.cli.output import table

    if not problems_only:
        print(f"nbdvvol {found.version}, revision {found.revision}")
        active = [task for task in found.tasks if task.state in ("queued", "running")]
        for kind, items in (
            (Kind.HOSTS, found.hosts),
            (Kind.DATASTORES, found.datastores),
            (Kind.VVOLS, found.vvols),
            (Kind.TASKS, active),
        ):
            if items:
                heads, row = columns(kind)
                print()
                table(heads, map(row, items))
        print()
    if not found.problems:
        print("all is well")
    for problem in found.problems:
        print(f"{problem.code} {problem.subject}: {problem.message}\n  do: {problem.action}")
