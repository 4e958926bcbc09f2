"""What decides about a VVol's log, against control's own decision, over a link that loses questions and answers.

Checked after every step: nothing is logged unless the registry says that this log may hold data, under this epoch; and
the registry says that none does only while there is nothing in it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdvvol.control.logs import Decided, Standing, decide
from nbdvvol.filter.logmachine import Do, LogMachine, Plane
from nbdvvol.model.log import LogChange, LogRecord, LogWanted

LOG = "ab" * 16
WANTED: dict[Do, LogWanted] = {Do.ASK_DIRTY: "dirty", Do.ASK_CLEAN: "clean", Do.ASK_FORGET: "forget"}


def change(wanted: LogWanted, log: str = LOG, epoch: int = 3, generation: int = 1) -> LogChange:
    return LogChange(id=1, vvol="v", epoch=epoch, generation=generation, log=log, wanted=wanted, file="/l")


class World:
    """A machine, control's record, and a data plane that does as it is told."""

    def __init__(self, held: bool) -> None:
        self.record = Standing("dirty", "h", LOG, 2) if held else Standing()
        self.machine = LogMachine(on=True, held=held)
        self.holds = held
        self.logging = self.void = self.forgotten = False
        self.question: LogChange | None = None
        self.answer: LogRecord | None = None
        self.draining = False

    def drive(self) -> None:
        while (do := self.machine.next()) is not None:
            self.obey(do)

    def obey(self, do: Do) -> None:
        if do in WANTED:
            assert self.question is None and self.answer is None, "one question is out at a time"
            self.question = change(WANTED[do])
        elif do is Do.ALLOW:
            assert not self.void
            self.logging = self.holds = True
        elif do is Do.DRAIN:
            self.logging, self.draining = False, True
        else:
            self.forgotten = True

    def step(self, what: str) -> None:
        if what == "control" and self.question is not None:
            done: Decided = decide(self.record, "h", 1, self.question)
            self.record = done.after
            self.answer, self.question = LogRecord(id=1, vvol="v", refused=done.refused), None
        elif what == "answer" and self.answer is not None:
            answer, self.answer = self.answer, None
            if (do := self.machine.answered(answer)) is not None:
                self.obey(do)
        elif what == "link":
            self.question = self.answer = None
            self.machine.again()
        elif what in ("on", "off"):
            self.record = Standing(**{**_fields(self.record), "draining": what == "off"})
            self.machine.wish(on=what == "on")
        elif what == "fail" and not self.void and (self.logging or self.draining):
            self.logging, self.draining, self.void = False, True, True
            self.machine.failed()
        elif what == "drained" and self.draining:
            self.draining, self.holds = False, False
            self.machine.drained(void=self.void)
        elif what == "word" and self.void and self.draining:
            self.machine.needs_word()
        self.drive()

    def check(self) -> None:
        if self.logging:
            assert (self.record.state, self.record.log, self.record.epoch) == ("dirty", LOG, 3)
        if self.record.state == "clean" and self.record.given_up < 3:
            assert not self.holds, "it holds something, and the registry says that nothing does"
        if self.machine.clean:
            assert self.record.state == "clean"


def _fields(record: Standing) -> dict[str, object]:
    return {name: getattr(record, name) for name in Standing.__slots__}


STEPS = ("control", "answer", "link", "on", "off", "fail", "drained", "word")


@settings(max_examples=400, deadline=None)
@given(held=st.booleans(), steps=st.lists(st.sampled_from(STEPS), max_size=40))
def test_the_registry_knows_of_whatever_is_logged(held: bool, steps: list[str]) -> None:
    world = World(held)
    world.drive()
    for step in steps:
        world.step(step)
        world.check()
    for _ in range(8):  # whatever has happened, it ends well once everything answers
        for step in ("link", "on", "control", "answer", "drained", "control", "answer"):
            world.step(step)
            world.check()
    assert world.logging != world.void
    assert world.machine.plane is (Plane.VOID if world.void else Plane.SERVING)
    assert world.machine.clean == world.void


def test_it_is_logged_only_after_controls_word() -> None:
    machine = LogMachine(on=True, held=False)
    assert machine.next() is Do.ASK_DIRTY and machine.next() is None
    assert machine.answered(LogRecord(id=1, vvol="v")) is None
    assert machine.next() is Do.ALLOW and machine.next() is None
    machine.wish(on=False)
    assert machine.next() is Do.DRAIN and machine.next() is None
    machine.drained(void=False)
    assert machine.next() is Do.ASK_CLEAN


def test_another_epoch_ends_it() -> None:
    machine = LogMachine(on=True, held=True)
    assert machine.next() is Do.ASK_DIRTY
    machine.answered(LogRecord(id=1, vvol="v", refused="epoch"))
    machine.again()
    assert machine.dead and machine.next() is None


def test_what_was_refused_is_not_asked_again_before_something_is_new() -> None:
    machine = LogMachine(on=True, held=False)
    assert machine.next() is Do.ASK_DIRTY
    machine.answered(LogRecord(id=1, vvol="v", refused="draining"))
    assert machine.next() is None
    machine.wish(on=True)
    assert machine.next() is Do.ASK_DIRTY


@pytest.mark.parametrize("wanted", ["dirty", "clean", "forget"])
def test_another_log_than_the_one_that_holds_data_changes_nothing(wanted: LogWanted) -> None:
    now = Standing("dirty", "h", LOG, 3)
    for host, log in (("other", LOG), ("h", "cd" * 16)):
        done = decide(now, host, 1, change(wanted, log))
        assert (done.refused, done.after, done.moved) == ("other", now, False)


def test_control_decides() -> None:
    began = decide(Standing(), "h", 1, change("dirty"))
    assert began.moved and began.after == Standing("dirty", "h", LOG, 3)
    assert not decide(began.after, "h", 1, change("dirty")).moved, "repeating it changes nothing"
    ended = decide(began.after, "h", 1, change("clean"))
    assert ended.moved and ended.after == Standing(epoch=3) and not ended.after.holds
    assert not decide(ended.after, "h", 1, change("clean")).moved
    assert decide(began.after, "h", 1, change("forget")).after.given_up == 3
    assert decide(Standing(draining=True), "h", 1, change("dirty")).refused == "draining"
    assert decide(Standing(), "h", 1, change("dirty", log="")).refused == "other"
    assert decide(Standing(), "h", 1, change("dirty", generation=2)).refused == "generation"
    recovered = decide(Standing("unknown"), "h", 1, change("dirty"))
    assert recovered.after.state == "dirty", "who serves it, by the operator's word, knows"
