"""`task watch|cancel`: long work."""

from __future__ import annotations

from typing import Annotated

import typer

from nbdvvol.cli.options import Output, OutputOption, RunOption

Number = Annotated[int, typer.Argument(metavar="ID", help="The task's number; `nbdvvol get tasks` lists them.")]


def register(app: typer.Typer) -> None:
    """Add this noun's commands."""
    noun = typer.Typer(help="Watch or cancel long work.", no_args_is_help=True)
    noun.command()(watch)
    noun.command()(cancel)
    app.add_typer(noun, name="task")


def watch(number: Number, output: OutputOption = Output.TABLE, run: RunOption = None) -> None:
    """Print a task whenever it changes, until it is over; exit 1 when it did not succeed."""
    from nbdvvol.cli.client import Client
    from nbdvvol.model.resources import Task

    def show(task: Task) -> None:
        if output is Output.TABLE:
            print(f"{task.kind} {task.subject}: {task.state} {task.progress:.0%} {task.detail}".rstrip(), flush=True)
        else:
            print(task.model_dump_json(), flush=True)

    with Client.connect(run) as client:
        client.wait(number, show)


def cancel(number: Number, run: RunOption = None) -> None:
    """Ask a task to stop and undo what it began."""
    from nbdvvol.cli.client import Client

    with Client.connect(run) as client:
        task = client.cancel(number)
    print(f"task {task.id}: {task.state}")
