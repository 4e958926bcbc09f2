"""`cache drain`: what an operator does about a VVol's cache."""

from __future__ import annotations

import typer

from nbdvvol.cli.options import NoWait, RunOption, VVolArgument, two_words


def register(app: typer.Typer) -> None:
    """Add this noun's commands."""
    two_words(app, "cache", "Work on a VVol's cache.", "drain", drain)


def drain(name: VVolArgument, no_wait: NoWait = False, run: RunOption = None) -> None:
    """Write out what the host alone has of a VVol, and tell how that ended.

    The modes read and writethrough keep nothing that the VVol's storage has not: for them it is done at once."""
    from nbdvvol.cli.client import Client
    from nbdvvol.cli.output import follow

    with Client.connect(run) as client:
        follow(client, client.drain_cache(name), None, no_wait=no_wait)
