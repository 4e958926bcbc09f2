"""The `nbdvvol` command: all verbs together, and how failures are told."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from nbdvvol import __version__
from nbdvvol.cli import (
    attach,
    cache,
    daemons,
    datastore,
    doctor,
    farm,
    get,
    mirror,
    registry,
    status,
    task,
    trace,
    vvol,
)

app = typer.Typer(
    name="nbdvvol",
    help="Any mix of storage as per-VM virtual volumes, served over NBD.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (daemons, farm, get, vvol, mirror, attach, status, trace, task, cache, datastore, registry, doctor):
    module.register(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"nbdvvol {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run the command; exits with 0, 1 (refused or failed) or 2 (usage)."""
    from nbdvvol.model.errors import Code, NvError

    try:
        app(args=arguments, prog_name="nbdvvol")
    except NvError as error:
        tell(error)
        sys.exit(2 if error.code is Code.USAGE else 1)


def tell(error: Exception) -> None:
    """Print an NvError for people: what, then what to do next."""
    from nbdvvol.model.errors import NvError

    assert isinstance(error, NvError)
    first, *rest = error.message.split("\n")
    hint = f" -- {error.hint}" if error.hint else ""
    if not rest:
        print(f"error: {error.code}: {first}{hint}", file=sys.stderr)
        return
    print(f"error: {error.code}: {1 + len(rest)} things are wrong{hint}", file=sys.stderr)
    for line in (first, *rest):
        print(f"  {line}", file=sys.stderr)
