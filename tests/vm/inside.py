"""Runs inside a guest, by the project's own Python: attaches, detaches and serves on order (see shell.py).

Orders are JSON lines on stdin, answers JSON lines on stdout: a list of one value, or of an error's code and text.
Python starts slowly under software emulation, so that one process does everything; what must be a process of its
own is forked.
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
from uuid import uuid4

from nbdvvol.dataplane.plane import Plane
from nbdvvol.dataplane.types import LegDescription, LegState, PlaneConfig, Run, VolumeDescription
from nbdvvol.filter.attach import run_attach, run_detach
from nbdvvol.filter.attachments import Attachment
from nbdvvol.filter.reconcile import transmission_flags
from nbdvvol.filter.standalone import OneExport
from nbdvvol.logs import log_to_stderr
from nbdvvol.model.errors import NvError
from nbdvvol.nbd.provider import Facts
from nbdvvol.nbd.server import Server, Visit

listener = socket.socket(socket.AF_UNIX)


def answer(*values: Any) -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    print(json.dumps(values), flush=True)


def keep(uri: str, name: str, identity: str, connections: int, run_dir: str) -> None:
    """Be a keeper, in the foreground of a forked process."""
    if os.fork() == 0:
        run_attach(
            uri, name=name, identity=identity, connections=connections, device=None, dead_timeout_s=120,
            request_timeout_s=20, run_dir=Path(run_dir), foreground=True, on_attached=tell_record,
        )  # fmt: skip
        os._exit(0)


def tell_record(attachment: Attachment) -> None:
    answer(attachment.model_dump())


def detach(name: str, run_dir: str) -> None:
    answer(run_detach(Path(run_dir), name).model_dump())


def listen(path: str) -> None:
    listener.bind(path)
    listener.listen(16)
    listener.setblocking(False)
    answer("listening")


def serve(image: str, export: str) -> None:
    """Serve an image on the listening socket, by the filter's data plane, in a forked process, until it is killed."""
    pid = os.fork()
    if pid:
        answer(pid)
    else:
        asyncio.run(serve_forever(Path(image), export))


async def serve_forever(image: Path, export: str) -> None:
    file = image.open("r+b", buffering=0)
    size = image.stat().st_size
    plane = Plane(PlaneConfig(lock_memory=False))
    number = plane.open_object(file.fileno(), size=size, direct=False, block=False, read_only=False, align=1)
    leg = LegDescription(0, LegState.IN_SYNC, (Run(0, size, number, 0),))
    volume = plane.open_volume(VolumeDescription(uuid4().bytes, size, 1, 1, 0, 1, (leg,)))
    visit = Visit(OneExport(Facts(export, size, transmission_flags(read_only=False)), volume))
    await Server(lambda _: visit, plane).serve(listener)


def main() -> None:
    log_to_stderr()  # stdout is for answers
    orders: dict[str, Callable[..., None]] = {
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
