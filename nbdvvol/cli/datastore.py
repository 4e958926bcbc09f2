"""`datastore clear-fault`: what an operator decides about a datastore."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from nbdvvol.cli.options import RunOption, Yes, two_words


def register(app: typer.Typer) -> None:
    """Add this noun's commands."""
    two_words(app, "datastore", "Decide about a datastore.", "clear-fault", clear_fault)


def clear_fault(
    name: Annotated[str, typer.Argument(metavar="DATASTORE")],
    yes: Yes = False,
    run: RunOption = None,
) -> None:
    """Let FLUSH succeed again after a failed sync: what was written since the last good one may be lost.

    Until then it fails, whatever restarts, and VVols that were bound to that host move to no other. Where a server
    timed out, restart it first: space that was waiting for that is freed."""
    from nbdvvol.cli.client import Client
    from nbdvvol.cli.output import follow

    with Client.connect(run) as client:
        if not yes and sys.stdin.isatty():
            typer.confirm(
                f"Writes to {name} since its last good flush may be lost. Go on as if they were not?", abort=True
            )
        done = f"{name}: fault cleared; check the file systems of its VVols"
        follow(client, client.clear_fault(name), done, no_wait=False)
