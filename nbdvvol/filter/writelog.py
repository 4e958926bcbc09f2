"""A VVol's write-back log on this host, at one epoch: carries what the log machine decides to the data plane and to
control (logmachine.py decides).

It is opened before the VVol's first connection. Where it cannot be had, the VVol is served without, which is only
slower; but where the registry says that it holds data, or it holds some of which the registry does not know, the VVol
is not served. While the VVol is served logkeeper.py has it go in, out and in again, as control wishes and its device
allows.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from nbdvvol.dataplane.log import LogEvent, LogEventKind, LogFound, LogState, LogStats, LogVerdict
from nbdvvol.dataplane.types import DataPlane
from nbdvvol.datastores.logformat import EPOCH_MAX, RING_OFFSET, decode_super
from nbdvvol.filter.legplace import quiet, words_of
from nbdvvol.filter.legs import MirrorError
from nbdvvol.filter.logfile import VERDICTS, LogFile, file_name
from nbdvvol.filter.logkeeper import LogKeeper
from nbdvvol.filter.logmachine import Do, LogMachine, Plane
from nbdvvol.filter.lognotes import LogBook
from nbdvvol.filter.logwords import LogLink, report_of
from nbdvvol.filter.reconcile import log_policy
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.farm import LOG_DEADLINE_S, LOG_UNIT, CacheLog
from nbdvvol.model.link import VVolSpec
from nbdvvol.model.log import (
    LogChange,
    LogPhase,
    LogRecord,
    LogSpec,
    LogWanted,
    LostRange,
    range_words,
)
from nbdvvol.model.units import about_size

_log = structlog.get_logger("writelog")
REPORT_S = 1.0
NOTICE_LOST = 16
"""Lost ranges that an event names; a report has more, the filter's own log all that the data plane tells."""
CALL_AGAIN_S = 0.1
_NOTHING: tuple[object, ...] = ()
_WANTED: dict[Do, LogWanted] = {Do.ASK_DIRTY: "dirty", Do.ASK_CLEAN: "clean", Do.ASK_FORGET: "forget"}


def _asked(log: LogSpec | None) -> tuple[object, ...]:
    """What of it people ask for."""
    return _NOTHING if log is None or log.log is None else (log.on, log.folder, log.log, log.discard)


