"""The filter daemon: puts link, exports, listeners, work and data plane together; starts and stops them in order.

After a kill and a restart control says again what to serve, under fresh epochs, and the sockets are replaced. It
keeps nothing on disk but failed syncs that control has not heard of, the epochs that clients claimed, and which
write-back logs may hold data. One filter a run directory, and one of a host a state directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog

from nbdvvol.dataplane.types import DataPlane, PlaneConfig
from nbdvvol.filter.activation import take_sockets
from nbdvvol.filter.claims import ClaimBook
from nbdvvol.filter.exports import Export, ExportTable
from nbdvvol.filter.link import ControlLink, LinkOptions, Question
from nbdvvol.filter.listener import Listeners
from nbdvvol.filter.lognotes import LogBook
from nbdvvol.filter.objects import ObjectTable
from nbdvvol.filter.observe import Observer
from nbdvvol.filter.reconcile import merge
from nbdvvol.filter.syncfaults import FaultBook
from nbdvvol.filter.view import View
from nbdvvol.filter.work import WorkShop
from nbdvvol.logs import log_to_stderr
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.link import Delta, Fault, Held, HostState, Snapshot, Work
from nbdvvol.model.log import LogNote

_log = structlog.get_logger("filter")


@dataclass(frozen=True, slots=True)
class FilterOptions:
    """How to run a filter."""

    host: str
    control: str
    """`unix:PATH` or `https://ADDRESS:PORT`."""
    run_dir: Path
    """Sockets appear in run_dir/vms."""
    state_dir: Path | None = None
    """What must survive a restart of the machine: which logs may hold data; None: run_dir."""
    token_file: Path | None = None
    ca_file: Path | None = None
    """Certificate authority of control's https certificate; None: the system's."""
    cert_file: Path | None = None
    key_file: Path | None = None
    """Client certificate of this host, instead of a token."""
    reactors: int = 1
    spin_us: int = 200
    first_cpu: int | None = None
    """Reactor i is pinned to CPU `first_cpu` + i; None: to none."""
    cache_bytes: int = 0
    """RAM for the caches of all VVols; 0: none."""


class Filter:
    """One running filter over a data plane. Implements the link's Handler."""

    def __init__(
        self, options: FilterOptions, plane: DataPlane, faults: FaultBook, claims: ClaimBook, logs: LogBook
    ) -> None:
        self._plane = plane
        self._faults = faults
        self._logs = logs
        self._link = ControlLink(
            LinkOptions(
                host=options.host,
                control=options.control,
                token_file=options.token_file,
                run_dir=str(options.run_dir.absolute()),
                ca_file=options.ca_file,
                cert_file=options.cert_file,
                key_file=options.key_file,
            ),
            self,
        )
        self._objects = ObjectTable(plane, self._faults)
        self._table = ExportTable(plane, self._objects, self._link, claims, logs)
        self._work = WorkShop(plane, self._objects, self._link.send, self._table.verify, logs.forget)
        self._observer = Observer(options.host, self._link.instance, plane, self._table, self._objects, self._link.send)
        self._listeners = Listeners(
            options.run_dir.absolute(), plane, lambda vm: View(self._table, self._link, vm), self._link
        )
        self._reports: asyncio.Queue[tuple[int, list[Export]]] = asyncio.Queue()
        plane.on_sync_failed = self._table.sync_failed
        plane.on_mirror = self._table.mirror_event
        plane.on_log = self._table.log_event
        self._objects.on_remote = self._remote_told

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then end in order: nobody new, haggling told, I/O in flight finished."""
        self._listeners.adopt(take_sockets())
        await self._logs.look_over()
        tasks = [asyncio.create_task(self._link.run()), asyncio.create_task(self._say_applied())]
        stopped = asyncio.create_task(stop.wait())
        try:
            done, _ = await asyncio.wait([*tasks, stopped], return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stopped}:
                task.result()
        finally:
            _log.info("stopping")
            stopped.cancel()
            await self._listeners.stop()
            await self._work.stop()
            await self._observer.stop()
            await self._table.stop()
            self._objects.quit_remotes()
            clean = await self._table.close_all()
            await self._plane.close()
            await self._link.farewell(clean=clean)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._objects.shutdown()
            self._faults.close()
            self._logs.close()
            _log.info("stopped")

    def _remote_told(self, datastore: str, connected: bool, sentence: str) -> None:
        """The server of a remote datastore was lost, or is back."""
        (_log.info if connected else _log.warning)(sentence, datastore=datastore)
        self._link.notice("remote_back" if connected else "remote_lost", datastore, sentence)

    # ---- the link's Handler ----

    def held(self) -> list[Held]:
        """What the data plane still has."""
        return self._table.held()

    def address(self) -> str:
        """Address of the TCP listener, or ""."""
        return self._listeners.address

    def faults(self) -> list[Fault]:
        """Failed syncs that control may not have heard of."""
        return self._faults.unheard()

    def logs(self) -> list[LogNote]:
        """Write-back logs that may hold data, and how much, where that is known."""
        return [self._with_amount(note) for note in self._logs.all()]

    def _with_amount(self, note: LogNote) -> LogNote:
        log = self._table.log_of(note.vvol)
        stats = log.stats() if log is not None and note.epoch == log.spec.epoch else None
        return note if stats is None else note.model_copy(update={"dirty_bytes": stats.dirty_bytes})

    def snapshot(self, control: str, message: Snapshot) -> None:
        """The whole state."""
        self._objects.farm = control
        self._faults.enter(control)
        self._take(message.revision, message.state)

    def change(self, message: Delta) -> None:
        """An ordered change."""
        assert self._table.state is not None
        self._take(message.revision, merge(self._table.state, message))

    def connected(self) -> None:
        """Say again what control may have missed."""
        for report in self._table.reports():
            self._link.export(report)
        self._table.linked()

    def work(self, message: Work) -> None:
        """A work order."""
        self._work.order(self._link.control, message)

    def question(self, message: Question) -> None:
        """Something control wants to know."""
        self._observer.take(message)

    def disconnected(self) -> None:
        """Control is away: it will not hear what it has asked for."""
        self._observer.forget_all()

    def _take(self, revision: int, state: HostState) -> None:
        self._faults.take(state.faults)
        self._objects.follow_faults()
        exports = self._table.take(state)
        self._listeners.follow(state)
        self._reports.put_nowait((revision, exports))

    async def _say_applied(self) -> None:
        """Report revisions in order, each once what it touched has come up, gone, or failed."""
        while True:
            revision, exports = await self._reports.get()
            for export in exports:
                await export.settled.wait()
            self._link.applied(revision)


async def run_filter(options: FilterOptions) -> None:
    """Run a filter until SIGTERM or SIGINT. Raises NvError when another one has the run directory."""
    from nbdvvol.dataplane.plane import Plane

    log_to_stderr()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    options.run_dir.mkdir(parents=True, exist_ok=True)
    state_dir = options.state_dir or options.run_dir
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(options.run_dir / "filter.lock"), locked(state_dir / f"logs-{options.host}.lock"):
        faults, claims = FaultBook(options.run_dir.absolute()), ClaimBook(options.run_dir.absolute())
        logs = LogBook(state_dir.absolute(), options.host)
        config = PlaneConfig(
            reactors=options.reactors,
            spin_us=options.spin_us,
            cpu_first=options.first_cpu,
            cache_bytes=options.cache_bytes,
        )
        plane = Plane(config)
        _log.info("filter starts", host=options.host, control=options.control, pid=os.getpid())
        await Filter(options, plane, faults, claims, logs).run(stop)


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a directory by a lock file in it; it is given back by the kernel however the process ends."""
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            raise NvError(
                Code.BUSY,
                f"another filter (pid {holder or 'unknown'}) runs in {file.parent}",
                f"stop it, or give another --{'run' if file.name == 'filter.lock' else 'state'} directory",
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)
