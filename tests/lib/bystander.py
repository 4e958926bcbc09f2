"""Another client's verified I/O, going on while a test misbehaves: the misbehaviour must not touch it."""

from __future__ import annotations

import threading
import time

from tests.lib.pattern import difference, pattern
from tests.lib.rawio import Transmission

BLOCK = 16384


class Bystander:
    """A thread that writes, reads back and compares on a connection of its own, until stopped.

    It works in [base, base+span) of the export, which must be nobody else's."""

    def __init__(self, nbd: Transmission, base: int = 0, span: int = 1 << 20, pause_s: float = 0.005) -> None:
        self.nbd = nbd
        self.base = base
        self.blocks = span // BLOCK
        self.pause_s = pause_s
        self.rounds = 0
        self.worst_s = 0.0
        self.failure: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="bystander", daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        try:
            while not self._stop.is_set():
                self._round(self.rounds)
                self.rounds += 1
                self._stop.wait(self.pause_s)
        except BaseException as error:
            self.failure = error

    def _round(self, number: int) -> None:
        offset = self.base + number * 7 % self.blocks * BLOCK
        data = pattern(number, offset, BLOCK)
        begun = time.monotonic()
        self.nbd.write(offset, data)
        if number % 8 == 0:
            self.nbd.flush()
        got = self.nbd.read(offset, BLOCK)
        self.worst_s = max(self.worst_s, time.monotonic() - begun)
        unlike = difference(data, got)
        if unlike:
            raise AssertionError(f"round {number} at {offset}: {unlike}")

    def check(self, rounds: int = 2, timeout_s: float = 10.0) -> None:
        """Fail unless `rounds` more rounds succeed within the time."""
        goal = self.rounds + rounds
        end = time.monotonic() + timeout_s
        while self.rounds < goal:
            if self.failure is not None:
                raise AssertionError("the bystander's connection was harmed") from self.failure
            assert time.monotonic() < end, f"the bystander did no {rounds} rounds within {timeout_s} s"
            time.sleep(0.002)

    def stop(self) -> None:
        """End the thread; raise what harmed it."""
        self._stop.set()
        self._thread.join(30)
        self.nbd.stream.close()
        if self.failure is not None:
            raise AssertionError("the bystander's connection was harmed") from self.failure
