"""The attachments of a run directory: one record and one lock for each attached VVol.

`RUN/attach/ID.json` says what is attached where; it is replaced whole. Whoever holds the (POSIX) lock on `ID.lock`
is the attachment's keeper, or is taking it down. A record without a holder of its lock is an attachment whose
keeper died: the device works on, but does not reconnect.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import struct
import time
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from nbdvvol.model.base import Model
from nbdvvol.model.errors import Code, NvError

KEEPER_STOP_LIMIT_S = 5.0
_FLOCK = struct.Struct("@hhqqi")
"""struct flock of a 64-bit Linux."""
_IDENTITY = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Attachment(Model):
    """A VVol that is a device of this machine's kernel. `identity` is the VVol's UUID, the kernel's backend id."""

    identity: str
    vvol: str
    uri: str
    device: str
    index: int
    size: int
    block_size: int
    connections: int
    dead_timeout_s: int
    request_timeout_s: int
    keeper_pid: int


class Lock:
    """The held lock of one attachment; ends with `release` or with the process."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def take(cls, path: Path) -> Self | None:
        """Take the lock, or return None when another process holds it."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(fd)
            return None
        return cls(fd)

    @staticmethod
    def holder(path: Path) -> int | None:
        """The pid that holds the lock, as the kernel knows it; None when nobody does, or nobody we can see."""
        with path.open("rb") as file:
            asked = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
            kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_GETLK, asked))
        return pid if kind != fcntl.F_UNLCK and pid > 0 else None

    def release(self) -> None:
        """Let the next one have it."""
        os.close(self._fd)


class Attachments:
    """The records below a run directory."""

    def __init__(self, run_dir: Path) -> None:
        self.dir = run_dir.absolute() / "attach"
        self.dir.mkdir(mode=0o700, parents=True, exist_ok=True)

    def log_path(self, identity: str) -> Path:
        """Where a keeper in the background writes its log."""
        return self._path(identity, "log")

    def lock(self, identity: str) -> Lock | None:
        """Take an attachment's lock; None when its keeper lives."""
        return Lock.take(self._path(identity, "lock"))

    def load(self, identity: str) -> Attachment | None:
        """Return a record; None when there is none. Raises NvError(INTERNAL) for a file that is not one."""
        path = self._path(identity, "json")
        try:
            return Attachment.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise NvError(Code.INTERNAL, f"{path} is no attachment record: {error}", "move it away") from error

    def save(self, attachment: Attachment) -> None:
        """Write a record, whole or not at all."""
        path = self._path(attachment.identity, "json")
        fresh = path.with_suffix(".new")
        fresh.write_text(attachment.model_dump_json(indent=1) + "\n")
        fresh.replace(path)

    def remove(self, identity: str) -> None:
        """Forget an attachment; its lock file stays, for whoever waits on it."""
        self._path(identity, "json").unlink(missing_ok=True)

    def all(self) -> list[Attachment]:
        """Every record, by device."""
        found = (self.load(path.stem) for path in self.dir.glob("*.json"))
        return sorted((record for record in found if record is not None), key=lambda record: record.index)

    def find(self, name_or_device: str) -> Attachment:
        """Return the record of a device (/dev/nbd0 or nbd0), a VVol name or a UUID; raises NvError(NOT_FOUND)."""
        records = self.all()
        for record in records:
            if name_or_device in (record.device, record.device.removeprefix("/dev/"), record.vvol, record.identity):
                return record
        short = [record for record in records if record.vvol.rpartition("/")[2] == name_or_device]
        if len(short) == 1:
            return short[0]
        attached = ", ".join(f"{record.vvol} on {record.device}" for record in records) or "nothing"
        raise NvError(
            Code.NOT_FOUND, f"{name_or_device!r} is not attached from {self.dir.parent}", f"attached: {attached}"
        )

    def stop_keeper(self, identity: str) -> Lock:
        """End the keeper and return its lock, so that nobody reconnects meanwhile; raises NvError(TIMEOUT)."""
        path = self._path(identity, "lock")
        patience = time.monotonic() + KEEPER_STOP_LIMIT_S
        while (lock := self.lock(identity)) is None:
            late_s = time.monotonic() - patience
            pid = Lock.holder(path)
            if late_s > KEEPER_STOP_LIMIT_S:
                raise NvError(Code.TIMEOUT, f"the keeper, process {pid}, did not end", "end it and try again")
            if pid is not None:
                _signal(pid, signal.SIGKILL if late_s > 0 else signal.SIGTERM)
            time.sleep(0.05)
        return lock

    def _path(self, identity: str, kind: str) -> Path:
        if not _IDENTITY.fullmatch(identity):
            raise NvError(Code.INVALID, f"identity {identity!r} has other signs than letters, digits, '.', '_', '-'")
        return self.dir / f"{identity}.{kind}"


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it has ended meanwhile
