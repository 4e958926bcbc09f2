"""A mirrored VVol on this host: carries what the leg machine decides to the data plane, to control and to the legs.

The machine (native/volume/legs.h) decides by three inputs: control's record, the labels on the legs, the plane's
events. This module opens legs, reads labels, asks control and says the answers, opens the volume, and brings legs back
whose storage is there again. Invariants: the plane's description changes in one task only, so one change at a time is
under way; a lost leg's object leaves the description, and with that everything submitted to it has ended, before it is
opened again; after a fence nothing is opened or asked any more.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import structlog

from nbdvvol.dataplane.mirror import (
    Act,
    Ask,
    LaneState,
    LaneStatus,
    LegsAction,
    LegsRecord,
    Look,
    MirrorEvent,
    MirrorEventKind,
    MirrorStatus,
    Verified,
    Why,
)
from nbdvvol.dataplane.types import DataPlane, VolumeLimits
from nbdvvol.filter.legplace import ABSENT, LegPlace, Storage, quiet, words_of
from nbdvvol.filter.legwords import describe_mirror, record_of, record_of_spec, report_of, shift_of
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.link import VVolSpec
from nbdvvol.model.mirror import Lane, LegChange, LegDoubt, LegRecord, MirrorReport, NotServed, Stamp
from nbdvvol.nbd.client import Outclaimed

_log = structlog.get_logger("legs")
REPORT_S = 1.0
NOBODYS = 0xFFFF_FFFF_FFFF_FFFF
"""Token of a call into the plane that the leg machine did not ask for."""
ASK_AGAIN_S = 1.0
"""How long a refusal that brought nothing new rests before the question is asked again."""
RELEASE_MIN_S, RELEASE_MAX_S = 0.2, 2.0
"""How long a release that failed rests before it is tried again; writes are held meanwhile."""
DOUBT = "its server timed out and may still work on old requests: restart it, then `nbdvvol mirror resync`"
_ASKS: dict[int, Literal["stale", "syncing", "in-sync", "confirm"]] = {
    Ask.STALE: "stale",
    Ask.SYNCING: "syncing",
    Ask.IN_SYNC: "in-sync",
    Ask.CONFIRM: "confirm",
}
_REFUSALS: dict[int, tuple[NotServed, str, str]] = {
    Why.OLD_REGISTRY: (
        "old-registry",
        "a leg's label is newer than the registry",
        "the registry went back in time: restore the newer one, or rebuild it with `nbdvvol registry rebuild`",
    ),
    Why.NO_LEG: ("no-leg", "no in-sync leg is there with a valid label", "bring back the storage of an in-sync leg"),
    Why.EPOCH: ("", "control's record is of another epoch", "it is being moved to another host"),
    Why.LAST_LEG: ("", "control knows no other in-sync leg than the one that failed", "it is opened again"),
}


class MirrorError(NvError):
    """A VVol is not served; `why` is one of the reasons that the status has advice for."""

    def __init__(self, code: Code, message: str, hint: str = "", why: NotServed = "") -> None:
        super().__init__(code, message, hint)
        self.why: NotServed = why


class LegLink(Protocol):
    """The link to control, as far as a mirror needs it."""

    def ask_leg(self, change: LegChange, answer: Callable[[LegRecord], None]) -> None:
        """Ask for a change of a leg; no answer comes when control is away."""

    def doubt(self, said: LegDoubt) -> None:
        """Whether a leg's server may still carry out what it was asked; dropped while control is away."""

    def mirror(self, report: MirrorReport) -> None:
        """How a mirror is; dropped while control is away."""

    def leg_released(self, uuid: str, epoch: int, leg: int, doubt: bool) -> None:
        """A leg was taken from a VVol, and nothing of it is in flight; `doubt`: but its server may have kept some."""

    def notice(self, event: str, subject: str, message: str) -> None:
        """For the event list."""


@dataclass(slots=True)
class _Progress:
    """Of the copies that run."""

    since: dict[int, int] = field(default_factory=dict)
    """By leg: regions that were to be copied when its copy began."""
    last: dict[int, int] = field(default_factory=dict)
    rates: dict[int, float] = field(default_factory=dict)


