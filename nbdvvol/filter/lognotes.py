"""Which write-back logs on this host may hold data: noted in its state folder, whatever control's registry remembers.

The registry says so, too (`log_dirty`); but it can be lost and rebuilt from datastores that know of no log. A note is
durable before anything is logged, and goes, durably, once the log holds nothing and the registry knows that, before the
log's file goes. Control hears of all of them at each connect and keeps what they name from other hosts
(control/registry/logs.py); here nothing is served while a note is open (`check_notes`): the log that it names is empty,
is given up, is the one that the registry names, or its VVol waits for the operator.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import structlog
from pydantic import Field

from nbdvvol.dataplane.log import LogVerdict
from nbdvvol.filter.durable import load_file, replace_file
from nbdvvol.filter.legplace import words_of
from nbdvvol.filter.legs import MirrorError
from nbdvvol.filter.logdisks import LogDisks
from nbdvvol.filter.logfile import VERDICTS
from nbdvvol.model.base import Model
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.link import VVolSpec
from nbdvvol.model.log import LogNote, LogReport
from nbdvvol.model.units import about_size

_log = structlog.get_logger("lognotes")
LOOK_S = 5.0
"""How long a start waits for the logs that are noted to be looked at."""


class _File(Model):
    logs: list[LogNote] = Field(default_factory=list)


class LogBook:
    """Every note of this host."""

    def __init__(self, folder: Path, host: str = "local") -> None:
        """Read what earlier processes noted. Raises NvError(INVALID) when that is damaged: nothing is served then."""
        self._path = folder / f"logs-{host}.json"
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="log-notes")  # its disk may hang, like any other
        self.disks = LogDisks()
        """Where the logs lie that are noted."""
        self._lock = asyncio.Lock()
        self._changes, self._written = 0, 0
        hint = "restore it; moved away, what those logs hold may be missed without a word"
        found = load_file(self._path, _File, "which write-back logs may hold data", hint) or _File()
        self._notes = {(note.vvol, note.log): note for note in found.logs}

    def all(self) -> list[LogNote]:
        """For control."""
        return list(self._notes.values())

    def of(self, uuid: str) -> list[LogNote]:
        """Those about a VVol."""
        return [note for note in self._notes.values() if note.vvol == uuid]

    def under(self, uuid: str, epoch: int) -> LogNote | None:
        """The one about a VVol that was written under this epoch: by this process, for each has epochs of its own."""
        return next((note for note in self.of(uuid) if note.epoch == epoch), None)

    async def keep(self, spec: VVolSpec, log: str, file: str) -> None:
        """This log may hold data of the VVol from now on; durable on return. Raises OSError: then it may not."""
        note = LogNote(vvol=spec.uuid, log=log, file=file, epoch=spec.epoch, generation=spec.generation)
        before = self._notes.get((note.vvol, note.log))
        self._notes[note.vvol, note.log] = note
        try:
            await self._write()
        except OSError:
            if before is None:
                del self._notes[note.vvol, note.log]
            else:
                self._notes[note.vvol, note.log] = before
            raise

    async def drop(self, uuid: str, log: str) -> None:
        """The log holds nothing, or was given up; the note is gone durably on return. Raises OSError: then its file has
        to stay."""
        if self._notes.pop((uuid, log), None) is not None or self._written < self._changes:
            await self._write()

    async def strike(self, uuid: str, log: str) -> bool:
        """The same; False: it is not gone."""
        try:
            await self.drop(uuid, log)
        except OSError as error:
            _log.warning("the note of an empty log is left behind", vvol=uuid, log=log, error=str(error))
            return False
        return True

    async def forget(self, uuid: str, file: str) -> None:
        """The VVol is deleted: its notes go, then the file of its log. Raises NvError, OSError."""
        for note in self.of(uuid):
            await self.drop(uuid, note.log)
        await self.disks.remove(file, uuid)

    async def _write(self) -> None:
        """Who waits for the lock meanwhile is written together with the next."""
        self._changes += 1
        mine = self._changes
        async with self._lock:
            if self._written >= mine:
                return
            now, text = self._changes, _File(logs=self.all()).model_dump_json(indent=1) if self._notes else ""
            await asyncio.get_running_loop().run_in_executor(self._writer, replace_file, self._path, text)
            self._written = now

    async def look_over(self) -> None:
        """At the start: notes of logs that are empty go, and how much the others hold is told with them. One that
        cannot be looked at in time stays as it is."""
        looks = [asyncio.ensure_future(self._look(note)) for note in self.all()]
        if looks:
            _, late = await asyncio.wait(looks, timeout=LOOK_S)
            for look in late:
                look.cancel()

    async def _look(self, note: LogNote) -> None:
        with contextlib.suppress(NvError, OSError):
            found = await self.disks.look(note.file, note.vvol, note.log)
            if found.verdict is LogVerdict.USABLE:
                await self.drop(note.vvol, note.log)
            elif found.verdict is LogVerdict.UNKNOWN_DATA:
                self._notes[note.vvol, note.log] = note.model_copy(update={"dirty_bytes": found.dirty_bytes})

    def close(self) -> None:
        """Wait until all of it is written."""
        self.disks.close()
        self._writer.shutdown()


async def check_notes(book: LogBook, spec: VVolSpec, tell: Callable[[LogReport], None]) -> None:
    """Before a VVol is opened: no log of this host that holds data of it may be passed over.

    Raises MirrorError where one does, or may, and neither the registry nor the operator has a word on it; OSError."""
    log = spec.log
    for note in book.of(spec.uuid):
        if log is not None and (log.discard or log.given_up >= note.epoch):
            await book.drop(note.vvol, note.log)
        elif note.epoch > spec.epoch:
            text = f"the log {note.file} holds data of it under epoch {note.epoch}, control names epoch {spec.epoch}"
            raise MirrorError(Code.STALE, text, "control's registry is older than that log", "old-registry")
        elif note.epoch < spec.epoch and (log is None or log.held != note.log):
            await _settle(book, spec, note, tell)


async def _settle(book: LogBook, spec: VVolSpec, note: LogNote, tell: Callable[[LogReport], None]) -> None:
    """Look at a log of which the registry knows nothing."""
    verdict, held = LogVerdict.MISSING, 0
    try:
        found = await book.disks.look(note.file, note.vvol, note.log)
        verdict, held, why = found.verdict, found.dirty_bytes, f"{note.file}: {VERDICTS.get(found.verdict, '')}"
    except NvError as error:
        why = error.message
    if verdict is LogVerdict.USABLE:
        await book.drop(note.vvol, note.log)
        await _tidy(book.disks, spec, note)
        return
    holds = verdict is LogVerdict.UNKNOWN_DATA
    said = {"file": note.file, "found": note.log if holds else "", "verdict": verdict.value, "dirty_bytes": held}
    tell(LogReport.model_validate({"uuid": spec.uuid, "epoch": spec.epoch, "state": "refused", "why": why} | said))
    if holds:
        raise MirrorError(Code.STALE, f"{why}: {about_size(held)}, logged under epoch {note.epoch}", "", "log-unknown")
    text = f"the log {note.log}, which this host wrote under epoch {note.epoch}, may hold data of it, and {why}"
    raise MirrorError(Code.UNAVAILABLE, text, "", "log-missing")


async def _tidy(disks: LogDisks, spec: VVolSpec, note: LogNote) -> None:
    """An empty log that is not where one is wanted leaves nothing behind."""
    if spec.log is not None and spec.log.on and spec.log.folder in (note.file, str(Path(note.file).parent)):
        return
    try:
        await disks.remove(note.file, note.vvol)
    except (NvError, OSError) as error:
        _log.warning("an empty log is left behind", file=note.file, error=words_of(error))
