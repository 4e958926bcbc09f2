"""Control's registry of legs against the leg machine in C, with messages lost, doubled and late, deaths and rebinds.

`control.legs.decide` is the registry, `dataplane.legs.Legs` the machine of production; the plane between them is played
here, as far as docs/mirror.md section 2 has it: who counts for an acknowledgement, what is labelled when. Whatever
arrives, in whichever order: a record never calls a leg in sync whose label does not say so, its last leg in sync stays,
and a leg that would serve has every acknowledged write.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from nbdvvol.control.legs import Decision, decide, in_sync
from nbdvvol.dataplane.legs import Legs
from nbdvvol.dataplane.mirror import Act, Ask, LegLook, LegsAction, Look, MirrorEvent, MirrorEventKind
from nbdvvol.filter.legwords import record_of
from nbdvvol.model.mirror import LegChange, LegRecord, Record, RecordLeg, Stamp

Lane = Literal["in-sync", "promoting", "syncing", "failing", "stale"]
LEGS = 2
WANTED: dict[int, Literal["stale", "syncing", "in-sync", "confirm"]] = {
    Ask.STALE: "stale",
    Ask.SYNCING: "syncing",
    Ask.IN_SYNC: "in-sync",
    Ask.CONFIRM: "confirm",
}
LATE = st.integers(0, 3)
"""Counted from the newest."""
STEPS = st.sampled_from([20, 0, 1, 2, 3, 5])


@dataclass
class Disk:
    """A leg's storage."""

    there: bool = True
    syncing: bool = False
    epoch: int = 1
    generation: int = 1
    acknowledged: int = 0
    """How many of the acknowledged writes it has, the first ones."""


@dataclass
class Host:
    """A filter's process: the machine of production, and a plane."""

    epoch: int
    machine: Legs
    lanes: dict[int, Lane] = field(default_factory=dict)
    generation: int = 0
    events: list[MirrorEvent] = field(default_factory=list)
    """Of the plane, in order; not heard yet."""
    calls: list[LegsAction] = field(default_factory=list)
    """Into the plane; not carried out yet."""


