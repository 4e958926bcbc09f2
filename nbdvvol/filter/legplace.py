"""Where a leg's bytes lie, as this host has them open: its object, its label, and what stands in the way.

A leg that was lost is opened anew before it is used again: nothing that an earlier opening still has under way, or has
cached, is taken for the leg's. On a server that knows claims each opening is an attempt of its own, and the server has
let go of earlier ones before the new one sees a byte. Elsewhere a connection that timed out may leave requests behind
that land late; such a leg waits for the operator's word.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from nbdvvol.dataplane.mirror import LegLook, LegMeta, Look
from nbdvvol.dataplane.types import DataPlane
from nbdvvol.datastores.format import PAGE, RegionLayout, decode_label, region_layout
from nbdvvol.filter.objects import HeldObject, ObjectTable
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.link import DatastoreSpec, LegSpec, VVolSpec
from nbdvvol.model.mirror import Lane
from nbdvvol.nbd.claims import Claim

OPEN_S = 10.0
"""How long a leg may take to open and to show its label before it counts as absent."""
RETRY_MIN_S, RETRY_MAX_S = 0.5, 30.0
ABSENT = LegLook(Look.ABSENT)
_LABELS = 2 * PAGE

StoreOf = Callable[[str], DatastoreSpec | None]


@dataclass(eq=False, slots=True)
class LegPlace:
    """One leg of a mirror that this host runs."""

    spec: LegSpec
    lane: Lane = "stale"
    held: HeldObject | None = None
    look: LegLook = ABSENT
    described: bool = False
    """The data plane knows where it lies."""
    lost: bool = False
    """It failed: its storage is let go, and opened anew."""
    why: str = ""
    """Why it is not in sync."""
    attempt: int = 0
    retry_s: float = RETRY_MIN_S
    due_s: float = 0.0
    """When to try again, by the loop's clock."""
    hangs: asyncio.Task[HeldObject] | None = None
    """An opening that did not end in time; while it has not, there is no other."""
    fenced: bool = False
    """Its server knew claims when it was opened last."""
    doubted: bool = False
    """Its server may still have requests of ours. One that knows claims drops them when it is opened again; else the
    operator's word is needed."""
    told: bool = False
    """What control was told last of `doubt`."""
    at_attach: bool = False
    """Doubted only because it was away when the mirror began: who served before may have had a write under way."""

    @property
    def id(self) -> int:
        """The registry's number of the leg."""
        return self.spec.id

    def failed(self, why: str, now_s: float) -> None:
        """An attempt to bring it back has failed."""
        self.why = why
        self.due_s = now_s + self.retry_s
        self.retry_s = min(2 * self.retry_s, RETRY_MAX_S)

    @property
    def doubt(self) -> bool:
        """What control is to know: until everything that was submitted to it has ended, nobody can be sure."""
        return self.doubted or (self.lost and self.held is not None and self.held.remote is not None)

    @property
    def waits_for_word(self) -> bool:
        """Only a person can tell when nothing old can land there any more."""
        return self.doubted and not (self.fenced or self.spec.fences)

    def again(self) -> None:
        """Try at once."""
        self.due_s, self.retry_s = 0.0, RETRY_MIN_S


