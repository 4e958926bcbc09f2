"""How far a run is, and how long it still takes: judged by the steps it has made so far, each kind on its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

GUESS_S = 7.0
"""A step (one round of one point, every server) before any of its kind was made: seconds."""


class Progress:
    """Counts steps of several kinds and says what is left. It reads no clock: the caller says how long a step took."""

    def __init__(self, steps: Mapping[str, int], say: Callable[[str], None]) -> None:
        self.say = say
        self._left = dict(steps)
        self._all = sum(steps.values())
        self._spent: dict[str, tuple[int, float]] = {}

    def step(self, kind: str, seconds: float, what: str) -> None:
        """One step was made; say so."""
        count, spent = self._spent.get(kind, (0, 0.0))
        self._spent[kind] = count + 1, spent + seconds
        self._left[kind] = max(0, self._left.get(kind, 0) - 1)
        done = self._all - sum(self._left.values())
        self.say(f"  [{done}/{self._all}, {self.left_s() / 60:.0f} min left] {what}")

    def left_s(self) -> float:
        """Seconds that the remaining steps take, if they are like those before."""
        known = [spent / count for count, spent in self._spent.values()]
        usual = sum(known) / len(known) if known else GUESS_S
        each = {kind: spent / count for kind, (count, spent) in self._spent.items()}
        return sum(count * each.get(kind, usual) for kind, count in self._left.items())
