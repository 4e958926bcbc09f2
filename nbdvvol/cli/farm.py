"""`apply`, `check`, `schema`: what is done with a farm file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nbdvvol.cli.options import NoWait, Output, OutputOption, RunOption

FileOption = Annotated[Path, typer.Argument(metavar="FILE", help="The farm file.")]


def register(app: typer.Typer) -> None:
    """Add this noun's commands."""
    app.command()(apply)
    app.command()(check)
    app.command()(schema)


def apply(
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="The farm file.")] = None,
    option: Annotated[Path | None, typer.Option("-f", "--file", metavar="FILE", help="The same, as an option.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the difference, change nothing.")] = False,
    no_wait: NoWait = False,
    output: OutputOption = Output.TABLE,
    run: RunOption = None,
) -> None:
    """Make the farm what its file says. A VVol is never deleted by its absence."""
    from nbdvvol import farmfile
    from nbdvvol.cli.client import Client
    from nbdvvol.cli.output import emit, table, wait_task

    path = file or option
    if path is None or (file and option):
        raise typer.BadParameter("name one farm file: nbdvvol apply FILE")
    farm = farmfile.load(path)
    with Client.connect(run) as client:
        result = client.apply(farm, dry_run=dry_run)
        if output is not Output.TABLE:
            emit(result, output)
        else:
            rows = [
                (one.action, one.kind, one.name, one.detail)
                for one in result.changes
                if one.action != "keep" or one.detail
            ]
            kept = len(result.changes) - len(rows)
            if rows:
                table(("action", "kind", "name", "detail"), rows)
            print(f"{kept} unchanged" if not dry_run else f"{kept} unchanged; nothing was done (--dry-run)")
        if not dry_run and not no_wait:
            for number in result.tasks:
                wait_task(client, number)


def check(file: FileOption) -> None:
    """Check a farm file without a running farm; tells every error with its position."""
    from nbdvvol import farmfile

    farm = farmfile.load(file)
    vvols = sum(len(vm.vvols) for vm in farm.vms.values())
    print(f"{file}: {len(farm.datastores)} datastores, {len(farm.vms)} VMs, {vvols} VVols; nothing wrong")


def schema() -> None:
    """Print the farm file's JSON Schema, for editors."""
    import json

    from nbdvvol import farmfile

    print(json.dumps(farmfile.schema(), indent=2))
