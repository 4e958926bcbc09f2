"""`datastore clear-fault`: what an operator decides about a datastore."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from nbdvvol.cli.options import RunOption


def register(app: typer.Typer) -> None:
    """Add this noun's commands."""
    noun = typer.Typer(help="Decide about a datastore.", no_args_is_help=True)
    noun.callback()(_nothing)
    noun.command("clear-fault")(clear_fault)
    app.add_typer(noun, name="datastore")


def _nothing() -> None:
    """Keep `clear-fault` a word of its own, for verbs to come."""


def clear_fault(
    name: Annotated[str, typer.Argument(metavar="DATASTORE")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    run: RunOption = None,
) -> None:
    """Let FLUSH succeed again after a failed sync: what was written since the last good one may be lost.

    Until then it fails, whatever restarts, and VVols that were bound to that host move to no other."""
    from nbdvvol.cli.client import Client
    from nbdvvol.cli.output import follow

    with Client.connect(run) as client:
        if not yes and sys.stdin.isatty():
            typer.confirm(
                f"Writes to {name} since its last good flush may be lost. Go on as if they were not?", abort=True
            )
        done = f"{name}: fault cleared; check the file systems of its VVols"
        follow(client, client.clear_fault(name), done, no_wait=False)
