"""What control decides about legs: whatever is asked, however late and however often, its invariants hold."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from nbdvvol.control.legs import Standing, decide, free_spare, in_sync, replaced_by_now, spare_due
from nbdvvol.model.mirror import LegChange, Record, RecordLeg, Stamp

STATES = st.sampled_from(["in-sync", "syncing", "stale"])
WANTED = st.sampled_from(["stale", "syncing", "in-sync", "confirm"])
SMALL = st.integers(0, 6)
STAMPS = st.builds(lambda epoch, generation: Stamp(epoch=epoch, generation=generation), SMALL, SMALL)


@st.composite
def changes(draw: st.DrawFn) -> LegChange:
    """Any question, sensible or not."""
    values = {"epoch": draw(st.sampled_from([2, 3])), "generation": draw(st.integers(1, 9)), "leg": draw(SMALL)}
    stamp = draw(st.none() | STAMPS)
    return LegChange(id=1, vvol="v", wanted=draw(WANTED), stamp=stamp, **values)


def _record(states: list[Any], generation: int = 3) -> Record:
    legs = [
        RecordLeg(id=number, state=state, stamp=Stamp(epoch=1, generation=1)) for number, state in enumerate(states)
    ]
    return Record(epoch=3, generation=generation, legs=legs)


@given(st.lists(STATES, min_size=1, max_size=5), st.lists(changes(), max_size=30))
def test_no_question_breaks_the_record(states: list[str], asked: list[LegChange]) -> None:
    record = _record(["in-sync", *states])
    for change in asked:
        done = decide(record, change)
        before = {leg.id: leg for leg in record.legs}
        assert in_sync(done.record.legs), "a leg in sync is left"
        assert done.record.generation == record.generation + done.moved
        moved = [leg.id for leg in done.record.legs if leg.state != before[leg.id].state]
        assert len(moved) == done.moved
        for leg in done.record.legs:
            assert before[leg.id].stamp.key() <= leg.stamp.key()
            assert leg.stamp.key() <= (record.epoch, record.generation), "nothing above the record is confirmed"
            assert (before[leg.id].state, leg.state) != ("stale", "in-sync"), "it is copied to in between"
        if done.refused or (change.epoch, change.generation) != (record.epoch, record.generation):
            assert not done.moved
        if done.refused:
            assert done.record == record and done.message
        again = decide(done.record, change)
        assert not again.moved, "asked again, it is done or refused"
        assert done.refused or not again.refused
        record = done.record


def _ask(record: Record, wanted: Any, leg: int, **values: Any) -> Any:
    base = {"id": 1, "vvol": "v", "epoch": record.epoch, "generation": record.generation, "leg": leg, "wanted": wanted}
    return decide(record, LegChange.model_validate(base | values))


def test_the_way_of_a_leg_that_fails_and_returns() -> None:
    record = _record(["in-sync", "in-sync"])
    failed = _ask(record, "stale", 1).record
    assert [leg.state for leg in failed.legs] == ["in-sync", "stale"] and failed.generation == 4
    assert _ask(failed, "stale", 0).refused == "last-leg"
    assert _ask(failed, "in-sync", 1, stamp=Stamp(epoch=3, generation=4)).refused == "state"
    copied = _ask(failed, "syncing", 1).record
    assert _ask(copied, "in-sync", 1).refused == "state", "without a stamp"
    assert _ask(copied, "in-sync", 1, stamp=Stamp(epoch=3, generation=9)).refused == "state", (
        "of a label from the future"
    )
    whole = _ask(copied, "in-sync", 1, stamp=Stamp(epoch=3, generation=5)).record
    assert [leg.state for leg in whole.legs] == ["in-sync", "in-sync"] and whole.generation == 6
    assert whole.legs[1].stamp == Stamp(epoch=3, generation=5)
    late = _ask(whole, "stale", 1, generation=3)
    assert late.refused == "generation" and late.record == whole, "a question that was long under way harms nothing"
    assert _ask(whole, "stale", 1, epoch=2).refused == "epoch"
    assert _ask(whole, "stale", 7).refused == "unknown"


def _standing(*legs: tuple[str, float | None, int | None]) -> list[Standing]:
    return [
        Standing(n, f"d{n}", "in-sync" if lost is None else "stale", lost, replaces)
        for n, (_, lost, replaces) in enumerate(legs)
    ]


def test_a_spare_takes_the_place_of_what_is_lost_for_too_long() -> None:
    legs = _standing(("a", None, None), ("b", 700.0, None), ("c", 800.0, None))
    assert spare_due(legs, 600.0) == 2, "the longest lost"
    assert free_spare(legs, ["d1", "s"], ["d1", "s"]) == "s", "no second leg beside another"
    assert free_spare(legs, ["s"], []) is None, "the spare must be there"
    assert spare_due(legs, 900.0) is None, "not lost for long enough"
    assert spare_due(legs[1:], 600.0) is None, "nothing to copy from"
    replaced = [*legs, Standing(3, "s", "syncing", None, 2)]
    assert spare_due(replaced, 600.0) == 1, "one that has a spare already needs no second"
    assert free_spare(replaced, ["s", "t"], ["s", "t"]) == "t"
    assert replaced_by_now(replaced) == []
    assert replaced_by_now([*legs, Standing(3, "s", "in-sync", None, 2)]) == [2]
    whole = [*_standing(("a", None, None), ("b", None, None)), Standing(2, "s", "in-sync", None, 1)]
    assert replaced_by_now(whole) == [], "what came back stays"