class Storage:
    """Opens legs, looks at them and lets them go."""

    def __init__(self, plane: DataPlane, objects: ObjectTable, store_of: StoreOf) -> None:
        self._plane = plane
        self._objects = objects
        self._store_of = store_of
        self._attempts: Counter[tuple[str, int]] = Counter()
        """By VVol and leg: a server that has heard of one takes none before it, for as long as an epoch lasts."""
        self._doubts: set[tuple[str, int]] = set()
        """VVols and legs of which this process knows that their server may still work on old requests."""

    def place(self, vvol: VVolSpec, leg: LegSpec) -> LegPlace:
        """A leg that is not open yet, with what is known of it."""
        return LegPlace(leg, doubted=leg.doubt or (vvol.uuid, leg.id) in self._doubts, told=leg.doubt)

    def vouched(self, vvol: VVolSpec, place: LegPlace) -> None:
        """The operator says that its server works on nothing old any more."""
        self._doubts.discard((vvol.uuid, place.id))
        place.doubted = False

    def may_work_on(self, leg: LegSpec, error: BaseException) -> bool:
        """Whether the server of a leg that cannot be opened may live, and have requests of whoever used it before.

        One that refuses connections has ended; at a local leg nothing outlives the process that asked for it."""
        store = self._store_of(leg.datastore)
        if store is None or store.remote is None or not isinstance(error, NvError):
            return False
        cause = error.__cause__
        silent = isinstance(cause, OSError) and cause.errno in (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)
        return error.code is Code.TIMEOUT or silent

    async def open(self, place: LegPlace, vvol: VVolSpec, outclaimed: Callable[[str], None]) -> None:
        """Open the leg and look at its label. Raises NvError, OSError; Outclaimed: another host has it."""
        assert place.held is None
        if place.hangs is not None and not place.hangs.done():
            raise NvError(Code.TIMEOUT, "its storage hangs: an earlier attempt to open it has not ended")
        self._attempts[vvol.uuid, place.id] += 1
        place.attempt = self._attempts[vvol.uuid, place.id]
        task = asyncio.get_running_loop().create_task(self._acquire(place.spec, vvol, place.attempt))
        try:
            done, _ = await asyncio.wait({task}, timeout=OPEN_S)
        except asyncio.CancelledError:  # the mirror closes, and nobody would let go of what opens yet
            task.add_done_callback(self._too_late)
            raise
        if not done:
            place.hangs = task
            task.add_done_callback(self._too_late)
            raise NvError(Code.TIMEOUT, f"its storage did not open within {OPEN_S:.0f} s")
        held = task.result()
        try:
            async with asyncio.timeout(OPEN_S):
                place.look = await self._look(place.spec, vvol, held)
        except TimeoutError:
            await self._objects.release(held)
            raise NvError(Code.TIMEOUT, f"its label could not be read within {OPEN_S:.0f} s") from None
        except BaseException:
            await self._objects.release(held)
            raise
        if held.remote is not None:
            held.remote.on_outclaimed = outclaimed
            place.fenced = held.remote.fences
            place.doubted &= not place.fenced  # it has let go of earlier attempts, and of earlier epochs
        place.held, place.lost = held, False

    async def close(self, vvol: VVolSpec, place: LegPlace) -> None:
        """Let go of the leg's storage; the data plane does not use it any more."""
        held, place.held, place.described = place.held, None, False
        place.look = ABSENT
        if held is None:
            return
        if held.remote is not None:
            held.remote.on_outclaimed = None
            if held.remote.unsure:
                place.doubted = True
                self._doubts.add((vvol.uuid, place.id))
        await self._objects.release(held)

    async def _acquire(self, leg: LegSpec, vvol: VVolSpec, attempt: int) -> HeldObject:
        store = self._store_of(leg.datastore)
        if store is None:
            raise NvError(Code.NOT_FOUND, f"control named no datastore {leg.datastore} for this host")
        if leg.meta_length == 0:
            raise NvError(Code.INVALID, f"leg {leg.id} has no metadata region: it cannot be part of a mirror")
        claim = Claim(vvol.uuid, leg.id, vvol.epoch, attempt)
        held = await self._objects.acquire(store, leg.object, claim=claim)
        try:
            end = max([leg.meta_offset + leg.meta_length, *(run.at + run.n for run in leg.runs if run.s == 0)])
            if end > held.spec.size and end > await self._objects.refresh(store, held):
                raise NvError(
                    Code.INVALID,
                    f"datastore {store.name}: {held.spec.path} has {held.spec.size} bytes; the leg needs {end}",
                    "it was shortened: restore its size",
                )
            ranges = [(run.at, run.n) for run in leg.runs if run.s == 0]
            await self._objects.drop_cache(store, held, [(leg.meta_offset, leg.meta_length), *ranges])
        except BaseException:
            await self._objects.release(held)
            raise
        return held

    def _too_late(self, task: asyncio.Task[HeldObject]) -> None:
        """Nobody waits for it any more."""
        if not task.cancelled() and task.exception() is None:
            release = asyncio.get_running_loop().create_task(self._objects.release(task.result()))
            release.add_done_callback(lambda done: done.exception())

    async def _look(self, leg: LegSpec, vvol: VVolSpec, held: HeldObject) -> LegLook:
        raw = await self._plane.read(held.number, leg.meta_offset, _LABELS)
        try:
            label = decode_label(raw)
        except NvError as error:
            return LegLook(Look.FOREIGN if error.code is Code.UNSUPPORTED else Look.NO_LABEL)
        if (label.vvol, label.leg) != (UUID(vvol.uuid), leg.id):
            return LegLook(Look.FOREIGN)
        return LegLook(Look.LABEL, label.syncing, label.epoch, label.generation)


def layout_of(leg: LegSpec, size: int) -> RegionLayout:
    """How a leg's metadata region is laid out."""
    return region_layout(leg.meta_length, size)


def meta_of(place: LegPlace, size: int) -> LegMeta:
    """Where the data plane finds a leg's metadata; absent if it is not to know of it."""
    if place.held is None or not place.described:
        return LegMeta()
    return LegMeta(place.held.number, place.spec.meta_offset, layout_of(place.spec, size).bitmap_bytes)


def words_of(error: BaseException) -> str:
    """What a failure says, for people."""
    if isinstance(error, NvError):
        return f"{error.message} ({error.hint})" if error.hint else error.message
    return str(error) or type(error).__name__


def quiet(task: asyncio.Task[None]) -> None:
    """A task that was cancelled, and whose end nobody else looks at."""
    with contextlib.suppress(asyncio.CancelledError):
        task.exception()
