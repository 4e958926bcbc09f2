"""`doctor`: whether this machine can run nbdvvol well, and what to change if not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nbdvvol.cli.options import Output, OutputOption


def register(app: typer.Typer) -> None:
    """Add this noun's commands."""
    app.command()(doctor)


def doctor(
    file: Annotated[
        Path | None, typer.Option("-f", "--file", metavar="FILE", help="Also look at this farm file's datastores.")
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Check kernel, limits, io_uring, the nbd driver and datastores; exit 1 when something needed is missing."""
    from nbdvvol import farmfile
    from nbdvvol.cli import doors
    from nbdvvol.cli.output import emit

    findings = doors.examine(farmfile.load(file) if file else None)
    if output is not Output.TABLE:
        emit(findings, output)
    else:
        for one in findings:
            print(f"{one.verdict:<8} {one.name}: {one.value}" + (f"\n         do: {one.action}" if one.action else ""))
    raise typer.Exit(int(any(one.verdict == "missing" for one in findings)))