class WriteLog:
    """The log of one VVol that this host serves, or why it has none."""

    def __init__(
        self, plane: DataPlane, link: LogLink, spec: VVolSpec, wake: Callable[[], None], book: LogBook
    ) -> None:
        self.spec = spec
        self.volume: int | None = None
        """The one that it is before, or may come before; None: it is not served (any more)."""
        self._plane = plane
        self._link = link
        self._wake = wake  # when there is no log before the volume any more
        self._book = book  # has a note of this log as long as it is in use, and until it holds nothing
        self._disks = book.disks
        self._loop = asyncio.get_running_loop()
        self._machine: LogMachine | None = None
        self._number: int | None = None
        self._path = ""
        self._identity = (0, 0)
        self._gone = False  # its file: who starts next would not find it
        self._ended = ""  # the log that was, which holds nothing and whose note is to go, ...
        self._left = False  # ... and then its file
        self._length = self._size = 0
        self._asked_length: int | None = None  # None: it was taken as long as it was
        self._block = False
        self._anew = False  # its file is to be made anew, in another size
        self._forgotten: set[bytes] = set()  # logs that control has given up by our word: all they held is below
        self._phase: LogPhase | None = None  # where there is no machine
        self._why = ""
        self._failure = ""
        self._found: LogFound | None = None
        self._limits: CacheLog | None = None  # in force
        self._lost: list[LostRange] = []
        self._rate = 0.0
        self._carried = 0
        self._told: tuple[object, ...] = ()
        self._watched = False
        self._moved = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._keeper = LogKeeper(self)

    # ---- opening ----

    async def open(self, volume: int) -> bool:
        """Put the log before a volume that has had no connection yet, and recover it.

        False: what lies there cannot be used, and the volume has to be opened anew; it will be served without. Raises
        NvError where the VVol is not to be served; close the volume, then this, in that case too."""
        log = self._standing()
        if log is None or not (log.on or log.held):
            return True
        try:
            found = await self._try_open(volume, log)
        except (NvError, OSError) as error:
            await self._close_object()
            self._refuse(words_of(error), log)
            self._keeper.later()
            return True
        if found.verdict is not LogVerdict.USABLE:
            await self._judge(found, log)
            self._keeper.waits_for_word()
            return False
        if self._other_size(found, log):
            self._anew = True
            return False
        if not await self._noted(found, log):
            return False
        self._limits = log.log
        self._machine = LogMachine(on=log.on, held=bool(log.held))
        self._found = found
        self._keeper.began()
        if found.dirty_bytes:
            _log.info("a log was recovered", vvol=self._name(), file=self._path, dirty_bytes=found.dirty_bytes)
            text = f"{about_size(found.dirty_bytes)} that were logged and are not in the storage yet, in {self._path}"
            self._link.notice("log_recovered", self._name(), text)
        return True

    def _standing(self) -> LogSpec | None:
        """What control says; but what this process has logged under this epoch, of which control's word may not have
        come back yet, holds data, unless that was given up."""
        log, kept = self.spec.log, self._book.under(self.spec.uuid, self.spec.epoch)
        if kept is None or (log is not None and log.given_up >= kept.epoch):
            return log
        told = log if log is not None else LogSpec(on=False)
        return told.model_copy(update={"held": kept.log, "file": kept.file, "discard": False})

    async def _noted(self, found: LogFound, log: LogSpec) -> bool:
        """It may hold data from now on, which has to be noted first. False: it is not used, for that cannot be."""
        try:
            await self._book.keep(self.spec, found.id.hex(), self._path)
        except OSError as error:
            why = f"{self._path}: what it may hold cannot be noted: {error}"
            if not log.held:
                self._found = None
                self._refuse(why, log)
                self._keeper.later()
                return False
            _log.warning("a log that control knows of", vvol=self._name(), why=why)
        return True

    async def _try_open(self, volume: int, log: LogSpec, *, beside: bool = False) -> LogFound:
        name, size = file_name(self._name(), self.spec.uuid), log.log.size if log.log is not None else 0
        held, limit_s = log.file if log.held else "", LOG_DEADLINE_S if log.log is None else log.log.deadline or None
        file = await self._disks.open(log.folder, name, size, held, limit_s)
        self._path, self._block, self._identity = file.path, file.block, file.identity
        self._ended, self._left = "", False  # what was to go is used again, perhaps
        self._length, self._size, self._asked_length = file.length, file.size, None if log.held else size
        try:
            self._number = self._open_object(file)
        finally:
            os.close(file.fd)
        policy = replace(log_policy(log), beside=beside)
        return await self._plane.open_log(volume, self._number, 0, file.length, policy)

    def _open_object(self, file: LogFile) -> int:
        return self._plane.open_object(
            file.fd, size=file.length, direct=file.direct, block=file.block, read_only=False, align=file.align
        )

    def _refuse(self, why: str, log: LogSpec) -> None:
        """It cannot be opened. Raises MirrorError where it holds data of the VVol."""
        self._phase, self._why = "refused", why
        self._path = self._path or log.file or log.folder
        if log.held:
            hint = "bring it back; its filter tries again by itself"
            text = f"its write-back log {log.held}, which may hold data of it, is not to be had: {why}"
            raise MirrorError(Code.UNAVAILABLE, text, hint, "log-missing")
        _log.warning("served without its log", vvol=self._name(), why=why)
        self._link.notice("log_refused", self._name(), why)

    async def _judge(self, found: LogFound, log: LogSpec) -> None:
        """What lies there is not to be used. Raises MirrorError where the VVol cannot be served without it, either."""
        self._found = found
        errno_words = f" ({os.strerror(found.errno)})" if found.errno else ""
        why = f"{self._path}: {VERDICTS.get(found.verdict, found.verdict)}{errno_words}"
        if log.held or found.verdict is LogVerdict.REGISTRY_OLD:
            self._phase, self._why = "refused", why
            self.report()
            missing = f"the log {log.held} may hold data of it, and {why}"
            old = found.verdict is LogVerdict.REGISTRY_OLD
            raise MirrorError(Code.STALE, why if old else missing, "", "old-registry" if old else "log-missing")
        if found.verdict is LogVerdict.UNKNOWN_DATA and await self._epoch() > log.given_up:
            self._phase, self._why = "refused", why
            self.report()
            raise MirrorError(Code.STALE, f"{why}: {about_size(found.dirty_bytes)}", "", "log-unknown")
        self._refuse(why, log)

    async def _epoch(self) -> int:
        """Of what lies there, by its superblock."""
        assert self._number is not None
        try:
            async with asyncio.timeout(LOG_DEADLINE_S):
                _, found = decode_super(await self._plane.read(self._number, 0, RING_OFFSET))
        except TimeoutError:
            return EPOCH_MAX  # nobody knows: it was not given up
        return found.epoch if found is not None else 0

    def _other_size(self, found: LogFound, log: LogSpec) -> bool:
        """A file that holds nothing and has not the size that the profile says is made anew."""
        if log.held or found.dirty_bytes or self._block or log.log is None:
            return False
        return self._size != log.log.size

    async def make_anew(self) -> bool:
        """Behind a False of `open`, once the volume is closed: False again if it is worth no other try."""
        await self._close_object()
        if not self._anew:
            return False
        self._anew = False
        try:
            await self._disks.remove(self._path, self.spec.uuid)
        except (NvError, OSError) as error:  # it holds nothing: nobody misses it
            assert self.spec.log is not None
            self._refuse(words_of(error), self.spec.log)
            self._keeper.later()
            return False
        return True

    def start(self, volume: int) -> None:
        """The volume may be entered from now on."""
        self.volume = volume
        self._drive()
        self._look_after()
        self.report()

    def _look_after(self) -> None:
        if self.volume is not None and (_asked(self.spec.log) != _NOTHING or self.phase is not None):
            self._watch()
            self._keeper.go_on()

    def _watch(self) -> None:
        if not self._watched:
            self._watched = True
            self._spawn(self._report_often())

    # ---- closing ----

    def rest(self) -> None:
        """Its volume is about to be closed: it stays as it is."""
        self._keeper.stop()

    async def settle(self, limit_s: float) -> None:
        """Before a clean stop: have what it holds carried below, for so long at most; what is left, it keeps."""
        self.rest()
        machine = self._machine
        if machine is None:
            return
        machine.wish(on=False)
        self._drive()
        try:
            async with asyncio.timeout(limit_s):
                while not machine.clean and not machine.dead:
                    self._moved.clear()
                    await self._moved.wait()
        except TimeoutError:
            _log.warning("what is logged is not in the storage yet; the log keeps it", vvol=self._name())

    async def close(self, *, remove: bool = False) -> None:
        """Let go of it, once its volume is closed. `remove`: its file too, if it holds nothing."""
        self.rest()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._close_object()
        machine, self._machine, self.volume = self._machine, None, None
        if machine is not None and self._found is not None and machine.clean:
            self._ended, self._left = self._found.id.hex(), self._left or remove
        await self._tidy()

    async def _tidy(self) -> None:
        """Who starts next must not miss a log that holds nothing: its file goes after its note, if at all."""
        if self._ended and not await self._book.strike(self.spec.uuid, self._ended):
            return
        self._ended = ""
        if self._block or not self._left:
            return
        try:
            await self._disks.remove(self._path, self.spec.uuid)
            self._left = False
        except (NvError, OSError) as error:
            _log.warning("an empty log is left behind", file=self._path, error=words_of(error))

    async def _close_object(self) -> None:
        number, self._number = self._number, None
        if number is None:
            return
        try:
            await self._plane.close_object(number)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            self._disks.linger(self._path, partial(self._plane.close_object, number))

    # ---- what comes in ----

    def follow(self, spec: VVolSpec) -> None:
        """Control says this of the VVol now, at the same epoch."""
        before, self.spec = self.spec.log, spec
        if _asked(before) != _asked(spec.log):
            self._keeper.at_once()
        if self._machine is not None:
            self._machine.wish(on=self.wanted is not None and self.fits)
            self._limit()
            self._drive()
        self._look_after()
        self.report()

    # ---- what its keeper wants to know, and does ----

    @property
    def wanted(self) -> LogSpec | None:
        """As control wants it to log; None: not now."""
        log = self.spec.log
        return log if log is not None and log.on and log.log is not None and not self.spec.read_only else None

    @property
    def fits(self) -> bool:
        """The log that is before the volume works, and is what control wants, in size and place."""
        log = self.spec.log
        if self._machine is None or log is None or log.log is None:
            return False
        if self._gone or self._machine.plane in (Plane.FAILED, Plane.VOID):
            return False
        size = log.log.size
        same = self._asked_length in (None, size) if self._block else self._length == size // LOG_UNIT * LOG_UNIT
        return same and log.folder in (self._path, str(Path(self._path).parent))

    @property
    def over(self) -> bool:
        """It may be taken out."""
        return self._machine is not None and self._machine.over

    async def take_out(self) -> None:
        """Have the volume without it. Raises OSError: try again later."""
        assert self.volume is not None and self._machine is not None
        await self._plane.detach_log(self.volume)
        failed, found = self._gone or self._machine.plane is Plane.VOID, self._found
        self._machine, self._found, self._limits, self._gone = None, None, None, False
        self._lost = []
        assert found is not None
        self._phase, self._ended, self._left = "void" if failed else None, found.id.hex(), not failed
        await self._close_object()
        await self._tidy()
        self._wake()
        self.report()

    async def put_in(self, log: LogSpec) -> bool:
        """Open it anew and put it before the volume, which may be in use. False: it needs somebody's word first. Raises
        NvError, OSError: try again later; TimeoutError: what is under way takes too long."""
        assert self.volume is not None and self._machine is None
        volume, log = self.volume, log.model_copy(update={"held": "", "file": ""})
        try:
            found = await self._open_beside(volume, log)
            if found.verdict is not LogVerdict.USABLE:
                await self._let_go(volume)
                return self._is_no_log(found)
            await self._book.keep(self.spec, found.id.hex(), self._path)
            await self._attach(volume, found)
        except (NvError, OSError):
            await self._let_go(volume)
            raise
        self._machine, self._found, self._limits = LogMachine(on=True, held=False), found, log.log
        self._phase, self._why = None, ""
        self.follow(self.spec)
        return True

    async def _attach(self, volume: int, found: LogFound) -> None:
        try:
            await self._plane.attach_log(volume)
        except OSError as error:
            await self._book.strike(self.spec.uuid, found.id.hex())
            if error.errno == errno.ETIMEDOUT:
                raise TimeoutError(errno.ETIMEDOUT, "what is under way takes too long") from error
            raise

    async def _open_beside(self, volume: int, log: LogSpec) -> LogFound:
        found = await self._try_open(volume, log, beside=True)
        if found.verdict is LogVerdict.UNKNOWN_DATA and found.id in self._forgotten:
            await self._let_go(volume)
            log = log.model_copy(update={"discard": True})
            found = await self._try_open(volume, log, beside=True)
        if found.verdict is LogVerdict.USABLE and self._other_size(found, log):
            await self._let_go(volume)
            await self._disks.remove(self._path, self.spec.uuid)
            found = await self._try_open(volume, log, beside=True)
        return found

    async def _let_go(self, volume: int) -> None:
        """Of a log beside the volume, if there is one."""
        while self._number is not None:
            try:
                await self._plane.detach_log(volume)
            except OSError as error:
                if error.errno in (errno.EBUSY, errno.EALREADY, errno.ETIMEDOUT):
                    await asyncio.sleep(CALL_AGAIN_S)
                    continue
                if error.errno != errno.EINVAL:  # the volume is closed, and its object goes then
                    return
            await self._close_object()

    def _is_no_log(self, found: LogFound) -> bool:
        """What lies there cannot be used. Raises OSError if it could not be read, which may be over one day."""
        if found.verdict in (LogVerdict.UNREADABLE, LogVerdict.HANGS):
            raise OSError(found.errno, f"{self._path}: {VERDICTS[found.verdict]} ({os.strerror(found.errno)})")
        self._found = found
        self.put_off(f"{self._path}: {VERDICTS.get(found.verdict, found.verdict)}")
        return False

    def put_off(self, why: str) -> None:
        """It cannot be had now; the VVol goes on without."""
        if self._phase == "void":
            why = f"{self._failure}; it cannot begin anew yet: {why}"
        elif why != self._why:
            self._link.notice("log_refused", self._name(), why)
        self._phase, self._why = self._phase if self._phase == "void" else "refused", why
        self._path = self._path or (self.spec.log.folder if self.spec.log is not None else "")
        _log.warning("served without its log", vvol=self._name(), why=why)
        self.report()

    def waits(self) -> None:
        """It goes in as soon as storage lets it."""
        why = "what was under way did not end within the 2 s for which new requests are held"
        self._phase, self._why = "waits", why
        self.report()

    def is_not_wanted(self) -> None:
        """There is none, and is to be none."""
        self._phase, self._why = None, ""

    def _limit(self) -> None:
        """Limits that control has changed, in force from now on; size and place are not changed under a log."""
        log = self.spec.log
        if self._machine is None or self.volume is None or log is None or log.log in (None, self._limits):
            return
        try:
            self._plane.limit_log(self.volume, log_policy(log))
            self._limits = log.log
        except OSError as error:
            if error.errno == errno.EALREADY:  # it has not heard the last ones yet
                self._loop.call_later(CALL_AGAIN_S, self._limit)
            else:
                _log.error("a log keeps its limits", vvol=self._name(), error=str(error))

    @property
    def usable(self) -> bool:
        """It is before the volume, whatever it does now."""
        return self._machine is not None

    @property
    def clean(self) -> bool:
        """The registry knows that it holds nothing."""
        return self._machine is None or self._machine.clean

    def linked(self) -> None:
        """Control is there again: what was asked may be lost."""
        if self._machine is not None:
            self._machine.again()
            self._drive()
        self.report()

    def event(self, event: LogEvent) -> None:
        """The log tells something by itself."""
        if self._machine is None:
            return
        match event.kind:
            case LogEventKind.FAILED:
                self._why = self._failure = os.strerror(event.errno) if event.errno else "its device is too slow"
                self._machine.failed()
                self._keeper.failed()
                _log.error("a log has failed", vvol=self._name(), file=self._path, error=self._why)
                text = (
                    f"{self._path}: {self._why}; what it holds is carried to the storage, writes go there from now on"
                )
                self._link.notice("log_failed", self._name(), text)
            case LogEventKind.LOST:
                self._look_for_lost(self.stats())
            case LogEventKind.NEEDS_WORD:
                self._machine.needs_word()
            case LogEventKind.DRAINED:
                self._drained()
        self._drive()
        self.report()

    async def _look_for_file(self) -> None:
        """A log whose file was removed or moved works on, but nobody would find it: it is drained and left."""
        machine = self._machine
        if machine is None or self._gone or machine.dead or machine.plane is not Plane.SERVING:
            return
        if await self._disks.is_there(self._path, self._identity) or self._machine is not machine:
            return
        self._gone, self._why = True, "its file is gone from there, a restart would not find it"
        self._failure = self._why
        self._keeper.failed()
        _log.error("a log's file is gone", vvol=self._name(), file=self._path)
        text = f"{self._path}: {self._why}; what it holds is carried to the storage, writes go there from now on"
        self._link.notice("log_failed", self._name(), text)
        machine.wish(on=False)
        self._drive()
        self.report()

    def _look_for_lost(self, stats: LogStats | None) -> None:
        """Which bytes can be read nowhere any more; told when there are others than before."""
        if stats is None or self.volume is None:
            return
        spans = self._plane.log_lost(self.volume) if stats.lost_bytes else []
        lost = [LostRange(offset=span.offset, length=span.length) for span in spans]
        if lost == self._lost:
            return
        self._lost, before = lost, self._lost
        if set(map(repr, lost)) <= set(map(repr, before)):  # some of it was overwritten
            return
        ranges = [(one.offset, one.length) for one in lost]
        _log.error("what was logged is lost", vvol=self._name(), file=self._path, ranges=ranges)
        words = range_words(lost[:NOTICE_LOST], stats.lost_bytes)
        self._link.notice("log_lost", self._name(), f"{self._path}: {words} of it can be read nowhere any more")

    def _drained(self) -> None:
        assert self._machine is not None
        stats = self.stats()
        self._machine.drained(void=stats is not None and stats.state is LogState.VOID)

    # ---- the machine ----

    def _drive(self) -> None:
        while self._machine is not None and (do := self._machine.next()) is not None:
            self._obey(do)
        self._moved.set()
        if self._machine is not None and self._machine.over:
            self._keeper.go_on()

    def _obey(self, do: Do) -> None:
        if self._machine is None or self.volume is None:
            return
        if do in _WANTED:
            self._ask(do)
            return
        try:
            if do is Do.DRAIN:
                self._spawn(self._drain(self.volume))
            elif do is Do.ALLOW:
                self._plane.allow_log(self.volume)
            else:
                assert self._found is not None
                self._forgotten.add(self._found.id)
                self._plane.forget_log(self.volume)
        except OSError as error:
            if error.errno == errno.EALREADY:  # it has not heard the last one yet
                self._loop.call_later(CALL_AGAIN_S, self._obey_again, self._machine, do)
            else:
                _log.error("the data plane does not do that with a log", what=do.value, error=str(error))

    def _obey_again(self, machine: LogMachine, do: Do) -> None:
        """Unless it is of a log that is no more, or would have one written to that is to be empty by now."""
        if self._machine is machine and (do is not Do.ALLOW or machine.plane is Plane.SERVING):
            self._obey(do)

    async def _drain(self, volume: int) -> None:
        try:
            await self._plane.drain_log(volume)
        except OSError as error:
            _log.error("a log does not drain", vvol=self._name(), error=str(error))
            return
        if self._machine is not None and self.volume == volume:
            self._drained()
            self._drive()
            self.report()

    def _ask(self, do: Do) -> None:
        assert self._found is not None
        change = LogChange(
            id=0,
            vvol=self.spec.uuid,
            epoch=self.spec.epoch,
            generation=self.spec.generation,
            log=self._found.id.hex(),
            wanted=_WANTED[do],
            file=self._path,
            reason=self._why[:1000],
        )
        self._link.ask_log(change, self._answered)

    def _answered(self, answer: LogRecord) -> None:
        if self._machine is None:
            return
        if answer.refused:
            _log.warning("control refused a log's change", vvol=self._name(), why=answer.refused, text=answer.message)
        if (do := self._machine.answered(answer)) is not None:
            self._obey(do)
        self._drive()
        self.report()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(quiet)

    # ---- what is told ----

    def _name(self) -> str:
        return f"{self.spec.vm}/{self.spec.name}"

    def stats(self) -> LogStats | None:
        """As the plane has it."""
        if self._machine is None or self.volume is None:
            return None
        try:
            return self._plane.log_stats(self.volume)
        except OSError:  # closed a moment ago
            return None

    @property
    def rate(self) -> int:
        """Bytes a second that are carried below, smoothed."""
        return round(self._rate)

    @property
    def phase(self) -> LogPhase | None:
        """What it does now; None: there is none, and none is asked for."""
        if self._machine is None:
            return self._phase
        phases: dict[Plane, LogPhase] = {
            Plane.THROUGH: "through",
            Plane.SERVING: "serving",
            Plane.DRAINING: "draining",
            Plane.FAILED: "failed",
            Plane.VOID: "void",
        }
        if self._gone:
            phases |= {Plane.DRAINING: "failed", Plane.THROUGH: "void"}
        return phases[self._machine.plane]

    def report(self) -> None:
        """Tell control how it is."""
        phase, stats, found = self.phase, self.stats(), self._found
        if phase is None:
            return
        self._link.log(report_of(self.spec, phase, self._why, self._path, found, stats, self.rate, self._lost))

    async def _report_often(self) -> None:
        """Each second while there is something new to tell."""
        while True:
            await asyncio.sleep(REPORT_S)
            await self._look_for_file()
            stats = self.stats()
            if stats is not None:
                self._look_for_lost(stats)
                now = max(stats.destaged_bytes - self._carried, 0) / REPORT_S
                self._carried = stats.destaged_bytes
                self._rate = now if now == 0 and self._rate < 1 else 0.5 * self._rate + 0.5 * now
            told: tuple[object, ...] = (self.phase, *map(repr, self._lost))
            if stats is not None:
                told += (stats.dirty_bytes, stats.lost_bytes, stats.oldest_age_ms)
            if told != self._told:
                self._told = told
                self.report()