class Farm(RuleBasedStateMachine):
    """One mirrored VVol, its registry, and the host that serves it."""

    decide = staticmethod(decide)

    @initialize()
    def begin(self) -> None:
        """Every leg is whole, and labelled."""
        stamp = Stamp(epoch=1, generation=1)
        legs = [RecordLeg(id=number, state="in-sync", stamp=stamp) for number in range(1, LEGS + 1)]
        self.record = Record(epoch=1, generation=1, legs=legs)
        self.disks = {leg.id: Disk() for leg in legs}
        self.questions: list[LegChange] = []
        self.answers: list[LegRecord] = []
        self.late: list[LegChange] = []
        """What was ever asked, but for confirmations: it may arrive once more."""
        self.records = [self.record]
        """Every record there was."""
        self.written = 0
        self.host: Host | None = None
        self.numbers = 0
        self.it_goes_on(20)

    # ---- messages ----

    def _control_hears(self, question: LegChange) -> None:
        before, done = self.record, self.decide(self.record, question)
        self.record = done.record
        self._is_a_step(before, done.record)
        self.answers.append(LegRecord(id=question.id, vvol="v", refused=done.refused, record=done.record))

    @rule(steps=STEPS)
    def it_goes_on(self, steps: int) -> None:
        """Calls, events, questions and answers, each in their order, nothing lost."""
        if self.host is None and steps:
            self._a_host_opens_it()
        for _ in range(steps):
            if self.host is not None and self.host.calls:
                self._the_plane_obeys()
            elif self.host is not None and self.host.events:
                self.host.machine.event(self.host.events.pop(0))
            elif self.host is not None and self.answers:
                self._host_hears(self.answers.pop(0))
            elif self.questions:
                self._control_hears(self.questions.pop(0))
            self._drive()
        self._a_client_writes()

    @precondition(lambda self: self.questions or self.answers)
    @rule()
    def messages_are_lost(self) -> None:
        """All that are under way; who asks them again is told below."""
        self.questions.clear()
        self.answers.clear()

    @precondition(lambda self: self.late)
    @rule(which=LATE)
    def an_old_question_arrives(self, which: int) -> None:
        """Again, or after all."""
        self._control_hears(self.late[-1 - which % len(self.late)])

    @precondition(lambda self: self.host is not None)
    @rule(which=LATE)
    def an_old_record_arrives(self, which: int) -> None:
        """An answer of long ago."""
        self._host_hears(LegRecord(id=0, vvol="v", record=self.records[-1 - which % len(self.records)]))
        self._drive()

    def _host_hears(self, answer: LegRecord) -> None:
        assert self.host is not None and answer.record is not None
        self.host.machine.told(record_of(answer.record))

    def _is_a_step(self, before: Record, after: Record) -> None:
        states = {leg.id: leg.state for leg in before.legs}
        for leg in after.legs:
            if leg.state == "in-sync" and states[leg.id] != "in-sync":
                disk = self.disks[leg.id]
                assert not disk.syncing and (disk.epoch, disk.generation) >= leg.stamp.key(), (leg, disk)
                assert disk.acknowledged == self.written, "a leg counts that misses an acknowledged write"
        if after != before:
            self.records.append(after)

    @precondition(lambda self: self.host is not None)
    @rule()
    def the_link_is_back(self) -> None:
        """Control sends the record; what was asked may be lost."""
        assert self.host is not None
        self.questions.clear()
        self.host.machine.told(record_of(self.record))
        self.host.machine.ask_again()
        self._drive()

    # ---- the host ----

    def _a_host_opens_it(self) -> None:
        """Under the next epoch: the one of before is over."""
        self.record = self.record.model_copy(update={"epoch": self.record.epoch + 1})
        self.host = Host(self.record.epoch, Legs(self.record.epoch))
        looks = tuple(self._look(leg.id) for leg in self.record.legs)
        self.host.machine.begin(record_of(self.record), looks)
        self._drive()

    def _look(self, leg: int) -> LegLook:
        disk = self.disks[leg]
        if not disk.there:
            return LegLook(Look.ABSENT)
        return LegLook(Look.LABEL, disk.syncing, disk.epoch, disk.generation)

    @precondition(lambda self: self.host is not None)
    @rule(steps=STEPS)
    def the_host_dies(self, steps: int) -> None:
        """What it had asked may still arrive. Another one opens the VVol, or the same again."""
        self.host = None
        self.questions.clear()
        self.answers.clear()
        self.it_goes_on(steps)

    def _drive(self) -> None:
        while self.host is not None and (action := self.host.machine.next()) is not None:
            match action.kind:
                case Act.ASK:
                    self._ask(action)
                case Act.FENCE | Act.REFUSE:
                    self.host = None
                case _:
                    self.host.calls.append(action)

    def _ask(self, action: LegsAction) -> None:
        self.numbers += 1
        stamped = action.ask in (Ask.IN_SYNC, Ask.CONFIRM)
        stamp = Stamp(epoch=action.stamp_epoch, generation=action.stamp_generation) if stamped else None
        values = {"epoch": action.epoch, "generation": action.generation, "leg": action.leg, "stamp": stamp}
        question = LegChange(id=self.numbers, vvol="v", wanted=WANTED[action.ask], **values)
        self.questions.append(question)
        if action.ask != Ask.CONFIRM:
            self.late.append(question)

    # ---- the plane ----

    def _the_plane_obeys(self) -> None:
        """One call is carried out."""
        assert self.host is not None
        action = self.host.calls.pop(0)
        self.host.generation = max(self.host.generation, action.generation)
        if action.kind is Act.OPEN:
            self._open()
            return
        result = self._obey(action)
        args = (action.leg, self.host.epoch, self.host.generation) if self.host is not None else ()
        self._tell(MirrorEventKind.LEG_CHANGED, *args, result=result, token=action.token)

    def _tell(self, kind: MirrorEventKind, *args: int, **values: Any) -> None:
        if self.host is not None:
            self.host.events.append(MirrorEvent(kind, args=args, **values))

    def _open(self) -> None:
        """Legs that the record has in sync serve; labels are written before anything is."""
        assert self.host is not None
        for leg in self.record.legs:
            self.host.lanes[leg.id] = "in-sync" if leg.state == "in-sync" else "stale"
        if not self._label(self._lanes("in-sync")):
            self.host = None
            return
        self._tell(MirrorEventKind.ATTACHED, 0, self.host.epoch, self.host.generation)

    def _lanes(self, *lanes: Lane) -> list[int]:
        assert self.host is not None
        return [leg for leg, lane in self.host.lanes.items() if lane in lanes]

    def _label(self, legs: list[int], *, syncing: bool = False) -> bool:
        """Whether every one of these could be labelled."""
        assert self.host is not None
        for leg in legs:
            disk = self.disks[leg]
            if not disk.there:
                return False
            disk.syncing, disk.epoch, disk.generation = syncing, self.host.epoch, self.host.generation
        return True

    def _obey(self, action: LegsAction) -> int:
        assert self.host is not None
        lane, leg = self.host.lanes[action.leg], action.leg
        if action.kind is Act.FAIL:
            return 0 if self._fails(leg) else -16
        if action.kind is Act.RELEASE:
            if lane != "failing" or not self._label(self._lanes("in-sync", "promoting")):
                return -5
            self.host.lanes[leg] = "stale"
        elif action.kind is Act.RESYNC:
            if lane != "stale" or not self._label([leg], syncing=True):
                return -5
            self.host.lanes[leg] = "syncing"
        elif action.kind is Act.PROMOTE:
            if lane != "promoting" or not self._label(self._lanes("in-sync", "promoting")):
                return -5
            self.host.lanes[leg] = "in-sync"
        return 0

    def _fails(self, leg: int) -> bool:
        """The last one in sync never fails."""
        assert self.host is not None
        lane = self.host.lanes.get(leg)
        if lane in ("in-sync", "promoting") and [one for one in self._lanes("in-sync") if one != leg]:
            self.host.lanes[leg] = "failing"
            self._tell(MirrorEventKind.LEG_FAILED, leg, self.host.generation, result=-5)
            return True
        if lane == "syncing":
            self.host.lanes[leg] = "stale"
            self._tell(MirrorEventKind.LEG_STOPPED, leg, result=-5)
            return True
        return False

    @precondition(lambda self: self.host is not None and self.host.lanes)
    @rule(leg=st.integers(1, LEGS), gone=st.booleans(), steps=STEPS)
    def a_leg_fails(self, leg: int, gone: bool, steps: int) -> None:
        """An operation on it did, perhaps because its storage has gone. Without any leg left in sync a filter ends."""
        assert self.host is not None
        failed = self._fails(leg)
        self.disks[leg].there &= not gone
        if gone and not failed and self.host.lanes[leg] == "in-sync":
            self.host = None
        self.it_goes_on(steps)

    def _a_client_writes(self) -> None:
        """It is acknowledged when no leg is failing, and by then is on every leg that gets writes."""
        if self.host is None or not self.host.lanes or self._lanes("failing"):
            return
        whole = {leg for leg in self.disks if self.disks[leg].acknowledged == self.written}
        self.written += 1
        for leg in self._lanes("in-sync", "promoting", "syncing"):
            if leg in whole:
                self.disks[leg].acknowledged = self.written

    def _is_tried(self, leg: int, *, full: bool) -> None:
        """Its storage is there, and the filter has opened it anew."""
        assert self.host is not None
        self.disks[leg].there = True
        self.host.machine.looked(leg, self._look(leg))
        self.host.machine.want_resync(leg, full=full)
        self._drive()

    @rule(leg=st.integers(1, LEGS), full=st.booleans(), before=STEPS, whole=st.booleans(), after=STEPS)
    def a_leg_goes_and_comes_back(self, leg: int, full: bool, before: int, whole: bool, after: int) -> None:
        """As far as it gets. A whole copy is labelled as in sync; from then on it counts for acknowledgements."""
        self.it_goes_on(20)
        if self.host is not None and self.host.lanes.get(leg) == "in-sync":
            self._fails(leg)
            self.it_goes_on(20)
        if self.host is not None and self.host.lanes.get(leg) == "stale":
            self._is_tried(leg, full=full)
            self.it_goes_on(before)
        if whole and self.host is not None and self.host.lanes.get(leg) == "syncing":
            if self._label([leg]):
                self.disks[leg].acknowledged = self.written
                self.host.lanes[leg] = "promoting"
                self._tell(MirrorEventKind.RESYNC_DONE, leg, self.host.epoch, self.host.generation)
            else:
                self._fails(leg)
        self.it_goes_on(after)

    # ---- what must hold ----

    @invariant()
    def one_leg_in_sync_is_left(self) -> None:
        """In every record."""
        assert in_sync(self.record.legs)

    @invariant()
    def in_sync_is_labelled_so(self) -> None:
        """No record calls a leg in sync whose label says that it is not, or is below what was confirmed."""
        for leg in self.record.legs:
            disk = self.disks[leg.id]
            if leg.state == "in-sync":
                assert not disk.syncing and (disk.epoch, disk.generation) >= leg.stamp.key(), (leg, disk)

    @invariant()
    def what_may_serve_misses_nothing(self) -> None:
        """A leg that the record has in sync has all that was ever acknowledged, whoever dies now."""
        for leg in self.record.legs:
            if leg.state == "in-sync":
                assert self.disks[leg.id].acknowledged == self.written, leg

    def teardown(self) -> None:
        """When nothing is lost any more, plane and registry come to agree."""
        if getattr(self, "host", None) is None:
            return
        for _ in range(50):
            if self.host is None:
                return
            self.it_goes_on(12)
            if self.host is not None and not self.questions:
                self.the_link_is_back()
        if self.host is not None:
            assert not self._lanes("failing"), "what control knows is released"
            agreed = {leg.id: leg.state for leg in self.record.legs}
            assert all(agreed[leg] == "in-sync" for leg in self._lanes("in-sync"))
            assert self.host.lanes or not self.disks[in_sync(self.record.legs)[0]].there


