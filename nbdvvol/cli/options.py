"""Options that many verbs share."""

from __future__ import annotations

import enum
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

SYSTEM_RUN = Path("/run/nbdvvol")
"""Run directory of the farm that root's service runs."""


class Output(enum.StrEnum):
    """How a reading command prints."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


OutputOption = Annotated[Output, typer.Option("-o", "--output", help="How to print.", show_default=True)]
RunOption = Annotated[
    Path | None,
    typer.Option(
        "--run",
        metavar="DIR",
        help="Run directory of the farm. Else $NBDVVOL_RUN, ./run, /run/nbdvvol; or $NBDVVOL_CONTROL=https://...",
        show_default=False,
    ),
]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Do not wait for the task; print its number.")]
Force = Annotated[
    bool, typer.Option("--force", help="Do not wait for a host that is away; tells first what is at risk.")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
VVolArgument = Annotated[str, typer.Argument(metavar="VVOL", help="VM/NAME, or NAME where that is unique.")]


def two_words(
    app: typer.Typer, first: str, about: str, second: str, command: Callable[..., None], text: str | None = None
) -> None:
    """Add a command whose second word is the only one yet behind its first. `text`: its help, else its docstring."""
    group = typer.Typer(help=about, no_args_is_help=True)
    group.callback()(_nothing)
    group.command(second, help=text)(command)
    app.add_typer(group, name=first)


def _nothing() -> None:
    """Keep the second word, for others to come: typer drops the name of a group's only command."""
