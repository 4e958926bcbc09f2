"""The task machine: runs every task that is not done, from the registry's rows, also after a restart.

A task is a coroutine of small steps. Each looks at the rows first, so that running the task again from its
start goes on where it was. Nothing of a task is kept in memory that the rows do not say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import structlog

from nbdvvol.control.link import Links
from nbdvvol.control.registry import Registry, bindings, orders, stores, tasks
from nbdvvol.control.registry.orders import Order
from nbdvvol.control.registry.stores import Store
from nbdvvol.control.registry.tasks import Job
from nbdvvol.control.signal import Signal, Signals
from nbdvvol.model.errors import NvError

log = structlog.get_logger()
LOOK_AGAIN_S = 30.0


class CancelledByRequestError(Exception):
    """Somebody cancelled the task."""


class Context:
    """What a running task works with."""

    def __init__(
        self,
        job: Job,
        registry: Registry,
        links: Links,
        changed: Signals,
        locks: dict[str, asyncio.Lock],
        looked_at: set[str],
    ) -> None:
        self.job = job
        self.registry = registry
        self.links = links
        self._changed = changed.of(job.vvol)
        self._locks = locks
        self.looked_at = looked_at
        """Datastores that this process knows to be no newer than the registry (older.py)."""
        self._said = (-1.0, "")
        self.firm = False
        """Past the point of no return: a wish to cancel comes too late."""

    def store_lock(self, name: str) -> asyncio.Lock:
        """Held while a datastore's header or directory is written."""
        return self._locks.setdefault(name, asyncio.Lock())

    async def say(self, fraction: float, detail: str) -> None:
        """Tell how far the task is."""
        if self._said != (fraction, detail):
            self._said = (fraction, detail)
            await self.registry.run(tasks.progress, self.job.id, fraction, detail)

    async def until(
        self,
        fraction: float | Callable[[], float],
        waits_for: Callable[[], Awaitable[str]],
        *,
        cancellable: bool = True,
        again_s: float = LOOK_AGAIN_S,
    ) -> None:
        """Wait until `waits_for` returns "". Raises CancelledByRequestError when the task is cancelled meanwhile.

        `again_s`: look again after so long when nothing is known to have changed."""
        while True:
            ticket = self._changed.ticket
            if cancellable:
                await self.check_cancel()
            missing = await waits_for()
            if not missing:
                return
            await self.say(fraction() if callable(fraction) else fraction, f"waits for {missing}")
            await self._changed.after(ticket, again_s)

    async def check_cancel(self) -> None:
        """Raise CancelledByRequestError when somebody cancelled the task."""
        if await self.registry.run(tasks.cancel_asked, self.job.id):
            raise CancelledByRequestError

    async def host_for(self, store: Store, *, cancellable: bool = True) -> str:
        """A connected host that sees the datastore, waited for; the one that serves the VVol comes first."""

        async def connected() -> str:
            if any(host in self.links.connected for host in store.hosts):
                return ""
            return f"a filter that sees datastore {store.name} (hosts: {', '.join(store.hosts) or 'none'})"

        while True:
            await self.until(0.0, connected, cancellable=cancellable)
            holders = await self.registry.run(bindings.unreleased, self.job.vvol)
            there = [host for host in store.hosts if host in self.links.connected]
            if there:
                return next((host for host in there if host in holders), there[0])

    async def work(
        self, store: Store, what: str, key: str, *, share: tuple[float, float] = (0, 0), **args: Any
    ) -> dict[str, Any]:
        """Have a filter do something on a datastore, once: `key` names the step in this task. Raises its NvError."""
        return await self.work_on(None, store, what, key, share=share, **args)

    async def work_on(
        self, host: str | None, store: Store, what: str, key: str, *, share: tuple[float, float] = (0, 0), **args: Any
    ) -> dict[str, Any]:
        """`work` by a certain host; None leaves the choice."""
        whole = {"store": store.spec.model_dump(mode="json"), **args}
        order = await self.registry.run(orders.outstanding, self.job.id, key)
        if order is not None:
            result = await self.carry_out(order, share)
            if order.args == whole:
                return result
        where = host or await self.host_for(store, cancellable=not self.firm)
        order = await self.registry.run(orders.give, self.job.id, self.job.vvol, key, where, what, whole)
        return await self.carry_out(order, share)

    async def carry_out(self, order: Order, share: tuple[float, float]) -> dict[str, Any]:
        """Have an order done that was written down; its progress is that share of the task's. Raises its NvError."""
        span = share[1] - share[0]
        running: set[asyncio.Task[None]] = set()

        def progress(fraction: float) -> None:
            if span:
                where = f" on {order.args['store']['name']}" if "store" in order.args else ""
                what = f"{order.what}{where}"
                running.add(asyncio.ensure_future(self.say(share[0] + span * fraction, what)))

        try:
            return await self.links.carry_out(order, progress)
        finally:
            if running:
                await asyncio.wait(running)

    async def settled(self, *, but_mine: bool = False) -> None:
        """Wait until no order for this VVol runs anywhere; with `but_mine`, none of another task."""

        async def others() -> str:
            hosts = await self.registry.run(orders.of_vvol, self.job.vvol, self.job.id if but_mine else 0)
            return f"host {', '.join(hosts)} to say how its last order ended" if hosts else ""

        await self.until(0.0, others, cancellable=False)

    async def store(self, name: str) -> Store:
        """A datastore as it is now."""
        return await self.registry.run(stores.store, name)


Body = Callable[[Context], Awaitable[None]]
Undo = Callable[[Context, str], Awaitable[None]]


class Tasks:
    """Runs the tasks of the registry."""

    def __init__(
        self,
        registry: Registry,
        links: Links,
        changed: Signals,
        queued: Signal,
        bodies: Mapping[str, Body],
        undo: Mapping[str, Undo],
    ) -> None:
        self._registry = registry
        self._links = links
        self._changed = changed
        self._queued = queued
        self._bodies = bodies
        self._undo = undo
        self._running: dict[int, asyncio.Task[None]] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._looked_at: set[str] = set()

    async def run(self) -> None:
        """Start every task that is not done, for ever; cancelled at the end, it leaves them as they are."""
        try:
            while True:
                ticket = self._queued.ticket
                for job in await self._registry.run(tasks.live_jobs):
                    if job.id not in self._running:
                        self._running[job.id] = asyncio.create_task(self._one(job), name=f"task {job.id} {job.kind}")
                await self._queued.after(ticket, LOOK_AGAIN_S)
        finally:
            for running in self._running.values():
                running.cancel()
            await asyncio.gather(*self._running.values(), return_exceptions=True)

    async def _one(self, job: Job) -> None:
        context = Context(job, self._registry, self._links, self._changed, self._locks, self._looked_at)
        state, error = "success", ""
        try:
            await self._bodies[job.kind](context)
        except CancelledByRequestError:
            state, error = "cancelled", "cancelled by request"
        except NvError as failure:
            state, error = "error", str(failure)
        except Exception as failure:
            log.exception("task broke", task=job.id, kind=job.kind)
            state, error = "error", f"INTERNAL: {failure!r}"
        try:
            if state != "success" and job.kind in self._undo:
                await self._undo[job.kind](context, error)
            await self._registry.run(tasks.finish, job.id, state, error)
        except NvError:
            log.exception("task could not be ended; it starts again with control", task=job.id, kind=job.kind)
            return
        self._running.pop(job.id, None)
        log.info("task done", task=job.id, kind=job.kind, subject=job.subject, state=state, error=error)
