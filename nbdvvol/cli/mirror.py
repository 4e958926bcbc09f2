"""`mirror add-leg|remove-leg|resync|verify`: the copies of a VVol; also how `describe` and `status` show them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from nbdvvol.cli.options import NoWait, Output, OutputOption, RunOption, VVolArgument, Yes

if TYPE_CHECKING:
    from nbdvvol.cli.client import Client
    from nbdvvol.model.resources import Leg, LegNow, VVol

POLL_S = 0.3
STUCK_S = 15.0
"""A leg that nothing is copied to for so long is not waited for: its host tries again by itself, for as long as it is
needed."""
LegArgument = Annotated[str, typer.Argument(metavar="LEG", help="Its number, or its datastore.")]


def register(app: typer.Typer) -> None:
    """Add this noun's commands."""
    noun = typer.Typer(help="Copies of a VVol: add, remove, copy again, compare.", no_args_is_help=True)
    noun.command("add-leg")(add_leg)
    noun.command("remove-leg")(remove_leg)
    noun.command()(resync)
    noun.command()(verify)
    app.add_typer(noun, name="mirror")


def add_leg(
    name: VVolArgument,
    datastore: Annotated[str, typer.Option(help="Where the new copy is to lie.")],
    no_wait: NoWait = False,
    output: OutputOption = Output.TABLE,
    run: RunOption = None,
) -> None:
    """Give a VVol another copy on a datastore; its host copies to it from then on."""
    from nbdvvol.cli.client import Client
    from nbdvvol.cli.output import follow

    with Client.connect(run) as client:
        full = client.resolve(name)
        done = (
            f"{full} has a leg on datastore {datastore}, which is copied to from now on: nbdvvol describe vvol {full}"
        )
        follow(client, client.add_leg(full, datastore), done, no_wait=no_wait, output=output)


def remove_leg(
    name: VVolArgument,
    leg: LegArgument,
    yes: Yes = False,
    no_wait: NoWait = False,
    output: OutputOption = Output.TABLE,
    run: RunOption = None,
) -> None:
    """Take a copy away, never the last one that is in sync; its space is overwritten with zeros before it is free."""
    from nbdvvol.cli.client import Client
    from nbdvvol.cli.output import follow

    with Client.connect(run) as client:
        full = client.resolve(name)
        if not yes and sys.stdin.isatty():
            typer.confirm(f"Remove leg {leg} of {full}?", abort=True, err=True)
        ref = client.remove_leg(full, leg)
        follow(client, ref, f"{full} has no leg {leg} any more", no_wait=no_wait, output=output)


def resync(
    name: VVolArgument,
    leg: Annotated[str | None, typer.Argument(help="Its number, or its datastore; left out, every stale one.")] = None,
    full_copy: Annotated[bool, typer.Option("--full", help="Copy everything, not only what differs.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Stop copying, and leave it stale.")] = False,
    no_wait: NoWait = False,
    output: OutputOption = Output.TABLE,
    run: RunOption = None,
) -> None:
    """Copy to legs that are not in sync, at once, and wait until they are."""
    from nbdvvol.cli.client import Client
    from nbdvvol.cli.output import emit

    if full_copy and stop:
        raise typer.BadParameter("--full and --stop exclude each other")
    with Client.connect(run) as client:
        vvol = client.vvol(name)
        named = [leg] if leg is not None else [str(one.id) for one in _live(vvol) if one.state != "in-sync"]
        for one in named:
            vvol = client.resync(vvol.full_name, one, full=full_copy, stop=stop)
        numbers = {one.id for one in _live(vvol) if str(one.id) in named or one.datastore in named}
        if not (stop or no_wait):
            vvol = _until_in_sync(client, vvol.full_name, numbers)
        if output is not Output.TABLE:
            emit(vvol, output)
        elif not named:
            print(f"every leg of {vvol.full_name} is in sync")
        else:
            for copy in _live(vvol):
                if copy.id in numbers:
                    print(f"leg {copy.id} of {vvol.full_name}: {leg_words(copy)}")


def verify(
    name: VVolArgument,
    repair: Annotated[
        bool | None,
        typer.Option("--repair/--report", help="Make legs what the first has, or only tell; else as the profile says."),
    ] = None,
    no_wait: NoWait = False,
    output: OutputOption = Output.TABLE,
    run: RunOption = None,
) -> None:
    """Compare the legs that are in sync, while they are in use; exit 1 when they differ and are left so."""
    from nbdvvol.cli.client import Client
    from nbdvvol.cli.output import follow

    with Client.connect(run) as client:
        full = client.resolve(name)
        follow(client, client.verify(full, repair), None, no_wait=no_wait, output=output)
        if not no_wait and client.vvol(full).differed:
            raise typer.Exit(1)


