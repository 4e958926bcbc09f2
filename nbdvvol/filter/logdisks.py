"""The disks that write-back logs lie on: calls that may block, and none of which is waited for longer than a deadline.

Each place has threads of its own, so that a disk that hangs holds up the logs there and nothing else. Invariants: an
opening that comes too late is closed again; a log is not opened while a call that was given up may still change its
file, nor while what an earlier opening asked of its device has not ended (its object stays open until then, and with
that its lock).
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import structlog

from nbdvvol.dataplane.log import LogFound
from nbdvvol.filter.legplace import quiet
from nbdvvol.filter.logfile import LogFile, is_there, look_at_log, open_log_file, remove_log_file
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.farm import LOG_DEADLINE_S

_log = structlog.get_logger("logdisks")
T = TypeVar("T")
THREADS = 4
"""Of a place, so that a long look at one log there holds up no other."""
GLANCE_S = 5.0
"""How long a look at whether a file is there may take; then the log's own I/O will tell."""
AGAIN_S = 0.5
"""Between tries to close an object that is in use."""
HINT = "look at that device"


class LogDisks:
    """Those of one host."""

    def __init__(self) -> None:
        self._threads: dict[str, ThreadPoolExecutor] = {}
        self._late: dict[str, Future[Any]] = {}
        """By path: an opening or a removal that was given up, and may not have ended."""
        self._looks: dict[tuple[str, str, str], Future[LogFound]] = {}
        """One takes its time where a log is large; who asks again goes on waiting for it."""
        self._closing: dict[str, asyncio.Task[None]] = {}
        """By path: logs that are closed as soon as their device has answered."""

    async def open(self, folder: str, name: str, size: int, held: str, limit_s: float | None) -> LogFile:
        """As open_log_file(). Raises NvError: TIMEOUT where its device does not answer within so long."""
        path = held or str(Path(folder) / name)
        late = self._late.get(path)
        if any(one in self._closing for one in (path, folder)) or (late is not None and not late.done()):
            raise NvError(Code.TIMEOUT, f"the log {path}: an earlier opening of it hangs, and has not ended", HINT)
        job = self._place(held, folder).submit(open_log_file, folder, name, size, held)
        try:
            return await _ended(job, path, limit_s)
        except BaseException:
            self._late[path] = job
            job.add_done_callback(_close_late)
            raise

    async def look(self, path: str, uuid: str, log: str) -> LogFound:
        """As look_at_log(). Raises NvError."""
        what = path, uuid, log
        job = self._looks.get(what)
        if job is None:
            job = self._looks[what] = self._place(path).submit(look_at_log, *what)
        try:
            return await _ended(job, path, LOG_DEADLINE_S)
        finally:
            if job.done():
                self._looks.pop(what, None)

    async def remove(self, path: str, uuid: str) -> None:
        """As remove_log_file(). Raises OSError, NvError."""
        job = self._place(path).submit(remove_log_file, path, uuid)
        try:
            await _ended(job, path, LOG_DEADLINE_S)
        except BaseException:
            self._late[path] = job
            raise

    async def is_there(self, path: str, identity: tuple[int, int]) -> bool:
        """As is_there(); so it counts where nobody answers, too."""
        try:
            return await _ended(self._place(path).submit(is_there, path, identity), path, GLANCE_S)
        except NvError:
            return True

    def linger(self, path: str, close: Callable[[], Awaitable[None]]) -> None:
        """Something of this log's hangs at its device: its object is closed when that has ended, by nobody else."""
        task = asyncio.get_running_loop().create_task(_close_patiently(path, close))
        self._closing[path] = task
        task.add_done_callback(lambda _: self._closing.pop(path, None))
        task.add_done_callback(quiet)

    def close(self) -> None:
        """End; calls that hang are left behind."""
        for task in self._closing.values():
            task.cancel()
        for thread in self._threads.values():
            thread.shutdown(wait=False, cancel_futures=True)

    def _place(self, path: str, folder: str = "") -> ThreadPoolExecutor:
        """Of a file those of its folder, of a device its own."""
        parent = str(Path(path).parent)
        place = folder if not path else path if parent.startswith("/dev") else parent
        if place not in self._threads:
            self._threads[place] = ThreadPoolExecutor(THREADS, thread_name_prefix="log-disk")
        return self._threads[place]


async def _ended(job: Future[T], path: str, limit_s: float | None) -> T:
    """What it brings. Raises what it raises, NvError(TIMEOUT)."""
    told = asyncio.wrap_future(job)
    try:
        done, _ = await asyncio.wait({told}, timeout=limit_s)
    except asyncio.CancelledError:
        told.cancel()
        raise
    if done:
        return told.result()
    told.cancel()  # it never begins, or nobody waits for its end any more
    raise NvError(Code.TIMEOUT, f"the log {path}: its device has not answered within {limit_s:g} s", HINT)


def _close_late(job: Future[LogFile]) -> None:
    if not job.cancelled() and job.exception() is None:
        os.close(job.result().fd)


async def _close_patiently(path: str, close: Callable[[], Awaitable[None]]) -> None:
    _log.warning("a log's device hangs; its log stays open until it has answered", file=path)
    while True:
        try:
            await close()
        except OSError as error:
            if error.errno == errno.EBUSY:
                await asyncio.sleep(AGAIN_S)
                continue
            _log.error("a log does not close", file=path, error=str(error))
        else:
            _log.info("a log's device has answered", file=path)
        return
