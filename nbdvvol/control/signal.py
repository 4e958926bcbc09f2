"""Waking up those who wait for the world to change. A ticket taken before a look makes no wake-up lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from weakref import WeakValueDictionary


class Signal:
    """A counter that people can wait on."""

    def __init__(self) -> None:
        self.ticket = 0
        self._next: asyncio.Future[None] | None = None

    def fire(self) -> None:
        """Something changed: wake everybody."""
        self.ticket += 1
        if self._next is not None and not self._next.done():
            self._next.set_result(None)
        self._next = None

    async def after(self, ticket: int, timeout_s: float) -> bool:
        """Wait until it fired after `ticket` was read, at most `timeout_s`; False when the time ran out."""
        if self.ticket != ticket:
            return True
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_s):  # wait_for of Python 3.11 may swallow a cancellation
                await asyncio.shield(self._next)
        except TimeoutError:
            return False
        return True


class Signals:
    """A signal for each subject, so that a change wakes those whom it concerns and nobody else."""

    def __init__(self) -> None:
        self._of: WeakValueDictionary[str, Signal] = WeakValueDictionary()

    def of(self, subject: str) -> Signal:
        """The signal of one subject, which lives as long as somebody keeps it."""
        return self._of.setdefault(subject, Signal())

    def fire(self, subjects: Iterable[str]) -> None:
        """These changed."""
        for subject in subjects:
            signal = self._of.get(subject)
            if signal is not None:
                signal.fire()

    def fire_all(self) -> None:
        """Something changed that may concern anybody: a host came or went."""
        for signal in list(self._of.values()):
            signal.fire()
