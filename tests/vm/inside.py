"""Runs inside a guest, by the project's own Python: attaches, detaches and serves on order (see shell.py).

Orders are JSON lines on stdin, answers JSON lines on stdout: a list of one value, or of an error's code and text.
Python starts slowly under software emulation, so that one process does everything; what must be a process of its
own is forked. Only `attach` starts another Python, the keeper, as the command line does.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from nbdvvol.filter.attach import run_attach, run_detach
from nbdvvol.filter.attachments import Attachment
from nbdvvol.model.errors import NvError

RUN_DIR = Path("/run/nbdvvol")
ACTIVATION_FD = 3
listeners: list[int] = []


def answer(*values: Any) -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    print(json.dumps(values), flush=True)


def attach(
    uri: str, identity: str, connections: int, *, foreground: bool = False, tell: Callable[[Attachment], None] = answer
) -> None:
    run_attach(
        uri, identity=identity, connections=connections, device=None, dead_timeout_s=120, request_timeout_s=20,
        run_dir=RUN_DIR, foreground=foreground, on_attached=tell,
    )  # fmt: skip


def tell_record(attachment: Attachment) -> None:
    answer(attachment.model_dump())


def keep(uri: str, identity: str, connections: int) -> None:
    """Be a keeper, in the foreground of a forked process."""
    if os.fork() == 0:
        attach(uri, identity, connections, foreground=True, tell=tell_record)
        os._exit(0)


def detach(name: str) -> None:
    answer(run_detach(RUN_DIR, name).model_dump())


def listen(path: str) -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    sock.listen(16)
    listeners.append(os.dup(sock.fileno()))
    while listeners[-1] <= ACTIVATION_FD:  # that place is taken anew each time
        listeners.append(os.dup(sock.fileno()))
    answer("listening")


def serve(image: str, export: str) -> None:
    """Serve an image on the listening socket, by the filter's data plane, in a forked process."""
    from nbdvvol.filter.standalone import run_standalone

    pid = os.fork()
    if pid:
        answer(pid)
        return
    while True:  # it ends whenever its last client is gone
        os.dup2(listeners[-1], ACTIVATION_FD)
        os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
        asyncio.run(run_standalone(Path(image), export=export, read_only=False, stdio=False))


def main() -> None:
    orders: dict[str, Callable[..., None]] = {
        "attach": lambda *arguments: attach(*arguments, tell=tell_record),
        "keep": keep,
        "detach": detach,
        "listen": listen,
        "serve": serve,
    }
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        try:
            orders[what](*arguments)
        except NvError as error:
            answer({"code": error.code, "message": error.message})


main()
