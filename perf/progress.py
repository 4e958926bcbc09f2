"""How far a run is, and how long it still takes: judged by what was measured so far, each generator on its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

GUESS_S = 0.9
"""A measurement, before any of its kind was made: seconds."""


class Progress:
    """Counts measurements of several kinds and says what is left. It reads no clock: the caller says what they took."""

    def __init__(self, measurements: Mapping[str, int], say: Callable[[str], None]) -> None:
        self.say = say
        self._left = dict(measurements)
        self._all = sum(measurements.values())
        self._spent: dict[str, tuple[int, float]] = {}

    def step(self, kind: str, count: int, seconds: float, what: str) -> None:
        """That many measurements of a kind were made, or given up; say so."""
        made, spent = self._spent.get(kind, (0, 0.0))
        self._spent[kind] = made + count, spent + seconds
        self._left[kind] = max(0, self._left.get(kind, 0) - count)
        done = self._all - sum(self._left.values())
        self.say(f"  [{done}/{self._all}, {self.left_s() / 60:.0f} min left] {what}")

    def left_s(self) -> float:
        """Seconds that the remaining measurements take, if they are like those before."""
        each = {kind: spent / made for kind, (made, spent) in self._spent.items() if made}
        return sum(count * each.get(kind, GUESS_S) for kind, count in self._left.items())