def _live(vvol: VVol) -> list[Leg]:
    return [leg for leg in vvol.legs if leg.life == "live"]


def _until_in_sync(client: Client, name: str, numbers: set[int]) -> VVol:
    """Wait for copies, showing them on a terminal. Raises NvError when nothing has moved for `STUCK_S`."""
    from nbdvvol.model.errors import Code, NvError

    moved_s = time.monotonic()
    before: object = None
    while True:
        vvol = client.vvol(name)
        left = [leg for leg in _live(vvol) if leg.id in numbers and leg.state != "in-sync"]
        _show(left)
        if not left:
            return vvol
        now = [(leg.id, leg.state, leg.now.lane, leg.now.copied_bytes) for leg in left if leg.now is not None]
        copies = any(leg.now is not None and leg.now.progress is not None for leg in left)
        if now != before or copies:
            before, moved_s = now, time.monotonic()
        elif time.monotonic() - moved_s > STUCK_S:
            told = "; ".join(f"leg {leg.id}: {leg_words(leg)}" for leg in left)
            hint = "its host tries again by itself: nbdvvol status -x tells what is in the way"
            raise NvError(Code.UNAVAILABLE, f"nothing is copied to VVol {name} now: {told}", hint)
        time.sleep(POLL_S)


def _show(left: Sequence[Leg]) -> None:
    from nbdvvol.cli.output import show_line

    if sys.stderr.isatty():
        show_line("; ".join(f"leg {leg.id}: {leg_words(leg)}" for leg in left))


# ---- how legs are shown ----


def state_words(leg: Leg) -> str:
    """The registry's state of a leg, and the host's where that says more."""
    if leg.life != "live":
        return leg.life
    lane = leg.now.lane if leg.now is not None else leg.state
    return leg.state if lane == leg.state else f"{leg.state} ({lane})"


def leg_words(leg: Leg) -> str:
    """A leg of a mirror in one line."""
    said = [f"{state_words(leg)} on {leg.datastore}{f' file {leg.object}' if leg.object else ''}"]
    now = leg.now
    if now is not None and now.progress is not None:
        said.append(now.copy_words())
    elif now is not None and now.dirty_regions:
        said.append(f"{now.dirty_regions} regions dirty")
    if leg.reason and leg.state != "in-sync":
        said.append(leg.reason)
    if leg.resync == "off":
        said.append("left so by request")
    if leg.replaces is not None:
        said.append(f"a spare for leg {leg.replaces}")
    said.append("its server fences" if leg.fences else "cannot fence")
    return ", ".join(said)


def mirror_words(vvol: VVol) -> str:
    """How a mirror is run, and how it is."""
    from nbdvvol.model.units import format_duration

    if vvol.mirror is None:
        return ""
    policy, now = vvol.mirror, vvol.now
    said = [f"reads {policy.read}", f"holds writes {format_duration(policy.hold)}"]
    if policy.lease is not None:
        said.append(f"lease {format_duration(policy.lease)}")
    if now is not None:
        said = [f"{now.state} on host {now.host}", *said]
        said.append(f"{now.intent_regions} regions written to lately")
        if now.doubtful_regions:
            said.append(f"{now.doubtful_regions} regions being made alike after a crash")
        if now.repairs:
            said.append(f"{now.repairs} reads mended")
    if vvol.differed:
        said.append(f"last comparison: {vvol.differed}")
    return ", ".join(said)


HEADS = ("vvol", "leg", "datastore", "state", "regions", "dirty", "copied", "done", "rate", "to_go", "why")


def leg_rows(vvols: Iterable[VVol]) -> Iterator[tuple[object, ...]]:
    """Rows of the legs of mirrors, for `status`."""
    for vvol in vvols:
        for leg in vvol.legs if vvol.mirror is not None else ():
            runs = _run_cells(leg.now) if leg.now is not None else ("",) * 6
            why = leg.reason if leg.state != "in-sync" else ""
            yield vvol.full_name, leg.id, leg.datastore, state_words(leg), *runs, why


def _run_cells(now: LegNow) -> tuple[object, ...]:
    from nbdvvol.model.units import about_size, about_time

    return (
        now.dirty_regions,
        about_size(now.dirty_bytes),
        about_size(now.copied_bytes) if now.progress is not None else "",
        f"{now.progress:.0%}" if now.progress is not None else "",
        f"{about_size(now.rate)}/s" if now.rate else "",
        about_time(now.eta_s) if now.eta_s is not None else "",
    )
