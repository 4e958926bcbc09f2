"""A server of one mirrored volume over our data plane, without farm, registry or control: `python -m perf.mirrored`.

For measuring what the farm would make hard to time: a resync begins when SIGUSR1 comes, and how long it took stands
in a file. This program plays the registry, which says yes to everything; the haggling, the mirror and everything below
it are the product's own. It serves until SIGTERM.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated
from uuid import uuid4

import typer

from nbdvvol.dataplane.mirror import LegMeta, MirrorDescription, MirrorEvent, MirrorEventKind, ReadPolicy
from nbdvvol.dataplane.plane import STOPS, Plane
from nbdvvol.dataplane.types import LegDescription, LegState, PlaneConfig, Run, VolumeDescription
from nbdvvol.datastores.format import region_bytes, region_layout
from nbdvvol.model.farm import MirrorConfig
from nbdvvol.model.mirror import mirror_spec
from perf.plane import BLOCK, open_file, serving

EXTENT = 1 << 20
STALE_LEG = 2
"""The one that a resync copies to; the other one is read."""
_LOSSES = (MirrorEventKind.LEG_FAILED,)
"""Whose result says why, and is an error by nature."""


def meta_bytes(size: int) -> int:
    """What a leg's metadata takes, behind its bytes."""
    return region_bytes(size, EXTENT)


def describe(size: int, objects: tuple[int, ...], block_min: int = 1) -> VolumeDescription:
    """A mirror with one leg an object, with the farm file's defaults."""
    layout = region_layout(meta_bytes(size), size)
    policy = mirror_spec(MirrorConfig(legs=[f"store{number}" for number in objects]))
    legs = tuple(
        LegDescription(leg, LegState.IN_SYNC, (Run(0, size, number, 0),)) for leg, number in enumerate(objects, 1)
    )
    mirror = MirrorDescription(
        region_shift=layout.region_shift,
        op_deadline_ms=round(policy.op_deadline_s * 1000),
        hold_deadline_ms=round(policy.hold_s * 1000),
        intent_idle_ms=round(policy.intent_idle_s * 1000),
        metas=tuple(LegMeta(number, size, layout.bitmap_bytes) for number in objects),
        read=ReadPolicy[policy.read.upper().replace("-", "_")],
        resync_rate=policy.resync_rate,
    )
    return VolumeDescription(uuid4().bytes, size, 1, 1, 0, 1, legs, block_min=block_min, mirror=mirror)


class Registry:
    """Says yes to everything, and takes a leg through losing and copying it when told to."""

    def __init__(self, plane: Plane, log: Path) -> None:
        self._plane = plane
        self._log = log
        self._events: asyncio.Queue[MirrorEvent] = asyncio.Queue()
        self._generation = 1
        self._token = 0
        self._busy: asyncio.Task[None] | None = None
        self.volume = 0
        plane.on_mirror = self._events.put_nowait

    def resync(self) -> None:
        """Begin to copy the whole leg, unless that is under way."""
        if self._busy is None or self._busy.done():
            self._busy = asyncio.get_running_loop().create_task(self._copy())

    async def stop(self) -> None:
        """Give up what runs."""
        if self._busy is not None:
            self._busy.cancel()
            with suppress(asyncio.CancelledError):
                await self._busy

    async def attached(self) -> None:
        """Once it serves. Raises RuntimeError if it cannot."""
        await self._heard(MirrorEventKind.ATTACHED)

    async def _heard(self, kind: MirrorEventKind, token: int = 0) -> None:
        """That event has come. Raises RuntimeError when it, or a resync's early end, tells of an error."""
        while True:
            event = await self._events.get()
            wanted = (event.kind, event.token) == (kind, token)
            if event.kind is MirrorEventKind.LEG_STOPPED or (wanted and event.result < 0 and kind not in _LOSSES):
                raise RuntimeError(f"{event.kind.value}: {os.strerror(-event.result)}")
            if wanted:
                return

    async def _do(self, call: Callable[[int, int], None]) -> None:
        """A call that gets a generation and a token, until it is through."""
        self._generation += 1
        self._token += 1
        call(self._generation, self._token)
        await self._heard(MirrorEventKind.LEG_CHANGED, self._token)

    async def _copy(self) -> None:
        try:
            await self._lose_and_copy()
        except (RuntimeError, OSError) as error:
            self._write({"error": str(error)})

    async def _lose_and_copy(self) -> None:
        plane, volume, leg = self._plane, self.volume, STALE_LEG
        plane.fail_leg(volume, leg, STOPS)
        await self._heard(MirrorEventKind.LEG_FAILED)
        await self._do(lambda generation, token: plane.release_leg(volume, leg, generation, token))
        began = time.monotonic()
        await self._do(lambda generation, token: plane.resync_leg(volume, leg, generation, token, full=True))
        self._write({"began": True})
        await self._heard(MirrorEventKind.RESYNC_DONE)
        took = time.monotonic() - began
        await self._do(lambda generation, token: plane.promote_leg(volume, leg, generation, token))
        self._write({"seconds": took})

    def _write(self, line: dict[str, float | bool | str]) -> None:
        with self._log.open("a") as out:
            out.write(json.dumps(line) + "\n")


async def serve(path: Path, files: list[Path], size: int, direct: bool, config: PlaneConfig) -> None:
    """Until SIGTERM or SIGINT; SIGUSR1 begins a resync."""
    plane = Plane(config)
    registry = Registry(plane, Path(f"{path}.resyncs"))
    try:
        objects = tuple(open_file(plane, file, size + meta_bytes(size), direct=direct) for file in files)
        block_min = BLOCK if direct else 1
        registry.volume = plane.open_volume(describe(size, objects, block_min))
        await registry.attached()
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, registry.resync)
        async with serving(path, size, plane, registry.volume, block_min) as stop:
            await stop.wait()
        await registry.stop()
    finally:
        await plane.close()


def main(
    unix: Annotated[Path, typer.Option(help="Socket to listen on; beside it SOCKET.resyncs tells of resyncs.")],
    size: Annotated[int, typer.Option(help="Bytes of the volume.")],
    file: Annotated[list[Path], typer.Option(help="A leg: bytes of the volume, then its metadata (repeatable).")],
    direct: Annotated[bool, typer.Option(help="Past the page cache.")] = False,
    spin_us: Annotated[int, typer.Option(min=0)] = 50,
) -> None:
    """Serve one mirrored volume on a unix socket."""
    asyncio.run(serve(unix, file, size, direct, PlaneConfig(spin_us=spin_us, lock_memory=False)))


if __name__ == "__main__":
    typer.run(main)
