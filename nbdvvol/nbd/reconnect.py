"""When to dial a lost server again, and when to stop keeping its I/O waiting. Sans I/O: told of what happens, and when.

A remote export has some places for connections. Invariants: a place is being dialled, up, or waits for its next try; no
more are dialled or up than the server takes (`limit`), but for those that are up when it says so; while none is up only
one is dialled, so that a server that is down is not knocked at from all sides; tries come with back-off, at once only
after a connection that had lasted; once all have been down for `hold_s`, GiveUp is said exactly once, until one is up
again. Times are seconds of a monotonic clock.
"""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass

BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.2, 5.0
LASTING_S = 5.0
"""A connection that lasted this long is worth an immediate try; one that breaks at once is not."""


@dataclass(frozen=True, slots=True)
class Dial:
    """Connect this place now, and say `up` or `failed`."""

    place: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """I/O that waits for a connection fails from here on, until one is up."""


Action = Dial | GiveUp


class _State(enum.Enum):
    WAITING = "waiting"
    DIALLING = "dialling"
    UP = "up"


@dataclass(slots=True)
class _Place:
    state: _State = _State.WAITING
    due_s: float = 0.0
    since_s: float = 0.0


class Reconnector:
    """The places of one remote export."""

    def __init__(self, places: int, hold_s: float, now_s: float, chance: random.Random | None = None) -> None:
        self._places = [_Place(due_s=now_s, since_s=now_s) for _ in range(places)]
        self._limit = places
        self._hold_s = hold_s
        self._down_s: float | None = now_s
        self._gave_up = False
        self._failures = 0
        self._chance = chance or random.Random()
        self.last_error = ""

    @property
    def up_count(self) -> int:
        """How many places are connected."""
        return sum(place.state is _State.UP for place in self._places)

    @property
    def _busy(self) -> int:
        """How many places are connected, or being so."""
        return sum(place.state is not _State.WAITING for place in self._places)

    @property
    def down_since_s(self) -> float | None:
        """Since when none is; None while one is."""
        return self._down_s

    def up(self, place: int, now_s: float) -> list[Action]:
        """The place is connected."""
        self._places[place].state = _State.UP
        self._places[place].since_s = now_s
        self._down_s = None
        self._gave_up = False
        self._failures = 0
        for other in self._places:  # the server is there: the others need not wait
            if other.state is _State.WAITING:
                other.due_s = min(other.due_s, now_s)
        return self.tick(now_s)

    def failed(self, place: int, why: str, now_s: float) -> list[Action]:
        """Dialling did not succeed."""
        self.last_error = why
        self._failures += 1
        self._wait(place, now_s, self._backoff_s())
        return self.tick(now_s)

    def lost(self, place: int, why: str, now_s: float) -> list[Action]:
        """A connection broke."""
        self.last_error = why
        lasted = now_s - self._places[place].since_s >= LASTING_S
        if not lasted:
            self._failures += 1
        self._wait(place, now_s, 0.0 if lasted else self._backoff_s())
        if self._down_s is None and not self.up_count:
            self._down_s = now_s
        return self.tick(now_s)

    def limit(self, places: int | None) -> None:
        """The server takes no more than so many connections now (None: any number); those that are up stay."""
        self._limit = len(self._places) if places is None else places

    def tick(self, now_s: float) -> list[Action]:
        """What is due."""
        actions: list[Action] = []
        if self._down_s is not None and not self._gave_up and now_s >= self._down_s + self._hold_s:
            self._gave_up = True
            actions.append(GiveUp())
        alone = not self.up_count
        for number, place in enumerate(self._places):
            if self._busy >= (1 if alone else self._limit):
                break
            if place.state is _State.WAITING and place.due_s <= now_s:
                place.state = _State.DIALLING
                actions.append(Dial(number))
        return actions

    def next_s(self) -> float | None:
        """When `tick` has something to do, if nothing else happens; None: nothing."""
        times = [place.due_s for place in self._places if place.state is _State.WAITING]
        if self._busy >= (self._limit if self.up_count else 1):
            times = []
        if self._down_s is not None and not self._gave_up:
            times.append(self._down_s + self._hold_s)
        return min(times, default=None)

    def _wait(self, place: int, now_s: float, delay_s: float) -> None:
        self._places[place].state = _State.WAITING
        self._places[place].due_s = now_s + delay_s
        if not self.up_count:  # one place knocks for all
            for other in self._places:
                if other.state is _State.WAITING:
                    other.due_s = max(other.due_s, now_s + delay_s)

    def _backoff_s(self) -> float:
        ceiling = min(BACKOFF_FIRST_S * 2 ** min(self._failures - 1, 16), BACKOFF_MAX_S)
        return float(ceiling * self._chance.uniform(0.5, 1.0))