TestFarm = Farm.TestCase
TestFarm.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


def _any_epoch(record: Record, change: LegChange) -> Decision:
    return decide(record, change.model_copy(update={"epoch": record.epoch}))


def _any_generation(record: Record, change: LegChange) -> Decision:
    """A stamp that is below what is known of the leg would still give an old question away."""
    stamp = Stamp(epoch=record.epoch, generation=record.generation) if change.stamp is not None else None
    return decide(record, change.model_copy(update={"generation": record.generation, "stamp": stamp}))


def _of_another_epoch(farm: Farm) -> None:
    """A copy is whole and its question on the way when the host dies; the next one serves without that leg."""
    farm.a_leg_goes_and_comes_back(leg=2, full=False, before=20, whole=True, after=1)
    assert [question.wanted for question in farm.questions] == ["in-sync"]
    farm.the_host_dies(steps=20)
    farm.an_old_question_arrives(which=0)


def _of_another_generation(farm: Farm) -> None:
    """A copy was whole; the leg is lost again, and being copied to when that question comes once more."""
    farm.a_leg_goes_and_comes_back(leg=2, full=False, before=20, whole=True, after=20)
    farm.a_leg_goes_and_comes_back(leg=2, full=False, before=20, whole=False, after=20)
    farm.an_old_question_arrives(which=2)


@pytest.mark.parametrize(
    ("life", "forgets"), [(_of_another_epoch, _any_epoch), (_of_another_generation, _any_generation)]
)
def test_a_registry_that_forgets_to_compare_is_found(
    life: Callable[[Farm], None], forgets: Callable[[Record, LegChange], Decision]
) -> None:
    class Forgetful(Farm):
        decide = staticmethod(forgets)

    for kind in (Farm, Forgetful):
        farm = kind()
        farm.begin()
        if kind is Farm:
            life(farm)
            farm.in_sync_is_labelled_so()
            farm.what_may_serve_misses_nothing()
        else:
            with pytest.raises(AssertionError, match="misses an acknowledged write|syncing=True"):
                life(farm)
