"""`up`, `control`, `filter`: the commands that are daemons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

State = Annotated[Path, typer.Option("--state", metavar="DIR", help="What must survive: registry and host tokens.")]
Run = Annotated[Path, typer.Option("--run", metavar="DIR", help="Sockets and locks.")]
Parent = Annotated[int, typer.Option("--parent", hidden=True, help="End when this process is gone.")]


def register(app: typer.Typer) -> None:
    """Add this noun's commands."""
    app.command("up")(up)
    app.command("control")(control)
    app.command("filter")(filter_)


def up(
    file: Annotated[Path, typer.Option("-f", "--file", metavar="FILE", help="The farm file.")],
    state: State = Path("state"),
    run: Run = Path("run"),
) -> None:
    """Run a whole farm on this machine in the foreground: control, filters, and what the file declares.

    Prints one line per export and a line to paste that attaches it, then `ready`. Stops cleanly on Ctrl-C.
    """
    from nbdvvol.cli import doors

    raise typer.Exit(doors.up(file, state=state, run=run))


def control(
    state: State = Path("state"),
    run: Run = Path("run"),
    listen: Annotated[str, typer.Option(help="https://ADDRESS:PORT, besides RUN/control.sock.")] = "",
    parent: Parent = 0,
) -> None:
    """Run the control daemon alone."""
    from nbdvvol.cli import doors

    doors.control(state=state, run=run, listen=listen, parent=parent)


def filter_(
    host: Annotated[str, typer.Option(help="Name of this host in the farm file.")] = "local",
    control: Annotated[str, typer.Option(metavar="ADDRESS", help="unix:PATH or https://ADDRESS:PORT.")] = "",
    token_file: Annotated[Path | None, typer.Option(metavar="FILE", help="This host's own token.")] = None,
    ca: Annotated[Path | None, typer.Option(metavar="FILE", help="CA that signed control's certificate.")] = None,
    cert: Annotated[Path | None, typer.Option(metavar="FILE", help="Client certificate instead of a token.")] = None,
    key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its key.")] = None,
    run: Run = Path("run"),
    state: Annotated[
        Path | None,
        typer.Option(
            "--state",
            metavar="DIR",
            help="What must survive a restart of the machine: which write-back logs may hold data. Else the --run DIR.",
            show_default=False,
        ),
    ] = None,
    reactors: Annotated[int, typer.Option(min=1, max=64, help="Threads that move data.")] = 1,
    spin_us: Annotated[int, typer.Option(min=0, max=10_000, help="Longest busy wait before a thread sleeps.")] = 200,
    first_cpu: Annotated[
        int | None, typer.Option(min=0, max=1023, help="Pin them to the CPUs from this one on.")
    ] = None,
    cache: Annotated[str, typer.Option(metavar="SIZE", help="RAM for the caches of all VVols; 0: none.")] = "256MiB",
    stdio: Annotated[
        bool, typer.Option("--stdio", help="Serve one client on stdin and stdout; needs --serve.")
    ] = False,
    serve: Annotated[Path | None, typer.Option(metavar="PATH", help="Serve this file or device; no control.")] = None,
    export: Annotated[str, typer.Option(help="With --serve: the export's name.")] = "",
    read_only: Annotated[bool, typer.Option("--read-only", help="With --serve: refuse writes.")] = False,
    parent: Parent = 0,
) -> None:
    """Run a host's filter: it serves the VVols that control binds to this host.

    With --serve PATH it serves one plain file or device without any control: on stdin and stdout (--stdio), or on
    the socket that systemd-style activation passes (LISTEN_FDS).
    """
    from nbdvvol.cli import doors

    if serve is not None:
        doors.standalone(serve, export=export, read_only=read_only, stdio=stdio, reactors=reactors, spin_us=spin_us)
        return
    if stdio:
        raise typer.BadParameter("--stdio needs --serve PATH")
    doors.filter_(
        host=host,
        control=control or f"unix:{(run / 'control.sock').absolute()}",
        token_file=token_file,
        ca=ca,
        cert=cert,
        key=key,
        run=run,
        state=state,
        reactors=reactors,
        spin_us=spin_us,
        first_cpu=first_cpu,
        cache=cache,
        parent=parent,
    )
