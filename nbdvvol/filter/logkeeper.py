"""When a VVol's write-back log goes in, out, and in again while the VVol is served: decides; writelog.py acts.

A log that control wants no more, or wants in another size or place, or whose device has failed, is taken out once it
holds nothing and the registry knows that. Then, and whenever one is wanted and there is none, it is opened anew and put
in. What does not succeed is tried again, later each time; at once when people ask for something else. One that fails
soon after it began counts as one that did not succeed, so a device that fails on and off is left alone for longer and
longer.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Protocol

from nbdvvol.filter.legplace import quiet, words_of
from nbdvvol.model.errors import NvError
from nbdvvol.model.log import LogSpec

AGAIN_S = 1.0
"""Until the next look at a log that could not be taken out yet."""
LATER_MIN_S = 5.0
LATER_MAX_S = 300.0
"""Between tries to have one; also how long one has to work for the next failure to be its first."""


class Kept(Protocol):
    """A log, as its keeper sees it."""

    @property
    def wanted(self) -> LogSpec | None:
        """As control wants it to log; None: not now."""

    @property
    def usable(self) -> bool:
        """It is before the volume."""

    @property
    def fits(self) -> bool:
        """It works, and is what control wants."""

    @property
    def over(self) -> bool:
        """It may be taken out."""

    async def take_out(self) -> None:
        """Raises OSError: try again later."""

    async def put_in(self, log: LogSpec) -> bool:
        """False: it needs somebody's word first. Raises NvError, OSError, TimeoutError."""

    def put_off(self, why: str) -> None:
        """It cannot be had now."""

    def waits(self) -> None:
        """It could not go in, for what is under way takes too long."""

    def is_not_wanted(self) -> None:
        """There is none, and there is to be none."""


class LogKeeper:
    """Of one log."""

    def __init__(self, log: Kept) -> None:
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._stopped = False
        self._delay_s = LATER_MIN_S
        self._due_s: float | None = 0.0  # None: not before somebody says something
        self._since_s = 0.0  # it works

    # ---- what happens ----

    def go_on(self) -> None:
        """Something has changed."""
        self._changed.set()
        if self._task is None and not self._stopped:
            self._task = self._loop.create_task(self._keep())
            self._task.add_done_callback(quiet)

    def stop(self) -> None:
        """For good."""
        self._stopped = True
        if self._task is not None:
            self._task.cancel()

    def at_once(self) -> None:
        """People ask for something else."""
        self._delay_s, self._due_s = LATER_MIN_S, 0.0

    def began(self) -> None:
        """It works."""
        self._since_s = self._loop.time()

    def failed(self) -> None:
        """It does not any more."""
        if self._loop.time() - self._since_s >= LATER_MAX_S:
            self._delay_s = LATER_MIN_S
        self.later()

    def later(self) -> None:
        """It is tried again, but not now."""
        self._due_s = self._loop.time() + self._delay_s
        self._delay_s = min(2 * self._delay_s, LATER_MAX_S)

    def waits_for_word(self) -> None:
        """It is not tried again before people say something."""
        self._due_s = None

    # ---- what is done ----

    async def _keep(self) -> None:
        while True:
            self._changed.clear()
            wait_s = await self._step()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()

    async def _step(self) -> float | None:
        """One look at it; in how many seconds the next one is due, if nothing changes (None: not at all)."""
        log = self._log
        if log.usable:
            return None if log.fits or not log.over else await self._take_out()
        wanted = log.wanted
        if wanted is None:
            log.is_not_wanted()
            return None
        if self._due_s is None:
            return None
        left_s = self._due_s - self._loop.time()
        return left_s if left_s > 0 else await self._put_in(wanted)

    async def _take_out(self) -> float:
        try:
            await self._log.take_out()
        except OSError:
            return AGAIN_S
        return 0.0

    async def _put_in(self, wanted: LogSpec) -> float | None:
        self.later()
        try:
            if await self._log.put_in(wanted):
                self.began()
            else:
                self.waits_for_word()
        except TimeoutError:
            self._log.waits()
        except (NvError, OSError) as error:
            self._log.put_off(words_of(error))
        return 0.0
