"""Reference policies, written for clarity: each is told of one block after the other and says whether it had it."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Protocol


class Policy(Protocol):
    """A cache of a fixed number of blocks."""

    def request(self, block: int) -> bool:
        """Was it there? It is afterwards."""


class Lru:
    """Least recently used leaves first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._held: OrderedDict[int, None] = OrderedDict()

    def request(self, block: int) -> bool:
        """See Policy."""
        if block in self._held:
            self._held.move_to_end(block)
            return True
        if len(self._held) >= self._capacity:
            self._held.popitem(last=False)
        self._held[block] = None
        return False


class Arc:
    """Adaptive replacement (Megiddo and Modha, 2003): seen once, seen more often, and the ghosts of both."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._wanted = 0
        """How long `once` should be."""
        self._once: OrderedDict[int, None] = OrderedDict()
        self._often: OrderedDict[int, None] = OrderedDict()
        self._once_gone: OrderedDict[int, None] = OrderedDict()
        self._often_gone: OrderedDict[int, None] = OrderedDict()

    def _replace(self, from_often_gone: bool) -> None:
        once = len(self._once)
        if once and (once > self._wanted or (from_often_gone and once == self._wanted) or not self._often):
            block, _ = self._once.popitem(last=False)
            self._once_gone[block] = None
        else:
            block, _ = self._often.popitem(last=False)
            self._often_gone[block] = None

    def _comes_back(self, block: int) -> bool:
        """A ghost: learn from it."""
        if block in self._once_gone:
            step = max(1, len(self._often_gone) // len(self._once_gone))
            self._wanted = min(self._capacity, self._wanted + step)
            self._replace(False)
            del self._once_gone[block]
        elif block in self._often_gone:
            step = max(1, len(self._once_gone) // len(self._often_gone))
            self._wanted = max(0, self._wanted - step)
            self._replace(True)
            del self._often_gone[block]
        else:
            return False
        self._often[block] = None
        return True

    def _make_room(self) -> None:
        seen_once = len(self._once) + len(self._once_gone)
        total = seen_once + len(self._often) + len(self._often_gone)
        if seen_once == self._capacity:
            if self._once_gone:
                self._once_gone.popitem(last=False)
                self._replace(False)
            else:
                self._once.popitem(last=False)
        elif total >= self._capacity:
            if total == 2 * self._capacity:
                self._often_gone.popitem(last=False)
            self._replace(False)

    def request(self, block: int) -> bool:
        """See Policy."""
        if block in self._often:
            self._often.move_to_end(block)
            return True
        if block in self._once:
            del self._once[block]
            self._often[block] = None
            return True
        if not self._comes_back(block):
            self._make_room()
            self._once[block] = None
        return False


class S3Fifo:
    """S3-FIFO (Yang and others, 2023): two bits a block, a tenth for new ones, a ghost as long as the rest."""

    def __init__(self, capacity: int) -> None:
        self._small_target = max(1, capacity // 10)
        self._capacity = capacity
        self._ghost_max = capacity - self._small_target
        self._uses: dict[int, int] = {}
        self._small: deque[int] = deque()
        self._main: deque[int] = deque()
        self._ghost: OrderedDict[int, None] = OrderedDict()

    def _leave_small(self) -> bool:
        block = self._small.popleft()
        if self._uses[block] > 1:
            self._main.append(block)
            self._uses[block] = 0
            return False
        del self._uses[block]
        self._ghost[block] = None
        if len(self._ghost) > self._ghost_max:
            self._ghost.popitem(last=False)
        return True

    def _leave_main(self) -> bool:
        block = self._main.popleft()
        if self._uses[block] > 0:
            self._uses[block] -= 1
            self._main.append(block)
            return False
        del self._uses[block]
        return True

    def _evict(self) -> None:
        gone = False
        while not gone:
            from_small = len(self._small) >= self._small_target or not self._main
            gone = self._leave_small() if from_small else self._leave_main()

    def request(self, block: int) -> bool:
        """See Policy."""
        if block in self._uses:
            self._uses[block] = min(3, self._uses[block] + 1)
            return True
        if len(self._uses) >= self._capacity:
            self._evict()
        known = block in self._ghost
        if known:
            del self._ghost[block]
        (self._main if known else self._small).append(block)
        self._uses[block] = 0
        return False


REFERENCES: dict[str, type[Lru | Arc | S3Fifo]] = {"LRU": Lru, "ARC": Arc, "S3-FIFO": S3Fifo}


def hits(policy: Policy, trace: Iterable[int]) -> int:
    """How many requests of the trace were hits."""
    return sum(map(policy.request, trace))