class Mirror:
    """One mirrored VVol at one epoch, from its opening to its close."""

    def __init__(
        self,
        plane: DataPlane,
        storage: Storage,
        link: LegLink,
        spec: VVolSpec,
        limits: VolumeLimits,
        lost: Callable[[], None],
    ) -> None:
        assert spec.mirror is not None
        self.spec = spec
        self.volume: int | None = None
        self.block_min = 1
        self.dead: MirrorError | None = None
        """Why it serves no more; it is to be closed."""
        self.places = {leg.id: storage.place(spec, leg) for leg in spec.legs}
        self._plane = plane
        self._storage = storage
        self._link = link
        self._limits = limits
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._machine = plane.leg_machine(spec.epoch)
        self._begun = False
        self._shift = shift_of(spec)
        self._known = record_of_spec(spec)
        self._attached: asyncio.Future[None] = self._loop.create_future()
        self._attached.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._calls: dict[int, tuple[Act, int]] = {}
        self._release_s: dict[int, float] = {}
        """By leg whose release has failed: how long the next one that fails rests."""
        self._map_version = 0
        self._running_spec = spec
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._tender: asyncio.Task[None] | None = None
        self._reporter: asyncio.Task[None] | None = None
        self._progress = _Progress()
        self._errors: dict[int, int] = {}

    # ---- life ----

    async def open(self) -> None:
        """Open the legs, and serve once the mirror is attached. Raises NvError, OSError; `close` it then too."""
        await asyncio.gather(*(self._try_open(place) for place in self.places.values()))
        if self.dead is not None:
            raise self.dead
        for place in self.places.values():
            place.described = place.held is not None and place.look.look is Look.LABEL
        held = [place.held for place in self.places.values() if place.held is not None]
        self.block_min = max((one.spec.align for one in held), default=1)
        looks = tuple(self.places[leg.id].look if leg.id in self.places else ABSENT for leg in self._known.legs)
        self._machine.begin(self._known, looks)
        self._begun = True
        self._drive()
        await asyncio.shield(self._attached)

    def start(self) -> None:
        """It may be entered from now on, and its legs are tended: until then its volume does not change."""
        self._tender = self._loop.create_task(self._tend())
        self._tender.add_done_callback(quiet)
        self._reporter = self._loop.create_task(self._report_often())
        self._reporter.add_done_callback(quiet)

    async def close(self) -> None:
        """Drain, make durable, let go of every leg."""
        tasks = [task for task in (self._tender, self._reporter) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if not self._attached.done():
            self._attached.cancel()
        volume, self.volume = self.volume, None
        self._begun = False  # what control answers from now on finds no volume
        if volume is not None:
            await self._plane.close_volume(volume)
        for place in self.places.values():
            await self._storage.close(self.spec, place)
            self._tell_doubt(place)

    def give_up(self, error: MirrorError) -> None:
        """Serve no more, from here on: another host has it, or nobody knows any more that we have it."""
        if self.dead is not None:
            return
        self.dead = error
        _log.error("a mirror is given up", uuid=self.spec.uuid, epoch=self.spec.epoch, reason=error.message)
        if self.volume is not None:
            self._plane.fence_volume(self.volume)
        if not self._attached.done():
            self._attached.set_exception(error)
        self._lost()

    # ---- what comes in ----

    def follow(self, spec: VVolSpec) -> None:
        """Control says this of the VVol now, at the same epoch."""
        assert spec.epoch == self.spec.epoch
        old = {leg.id: leg for leg in self.spec.legs}
        self.spec = spec
        for leg in spec.legs:
            place = self.places.setdefault(leg.id, self._storage.place(spec, leg))
            before = old.get(leg.id)
            place.spec = leg
            if before is None or (before.asked, before.tries, before.resync) != (leg.asked, leg.tries, leg.resync):
                place.again()
            if before is not None and before.asked != leg.asked:
                self._storage.vouched(spec, place)
            if leg.resync == "off" and place.lane == "syncing" and self.volume is not None:
                self._plane.stop_leg(self.volume, leg.id)
        self._tell(record_of_spec(spec))
        self._work.set()

    def linked(self) -> None:
        """Control is there again: what was asked may be lost."""
        if self._begun:
            self._machine.ask_again()
            self._drive()
            for place in self.places.values():
                place.told = place.spec.doubt
                self._tell_doubt(place)
            self.report()

    def event(self, event: MirrorEvent) -> None:
        """Something happened to the volume."""
        leg = self.places.get(event.args[0]) if event.args else None
        rest_s = 0.0
        match event.kind:
            case MirrorEventKind.ATTACHED:
                self._on_attached(event)
            case MirrorEventKind.LEG_FAILED if leg is not None:
                by_request = leg.spec.resync == "off" and event.result == -errno.ENODEV
                leg.why = "taken out of use by request" if by_request else os.strerror(-event.result)
                leg.lane, leg.lost = "failing", True
                self._link.notice("leg_failed", self._name(leg), leg.why)
            case MirrorEventKind.LEG_STOPPED if leg is not None:
                leg.lane, leg.lost = "stale", event.result != -errno.ECANCELED
                leg.why = "stopped" if not leg.lost else os.strerror(-event.result)
                leg.failed(leg.why, self._loop.time())
                self._tell_doubt(leg)
            case MirrorEventKind.RESYNC_DONE if leg is not None:
                leg.lane = "promoting"
            case MirrorEventKind.LEG_CHANGED:
                rest_s = self._on_call_done(event)
            case MirrorEventKind.READ_REPAIRED if leg is not None:
                self._link.notice("read_repaired", self._name(leg), f"{event.args[2]} bytes at {event.args[1]}")
            case MirrorEventKind.FENCED:
                self._outclaimed(f"a leg's label has epoch {event.args[0]}")
            case _:
                pass
        if rest_s:
            self._loop.call_later(rest_s, self._hear, event)
        else:
            self._hear(event)
        self._work.set()
        self.report()

    def sync_failed(self, number: int) -> None:
        """An object's sync failed: every leg on it that need not stay has lost something."""
        for place in self.places.values():
            if place.held is not None and place.held.number == number and self.volume is not None:
                self._plane.fail_leg(self.volume, place.id, NOBODYS)

    def spares(self, number: int) -> bool:
        """Whether every leg on this object may be lost: another leg, elsewhere, is in sync."""
        return any(
            place.lane == "in-sync" and place.held is not None and place.held.number != number
            for place in self.places.values()
        )

    def uses(self, number: int) -> int:
        """How many legs have this object open."""
        return sum(place.held is not None and place.held.number == number for place in self.places.values())

    # ---- the machine ----

    def _hear(self, event: MirrorEvent) -> None:
        if self._begun and self.dead is None:
            self._machine.event(event)
            self._drive()

    def _tell(self, record: LegsRecord) -> None:
        if (record.epoch, record.generation) >= (self._known.epoch, self._known.generation):
            self._known = record
        if self._begun:
            self._machine.told(record)
            self._drive()

    def _drive(self) -> None:
        while self.dead is None and (action := self._machine.next()) is not None:
            self._obey(action)

    def _obey(self, action: LegsAction) -> None:
        match action.kind:
            case Act.ASK:
                self._ask(action)
            case Act.OPEN:
                self._open_volume()
            case Act.FENCE:
                text = f"epoch {self.spec.epoch} is over: another host was given this VVol, or its record has changed"
                self.give_up(MirrorError(Code.STALE, text, "nothing is to be done here"))
            case Act.REFUSE:
                why, message, hint = _REFUSALS.get(action.why, ("", "the legs cannot be opened", ""))
                self.give_up(MirrorError(Code.STALE, f"{message}: {self._looks()}", hint, why))
            case _:
                self._call(action)

    def _call(self, action: LegsAction) -> None:
        """Into the plane; LEG_CHANGED will tell."""
        assert self.volume is not None
        plane, volume, leg, token = self._plane, self.volume, action.leg, action.token
        self._calls[token] = action.kind, leg
        try:
            if action.kind is Act.FAIL:
                plane.fail_leg(volume, leg, token)
            elif action.kind is Act.RELEASE:
                plane.release_leg(volume, leg, action.generation, token)
            elif action.kind is Act.RESYNC:
                plane.resync_leg(volume, leg, action.generation, token, full=action.full)
            else:
                plane.promote_leg(volume, leg, action.generation, token)
        except OSError as error:
            failed = MirrorEvent(MirrorEventKind.LEG_CHANGED, volume, -(error.errno or errno.EIO), token, (leg,))
            self._loop.call_soon(self.event, failed)

    def _on_call_done(self, event: MirrorEvent) -> float:
        """For how many seconds the machine is not to hear of it: it tries again at once what has failed."""
        act, number = self._calls.pop(event.token, (None, 0))
        place = self.places.get(number)
        if act is None or place is None:
            return 0.0
        if act is Act.RELEASE and event.result:
            return self._release_failed(place, event.result)
        if act is Act.RESYNC and event.result == 0:
            place.lane, place.why = "syncing", ""
        elif act is Act.RESYNC:  # its object may be latched by what failed: it is opened anew
            place.lost = True
            place.failed(f"its resync does not begin: {os.strerror(-event.result)}", self._loop.time())
        elif act is Act.RELEASE:
            place.lane = "stale"
            self._release_s.pop(number, None)
        elif act is Act.PROMOTE and event.result == 0:
            place.lane, place.why = "in-sync", ""
            place.again()
            self._link.notice("leg_in_sync", self._name(place), "it is in sync again")
        return 0.0

    def _release_failed(self, place: LegPlace, result: int) -> float:
        """A leg in sync takes no new label, and the plane does not fail the last one: what is held waits for it."""
        rest_s = self._release_s.get(place.id, RELEASE_MIN_S)
        self._release_s[place.id] = min(2 * rest_s, RELEASE_MAX_S)
        if rest_s == RELEASE_MIN_S:
            text = f"a leg cannot be released: what is in sync takes no new label: {os.strerror(-result)}; tried again"
            _log.warning(text, uuid=self.spec.uuid, leg=place.id)
        return rest_s

    def _ask(self, action: LegsAction) -> None:
        place = self.places.get(action.leg)
        stamped = action.ask in (Ask.IN_SYNC, Ask.CONFIRM)
        change = LegChange(
            id=0,
            vvol=self.spec.uuid,
            epoch=action.epoch,
            generation=action.generation,
            leg=action.leg,
            wanted=_ASKS[action.ask],
            stamp=Stamp(epoch=action.stamp_epoch, generation=action.stamp_generation) if stamped else None,
            reason=place.why[:1000] if place is not None else "",
        )
        if place is not None and action.ask == Ask.STALE:
            change.doubt = place.told = place.doubt
        self._link.ask_leg(change, self._answered)

    def _tell_doubt(self, place: LegPlace) -> None:
        """What is new of it; of a leg that is in sync there is nothing to know."""
        if place.doubt != place.told and place.lane not in ("in-sync", "promoting"):
            place.told = place.doubt
            epoch = self.spec.epoch
            self._link.doubt(LegDoubt(vvol=self.spec.uuid, epoch=epoch, leg=place.id, doubt=place.doubt))

    def _answered(self, answer: LegRecord) -> None:
        if self.dead is not None or not self._begun:
            return
        if answer.refused == "epoch":
            self._outclaimed(f"control has given it another epoch: {answer.message}")
            return
        if answer.record is None:
            return  # the VVol is gone: control says what is to become of it
        record = record_of(answer.record)
        if answer.refused and record.generation <= self._known.generation:
            _log.warning("control refused a leg's change", uuid=self.spec.uuid, why=answer.refused, text=answer.message)
            self._loop.call_later(ASK_AGAIN_S, self._tell, record)
        else:
            self._tell(record)
        self._work.set()

    def _outclaimed(self, message: str) -> None:
        self.give_up(MirrorError(Code.STALE, message, "another host has this VVol: nothing is to be done here"))

    # ---- the volume ----

    def _open_volume(self) -> None:
        self._map_version = 1
        desc = describe_mirror(self.spec, self._known, self.places, self._shift, self.block_min, 0, 1)
        try:
            self.volume = self._plane.open_volume(desc, self._limits)
        except (OSError, ValueError) as error:
            self.give_up(MirrorError(Code.IO, f"the data plane does not open it: {error}"))

    def _on_attached(self, event: MirrorEvent) -> None:
        if event.result:
            text = f"the mirror could not be attached: {os.strerror(-event.result)}"
            self.give_up(MirrorError(Code.IO, text, "look at its legs' storage"))
            return
        states = {leg.id: leg.state for leg in self._known.legs}
        for place in self.places.values():
            if place.described and place.lane == "stale" and states.get(place.id) == 0:
                place.lane, place.why = "in-sync", ""
        status = self.status()
        if status is not None and status.intents == 0:
            self._nothing_was_under_way()
        if not self._attached.done():
            self._attached.set_result(None)

    def _nothing_was_under_way(self) -> None:
        """No intent was found: who served it before had no write in flight to a leg that is away."""
        for place in self.places.values():
            if place.at_attach:
                place.doubted = place.at_attach = False
                self._tell_doubt(place)

    async def _change_volume(self) -> None:
        """Tell the plane of other legs, or of another policy; older I/O has ended on return."""
        assert self.volume is not None
        spec, version = self.spec, self._map_version
        desc = describe_mirror(spec, self._known, self.places, self._shift, self.block_min, version, version + 1)
        await self._plane.change_volume(self.volume, desc)
        self._map_version = version + 1
        self._running_spec = spec

    async def limit(self, limits: VolumeLimits) -> None:
        """Other limits and shares."""
        if self.volume is not None:
            await self._plane.limit_volume(self.volume, limits)

    async def verify(self, *, repair: bool) -> Verified:
        """Compare the in-sync legs. Raises OSError."""
        if self.volume is None:
            raise NvError(Code.UNAVAILABLE, "it is not served here now")
        return await self._plane.verify_volume(self.volume, repair=repair)

    # ---- bringing legs back ----

    async def _tend(self) -> None:
        while True:
            self._work.clear()
            before = self._whys()
            try:
                wait_s = await self._tend_all()
            except (NvError, OSError) as error:
                _log.error("legs cannot be tended", uuid=self.spec.uuid, error=str(error))
                wait_s = 1.0
            if self._whys() != before:
                self.report()
            self._idle.set()
            try:
                async with asyncio.timeout(wait_s):
                    await self._work.wait()
            except TimeoutError:
                pass
            self._idle.clear()

    async def _tend_all(self) -> float | None:
        """One round; seconds until the next, if nothing happens."""
        await self._follow_spec()
        due: list[float] = []
        for place in list(self.places.values()):
            if self.dead is not None:
                return None
            if place.lane == "in-sync" and place.spec.resync == "off":
                self._take_out_of_use(place)
            if place.lost and place.lane == "stale" and place.held is not None:
                place.described = False
                await self._change_volume()  # ends when everything that was submitted to it has
                await self._storage.close(self.spec, place)
                self._tell_doubt(place)
            if place.lane == "stale" and self._may_come_back(place):
                if place.due_s > self._loop.time():
                    due.append(place.due_s - self._loop.time())
                else:
                    await self._bring_back(place)
                    due.append(max(place.due_s - self._loop.time(), 0.05))
        return min(due, default=None)

    def _whys(self) -> dict[int, str]:
        return {place.id: place.why for place in self.places.values()}

    def _take_out_of_use(self, place: LegPlace) -> None:
        """It is to be removed: it fails as by an error. The plane never fails the last one in sync."""
        if self.volume is not None and any(p.lane == "in-sync" for p in self.places.values() if p is not place):
            self._plane.fail_leg(self.volume, place.id, NOBODYS)

    def _may_come_back(self, place: LegPlace) -> bool:
        if place.spec.resync == "off":
            place.why = place.why or "stopped by the operator"
            return False
        if place.waits_for_word:
            place.why = DOUBT
            return False
        return True

    async def _bring_back(self, place: LegPlace) -> None:
        """Open it, make it known to the plane, and have it copied to."""
        full = place.spec.resync == "full"
        try:
            if place.held is None:
                await self._storage.open(place, self.spec, self._outclaimed)
                self._check_usable(place, full)
                self._machine.looked(place.id, place.look)
            if not place.described:
                place.described = True
                await self._change_volume()
        except Outclaimed as error:
            self._outclaimed(error.message)
            return
        except (NvError, OSError) as error:
            place.described = False
            await self._storage.close(self.spec, place)
            place.failed(words_of(error), self._loop.time())
            return
        place.failed(place.why, self._loop.time())  # the next try, if this one leads to nothing
        self._machine.want_resync(place.id, full=full)
        self._drive()

    def _check_usable(self, place: LegPlace, full: bool) -> None:
        assert place.held is not None
        if place.doubted:
            raise NvError(Code.CONFLICT, DOUBT)  # its server knew claims when it was looked at, and does not now
        if place.look.look is Look.FOREIGN:
            raise NvError(Code.CONFLICT, "what lies there is another leg, or of another VVol; it is not touched")
        if place.look.look is Look.NO_LABEL and not full:
            raise NvError(
                Code.CONFLICT, "it has no valid label; `nbdvvol mirror resync --full` copies everything to it"
            )
        if place.held.spec.align > self.block_min:
            raise NvError(
                Code.CONFLICT, f"it takes blocks of {place.held.spec.align} bytes, more than clients were told"
            )

    async def _follow_spec(self) -> None:
        """Legs that control took away, and another policy."""
        spec = self.spec
        gone = [place for number, place in self.places.items() if number not in {leg.id for leg in spec.legs}]
        before = self._running_spec
        runs = {leg.id: (leg.runs, leg.meta_offset, leg.meta_length) for leg in before.legs}
        other = any(runs.get(leg.id, ()) != (leg.runs, leg.meta_offset, leg.meta_length) for leg in spec.legs)
        if not gone and not other and spec.mirror == before.mirror:
            return
        for place in gone:
            del self.places[place.id]
        await self._change_volume()
        for place in gone:
            await self._storage.close(self.spec, place)
            self._link.leg_released(spec.uuid, spec.epoch, place.id, place.doubt)

    async def _try_open(self, place: LegPlace) -> None:
        if place.waits_for_word:
            place.why = DOUBT
            return
        try:
            await self._storage.open(place, self.spec, self._outclaimed)
            if place.look.look is not Look.LABEL:
                place.why = "it has no valid label of this leg"
        except Outclaimed as error:
            self._outclaimed(error.message)
        except (NvError, OSError) as error:
            place.failed(words_of(error), self._loop.time())
            if place.spec.state != "stale" and self._storage.may_work_on(place.spec, error):
                place.doubted = place.at_attach = True
                self._tell_doubt(place)
            _log.warning("a leg is absent", uuid=self.spec.uuid, leg=place.id, reason=place.why)

    # ---- what is told ----

    def _name(self, place: LegPlace) -> str:
        return f"{self.spec.vm}/{self.spec.name} leg {place.id} ({place.spec.datastore})"

    def _looks(self) -> str:
        return "; ".join(f"leg {p.id}: {p.why or p.look.look.name.lower()}" for p in self.places.values())

    def status(self) -> MirrorStatus | None:
        """As the plane has it."""
        return self._plane.mirror_status(self.volume) if self.volume is not None else None

    def lane_of(self, place: LegPlace) -> Lane:
        """What the leg is, for people."""
        return "absent" if place.lane == "stale" and place.held is None else place.lane

    def report(self) -> None:
        """Tell control how it is."""
        status = self.status()
        if status is None:
            return
        lanes = {leg.id: leg for leg in status.legs}
        for place in self.places.values():
            copying = place.lane in ("syncing", "promoting") and place.id in lanes
            if not copying:
                for kept in (self._progress.since, self._progress.last, self._progress.rates):
                    kept.pop(place.id, None)
            elif place.id not in self._progress.since:
                self._progress.since[place.id] = self._progress.last[place.id] = lanes[place.id].dirty_regions
        known = {place.id: self.lane_of(place) for place in self.places.values()}
        whys = {place.id: _why(place, lanes.get(place.id)) for place in self.places.values()}
        since, rates = self._progress.since, self._progress.rates
        self._link.mirror(
            report_of(self.spec, status, self._shift, known, whys, since, rates, dead=self.dead is not None)
        )

    async def _report_often(self) -> None:
        """Each second while something is copied or held."""
        while True:
            await asyncio.sleep(REPORT_S)
            status = self.status()
            if status is None:
                continue
            for leg in status.legs:
                before = self._progress.last.get(leg.id)
                if before is None or leg.state is not LaneState.SYNCING:
                    continue
                now = max(before - leg.dirty_regions, 0) * (1 << self._shift) / REPORT_S
                self._progress.rates[leg.id] = 0.7 * self._progress.rates.get(leg.id, now) + 0.3 * now
                self._progress.last[leg.id] = leg.dirty_regions
            waits = any(place.lost and place.held is not None for place in self.places.values())
            if self._progress.since or status.doubtful or status.frozen or waits:
                self.report()


def _why(place: LegPlace, lane: LaneStatus | None) -> str:
    """Why a leg is not in sync, and what its coming back waits for."""
    if lane is None or not lane.outstanding or place.held is None or not (place.lost and place.lane == "stale"):
        return place.why
    return f"{place.why}; waits: {lane.outstanding} old operations have not ended"
