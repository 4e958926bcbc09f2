"""Waking up those who wait for the world to change. A ticket taken before a look makes no wake-up lost."""

from __future__ import annotations

import asyncio


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
