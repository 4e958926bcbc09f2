"""`cache drain|discard|recover`: what an operator does about a VVol's cache and its write-back log."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from nbdvvol.cli.options import NoWait, RunOption, VVolArgument, Yes

if TYPE_CHECKING:
    from nbdvvol.model.observe import LogCounters
    from nbdvvol.model.resources import VVol


def register(app: typer.Typer) -> None:
    """Add this noun's commands."""
    group = typer.Typer(help="Work on a VVol's cache and its write-back log.", no_args_is_help=True)
    for name, command in (("drain", drain), ("discard", discard), ("recover", recover)):
        group.command(name)(command)
    app.add_typer(group, name="cache")


def drain(name: VVolArgument, no_wait: NoWait = False, run: RunOption = None) -> None:
    """Carry what a VVol's write-back log holds to its storage, and tell how that ended.

    The modes read and writethrough keep nothing that the VVol's storage has not: for them it is done at once."""
    from nbdvvol.cli.client import Client
    from nbdvvol.cli.output import follow

    with Client.connect(run) as client:
        follow(client, client.drain_cache(name), None, no_wait=no_wait)


def discard(name: VVolArgument, yes: Yes = False, run: RunOption = None) -> None:
    """Give up what a write-back log holds of a VVol: it is lost.

    For a log that is gone, and for one whose place holds something else: that may be overwritten."""
    from nbdvvol.cli.client import Client

    with Client.connect(run) as client:
        found = client.vvol(name)
        told = lost_words(found)
        print(f"{found.full_name}: {told}", file=sys.stderr)
        if not yes and sys.stdin.isatty():
            typer.confirm("Give that up, for good?", abort=True, err=True)
        client.discard_log(found.full_name)
    print(f"{found.full_name}: what its log held is given up; a new one begins when it is opened")


def lost_words(vvol: VVol) -> str:
    """What giving up the log of a VVol loses, for people."""
    from nbdvvol.model.log import holding_words

    log, now = vvol.log, vvol.log_now
    if now is not None and now.state == "refused" and now.found:
        return f"the log {now.file} on host {now.host} holds {holding_words(now.dirty_bytes, now.oldest_age_ms)}"
    if log is None:
        return "no log that is known holds data of it; what lies in the place of its log may be overwritten"
    return log.words()


def recover(name: VVolArgument, run: RunOption = None) -> None:
    """Have a log replayed of which the registry knows nothing, and which the VVol's host has found.

    Right if no other host has served the VVol since; else what it holds is older than what is there."""
    from nbdvvol.cli.client import Client

    with Client.connect(run) as client:
        found = client.recover_log(name)
    print(f"{found.full_name}: its log is taken as it is, and replayed")


def log_words(log: LogCounters) -> str:
    """How a write-back log is, for people."""
    from nbdvvol.cli.output import amount, number
    from nbdvvol.model.log import holding_words

    if log.state in ("refused", "waits"):
        return f"{log.state}: it is served without; see `nbdvvol status -x`"
    carried = f", {amount(log.destage_rate)}/s are carried to the storage" if log.destage_rate else ""
    lost = f"; {log.lost_bytes} bytes are lost" if log.lost_bytes else ""
    return (
        f"{log.state}; holds {holding_words(log.dirty_bytes, log.oldest_age_ms)}{carried}; {amount(log.used_bytes)} of "
        f"{amount(log.ring_bytes)} used; {number(log.logged)} requests logged in {number(log.groups)} writes, "
        f"{number(log.bypassed)} bypassed; {amount(log.destaged_bytes)} carried, {amount(log.merged_bytes)} "
        f"overwritten before that{lost}"
    )
