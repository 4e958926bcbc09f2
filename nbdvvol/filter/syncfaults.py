"""Objects whose sync failed: what must stay latched over a restart of this process.

A fault is written to the run directory at once, told to control, and kept here until control lists it: from then on
control's word counts, that it stands and that the operator cleared it. The run directory may be lost with the
machine's memory; so are all bytes then that no FLUSH had answered for.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import structlog
from pydantic import Field

from nbdvvol.filter.durable import load_file, replace_file
from nbdvvol.model.base import Model
from nbdvvol.model.link import Fault

_log = structlog.get_logger("syncfaults")
FILE_NAME = "sync-faults.json"


class _File(Model):
    farm: str
    faults: list[Fault] = Field(default_factory=list)


class FaultBook:
    """Every fault of this host that stands: those that control lists, and those that it may not have heard of."""

    def __init__(self, run_dir: Path) -> None:
        """Read what an earlier process left. Raises NvError(INVALID) when that is damaged."""
        self._path = run_dir / FILE_NAME
        self._unheard: dict[str, Fault] = {}
        self._listed: dict[str, dict[str, str]] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="sync-faults")  # its disk may hang, like any other
        self._farm = ""
        hint = "move it away to accept what those may have lost"
        found = load_file(self._path, _File, "which objects' syncs failed", hint)
        if found is None:
            return
        self._farm = found.farm
        self._unheard = {fault.id: fault for fault in found.faults}

    def enter(self, farm: str) -> None:
        """We serve this farm. What failed under another one was about other bytes."""
        if farm != self._farm and self._unheard:
            _log.warning("faults of another farm are forgotten", farm=self._farm, faults=len(self._unheard))
            self._unheard.clear()
            self._save()
        self._farm = farm

    def stands(self, datastore: str, name: str) -> bool:
        """Whether FLUSH must fail on this object."""
        listed = self._listed.get(datastore, {}).values()
        return name in listed or any((f.datastore, f.object) == (datastore, name) for f in self._unheard.values())

    def add(self, datastore: str, name: str, message: str) -> Fault:
        """A sync failed: remember it, also if this process is killed. Returns what control is to be told."""
        fault = Fault(id=str(uuid4()), datastore=datastore, object=name, message=message)
        self._unheard[fault.id] = fault
        self._save()
        return fault

    def unheard(self) -> list[Fault]:
        """What control may not have heard of."""
        return list(self._unheard.values())

    def take(self, listed: dict[str, dict[str, str]]) -> None:
        """Control lists these: they need not be remembered here any more."""
        self._listed = listed
        heard = {number for faults in listed.values() for number in faults} & self._unheard.keys()
        for number in heard:
            del self._unheard[number]
        if heard:
            self._save()

    def close(self) -> None:
        """Wait until all of it is written."""
        self._writer.shutdown()

    def _save(self) -> None:
        text = _File(farm=self._farm, faults=self.unheard()).model_dump_json(indent=1)
        self._writer.submit(self._write, text if self._unheard else "")

    def _write(self, text: str) -> None:
        """Replace the file as a whole; "" removes it."""
        try:
            replace_file(self._path, text)
        except OSError as error:
            _log.error("a failed sync cannot be written down; it holds until this process ends", error=str(error))
