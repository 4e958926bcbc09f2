"""Reads what the datastores of a farm file say of themselves: headers, directories, legs' labels and map copies.

Reads only, and takes no lock: what is read changes only on control's order, and control does not run. Files and
devices are read past what this machine's page cache may remember of them; remote exports by the data plane, as filters
do. Whatever cannot be read is told as it is; what it means is decided elsewhere (control/rebuild.py).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from nbdvvol.control.rebuild import Found, FoundLeg, leg_of_file
from nbdvvol.datastores import format as disk
from nbdvvol.datastores import store_of
from nbdvvol.datastores.nbd import RemoteExport
from nbdvvol.model.check import place_of
from nbdvvol.model.errors import NvError
from nbdvvol.model.farm import DatastoreConfig, DatastoreKind, Farm
from nbdvvol.model.link import DatastoreSpec, remote_spec

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from nbdvvol.dataplane.types import DataPlane

PIECE_BYTES = 1 << 20
Part = TypeVar("Part", disk.Label, disk.MapCopy)
Read = Callable[[int, int], Awaitable[bytes]]
"""(offset, length) → bytes. Raises OSError when they are not all there."""


async def survey(farm: Farm) -> list[Found]:
    """What is on each datastore of a farm."""
    plane: DataPlane | None = None
    if any(config.kind is DatastoreKind.NBD for config in farm.datastores.values()):
        from nbdvvol.dataplane.plane import Plane

        plane = Plane()
    try:
        return [await _look(plane, name, config) for name, config in farm.datastores.items()]
    finally:
        if plane is not None:
            await plane.close()


async def _look(plane: DataPlane | None, name: str, config: DatastoreConfig) -> Found:
    kind = config.kind
    path = place_of(config) if kind is DatastoreKind.NBD else config.path or ""
    spec = DatastoreSpec(name=name, kind=kind, path=path, remote=remote_spec(config))
    try:
        if kind is DatastoreKind.DIR:
            return await _directory(spec, config)
        async with _opened(plane, spec) as (read, size):
            direct = store_of(spec, "").direct_works() if kind is not DatastoreKind.NBD else None
            return replace(await _single(name, config, read, size), size=size, direct_ok=direct)
    except (NvError, OSError) as error:
        return Found(name, config, "unreadable", error.message if isinstance(error, NvError) else str(error))


# ---- one object ----


def _opened(plane: DataPlane | None, spec: DatastoreSpec) -> AbstractAsyncContextManager[tuple[Read, int]]:
    if spec.kind is DatastoreKind.NBD:
        assert plane is not None, "a farm with remote exports has a data plane here"
        return _remote(plane, spec)
    return _local(spec.path)


@asynccontextmanager
async def _local(path: str, *, follow: bool = True) -> AsyncIterator[tuple[Read, int]]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise OSError(f"{path} is neither a file nor a block device")
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

        async def read(offset: int, length: int) -> bytes:
            return _all(fd, offset, length)

        yield read, os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)


def _all(fd: int, offset: int, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        piece = os.pread(fd, length - len(data), offset + len(data))
        if not piece:
            raise OSError(f"it ends at {offset + len(data)}; bytes {offset}..{offset + length} were to be read")
        data += piece
    return bytes(data)


@asynccontextmanager
async def _remote(plane: DataPlane, spec: DatastoreSpec) -> AsyncIterator[tuple[Read, int]]:
    export = await RemoteExport.open(plane, spec, lambda _up, _words: None, may_read_only=True)
    try:

        async def read(offset: int, length: int) -> bytes:
            data = bytearray()
            while len(data) < length:
                at = offset + len(data)
                data += await plane.read(export.number, at, min(PIECE_BYTES, offset + length - at))
            return bytes(data)

        yield read, export.spec.size
    finally:
        await export.close()


async def _single(name: str, config: DatastoreConfig, read: Read, size: int) -> Found:
    """A datastore that is one object."""
    raw = await read(0, min(disk.HEADER_AREA, size))
    try:
        header = disk.decode_header(raw)
    except NvError as error:
        if disk.has_header(raw):
            return Found(name, config, "damaged", error.message)
        return Found(name, config, "blank" if disk.is_blank(raw) else "something else")
    entries: dict[int, disk.Entry] = {}
    damaged: list[int] = []
    end = min(header.directory_offset + header.directory_length, size)
    for start in range(header.directory_offset, end, PIECE_BYTES):
        piece = await read(start, min(PIECE_BYTES, end - start))
        if disk.is_blank(piece):
            continue
        found, bad = disk.decode_pages(piece, (start - header.directory_offset) // disk.PAGE)
        entries |= found
        damaged += bad
    legs = []
    for slot, entry in sorted(entries.items()):
        leg = FoundLeg(entry.vvol, entry.leg, slot=slot, meta_offset=entry.offset, meta_length=entry.length)
        legs.append(await _metadata(leg, read, size))
    return Found(name, config, "formatted", header=header, legs=tuple(legs), damaged_slots=tuple(damaged))


async def _metadata(leg: FoundLeg, read: Read, size: int) -> FoundLeg:
    """A leg with its label and its map copy, as far as they are whole and its own."""
    if leg.meta_length <= disk.BITMAP_OFFSET or leg.meta_offset + leg.meta_length > size:
        return replace(
            leg, error=f"its metadata at {leg.meta_offset}, {leg.meta_length} bytes, does not fit {size} bytes"
        )
    raw = await read(leg.meta_offset, disk.BITMAP_OFFSET)
    first, second = 2 * disk.PAGE, 2 * disk.PAGE + disk.MAP_SLOT_BYTES
    label, bad_label = _own(leg, "label", lambda: disk.decode_label(raw[:first]))
    copy, bad_map = _own(leg, "map copy", lambda: disk.decode_map((raw[first:second], raw[second:])))
    return replace(leg, label=label, map=copy, error="; ".join(filter(None, (bad_label, bad_map))))


def _own(leg: FoundLeg, what: str, decode: Callable[[], Part]) -> tuple[Part | None, str]:
    """A part of a leg's metadata, if it is whole and the leg's; else what is wrong."""
    try:
        found = decode()
    except NvError as error:
        return None, error.message
    if (found.vvol, found.leg) != (leg.vvol, leg.id):
        return None, f"its {what} is that of leg {found.leg} of VVol {found.vvol}"
    return found, ""


# ---- directories ----


async def _directory(spec: DatastoreSpec, config: DatastoreConfig) -> Found:
    """A directory: a file is what its name says; a mirror's leg has its metadata at its head."""
    store = store_of(spec, "")
    store.prepare(0)
    legs, files = [], []
    for name, size in store.list():
        whose = leg_of_file(name)
        if whose is not None and whose[1] == 0:
            files.append((name, size))
        elif whose is not None:
            legs.append(await _leg_file(spec, FoundLeg(*whose, object=name, object_size=size)))
    direct = store.direct_works()
    return Found(spec.name, config, "directory", direct_ok=direct, legs=tuple(legs), files=tuple(files))


async def _leg_file(spec: DatastoreSpec, leg: FoundLeg) -> FoundLeg:
    """Its metadata ends where its map says that the VVol's bytes begin."""
    async with _local(str(Path(spec.path) / leg.object), follow=False) as (read, size):
        leg = await _metadata(replace(leg, meta_length=disk.BITMAP_OFFSET + 1), read, size)
    begins = min((run.at for run in leg.map.runs if run.state == 0), default=0) if leg.map is not None else 0
    if leg.map is not None and begins < disk.region_bytes(1, 1):
        return replace(leg, map=None, meta_length=0, error=f"its map copy leaves {begins} bytes for its metadata")
    return replace(leg, meta_length=begins)
