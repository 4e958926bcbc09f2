"""Open datastore objects, shared by VVols and work orders and counted: one object, one I/O mode, one opening.

Files and devices are opened by path; a remote export is an object with connections of its own (datastores/nbd.py).
A leg of a mirror on a remote export has an object to itself: its connections claim that leg, and what its server owes
is owed to it alone.

An object whose sync failed is latched: every FLUSH on it fails, also after it was closed and opened again, until
the operator clears it (syncfaults.py remembers). Each datastore has a thread of its own for calls that block, so that
one that hangs holds up no other.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TypeVar

from nbdvvol.dataplane.types import DataPlane, ObjectSpec, ObjectStats
from nbdvvol.datastores import store_of
from nbdvvol.datastores.base import OpenObject, Store
from nbdvvol.datastores.format import HEADER_AREA, decode_header
from nbdvvol.datastores.nbd import RemoteExport
from nbdvvol.datastores.single import no_name
from nbdvvol.filter.syncfaults import FaultBook
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.link import DatastoreSpec, Fault
from nbdvvol.model.observe import DatastoreCounters
from nbdvvol.nbd.claims import Claim

T = TypeVar("T")
AGAIN_S = 0.5
"""Between tries to close an object of which something that was asked hangs."""
Key = tuple[str, str, str]
"""(path of the datastore, name of the object in it, the claim of the mirror's leg that has it to itself, or "")."""


@dataclass(eq=False, slots=True)
class HeldObject:
    """An open object. `number` is the data plane's."""

    key: Key
    datastore: str
    number: int
    spec: ObjectSpec
    remote: RemoteExport | None = None
    users: int = 0
    latched: bool = False
    """Its data plane object fails every FLUSH."""
    doomed: bool = False
    """A sync of it failed that nobody else than legs of mirrors used, and they were given up: it is opened anew."""
    closing: bool = False
    """Its counters have been added to its datastore's."""


RemoteTold = Callable[[str, bool, str], None]
"""Called with a datastore's name, whether its server is connected, and a sentence, each time that changes."""


class ObjectTable:
    """Every open object of this filter."""

    def __init__(self, plane: DataPlane, faults: FaultBook) -> None:
        self.farm = ""
        """Identity of the farm that the objects are locked for."""
        self.on_remote: RemoteTold | None = None
        self._away: set[str] = set()
        """Datastores whose server was told to be lost. An export that is closed while it is has nothing more to say."""
        self._plane = plane
        self._faults = faults
        self._held: dict[Key, HeldObject] = {}
        self._closed: defaultdict[str, ObjectStats] = defaultdict(ObjectStats)
        """By datastore, what its objects had counted when they were closed: a sum must never go back."""
        self._locks: defaultdict[Key, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._threads: dict[str, ThreadPoolExecutor] = {}
        self._late: set[asyncio.Task[None]] = set()
        """Those that close an object which could not be closed yet."""

    async def acquire(
        self, spec: DatastoreSpec, name: str, *, may_read_only: bool = False, claim: Claim | None = None
    ) -> HeldObject:
        """Open an object, or share it. Raises NvError; every success needs a `release`.

        A claim is made where the datastore is a remote export; `held.remote.fences` tells whether it was taken."""
        if spec.remote is None:
            claim = None
        key = spec.path, name, str(claim or "")
        async with self._locks[key]:
            held = self._held.get(key)
            if held is None:
                held = await self._open(spec, key, may_read_only, claim)
                self._held[key] = held
            elif held.doomed:
                raise NvError(
                    Code.BUSY,
                    f"datastore {spec.name}: {held.spec.path} has legs whose sync failed, and is still in use",
                )
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
        if held.remote is not None:
            size = await held.remote.refresh()
        else:
            size = await self.blocking(spec, lambda _: _size_of(path, block))
        if size > held.spec.size:
            held.spec.size = size
            self._plane.set_object_size(held.number, size)
        return size

    async def drop_cache(self, spec: DatastoreSpec, held: HeldObject, ranges: Sequence[tuple[int, int]]) -> None:
        """Forget cached pages of these (offset, length): another host may have written there since.

        Nothing of ours is dirty in them: a VVol's last close made its bytes durable."""
        if not held.spec.direct and held.remote is None:
            path = held.spec.path
            await self.blocking(spec, lambda _: _forget(path, ranges))

    async def blocking(self, spec: DatastoreSpec, call: Callable[[Store], T]) -> T:
        """Run a blocking call on the datastore in its own thread."""
        store = store_of(spec, self.farm)
        thread = self._threads.get(spec.path)
        if thread is None:
            thread = self._threads[spec.path] = ThreadPoolExecutor(1, thread_name_prefix=f"store-{spec.name}")
        return await asyncio.get_running_loop().run_in_executor(thread, call, store)

    def find(self, number: int) -> HeldObject | None:
        """An open object by its data plane number."""
        return next((held for held in self._held.values() if held.number == number), None)

    def sync_failed(self, held: HeldObject, error: int) -> Fault | None:
        """A sync of it failed with this errno, and latched. Returns what control is to be told, if that is news."""
        held.latched = True
        if self._faults.stands(held.datastore, held.key[1]):
            return None
        why = f"a sync of {held.spec.path} failed (errno {error})"
        if error == errno.ESTALE:
            why = f"{held.spec.path} was lost before it had made durable what it had acknowledged"
        elif error == errno.ETIMEDOUT and held.remote is not None:
            why = f"{held.spec.path} never said what became of a write, and may carry it out late (restart it first)"
        message = f"{why}; acknowledged writes may be lost, every FLUSH fails"
        return self._faults.add(held.datastore, held.key[1], message)

    def follow_faults(self) -> None:
        """Control's list of faults is new: latch what stands, clear what the operator cleared."""
        for held in self._held.values():
            if held.users == 0:
                continue  # it is being closed
            stands = self._faults.stands(held.datastore, held.key[1])
            if stands and not held.latched:
                self._plane.latch_fault(held.number)
            elif held.latched and not stands:
                self._plane.clear_fault(held.number)
            held.latched = stands

    def counters(self) -> list[DatastoreCounters]:
        """What was done on each datastore since this filter started, by name."""
        sums = dict(self._closed)
        live = [held for held in self._held.values() if not held.closing]
        for held in live:
            sums[held.datastore] = _sum(sums.get(held.datastore, ObjectStats()), self._plane.object_stats(held.number))
        found = []
        for name in sorted(sums):
            here = [held for held in live if held.datastore == name]
            faults = sum(held.latched for held in here)
            found.append(DatastoreCounters(datastore=name, objects=len(here), faults=faults, **asdict(sums[name])))
        return found

    def quit_remotes(self) -> None:
        """The filter stops: I/O that waits for a lost server waits no longer."""
        for held in self._held.values():
            if held.remote is not None:
                held.remote.quit()

    def shutdown(self) -> None:
        """End the threads; calls that hang are left behind."""
        for task in self._late:
            task.cancel()
        for thread in self._threads.values():
            thread.shutdown(wait=False, cancel_futures=True)

    async def _open(self, spec: DatastoreSpec, key: Key, may_read_only: bool, claim: Claim | None) -> HeldObject:
        if spec.remote is not None:
            held = await self._open_remote(spec, key, may_read_only, claim)
        else:
            held = await self._open_path(spec, key, may_read_only)
        if spec.uuid and not key[1]:
            try:
                await self._check_header(spec, held.number, held.spec.path)
            except BaseException:
                await self._close(held)
                raise
        held.latched = self._faults.stands(spec.name, key[1])
        if held.latched:
            self._plane.latch_fault(held.number)
        return held

    async def _open_remote(self, spec: DatastoreSpec, key: Key, may_read_only: bool, claim: Claim | None) -> HeldObject:
        no_name(spec, key[1])

        def tell(connected: bool, sentence: str) -> None:
            (self._away.discard if connected else self._away.add)(spec.name)
            if self.on_remote is not None:
                self.on_remote(spec.name, connected, sentence)

        remote = await RemoteExport.open(self._plane, spec, tell, may_read_only=may_read_only, claim=claim)
        if spec.name in self._away:
            tell(True, f"{spec.path} is connected again")
        return HeldObject(key, spec.name, remote.number, remote.spec, remote)

    async def _open_path(self, spec: DatastoreSpec, key: Key, may_read_only: bool) -> HeldObject:
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
        return HeldObject(key, spec.name, number, facts)

    async def _close(self, held: HeldObject) -> None:
        if held.remote is not None:
            await held.remote.close()
        else:
            await self._plane.close_object(held.number)

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
        if held.users == 0 and self._held.get(held.key) is held:
            last = self._plane.object_stats(held.number)  # without users it counts nothing any more
            self._closed[held.datastore] = _sum(self._closed[held.datastore], last)
            held.closing = True
            try:
                await self._close(held)  # known until then: what fails at the end must find its name
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                held.closing = False  # something that was asked of it hangs: it stays open, for whoever wants it next
                self._closed[held.datastore] = _sum(self._closed[held.datastore], last, -1)
                self._close_later(held)
                return
            del self._held[held.key]

    def _close_later(self, held: HeldObject) -> None:
        async def close() -> None:
            await asyncio.sleep(AGAIN_S)
            async with self._locks[held.key]:
                await self._close_unused(held)

        task = asyncio.get_running_loop().create_task(close())
        self._late.add(task)
        task.add_done_callback(self._late.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())


def _sum(one: ObjectStats, other: ObjectStats, sign: int = 1) -> ObjectStats:
    return ObjectStats(**{name: getattr(one, name) + sign * getattr(other, name) for name in ObjectStats.__slots__})


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
