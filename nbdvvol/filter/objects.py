"""Open datastore objects, shared by VVols and work orders and counted: one object, one I/O mode, one opening.

An object whose sync failed stays open without users until the operator clears it: closing it would forget that
acknowledged bytes may be lost. Each datastore has a thread of its own for calls that block, so that one that
hangs holds up no other.
"""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from nbdvvol.dataplane.types import DataPlane, ObjectSpec
from nbdvvol.datastores import store_of
from nbdvvol.datastores.base import OpenObject, Store
from nbdvvol.datastores.format import HEADER_AREA, decode_header
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.link import DatastoreSpec

T = TypeVar("T")
Key = tuple[str, str]
"""(path of the datastore, name of the object in it)."""


@dataclass(eq=False, slots=True)
class HeldObject:
    """An open object. `number` is the data plane's."""

    key: Key
    datastore: str
    number: int
    spec: ObjectSpec
    users: int = 0
    faulty: bool = False


class ObjectTable:
    """Every open object of this filter."""

    def __init__(self, plane: DataPlane) -> None:
        self.farm = ""
        """Identity of the farm that the objects are locked for."""
        self._plane = plane
        self._held: dict[Key, HeldObject] = {}
        self._locks: defaultdict[Key, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._threads: dict[str, ThreadPoolExecutor] = {}

    async def acquire(self, spec: DatastoreSpec, name: str, *, may_read_only: bool = False) -> HeldObject:
        """Open an object, or share it. Raises NvError; every success needs a `release`."""
        key = spec.path, name
        async with self._locks[key]:
            held = self._held.get(key)
            if held is None:
                held = await self._open(spec, key, may_read_only)
                self._held[key] = held
            elif held.spec.direct != spec.direct:
                modes = "direct" if held.spec.direct else "buffered", "direct" if spec.direct else "buffered"
                raise NvError(
                    Code.BUSY,
                    f"datastore {spec.name}: {held.spec.path} is open {modes[0]} and cannot be {modes[1]} too",
                    "unbind its VVols first",
                )
            elif held.spec.read_only and not may_read_only:
                raise NvError(Code.DENIED, f"datastore {spec.name}: {held.spec.path} is open for reading only")
            held.users += 1
            return held

    async def release(self, held: HeldObject) -> None:
        """Give an object back; the last user closes it."""
        async with self._locks[held.key]:
            held.users -= 1
            assert held.users >= 0
            await self._close_unused(held)

    async def refresh(self, spec: DatastoreSpec, held: HeldObject) -> int:
        """Look whether the object grew, and tell the data plane; return its size in bytes."""
        path, block = held.spec.path, held.spec.block
        size = await self.blocking(spec, lambda _: _size_of(path, block))
        if size > held.spec.size:
            held.spec.size = size
            self._plane.set_object_size(held.number, size)
        return size

    async def drop_cache(self, spec: DatastoreSpec, held: HeldObject, ranges: Sequence[tuple[int, int]]) -> None:
        """Forget cached pages of these (offset, length): another host may have written there since.

        Nothing of ours is dirty in them: a VVol's last close made its bytes durable."""
        if not held.spec.direct:
            path = held.spec.path
            await self.blocking(spec, lambda _: _forget(path, ranges))

    async def blocking(self, spec: DatastoreSpec, call: Callable[[Store], T]) -> T:
        """Run a blocking call on the datastore in its own thread."""
        store = store_of(spec, self.farm)
        thread = self._threads.get(spec.path)
        if thread is None:
            thread = self._threads[spec.path] = ThreadPoolExecutor(1, thread_name_prefix=f"store-{spec.name}")
        return await asyncio.get_running_loop().run_in_executor(thread, call, store)

    def mark_faulty(self, number: int) -> HeldObject | None:
        """The data plane reports a failed sync of an object."""
        for held in self._held.values():
            if held.number == number:
                held.faulty = True
                return held
        return None

    async def clear_faults(self, spec: DatastoreSpec) -> int:
        """The operator accepts what failed syncs of this datastore may have lost; return how many objects."""
        faulty = [held for held in self._held.values() if held.key[0] == spec.path and held.faulty]
        for held in faulty:
            self._plane.clear_fault(held.number)
            held.faulty = False
            async with self._locks[held.key]:
                await self._close_unused(held)
        return len(faulty)

    def shutdown(self) -> None:
        """End the threads; calls that hang are left behind."""
        for thread in self._threads.values():
            thread.shutdown(wait=False, cancel_futures=True)

    async def _open(self, spec: DatastoreSpec, key: Key, may_read_only: bool) -> HeldObject:
        found: OpenObject = await self.blocking(spec, lambda store: store.open(key[1], may_read_only=may_read_only))
        facts = found.spec
        try:
            number = self._plane.open_object(
                found.fd,
                size=facts.size,
                direct=facts.direct,
                block=facts.block,
                read_only=facts.read_only,
                align=facts.align,
            )
        finally:
            os.close(found.fd)
        if spec.uuid and not key[1]:
            try:
                await self._check_header(spec, number, facts.path)
            except BaseException:
                await self._plane.close_object(number)
                raise
        return HeldObject(key, spec.name, number, facts)

    async def _check_header(self, spec: DatastoreSpec, number: int, path: str) -> None:
        """A formatted datastore says who it is: a path may lead to another disk since it was looked at last."""
        raw = await self._plane.read(number, 0, HEADER_AREA)
        try:
            found = str(decode_header(raw).uuid)
        except NvError as error:
            raise NvError(error.code, f"datastore {spec.name}: {path}: {error.message}", error.hint) from None
        if found != spec.uuid:
            raise NvError(
                Code.CONFLICT,
                f"datastore {spec.name}: {path} is another datastore, {found} instead of {spec.uuid}",
                "bring the right one back, or correct the path; nothing was changed",
            )

    async def _close_unused(self, held: HeldObject) -> None:
        if held.users == 0 and not held.faulty and self._held.get(held.key) is held:
            del self._held[held.key]
            await self._plane.close_object(held.number)


def _forget(path: str, ranges: Sequence[tuple[int, int]]) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for offset, length in ranges:
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _size_of(path: str, block: bool) -> int:
    if not block:
        return os.stat(path).st_size  # noqa: PTH116
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)
