"""When a lost server is dialled again: back-off, one knock for all, and the end of patience."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from nbdvvol.nbd.reconnect import BACKOFF_MAX_S, LASTING_S, Action, Dial, GiveUp, Reconnector


def fresh(places: int = 4, hold_s: float = 60.0) -> Reconnector:
    return Reconnector(places, hold_s, 0.0, random.Random(1))


def test_one_knocks_then_all_come() -> None:
    machine = fresh()
    assert machine.tick(0.0) == [Dial(0)] and machine.tick(0.0) == []
    assert machine.up(0, 0.1) == [Dial(1), Dial(2), Dial(3)]
    for place in (1, 2, 3):
        assert machine.up(place, 0.2) == []
    assert machine.up_count == 4 and machine.next_s() is None and machine.down_since_s is None


def test_a_connection_that_lasted_is_dialled_at_once() -> None:
    machine = fresh(1)
    machine.tick(0.0)
    machine.up(0, 0.0)
    assert machine.lost(0, "cut", LASTING_S) == [Dial(0)]
    assert machine.down_since_s == LASTING_S and machine.last_error == "cut"


def test_one_that_breaks_at_once_is_not() -> None:
    machine = fresh(1)
    machine.tick(0.0)
    machine.up(0, 0.0)
    assert machine.lost(0, "cut", 0.1) == []
    due = machine.next_s()
    assert due is not None and 0.1 < due <= 0.3
    assert machine.tick(due) == [Dial(0)]


def test_tries_come_ever_later_up_to_a_bound() -> None:
    machine, now, waits = fresh(3, hold_s=1e9), 0.0, []
    assert machine.tick(now) == [Dial(0)]
    for _ in range(12):
        assert machine.failed(0, "refused", now) == []
        due = machine.next_s()
        assert due is not None
        waits.append(due - now)
        now = due
        assert machine.tick(now) == [Dial(0)], "one place knocks for all"
    assert waits[0] < 0.3 and max(waits) <= BACKOFF_MAX_S and min(waits[-3:]) >= BACKOFF_MAX_S / 2


def test_giving_up_is_said_once_and_undone_by_a_connection() -> None:
    machine = fresh(2, hold_s=30.0)
    machine.tick(0.0)
    machine.up(0, 0.0)
    machine.up(1, 0.0)
    machine.lost(0, "cut", 10.0)
    assert machine.down_since_s is None
    machine.lost(1, "cut", 11.0)
    assert GiveUp() not in machine.tick(40.9)
    assert GiveUp() in machine.tick(41.0) and GiveUp() not in machine.tick(99.0)
    machine.failed(0, "refused", 99.0)
    machine.tick(200.0)
    machine.up(0, 200.0)
    machine.lost(0, "cut", 300.0)
    assert GiveUp() in machine.tick(330.0)


def test_without_patience_io_fails_at_once() -> None:
    machine = fresh(1, hold_s=0.0)
    machine.tick(0.0)
    machine.up(0, 1.0)
    assert GiveUp() in machine.lost(0, "cut", 2.0)


def test_a_server_that_takes_one_connection_gets_one() -> None:
    machine = fresh()
    machine.tick(0.0)
    machine.limit(1)
    assert machine.up(0, 0.0) == []
    assert machine.lost(0, "cut", 10.0) == [Dial(0)]


def test_the_one_connection_may_be_any_of_the_places() -> None:
    machine = fresh()
    machine.tick(0.0)
    assert machine.up(0, 0.0) == [Dial(1), Dial(2), Dial(3)]
    machine.up(2, 0.0)
    machine.failed(1, "one is enough", 1.0)
    machine.failed(3, "one is enough", 1.0)
    machine.limit(1)
    assert machine.lost(0, "cut", 10.0) == [] and machine.next_s() is None, "one is up, though the last place waits"
    assert machine.lost(2, "cut", 20.0) == [Dial(0)]
    machine.limit(None)
    assert machine.up(0, 21.0) == [Dial(1), Dial(2), Dial(3)]


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["up", "failed", "lost", "tick"]), st.floats(0, 20))))
def test_whatever_happens_somebody_dials(script: list[tuple[int, str, float]]) -> None:
    """After any history, time alone leads to a dial for every place that is not up; and while none is, one knocks."""
    machine, now = fresh(), 0.0
    dialling: set[int] = set()
    up: set[int] = set()

    def take(actions: list[Action]) -> None:
        places = [action.place for action in actions if isinstance(action, Dial)]
        assert not set(places) & (dialling | up) and len(set(places)) == len(places)
        assert up or not places or (len(places) == 1 and not dialling), "one place knocks for all"
        dialling.update(places)

    take(machine.tick(now))
    for place, what, passed in script:
        now += passed
        take(machine.tick(now))
        if what == "up" and place in dialling:
            dialling.discard(place)
            up.add(place)
            take(machine.up(place, now))
        elif what == "failed" and place in dialling:
            dialling.discard(place)
            take(machine.failed(place, "x", now))
        elif what == "lost" and place in up:
            up.discard(place)
            take(machine.lost(place, "x", now))
        assert machine.up_count == len(up)
    for _ in range(20):
        for place in sorted(dialling):
            dialling.discard(place)
            up.add(place)
            take(machine.up(place, now))
        due = machine.next_s()
        if due is not None:
            now = max(now, due)
            take(machine.tick(now))
    assert up == {0, 1, 2, 3}
