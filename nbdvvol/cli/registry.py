"""`registry rebuild`: a registry anew, from what the datastores say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nbdvvol.cli.options import Output, OutputOption, two_words

if TYPE_CHECKING:
    from nbdvvol.model.rebuild import Rebuilt, RebuiltLeg
    from nbdvvol.model.resources import Problem


def register(app: typer.Typer) -> None:
    """Add this noun's commands."""
    two_words(app, "registry", "What control knows, when it is lost.", "rebuild", rebuild)


def rebuild(
    file: Annotated[
        Path, typer.Option("-f", "--file", metavar="FILE", help="The farm file: where the datastores are.")
    ],
    state: Annotated[Path, typer.Option("--state", metavar="DIR", help="Control's state directory.")] = Path("state"),
    without: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Go on without this datastore, or one leg (UUID:LEG): what it alone had is lost. Again for more.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it would hold, write nothing.")] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Rebuild a lost or outdated registry from the datastores' headers, labels and map copies.

    Control must be stopped; filters may run. The registry that is there is moved aside. It is refused while a leg that
    may be newer is missing; what cannot be decided is told, each with what to do."""
    from nbdvvol.cli import doors
    from nbdvvol.cli.output import emit
    from nbdvvol.model.errors import Code, NvError

    found = doors.rebuild(file, state=state, without=without or [], dry_run=dry_run)
    if output is Output.TABLE:
        _print(found)
    else:
        emit(found, output)
    if found.blockers:
        lines = "\n".join(_line(one) for one in found.blockers)
        raise NvError(Code.CONFLICT, lines, "nothing was written")
    if output is Output.TABLE:
        _say_done(found, state, file)


def _print(found: Rebuilt) -> None:
    from nbdvvol.cli.output import table
    from nbdvvol.model.units import format_size

    table(
        ("datastore", "found", "size", "legs", "uuid"),
        [(one.name, one.found, format_size(one.size), one.legs, one.uuid) for one in found.datastores],
    )
    rows = [
        (vvol.full_name, format_size(vvol.size), vvol.epoch, vvol.generation, leg.id, leg.datastore, *_leg(leg))
        for vvol in found.vvols
        for leg in vvol.legs
    ]
    if rows:
        print()
        table(("vvol", "size", "epoch", "generation", "leg", "datastore", "state", "label", "why"), rows)
    for note in found.notes:
        print(f"\n{_line(note)}")


def _leg(leg: RebuiltLeg) -> tuple[str, str, str]:
    state = leg.life if leg.life == "leaving" else leg.state
    return state, f"{leg.stamp.epoch}.{leg.stamp.generation}", leg.why


def _line(one: Problem) -> str:
    return f"{one.code} {one.subject}: {one.message}" + (f" -- {one.action}" if one.action else "")


def _say_done(found: Rebuilt, state: Path, file: Path) -> None:
    if not found.written:
        print(f"\n{len(found.vvols)} VVols; nothing was written (--dry-run)")
        return
    old = f"; the old one is {found.moved}" if found.moved else ""
    print(f"\nrebuilt: {state / 'registry.db'} has {len(found.vvols)} VVols{old}")
    print(f"start control and apply the farm file; in one: nbdvvol up -f {file} --state {state}")
