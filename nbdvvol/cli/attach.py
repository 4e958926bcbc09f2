"""`attach`, `detach`: a VVol as a block device of this machine's own kernel."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from nbdvvol.cli.options import SYSTEM_RUN, RunOption, VVolArgument


def register(app: typer.Typer) -> None:
    """Add this noun's commands."""
    app.command()(attach)
    app.command()(detach)


def attach(
    name: VVolArgument,
    device: Annotated[str | None, typer.Option(metavar="/dev/nbdN", help="Which device; left out, a free one.")] = None,
    connections: Annotated[int, typer.Option(min=1, max=16, help="Sockets to spread requests over.")] = 2,
    dead_timeout_s: Annotated[
        int, typer.Option(help="Seconds that I/O waits for a server that is away, before it fails.")
    ] = 300,
    request_timeout_s: Annotated[
        int, typer.Option(help="Seconds after which a request without an answer is sent again.")
    ] = 30,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay; end by Ctrl-C leaves the device.")] = False,
    run: RunOption = None,
) -> None:
    """Attach a VVol to this machine's kernel as /dev/nbdN; comes back by itself after a restart of the filter."""
    from nbdvvol.cli import doors
    from nbdvvol.cli.client import Client

    with Client.connect(run) as client:
        found = client.uri(name)
    doors.attach(
        found.uri,
        name=found.vvol,
        identity=found.identity,
        device=device,
        connections=connections,
        dead_timeout_s=dead_timeout_s,
        request_timeout_s=request_timeout_s,
        run_dir=_run_dir(run),
        foreground=foreground,
    )


def detach(
    name: Annotated[str, typer.Argument(metavar="VVOL|/dev/nbdN", help="What attach was given or printed.")],
    force: Annotated[bool, typer.Option("--force", help="Even if it cannot be flushed: that data is lost.")] = False,
    run: RunOption = None,
) -> None:
    """Flush a device and take it down."""
    from nbdvvol.cli import doors

    doors.detach(_run_dir(run), name, force=force)


def _run_dir(run: Path | None) -> Path:
    """Where attachments are recorded; works too while control is down."""
    named = run or (Path(os.environ["NBDVVOL_RUN"]) if os.environ.get("NBDVVOL_RUN") else None)
    return named or next((path for path in (Path("run"), SYSTEM_RUN) if path.is_dir()), Path("run"))
