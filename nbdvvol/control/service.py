"""Control's parts in one place: registry, links, tasks, and what the API asks of them together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from nbdvvol import __version__
from nbdvvol.control import caches, lifecycle, mirrors, observe
from nbdvvol.control.clock import moment
from nbdvvol.control.credentials import HostTokens, read_tokens
from nbdvvol.control.link import Links
from nbdvvol.control.logview import log_problems, with_log
from nbdvvol.control.mirrorview import StuckCopies, mirror_problems, with_report
from nbdvvol.control.registry import Committed, Registry, farm, logs, risks, stores, upkeep, views
from nbdvvol.control.registry import mirrors as tending
from nbdvvol.control.signal import Signal, Signals
from nbdvvol.control.status import cache_problems, host_view, problems
from nbdvvol.control.tasks import Tasks
from nbdvvol.model.errors import NvError
from nbdvvol.model.farm import ControlConfig
from nbdvvol.model.log import FoundLog
from nbdvvol.model.observe import HostCounters, Trace
from nbdvvol.model.resources import Event, ForceRisks, Host, Reactor, Status, Task, TaskState, VVol

log = structlog.get_logger()
TASKS_SHOWN = 50
UPKEEP_S = 3600.0
TEND_S = 5.0
"""How often control looks whether a mirror needs a spare."""
LOOK_FOR_S = 30.0
"""How often it looks for a datastore that is missing and that stale legs lie on."""
BODIES = lifecycle.BODIES | mirrors.BODIES | caches.BODIES
UNDO = lifecycle.UNDO | mirrors.UNDO | caches.UNDO


class Control:
    """One running control, without its sockets."""

    def __init__(self, registry: Registry, state_dir: Path) -> None:
        self.registry = registry
        self.changed = Signal()
        """Anything but a task's progress."""
        self.moved = Signal()
        """Anything."""
        self._waited_for = Signals()
        self._queued = Signal()
        self.links = Links(registry, self._waited_for)
        self.tasks = Tasks(registry, self.links, self._waited_for, self._queued, BODIES, UNDO)
        self._stuck = StuckCopies()
        self.host_tokens = HostTokens(state_dir)
        self.tokens: dict[str, str] = {}
        self.config = ControlConfig()
        self.on_settings: Callable[[ControlConfig], Awaitable[None]] | None = None
        self._running: list[asyncio.Task[None]] = []
        registry.on_commit = self._committed

    def _committed(self, committed: Committed) -> None:
        self.links.poke(committed.hosts)
        self._waited_for.fire(committed.vvols)
        if committed.queued:
            self._queued.fire()
        if not committed.progress_only:
            self.changed.fire()
        self.moved.fire()

    async def start(self) -> None:
        """Read what was applied last and go on with every task. A token file that is gone keeps nobody else out."""
        try:
            await self.settings_changed()
        except NvError as error:
            log.error("the applied settings cannot all be followed", error=str(error))
        self._running = [
            asyncio.create_task(self.tasks.run(), name="tasks"),
            asyncio.create_task(self._keep_short(), name="upkeep"),
            asyncio.create_task(self._tend(), name="mirrors"),
            asyncio.create_task(self._look_for_stores(), name="missing datastores"),
        ]

    async def _keep_short(self) -> None:
        """Forget what nobody asks for any more."""
        while True:
            await self.registry.run(upkeep.prune)
            await asyncio.sleep(UPKEEP_S)

    async def _tend(self) -> None:
        """Do by itself what a profile says about mirrors."""
        while True:
            reports = [report for link in self.links.connected.values() for report in link.mirrors.values()]
            try:
                await self.registry.run(tending.tend, self._stuck.look(reports, time.monotonic()))
            except NvError as error:
                log.error("mirrors are not looked after now", error=str(error))
            await asyncio.sleep(TEND_S)

    async def _look_for_stores(self) -> None:
        """Look whether a missing datastore with stale legs is back: its filter tries only what it needs."""
        while True:
            await asyncio.sleep(LOOK_FOR_S)
            for name in await self.registry.run(tending.missing_stores):
                store = await self.registry.run(stores.store, name)
                host = next((host for host in store.hosts if host in self.links.connected), None)
                if host is None:
                    continue
                try:
                    await self.links.probe(name, host)
                except NvError as error:
                    log.debug("still missing", datastore=name, error=str(error))

    async def stop(self) -> None:
        """End the links, leave the tasks where they are, close the registry."""
        for running in self._running:
            running.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        await self.links.close()
        await self.registry.close()

    async def settings_changed(self) -> None:
        """The farm file was applied: credentials of new hosts, API tokens, listeners."""
        doc = await self.registry.run(views.setting, "control")
        self.config = ControlConfig.model_validate(doc) if doc is not None else ControlConfig()
        for host, config in (await self.registry.run(farm.host_names)).items():
            self.host_tokens.ensure(host, config)
        self.tokens = read_tokens(self.config.tokens) if self.config.tokens is not None else {}
        if self.on_settings is not None:
            await self.on_settings(self.config)

    async def hosts(self) -> list[Host]:
        """Every host, and whether its filter is connected."""
        rows = await self.registry.run(views.hosts)
        return [host_view(row, row.name in self.links.connected) for row in rows]

    async def vvols(self) -> list[VVol]:
        """Every VVol, with what hosts say of their mirrors and logs."""
        return [self._reported(vvol) for vvol in await self.registry.run(views.vvols)]

    def _reported(self, vvol: VVol) -> VVol:
        """With what its host says of it."""
        return with_log(with_report(vvol, self.links.mirror), self.links.log)

    async def vvol(self, vm: str, name: str) -> VVol:
        """One VVol. Raises NOT_FOUND."""
        return self._reported(await self.registry.run(views.vvol, vm, name))

    async def resolve(self, name: str) -> VVol:
        """A VVol by its full name, UUID or unique short name. Raises NOT_FOUND or CONFLICT."""
        return self._reported(await self.registry.run(views.resolve, name))

    async def risks(self, vm: str, name: str) -> ForceRisks:
        """What taking a VVol by force from its host puts at risk now. Raises NOT_FOUND."""
        connected = frozenset(self.links.connected)
        return await self.registry.run(risks.force_risks, vm, name, moment(), connected)

    async def may_move(self, vm: str, name: str, host: str | None) -> None:
        """Raise CONFLICT where a VVol would leave behind what the log of a host that is away holds of it."""
        await self.registry.run(logs.refuse_elsewhere, vm, name, host, frozenset(self.links.connected))

    async def found_log(self, vm: str, name: str) -> FoundLog:
        """The log of which the registry knows nothing and that a VVol's host has found, if there is one."""
        now = (await self.vvol(vm, name)).log_now
        if now is None or now.state != "refused":
            return FoundLog()
        return FoundLog(host=now.host, log=now.found, file=now.file)

    async def status(self) -> Status:
        """The farm at a glance."""
        run = self.registry.run
        counters = await self.counters()
        hosts, stores, vvols = await self.hosts(), await run(views.datastores), await self.vvols()
        tasks = await run(views.tasks)
        found = mirror_problems(vvols, stores) + problems(hosts, stores, vvols, tasks)
        found += log_problems(vvols, frozenset(self.links.connected))
        found += cache_problems(vvols, counters)
        live = [task for task in tasks if task.state in (TaskState.QUEUED, TaskState.RUNNING)]
        return Status(
            version=__version__,
            instance=self.registry.identity,
            revision=await run(views.revision),
            hosts=hosts,
            datastores=stores,
            vvols=vvols,
            tasks=live[:TASKS_SHOWN],
            problems=found,
            counters=counters,
        )

    async def counters(self) -> list[HostCounters]:
        """What every host's filter has counted by now."""
        return await observe.counters(self.links)

    async def reactors(self) -> list[Reactor]:
        """Every data plane thread of every host."""
        return [Reactor(host=host.host, **dict(reactor)) for host in await self.counters() for reactor in host.reactors]

    async def trace(self, vm: str, name: str, seconds: float, count: int, every: int) -> Trace:
        """Trace a VVol's requests on the host that serves it. Raises NOT_FOUND, UNAVAILABLE, BUSY or TIMEOUT."""
        vvol = await self.registry.run(views.vvol, vm, name)
        return await observe.trace(self.links, vvol, seconds, count, every)

    async def watch_task(self, task_id: int, wait_s: float) -> Task:
        """A task now, or as soon as it moves on within `wait_s`. Raises NOT_FOUND."""
        ticket = self.moved.ticket
        first = task = await self.registry.run(views.task, task_id)
        end = time.monotonic() + wait_s
        while task == first and task.state in (TaskState.QUEUED, TaskState.RUNNING):
            left = end - time.monotonic()
            if left <= 0 or not await self.moved.after(ticket, left):
                break
            ticket = self.moved.ticket
            task = await self.registry.run(views.task, task_id)
        return task

    async def watch_events(self, after: int, limit: int, wait_s: float) -> list[Event]:
        """Events after an id, as soon as there are any within `wait_s`."""
        end = time.monotonic() + wait_s
        while True:
            ticket = self.changed.ticket
            events = await self.registry.run(views.events, after, limit)
            left = end - time.monotonic()
            if events or left <= 0 or not await self.changed.after(ticket, left):
                return events
