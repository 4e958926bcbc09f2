"""A server of one volume over our data plane, without farm, registry or control: `python -m perf.plane`.

For measuring what no farm file can ask for: a map cut into any number of runs, a volume without storage, and a cache in
front of a file that another server serves, too. The
haggling, the volume description and everything below them are the product's own. It serves until SIGTERM.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated
from uuid import uuid4

import typer

from nbdvvol.dataplane.plane import Plane
from nbdvvol.dataplane.types import (
    CacheMode,
    CachePolicy,
    LegDescription,
    LegState,
    PlaneConfig,
    Run,
    VolumeDescription,
)
from nbdvvol.filter.reconcile import transmission_flags
from nbdvvol.filter.standalone import OneExport
from nbdvvol.nbd.provider import Facts
from nbdvvol.nbd.server import Server, Visit

ZERO = Path("/dev/zero")
BLOCK = 4096
SEED = 20_26


def shuffled(size: int, count: int, number: int) -> tuple[Run, ...]:
    """`size` bytes of object `number` as `count` runs, neighbours in the volume being strangers in the object.

    Raises ValueError when the runs would not be whole blocks."""
    length, rest = divmod(size, count)
    if rest or length % BLOCK:
        raise ValueError(f"{size} bytes cannot be cut into {count} runs of whole {BLOCK}-byte blocks")
    places = list(range(count))
    random.Random(SEED).shuffle(places)
    return tuple(Run(at * length, length, number, place * length) for at, place in enumerate(places))


def describe(size: int, runs: tuple[Run, ...], block_min: int = 1) -> VolumeDescription:
    """A volume of one leg."""
    leg = LegDescription(0, LegState.IN_SYNC, runs)
    return VolumeDescription(uuid4().bytes, size, 1, 1, 0, 1, (leg,), block_min=block_min)


@asynccontextmanager
async def serving(path: Path, size: int, plane: Plane, volume: int, block_min: int = 1) -> AsyncIterator[asyncio.Event]:
    """Serve a volume on a unix socket for the length of the block; the event is set by SIGTERM and SIGINT."""
    stop = asyncio.Event()
    for ending in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(ending, stop.set)
    facts = Facts("", size, transmission_flags(read_only=False), block_min=block_min)
    visit = Visit(OneExport(facts, volume))
    server = Server(lambda _: visit, plane)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(128)
        accepting = asyncio.get_running_loop().create_task(server.serve(listener))
        try:
            yield stop
        finally:
            accepting.cancel()
            await asyncio.gather(accepting, return_exceptions=True)
            await server.stop()


def open_file(plane: Plane, file: Path, size: int, *, direct: bool = False) -> int:
    """A file as an object of the plane: its number."""
    fd = os.open(file, os.O_RDWR | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
    try:
        align = BLOCK if direct else 1
        return plane.open_object(fd, size=size, direct=direct, block=False, read_only=False, align=align)
    finally:
        os.close(fd)


async def until_stopped(
    config: PlaneConfig, path: Path, size: int, make: Callable[[Plane], int], block_min: int = 1
) -> None:
    """Serve the volume that `make` opens until SIGTERM or SIGINT, through the cache if the plane has one."""
    plane = Plane(config)
    try:
        volume = make(plane)
        if config.cache_bytes:
            await plane.cache_volume(volume, CachePolicy(CacheMode.READ))
        async with serving(path, size, plane, volume, block_min) as stop:
            await stop.wait()
    finally:
        await plane.close()


def main(
    unix: Annotated[Path, typer.Option(help="Socket to listen on.")],
    size: Annotated[int, typer.Option(help="Bytes of the volume.")],
    file: Annotated[
        Path, typer.Option(help="What the volume lies on; without it, nothing: zeros, and writes are lost.")
    ] = ZERO,
    runs: Annotated[int, typer.Option(min=1, help="How many runs the map has.")] = 1,
    reactors: Annotated[int, typer.Option(min=1)] = 1,
    spin_us: Annotated[int, typer.Option(min=0)] = 50,
    direct: Annotated[bool, typer.Option(help="Open the file with O_DIRECT.")] = False,
    cache: Annotated[int, typer.Option(min=0, help="Bytes of RAM that keep what is read.")] = 0,
) -> None:
    """Serve one volume on a unix socket."""
    config = PlaneConfig(reactors=reactors, spin_us=spin_us, lock_memory=False, cache_bytes=cache)

    block_min = BLOCK if direct else 1

    def make(plane: Plane) -> int:
        number = open_file(plane, file, size, direct=direct)
        return plane.open_volume(describe(size, shuffled(size, runs, number), block_min))

    asyncio.run(until_stopped(config, unix, size, make, block_min))


if __name__ == "__main__":
    typer.run(main)
