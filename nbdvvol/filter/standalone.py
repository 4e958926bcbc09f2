"""One plain file or device without control: on stdin and stdout, or on the socket that LISTEN_FDS names.

It is for other people's test suites and for a quick look. The file is served in place, as one adopted leg. It
is locked like a datastore, so that a farm's file is not served beside its farm; read-only needs no lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import stat
import threading
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from nbdvvol.dataplane.types import (
    DataPlane,
    LegDescription,
    LegState,
    ObjectSpec,
    PlaneConfig,
    Run,
    VolumeDescription,
)
from nbdvvol.datastores.lock import lock_for_farm
from nbdvvol.filter.activation import take_sockets
from nbdvvol.filter.reconcile import transmission_flags
from nbdvvol.logs import log_to_stderr
from nbdvvol.model.errors import Code, NvError
from nbdvvol.nbd.constants import Reply
from nbdvvol.nbd.options import parse_string, quote
from nbdvvol.nbd.provider import Facts, Listing, Opened, ReplyError, match_contexts
from nbdvvol.nbd.server import Server, Visit

_RELAY_BYTES = 1 << 16


class OneExport:
    """A Provider of a single export; the empty name means it too."""

    def __init__(self, facts: Facts, volume: int) -> None:
        self._facts = facts
        self._volume = volume

    async def list(self) -> Sequence[Listing]:
        """The export."""
        return [Listing(self._facts.name, self._facts.description)]

    async def info(self, name: str) -> Facts:
        """Its facts."""
        return (await self.open(name)).facts

    async def list_meta(self, name: str, queries: Sequence[str]) -> Sequence[str]:
        """Its contexts."""
        return match_contexts(queries, (await self.info(name)).contexts)

    async def open(self, name: str) -> Opened:
        """The export to enter."""
        if name not in ("", self._facts.name):
            raise ReplyError(
                Reply.ERR_UNKNOWN, f"there is no export {quote(name)}; this server has {quote(self._facts.name)}"
            )
        return Opened(self._facts, self._volume)


async def run_standalone(
    path: Path, *, export: str, read_only: bool, stdio: bool, reactors: int = 1, spin_us: int = 200
) -> None:
    """Serve `path` until the one client is gone (stdio), or all clients of the given socket are.

    SIGTERM and SIGINT end it cleanly. Raises NvError when the file cannot be opened or nothing says where clients
    come from."""
    from nbdvvol.dataplane.plane import Plane

    log_to_stderr()
    given = {} if stdio else take_sockets()
    if not stdio and len(given) != 1:
        raise NvError(
            Code.USAGE,
            f"--serve without --stdio needs one listening socket by LISTEN_FDS; there are {len(given)}",
            "use --stdio, or start it from a service manager or libnbd's socket activation",
        )
    parse_string(export.encode(), "the export's name")
    fd, spec = _open(path, read_only)
    try:
        plane = Plane(PlaneConfig(reactors=reactors, spin_us=spin_us, lock_memory=False))
        try:
            server = _server(plane, fd, spec, export)
            work = _serve_stdio(server) if stdio else _serve_listener(server, next(iter(given.values())))
            await _until_signal(work)
            await server.stop()
        finally:
            await plane.close()
    finally:
        os.close(fd)


def _open(path: Path, read_only: bool) -> tuple[int, ObjectSpec]:
    try:
        fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    except OSError as error:
        hint = "" if read_only else "if it may only be read, add --read-only"
        raise NvError(Code.UNAVAILABLE, f"{path} cannot be opened: {error.strerror}", hint) from error
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        os.close(fd)
        raise NvError(Code.INVALID, f"{path} is neither a file nor a block device")
    if not read_only:
        try:
            lock_for_farm(fd, str(path), str(uuid4()))
        except NvError:
            os.close(fd)
            raise
    size = os.lseek(fd, 0, os.SEEK_END)
    if not size:
        os.close(fd)
        raise NvError(
            Code.INVALID, f"{path} has 0 bytes; there is nothing to serve", "give it a size, with truncate -s"
        )
    return fd, ObjectSpec(str(path), size, read_only=read_only, block=stat.S_ISBLK(mode))


def _server(plane: DataPlane, fd: int, spec: ObjectSpec, export: str) -> Server:
    number = plane.open_object(fd, size=spec.size, direct=False, block=spec.block, read_only=spec.read_only, align=1)
    desc = VolumeDescription(
        uuid=uuid4().bytes,
        size=spec.size,
        epoch=1,
        generation=1,
        map_from=0,
        map_to=1,
        legs=(LegDescription(0, LegState.IN_SYNC, (Run(0, spec.size, number, 0),)),),
        read_only=spec.read_only,
    )
    facts = Facts(export, spec.size, transmission_flags(read_only=spec.read_only))
    visit = Visit(OneExport(facts, plane.open_volume(desc)))
    return Server(lambda _: visit, plane)


async def _until_signal(work: Coroutine[Any, Any, None]) -> None:
    loop = asyncio.get_running_loop()
    task = loop.create_task(work)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _serve_listener(server: Server, listener: socket.socket) -> None:
    """Accept until the first client came and the last one is gone."""
    accepting = asyncio.get_running_loop().create_task(server.serve(listener))
    try:
        await server.visited()
        await server.idle()
    finally:
        accepting.cancel()
        await asyncio.gather(accepting, return_exceptions=True)
        listener.close()


async def _serve_stdio(server: Server) -> None:
    """One client on stdin and stdout: one socket as it is, two pipes or files through a relay."""
    sock, drained = _stdio_socket()
    server.welcome(sock)
    await server.idle()
    await asyncio.get_running_loop().run_in_executor(None, drained)


def _stdio_socket() -> tuple[socket.socket, Callable[[], None]]:
    same = os.path.sameopenfile(0, 1)
    if same and stat.S_ISSOCK(os.fstat(0).st_mode):
        return socket.socket(fileno=os.dup(0)), lambda: None
    ours, theirs = socket.socketpair()
    threading.Thread(target=_relay_in, args=(theirs,), daemon=True).start()
    out = threading.Thread(target=_relay_out, args=(theirs,), daemon=True)
    out.start()
    return ours, out.join


def _relay_in(sock: socket.socket) -> None:
    """stdin to the server; its end is the client's hang-up."""
    with contextlib.suppress(OSError):
        while data := os.read(0, _RELAY_BYTES):
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)


def _relay_out(sock: socket.socket) -> None:
    """The server's answers to stdout, to the last byte."""
    with contextlib.suppress(OSError):
        while data := sock.recv(_RELAY_BYTES):
            view = memoryview(data)
            while view:
                view = view[os.write(1, view) :]
