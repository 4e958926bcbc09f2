"""Child processes that must run: started, watched, started again, ended in order.

A child that ends by itself is started again after a growing pause; one that keeps ending makes the supervisor
give up with what it knows. Children sit in process groups of their own, so that Ctrl-C reaches their parent
alone and it can end them in the right order; they die with it (lifeline.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence

from nbdvvol.model.errors import Code, NvError

PAUSE_FIRST_S = 0.1
PAUSE_MAX_S = 5.0
DEATHS_MAX = 5
DEATHS_WITHIN_S = 60.0
STOP_S = 20.0
"""How long a child may take to end cleanly before it is killed."""


class Backoff:
    """When to start a child again: pauses double, and too many deaths in a while mean never. Sans clock."""

    def __init__(self) -> None:
        self._deaths: deque[float] = deque(maxlen=DEATHS_MAX)

    def died(self, now_s: float) -> float | None:
        """Seconds to wait before the next start after a death at `now_s`; None: give up."""
        self._deaths.append(now_s)
        recent = sum(1 for death in self._deaths if now_s - death < DEATHS_WITHIN_S)
        if recent >= DEATHS_MAX:
            return None
        return float(min(PAUSE_MAX_S, PAUSE_FIRST_S * 4 ** (recent - 1)))


class Child:
    """One `nbdvvol` daemon: `words` are its command and options."""

    def __init__(self, name: str, words: Sequence[str], *, keep_fd: int, say: Callable[[str], None]) -> None:
        self.name = name
        self._argv = [sys.executable, "-m", "nbdvvol", *words, "--parent", str(os.getpid())]
        self._keep_fd = keep_fd
        self._say = say
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self.proven = False
        """Whether it ever did its work; before that, its end is the end of everything."""

    async def run(self) -> None:
        """Keep it running until `stop`. Raises NvError(UNAVAILABLE) when it keeps ending."""
        backoff = Backoff()
        while not self._stopping.is_set():
            # It keeps our lock's descriptor open: the lock is free only once every child is gone too.
            self._process = await asyncio.create_subprocess_exec(
                *self._argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sys.stderr,
                pass_fds=[self._keep_fd],
                process_group=0,
            )
            status = await self._process.wait()
            if self._stopping.is_set():
                return
            how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            pause_s = backoff.died(time.monotonic())
            if pause_s is None or not self.proven:
                raise NvError(Code.UNAVAILABLE, f"{self.name} {how}", "its last lines above say why")
            self._say(f"{self.name} {how}; starting it again in {pause_s:g} s")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._stopping.wait()

    async def stop(self) -> bool:
        """End it: SIGTERM, then SIGKILL after STOP_S. Whether it ended cleanly."""
        self._stopping.set()
        process = self._process
        if process is None or process.returncode is not None:
            return True
        process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_S):
                # One that was still starting has no handler yet, and nothing to lose.
                return await process.wait() in ((0,) if self.proven else (0, -signal.SIGTERM))
        except TimeoutError:
            self._say(f"{self.name} did not end within {STOP_S:g} s; killing it")
            process.kill()
            await process.wait()
            return False
