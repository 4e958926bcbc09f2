"""A slow backend beside a server: `python -m perf.slow --socket S --file F -- SERVER ...`.

nbdkit serves the file with a delay on each operation; once it answers, this process becomes the server, which finds the
backend at the socket. nbdkit is a child of it, and ends with it: what the server uses is counted with nbdkit's part.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

LIMIT_S = 10.0
POLL_S = 0.02
DELAY_MS = 2


def delayed(plugin: list[str], delay_ms: int = DELAY_MS) -> list[str]:
    """nbdkit's words for a plugin whose reads and writes all take so much longer, milliseconds."""
    return ["--filter=delay", *plugin, f"rdelay={delay_ms}ms", f"wdelay={delay_ms}ms"]


def main(
    socket: Annotated[Path, typer.Option(help="Where nbdkit listens.")],
    file: Annotated[Path, typer.Option(help="What it serves.")],
    server: Annotated[list[str], typer.Argument(help="What to become once it does.")],
    delay_ms: Annotated[int, typer.Option(min=0)] = DELAY_MS,
) -> None:
    """Start nbdkit with a delay, wait for it, then become the server. Status 1 when nbdkit does not answer."""
    command = ["nbdkit", "-f", "--exit-with-parent", "-U", str(socket), *delayed(["file", str(file)], delay_ms)]
    socket.unlink(missing_ok=True)
    started = subprocess.Popen(command)
    deadline = time.monotonic() + LIMIT_S
    while not socket.exists():
        if started.poll() is not None or time.monotonic() > deadline:
            print("error: nbdkit with its delay filter does not answer", file=sys.stderr)
            raise typer.Exit(1)
        time.sleep(POLL_S)
    os.execvp(server[0], server)


if __name__ == "__main__":
    typer.run(main)
