"""A data plane in a background event loop, and raw NBD clients on socket pairs: no daemon, no handshake."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import pytest

from nbdvvol.dataplane.plane import Plane
from nbdvvol.dataplane.types import (
    ConnectionEnd,
    ConnectionParams,
    ContextId,
    LegDescription,
    LegState,
    PlaneConfig,
    Run,
    VolumeDescription,
    VolumeStats,
)
from tests.lib import nbdwords as w
from tests.lib.rawio import Style, Transmission
from tests.lib.rawnbd import Facts, Haggled, Stream

T = TypeVar("T")
ALL_FLAGS = (
    w.TFLAG_HAS_FLAGS
    | w.TFLAG_SEND_FLUSH
    | w.TFLAG_SEND_FUA
    | w.TFLAG_SEND_TRIM
    | w.TFLAG_SEND_WRITE_ZEROES
    | w.TFLAG_CAN_MULTI_CONN
    | w.TFLAG_SEND_CACHE
    | w.TFLAG_SEND_FAST_ZERO
)
CONTEXT = 7


def describe(size: int, runs: Sequence[Run], *, version: int = 1, start: int = 0, **extra: Any) -> VolumeDescription:
    """A one-leg description."""
    leg = LegDescription(0, LegState.IN_SYNC, tuple(runs))
    return VolumeDescription(b"rig-volume-uuid!", size, 1, 1, start, version, (leg,), **extra)


Pair = Callable[[], tuple[socket.socket, socket.socket]]


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        mine = socket.create_connection(server.getsockname())
        return mine, server.accept()[0]


class Client(Transmission):
    """A raw client, and how its connection ended."""

    end: Future[ConnectionEnd]

    def ended(self, timeout_s: float = 20) -> ConnectionEnd:
        """Wait for the plane's word that the connection is over."""
        return self.end.result(timeout_s)


class Rig:
    """A plane whose methods can be called from a plain test function."""

    def __init__(self, **config: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.folder = tempfile.TemporaryDirectory(prefix="nv", dir="/tmp")
        wish = PlaneConfig(**{"pool_bytes": 16 << 20, "lock_memory": False, **config})
        self.plane = self.call(lambda: Plane(wish))
        self.sockets: list[socket.socket] = []

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run a plain method of the plane in its loop."""

        async def run() -> T:
            return function(*args, **kwargs)

        return self.wait(run())

    def wait(self, coroutine: Coroutine[Any, Any, T], timeout_s: float = 40) -> T:
        """Run a coroutine in the plane's loop to its end."""
        return self.start(coroutine).result(timeout_s)

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine in the plane's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def close(self) -> None:
        """Close clients, plane and loop."""
        for sock in self.sockets:
            sock.close()
        self.wait(self.plane.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()
        self.folder.cleanup()

    def path(self, name: str) -> Path:
        """A path in the rig's folder."""
        return Path(self.folder.name) / name

    def file_object(self, size: int, name: str = "disk", **how: Any) -> int:
        """A sparse file of `size` bytes as an object."""
        path = self.path(name)
        flags = os.O_RDWR | os.O_CREAT | (os.O_DIRECT if how.get("direct") else 0)
        fd = os.open(path, flags, 0o600)
        try:
            if path.stat().st_size < size:
                os.ftruncate(fd, size)
            return self.fd_object(fd, size, **how)
        finally:
            os.close(fd)

    def fd_object(self, fd: int, size: int, **how: Any) -> int:
        """An open descriptor as an object."""
        wish = {"direct": False, "block": False, "read_only": False, "align": 1, **how}
        return self.call(self.plane.open_object, fd, size=size, **wish)

    def volume(self, size: int = 1 << 20, runs: Sequence[Run] | None = None, **extra: Any) -> int:
        """A volume over `runs`, or over a file of its own."""
        if runs is None:
            runs = [Run(0, size, self.file_object(size), 0)]
        return self.call(self.plane.open_volume, describe(size, runs, **extra))

    def connect(
        self, volume: int, size: int = 1 << 20, style: Style = "simple", *, early: bytes = b"", tflags: int = ALL_FLAGS,
        timeout_s: float = 20, pair: Pair = socket.socketpair, **params: Any,
    ) -> Client:  # fmt: skip
        """A client in the transmission phase of `volume`."""
        structured = style != "simple"
        flags = tflags | (w.TFLAG_SEND_DF if structured else 0)
        flags |= w.TFLAG_BLOCK_STATUS_PAYLOAD if style == "extended" else 0
        contexts = {"base:allocation": CONTEXT} if structured else {}
        params.setdefault("contexts", tuple(ContextId(number, name) for name, number in contexts.items()))
        wish = ConnectionParams(structured=structured, extended=style == "extended", tflags=flags, **params)
        mine, theirs = pair()
        self.sockets.append(mine)

        async def hand_over() -> asyncio.Future[ConnectionEnd]:
            return self.plane.open_connection(theirs.fileno(), volume, wish, early)

        ending = self.wait(hand_over())
        theirs.close()
        agreed = Haggled(structured, style == "extended", contexts, Facts(size, flags))
        client = Client(Stream(mine, timeout_s), agreed)

        async def end() -> ConnectionEnd:
            return await ending

        client.end = self.start(end())
        return client

    def stats(self, volume: int) -> VolumeStats:
        """The volume's counters."""
        return self.call(self.plane.volume_stats, volume)


def eventually(what: str, check: Callable[[], object], timeout_s: float = 30) -> None:
    """Wait until `check` holds."""
    end = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < end, f"not within {timeout_s} s: {what}"
        time.sleep(0.01)


@contextlib.contextmanager
def running(**config: Any) -> Iterator[Rig]:
    """A rig for the length of a with statement."""
    rig = Rig(**config)
    try:
        yield rig
    finally:
        rig.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    """A rig with two reactors."""
    with running(reactors=2) as one:
        yield one
