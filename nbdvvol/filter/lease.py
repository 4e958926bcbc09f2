"""Leases: a mirrored VVol whose profile has one is served only while control has said so not too long ago.

Time runs from before the question was asked, on CLOCK_BOOTTIME, which goes on while the machine sleeps; so control may
count on a lease's end without hearing of it. Renewed at a third of it. An end that comes while the process did not run
is noticed at the first turn of its loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from nbdvvol.model.mirror import Leased

TURN_S = 0.25
"""How often the clock is looked at; a lease ends so much early."""


def now_s() -> float:
    """Seconds of the clock that leases go by."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class LeaseLink(Protocol):
    """The link to control, as far as leases need it."""

    def renew(self, vvols: dict[str, int], answer: Callable[[Leased], None]) -> None:
        """Ask for leases; no answer comes when control goes away first."""


@dataclass(eq=False, slots=True)
class _Lease:
    epoch: int
    ended: Callable[[], None]
    held: asyncio.Future[None]
    until_s: float = 0.0
    next_s: float = 0.0


class Leases:
    """Every lease of this host."""

    def __init__(self, link: LeaseLink) -> None:
        self._link = link
        self._leases: dict[str, _Lease] = {}
        self._turns: asyncio.Task[None] | None = None

    async def obtain(self, uuid: str, epoch: int, ended: Callable[[], None]) -> None:
        """Wait for a lease; `ended` is called once when it has run out. `drop` it when it is not needed any more."""
        loop = asyncio.get_running_loop()
        lease = self._leases[uuid] = _Lease(epoch, ended, loop.create_future())
        if self._turns is None or self._turns.done():
            self._turns = loop.create_task(self._turn())
        await lease.held

    def drop(self, uuid: str) -> None:
        """It is not served any more."""
        lease = self._leases.pop(uuid, None)
        if lease is not None and not lease.held.done():
            lease.held.cancel()

    def left_s(self, uuid: str) -> float | None:
        """What is left of a lease; None where there is none."""
        lease = self._leases.get(uuid)
        return None if lease is None else max(lease.until_s - now_s(), 0.0)

    def stop(self) -> None:
        """The filter ends."""
        if self._turns is not None:
            self._turns.cancel()

    async def _turn(self) -> None:
        while True:
            now = now_s()
            for uuid, lease in list(self._leases.items()):
                if lease.held.done() and now + TURN_S >= lease.until_s:
                    del self._leases[uuid]
                    lease.ended()
            due = {uuid: lease.epoch for uuid, lease in self._leases.items() if now >= lease.next_s}
            if due:
                for uuid in due:
                    self._leases[uuid].next_s = now + 1.0
                self._link.renew(due, lambda answer, asked=now: self._leased(asked, answer))  # type: ignore[misc]
            await asyncio.sleep(TURN_S)

    def _leased(self, asked_s: float, answer: Leased) -> None:
        for uuid, seconds in answer.vvols.items():
            lease = self._leases.get(uuid)
            if lease is None:
                continue
            lease.until_s = max(lease.until_s, asked_s + seconds)
            lease.next_s = now_s() + seconds / 3
            if not lease.held.done():
                lease.held.set_result(None)
