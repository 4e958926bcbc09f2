"""Printing: tables for people, JSON and YAML with the same words for scripts, progress of tasks."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from nbdvvol.cli.options import Output

if TYPE_CHECKING:
    from pydantic import BaseModel

    from nbdvvol.cli.client import Client
    from nbdvvol.model.resources import Task, TaskRef

Row = Sequence[object]


def emit(value: BaseModel | Sequence[BaseModel], output: Output) -> None:
    """Print a model or a list of them as JSON or YAML."""
    data: Any
    if isinstance(value, Sequence):
        data = [item.model_dump(mode="json", by_alias=True) for item in value]
    else:
        data = value.model_dump(mode="json", by_alias=True)
    if output is Output.YAML:
        import yaml

        print(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), end="")
    else:
        print(json.dumps(data, indent=2, ensure_ascii=False))


def table(heads: Sequence[str], rows: Iterable[Row]) -> None:
    """Print aligned columns; a terminal's width folds them, a pipe's never."""
    cells = [[str(cell) if cell not in (None, "") else "-" for cell in row] for row in rows]
    if sys.stdout.isatty():
        _folded_table(heads, cells)
        return
    lines = [[head.upper() for head in heads], *cells]
    widths = [max(len(line[index]) for line in lines) for index in range(len(heads))]
    for line in lines:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


def _folded_table(heads: Sequence[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for head in heads:
        grid.add_column(head.upper(), overflow="fold")
    for row in rows:
        grid.add_row(*map(Text, row))
    Console(highlight=False).print(grid)


def number(value: float) -> str:
    """A count or a rate, short: whole where it is large, with a decimal where that says more."""
    return f"{value:.1f}" if 0 < value < 10 and value != int(value) else f"{value:,.0f}"


def amount(size_bytes: float) -> str:
    """About so many bytes."""
    from nbdvvol.model.units import about_size

    return about_size(size_bytes)


def duration(time_ns: float) -> str:
    """About so long, such as 12.3us."""
    for unit in ("ns", "us", "ms"):
        if time_ns < 1000:
            return f"{time_ns:.0f}{unit}" if unit == "ns" or time_ns >= 100 else f"{time_ns:.1f}{unit}"
        time_ns /= 1000
    return f"{time_ns:.2f}s"


def pairs(items: Iterable[tuple[str, object]]) -> None:
    """Print `name  value` lines."""
    shown = [(name, str(value)) for name, value in items if value not in (None, "", [])]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        print(f"{name:<{width}}  {value}")


def follow(client: Client, ref: TaskRef, done: str | None, *, no_wait: bool, output: Output = Output.TABLE) -> None:
    """Wait for a task with its progress shown on a terminal, then print `done`; or just print its number.

    `done` None: what the task said last is its result. For scripts, the task itself."""
    task = ref.task if no_wait else wait_task(client, ref.task.id)
    if output is not Output.TABLE:
        emit(task, output)
    elif no_wait:
        print(f"task {task.id}")
    else:
        print(f"{task.subject}: {task.detail}" if done is None else done)


def wait_task(client: Client, number: int) -> Task:
    """Wait for a task, showing progress on a terminal. Raises NvError when it does not succeed."""
    return client.wait(number, _progress_line() if sys.stderr.isatty() else lambda task: None)


def _progress_line() -> Callable[[Task], None]:
    def show(task: Any) -> None:
        text = f"task {task.id} {task.kind} {task.subject}: {task.state} {task.progress:4.0%} {task.detail}"
        over = task.state not in ("queued", "running")
        show_line("" if over else text)

    return show


def show_line(text: str) -> None:
    """Write over the terminal's line."""
    sys.stderr.write(f"\r\x1b[K{text[:120]}")
    sys.stderr.flush()
