"""A server of one volume over a remote export, with a write-back log or without: `python -m perf.logged`.

The volume, the log, the client of the remote export and the haggling are the product's own; nobody has to agree to the
log's holding data, as control does in a farm. It serves until SIGTERM; what the log then holds stays there.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated

import typer

from nbdvvol.dataplane.log import LogPolicy, LogVerdict
from nbdvvol.dataplane.plane import Plane
from nbdvvol.dataplane.types import PlaneConfig, Run
from nbdvvol.datastores.base import uncache
from nbdvvol.datastores.nbd import RemoteExport
from nbdvvol.model.farm import DatastoreConfig, DatastoreKind
from nbdvvol.model.link import DatastoreSpec, remote_spec
from perf.plane import BLOCK, describe, open_file, serving

CHUNK = 1 << 20


def make_log(path: Path, size: int) -> None:
    """A file of zeros that are really there: the log is formatted in it, and no write of it has to find space."""
    zeros = bytes(CHUNK)
    with path.open("wb") as out:
        for at in range(0, size, CHUNK):
            out.write(zeros[: min(CHUNK, size - at)])
        out.flush()
        os.fsync(out.fileno())
        uncache(out.fileno())


async def open_log(plane: Plane, volume: int, path: Path, size: int) -> int:
    """The log in front of a volume, allowed to log: its object. Raises RuntimeError when it is refused."""
    log = open_file(plane, path, size, direct=True)
    found = await plane.open_log(volume, log, 0, size, LogPolicy())
    if found.verdict is not LogVerdict.USABLE:
        raise RuntimeError(f"{path}: the log is refused: {found.verdict.value}")
    plane.allow_log(volume)
    return log


async def serve(path: Path, uri: str, size: int, log: tuple[Path, int] | None, config: PlaneConfig) -> None:
    """Until SIGTERM or SIGINT. `log`: its file, and bytes of it."""
    plane = Plane(config)
    try:
        remote = remote_spec(DatastoreConfig.model_validate({"kind": DatastoreKind.NBD, "uri": uri}))
        spec = DatastoreSpec(name="slow", kind=DatastoreKind.NBD, path=uri, remote=remote)
        export = await RemoteExport.open(plane, spec, lambda *_: None, may_read_only=False)
        volume = plane.open_volume(describe(size, (Run(0, size, export.number, 0),)))
        logs = [await open_log(plane, volume, *log)] if log is not None else []
        async with serving(path, size, plane, volume, BLOCK) as stop:
            await stop.wait()
        await plane.close_volume(volume)
        await export.close()
        for one in logs:
            await plane.close_object(one)
    finally:
        await plane.close()


def main(
    unix: Annotated[Path, typer.Option(help="Socket to listen on.")],
    uri: Annotated[str, typer.Option(help="The export below.")],
    size: Annotated[int, typer.Option(help="Bytes of the volume.")],
    log: Annotated[Path | None, typer.Option(help="A file for the log; without it, writes go through.")] = None,
    log_bytes: Annotated[int, typer.Option(help="Of that size.")] = 1 << 30,
    spin_us: Annotated[int, typer.Option(min=0)] = 50,
) -> None:
    """Serve one volume over a remote export on a unix socket."""
    if log is not None:
        make_log(log, log_bytes)
    config = PlaneConfig(spin_us=spin_us, lock_memory=False)
    asyncio.run(serve(unix, uri, size, (log, log_bytes) if log is not None else None, config))


if __name__ == "__main__":
    typer.run(main)
