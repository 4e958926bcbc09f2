"""`cache drain`: what an operator does about a VVol's cache."""

from __future__ import annotations

import typer

from nbdvvol.cli.options import NoWait, RunOption, VVolArgument


def register(app: typer.Typer) -> None:
    """Add this noun's commands."""
    noun = typer.Typer(help="Work on a VVol's cache.", no_args_is_help=True)
    noun.callback()(_nothing)
    noun.command("drain")(drain)
    app.add_typer(noun, name="cache")


def _nothing() -> None:
    """Keep `drain` a word of its own, for verbs to come."""


def drain(name: VVolArgument, no_wait: NoWait = False, run: RunOption = None) -> None:
    """Write out what the host alone has of a VVol, and tell how that ended.

    The modes read and writethrough keep nothing that the VVol's storage has not: for them it is done at once."""
    from nbdvvol.cli.client import Client
    from nbdvvol.cli.output import wait_task

    with Client.connect(run) as client:
        full = client.resolve(name)
        ref = client.drain_cache(full)
        if no_wait:
            print(f"task {ref.task.id}")
            return
        print(f"{full}: {wait_task(client, ref.task.id).detail}")
