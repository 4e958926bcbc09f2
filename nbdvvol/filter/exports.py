"""The VVols of this host: brings each from what runs to what control wants, alone and again until it succeeds.

One task a VVol, so that a datastore that is missing or hangs harms no other VVol. Invariants: at most one epoch
of a VVol runs; an object is released only after no volume uses it; `released` is reported only after the data
plane has drained the volume; what control did not confirm is not served.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Protocol

import structlog

from nbdvvol.dataplane.log import LogEvent
from nbdvvol.dataplane.mirror import MirrorEvent, Verified
from nbdvvol.dataplane.types import DataPlane, VolumeDescription
from nbdvvol.filter.claims import ClaimBook, ExportGate
from nbdvvol.filter.lease import LeaseLink, Leases
from nbdvvol.filter.legplace import Storage
from nbdvvol.filter.legs import LegLink, Mirror, MirrorError
from nbdvvol.filter.lognotes import LogBook, check_notes
from nbdvvol.filter.logwords import LogLink
from nbdvvol.filter.objects import HeldObject, ObjectTable
from nbdvvol.filter.reconcile import (
    Step,
    cache_policy,
    decide,
    describe,
    limits,
    touched,
    transmission_flags,
)
from nbdvvol.filter.writelog import WriteLog
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.link import DatastoreSpec, ExportReport, Fault, Held, HostState, VVolSpec
from nbdvvol.model.mirror import NotServed
from nbdvvol.nbd.constants import BLOCK_PREFERRED_BYTES, PAYLOAD_BYTES_MAX
from nbdvvol.nbd.provider import Facts

_log = structlog.get_logger("exports")
RETRY_MIN_S = 1.0
RETRY_MAX_S = 30.0
SETTLE_S = 5.0
"""How long a clean stop waits for what is logged to reach the storage; what is left, the log keeps."""


class Reporter(LegLink, LogLink, LeaseLink, Protocol):
    """Where news go: the link to control."""

    def export(self, report: ExportReport) -> None:
        """A VVol came up, changed, or cannot be served."""

    def released(self, uuid: str, epoch: int) -> None:
        """Drained."""

    def fault(self, fault: Fault) -> None:
        """A sync failed and latched."""

    def notice(self, event: str, subject: str, message: str) -> None:
        """For the event list."""


@dataclass(frozen=True, slots=True)
class _Running:
    spec: VVolSpec
    volume: int
    objects: dict[tuple[str, str], HeldObject]
    """None of a mirror: it has its own."""
    block_min: int
    log: WriteLog
    mirror: Mirror | None = None


@dataclass(eq=False, slots=True)
class Export:
    """One VVol on this host."""

    uuid: str
    gate: ExportGate
    wanted: VVolSpec | None = None
    running: _Running | None = None
    opening: Mirror | None = None
    """A mirror that is being opened."""
    error: str = ""
    why: NotServed = ""
    highest_epoch: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    settled: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def mirror(self) -> Mirror | None:
        """Its mirror, if it is one that runs or is being opened."""
        return self.running.mirror if self.running is not None else self.opening

    @property
    def volume(self) -> int | None:
        """The data plane's volume that may be entered now; None from the moment control wants another epoch."""
        if self.running is None or self.wanted is None:
            return None
        if self.running.mirror is not None and self.running.mirror.dead is not None:
            return None
        return self.running.volume if self.running.spec.epoch == self.wanted.epoch else None

    def full_name(self) -> str:
        """`VM/NAME`, as control wants it."""
        return f"{self.wanted.vm}/{self.wanted.name}" if self.wanted else ""

    def facts(self, name: str) -> Facts:
        """What clients are told; `name` is the canonical name on their socket."""
        assert self.running is not None and self.wanted is not None
        spec = self.running.spec
        return Facts(
            name=name,
            size=spec.size,
            flags=transmission_flags(read_only=spec.read_only),
            description=self.wanted.description,
            block_min=self.running.block_min,
            block_preferred=max(BLOCK_PREFERRED_BYTES, self.running.block_min),
            block_max=PAYLOAD_BYTES_MAX,
            claimed=self.gate.claimed,
        )

    def report(self) -> ExportReport | None:
        """The facts for control, or why there are none."""
        spec = self.running.spec if self.running else self.wanted
        if spec is None:
            return None
        facts = self.facts("") if self.running and self.wanted else None
        return ExportReport(
            uuid=self.uuid,
            epoch=spec.epoch,
            size=spec.size,
            flags=facts.flags if facts else transmission_flags(read_only=spec.read_only),
            block_min=facts.block_min if facts else 1,
            block_preferred=facts.block_preferred if facts else BLOCK_PREFERRED_BYTES,
            block_max=PAYLOAD_BYTES_MAX,
            error="" if facts else self.error,
            why="" if facts else self.why,
        )


class ExportTable:
    """Every VVol of this host."""

    def __init__(
        self, plane: DataPlane, objects: ObjectTable, reporter: Reporter, claims: ClaimBook, logs: LogBook
    ) -> None:
        self.state: HostState | None = None
        """What control wants; None until it has said so."""
        self._plane = plane
        self._objects = objects
        self._reporter = reporter
        self._claims = claims
        self._logs = logs
        self._leases = Leases(reporter)
        self._storage = Storage(plane, objects, self._store)
        self._exports: dict[str, Export] = {}
        self._highest: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._missing: set[str] = set()
        self._stopping = False

    def of(self, vm: str | None) -> list[Export]:
        """The exports of one VM, or of all, in the order of their names."""
        found = [e for e in self._exports.values() if e.wanted is not None and vm in (None, e.wanted.vm)]
        return sorted(found, key=Export.full_name)

    def take(self, state: HostState) -> list[Export]:
        """Control wants this now; return the exports it touches (await `settled` of each)."""
        changed = touched(self.state, state)
        self.state = state
        # Whatever still runs and is no longer named goes, also when an earlier state already left it out.
        changed |= {uuid for uuid in self._exports if uuid not in state.vvols}
        return [self._poke(uuid, state.vvols.get(uuid)) for uuid in sorted(changed)]

    def get(self, uuid: str) -> Export | None:
        """The export of a VVol."""
        return self._exports.get(uuid)

    def serving(self) -> list[tuple[VVolSpec, int]]:
        """What runs, with the data plane's numbers of the volumes."""
        return [(e.running.spec, e.running.volume) for e in self._exports.values() if e.running is not None]

    def held(self) -> list[Held]:
        """What runs or drains, and what control wanted and may run any moment: control gives neither to others."""
        specs = [export.running.spec if export.running else export.wanted for export in self._exports.values()]
        return [
            Held(
                uuid=spec.uuid,
                epoch=spec.epoch,
                generation=spec.generation,
                map_version=spec.map_version,
                legs=sorted(self._legs_of(spec.uuid)),
            )
            for spec in specs
            if spec is not None
        ]

    def _legs_of(self, uuid: str) -> list[int]:
        mirror = self._exports[uuid].mirror
        return list(mirror.places) if mirror is not None else []

    def _store(self, name: str) -> DatastoreSpec | None:
        return self.state.datastores.get(name) if self.state is not None else None

    def linked(self) -> None:
        """Control is there again: mirrors ask what they still want to know."""
        for mirror in self._mirrors():
            mirror.linked()
        for running in self._running():
            running.log.linked()

    def _running(self) -> list[_Running]:
        return [export.running for export in self._exports.values() if export.running is not None]

    def log_of(self, uuid: str) -> WriteLog | None:
        """The write-back log of a VVol that runs here."""
        export = self._exports.get(uuid)
        return export.running.log if export is not None and export.running is not None else None

    def log_event(self, event: LogEvent) -> None:
        """A volume's log tells something by itself."""
        for running in self._running():
            if running.log.volume == event.volume:
                running.log.event(event)

    def mirror_event(self, event: MirrorEvent) -> None:
        """Something happened to a mirror's volume."""
        for mirror in self._mirrors():
            if mirror.volume == event.volume:
                mirror.event(event)

    async def verify(self, uuid: str, epoch: int, *, repair: bool) -> Verified:
        """Compare the legs of a mirror that runs here. Raises NvError, OSError."""
        export = self._exports.get(uuid)
        running = export.running if export is not None else None
        if running is None or running.mirror is None or running.spec.epoch != epoch:
            raise NvError(Code.STALE, f"VVol {uuid} is not served here as a mirror under epoch {epoch}")
        return await running.mirror.verify(repair=repair)

    def _mirrors(self) -> list[Mirror]:
        return [mirror for export in self._exports.values() if (mirror := export.mirror) is not None]

    def reports(self) -> list[ExportReport]:
        """Facts of every export that has settled."""
        found = [export.report() for export in self._exports.values() if export.settled.is_set()]
        return [report for report in found if report is not None]

    async def stop(self) -> None:
        """Take nothing new from control; what runs goes on."""
        self._stopping = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._leases.stop()

    async def close_all(self) -> bool:
        """At a clean stop: drain every volume and release it, so that another host may take it at once.

        False: something did not end as it should, and may still be under way."""
        await asyncio.gather(*(running.log.settle(SETTLE_S) for running in self._running()))
        closing = (self._close(export) for export in self._exports.values())
        failures = [end for end in await asyncio.gather(*closing, return_exceptions=True) if end is not None]
        for failure in failures:
            _log.error("a VVol did not close", error=repr(failure))
        return not failures

    def sync_failed(self, number: int, error: int) -> None:
        """The data plane latched a failed sync."""
        held = self._objects.find(number)
        if held is None:
            _log.error("a sync failed of an object that is not open", object=number, errno=error)
        else:
            mirrors = self._mirrors()
            for mirror in mirrors:
                mirror.sync_failed(number)
            users = [mirror for mirror in mirrors if mirror.uses(number)]
            if held.users == sum(mirror.uses(number) for mirror in users) and all(m.spares(number) for m in users):
                held.doomed = True  # what it lost is on other legs
                return
            self._latched(held, error)

    def _latched(self, held: HeldObject, error: int) -> None:
        """A sync of it failed; whoever sees it first says so, before the VVols on it are released."""
        fault = self._objects.sync_failed(held, error)
        if fault is not None:
            _log.error("sync failed: FLUSH fails until the operator clears it", path=held.spec.path, errno=error)
            self._reporter.fault(fault)

    def _poke(self, uuid: str, wanted: VVolSpec | None) -> Export:
        export = self._exports.get(uuid)
        if export is None:
            gate = ExportGate(uuid, self._claims)
            export = self._exports[uuid] = Export(uuid, gate, highest_epoch=self._highest.get(uuid, 0))
            task = asyncio.get_running_loop().create_task(self._keep(export))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        export.wanted = wanted
        if export.opening is not None:
            self._follow_opening(export.opening, wanted)
        if wanted is not None:  # an epoch that was named is released by its number, even if it never ran
            export.highest_epoch = max(export.highest_epoch, wanted.epoch)
        export.settled.clear()
        export.changed.set()
        return export

    def _follow_opening(self, mirror: Mirror, wanted: VVolSpec | None) -> None:
        """A mirror may wait for its legs for long: it hears what control says meanwhile."""
        if wanted is not None and wanted.epoch == mirror.spec.epoch and wanted.mirror is not None:
            mirror.follow(wanted)
        else:
            mirror.give_up(MirrorError(Code.STALE, "control wants something else of it now"))

    async def _keep(self, export: Export) -> None:
        """Converge, forever: at once when control says something new, later when it failed."""
        delay_s = RETRY_MIN_S
        while not self._stopping:
            export.changed.clear()
            failed = await self._try(export)
            if export.changed.is_set():
                continue
            export.settled.set()
            if export.wanted is None and export.running is None:
                self._highest[export.uuid] = export.highest_epoch
                del self._exports[export.uuid]
                return
            try:
                async with asyncio.timeout(delay_s if failed else None):
                    await export.changed.wait()
                delay_s = RETRY_MIN_S
            except TimeoutError:
                delay_s = min(2 * delay_s, RETRY_MAX_S)

    async def _try(self, export: Export) -> bool:
        """One attempt; True when it failed and is to be repeated."""
        before = export.error
        try:
            await self._converge(export)
            export.error, export.why = "", ""
            return False
        except NvError as error:
            export.why = error.why if isinstance(error, MirrorError) else ""
            export.error = f"{error.message} ({error.hint})" if error.hint else error.message
        except OSError as error:
            export.error = str(error)
        except Exception as error:
            # A bug must not end this VVol's task, or its neighbours' reports.
            _log.exception("an export failed in an unexpected way", uuid=export.uuid)
            export.error = repr(error)
        if export.error != before:
            subject = export.full_name() or export.uuid
            _log.error("VVol is not as control wants it", vvol=subject, error=export.error)
            self._reporter.notice("vvol_failed", subject, export.error)
            self._tell(export)
        return True

    async def _converge(self, export: Export) -> None:
        wanted = export.wanted
        running = export.running
        if running is not None and running.mirror is not None and running.mirror.dead is not None:
            dead = running.mirror.dead
            await self._close(export)
            if wanted is not None and wanted.epoch == running.spec.epoch:
                raise dead
            running, wanted = None, export.wanted
        match decide(running.spec if running else None, wanted, export.highest_epoch):
            case Step.NOTHING:
                if wanted is None and running is None:
                    self._reporter.released(export.uuid, export.highest_epoch)
            case Step.CLOSE:
                await self._close(export)
            case Step.REFUSE:
                await self._close(export)
                assert wanted is not None
                raise MirrorError(
                    Code.STALE,
                    f"control names epoch {wanted.epoch}, but epoch {export.highest_epoch} was served here already",
                    "control's registry is older than this host's state: restore the newer one",
                    "old-registry",
                )
            case Step.OPEN:
                await self._open(export)
            case Step.REPLACE:
                await self._close(export)
                await self._open(export)
            case Step.CHANGE:
                await self._change(export)
            case Step.LIMIT | Step.RENAME:
                assert running is not None and wanted is not None
                await self._limit(running, wanted)
                export.running = replace(running, spec=wanted)
                if running.mirror is not None:
                    running.mirror.follow(wanted)
                self._tell(export)

    def _tell(self, export: Export) -> None:
        report = export.report()
        if report is not None:
            self._reporter.export(report)

    async def _open(self, export: Export) -> None:
        spec = export.wanted
        if spec is None:  # control changed its mind meanwhile
            return
        export.highest_epoch = max(export.highest_epoch, spec.epoch)
        await check_notes(self._logs, spec, self._reporter.log)
        if spec.mirror is not None:
            await self._open_mirror(export, spec)
            return
        objects = await self._acquire(spec, {})
        try:
            await self._drop_caches(spec, objects)
            block_min = _block_min(objects)
            desc = describe(spec, _numbers(objects), block_min=block_min, map_from=0)
            volume, log = await self._open_volume(export, spec, desc)
        except BaseException:
            await self._release(objects)
            raise
        export.running = _Running(spec, volume, objects, block_min, log)
        log.start(volume)
        await self._cache(volume, None, spec)
        _log.info("serving", vvol=f"{spec.vm}/{spec.name}", epoch=spec.epoch, size=spec.size)
        self._tell(export)

    async def _open_volume(self, export: Export, spec: VVolSpec, desc: VolumeDescription) -> tuple[int, WriteLog]:
        """A volume with its log before it, or without where that cannot be used and is not missed."""
        log = self._write_log(export, spec)
        while True:
            volume = self._plane.open_volume(desc, limits(spec))
            try:
                if await log.open(volume):
                    return volume, log
                await self._plane.close_volume(volume)
            except BaseException:
                await self._plane.close_volume(volume)
                await log.close()
                raise
            if not await log.make_anew():
                return self._plane.open_volume(desc, limits(spec)), log

    def _write_log(self, export: Export, spec: VVolSpec) -> WriteLog:
        def wake() -> None:
            export.settled.clear()
            export.changed.set()

        return WriteLog(self._plane, self._reporter, spec, wake, self._logs)

    async def _open_mirror(self, export: Export, spec: VVolSpec) -> None:
        log = self._write_log(export, spec)
        usable = True
        while True:
            mirror = await self._attach(export, spec)
            assert mirror.volume is not None
            try:
                if not usable or await log.open(mirror.volume):
                    break
                await mirror.close()
            except BaseException:
                self._leases.drop(spec.uuid)
                await mirror.close()
                await log.close()
                raise
            usable = await log.make_anew()
        mirror.start()
        export.running = _Running(mirror.spec, mirror.volume, {}, mirror.block_min, log, mirror)
        log.start(mirror.volume)
        await self._cache(mirror.volume, None, mirror.spec)
        _log.info("serving a mirror", vvol=f"{spec.vm}/{spec.name}", epoch=spec.epoch, legs=len(spec.legs))
        self._tell(export)
        mirror.report()

    async def _attach(self, export: Export, spec: VVolSpec) -> Mirror:
        """A mirror that can be served. Raises NvError, OSError."""

        def lost() -> None:
            if export.opening is not None:
                return  # its opening fails, and is tried again after a while as any other
            export.settled.clear()
            export.changed.set()

        mirror = export.opening = Mirror(self._plane, self._storage, self._reporter, spec, limits(spec), lost)
        try:
            if spec.mirror is not None and spec.mirror.lease_s is not None:
                ended = MirrorError(Code.STALE, "its lease has run out", "control was away for too long", "lease")
                async with asyncio.timeout(spec.mirror.lease_s):
                    await self._leases.obtain(spec.uuid, spec.epoch, lambda: mirror.give_up(ended))
            await mirror.open()
        except TimeoutError:
            self._leases.drop(spec.uuid)
            await mirror.close()
            raise MirrorError(Code.UNAVAILABLE, "control gives it no lease", why="lease") from None
        except BaseException:
            self._leases.drop(spec.uuid)
            await mirror.close()
            raise
        finally:
            export.opening = None
        if mirror.dead is not None or mirror.volume is None:
            await mirror.close()
            raise mirror.dead or MirrorError(Code.INTERNAL, "it opened and is not there")
        return mirror

    async def _limit(self, running: _Running, wanted: VVolSpec) -> None:
        """Put limits, shares and the cache's policy in force: no request waits for that."""
        if wanted.qos != running.spec.qos:
            await self._plane.limit_volume(running.volume, limits(wanted))
        await self._cache(running.volume, running.spec, wanted)
        running.log.follow(wanted)

    async def _cache(self, volume: int, running: VVolSpec | None, wanted: VVolSpec) -> None:
        """Put another cache policy in force. Where that cannot be, the VVol is served without: it is only slower."""
        if wanted.cache == (running.cache if running is not None else None):
            return
        name = f"{wanted.vm}/{wanted.name}"
        if wanted.cache is not None and self._plane.cache_totals().bytes == 0:
            _log.warning("served without a cache: this filter was started without memory for one", vvol=name)
            return
        try:
            await self._plane.cache_volume(volume, cache_policy(wanted))
        except OSError as error:
            _log.error("served with the cache as it was", vvol=name, error=str(error))
            self._reporter.notice("cache_failed", name, str(error))

    async def _change(self, export: Export) -> None:
        running, spec = export.running, export.wanted
        assert running is not None
        if spec is None or spec.epoch != running.spec.epoch:
            return
        if spec.read_only and running.log.usable:
            running.log.follow(spec)
            raise NvError(Code.BUSY, "it becomes read-only once its write-back log is drained")
        if running.mirror is not None:
            if spec.mirror is None or spec.size != running.spec.size:
                raise NvError(Code.INVALID, "a mirror keeps its kind and size while it is bound", "unbind it first")
            await self._limit(running, spec)
            running.mirror.follow(spec)
            export.running = replace(running, spec=spec)
            self._tell(export)
            return
        objects = await self._acquire(spec, running.objects)
        fresh = {key: held for key, held in objects.items() if running.objects.get(key) is not held}
        try:
            block_min = max(running.block_min, _block_min(objects))
            map_from = running.spec.map_version
            desc = describe(spec, _numbers(objects), block_min=block_min, map_from=map_from)
            await self._limit(running, spec)
            await self._plane.change_volume(running.volume, desc)
        except BaseException:
            await self._release(fresh)
            raise
        export.running = _Running(spec, running.volume, objects, block_min, running.log)
        self._tell(export)
        await self._release({key: held for key, held in running.objects.items() if key not in objects})

    async def _close(self, export: Export) -> None:
        running = export.running
        if running is None:
            if export.wanted is None:
                self._reporter.released(export.uuid, export.highest_epoch)
            return
        running.log.rest()
        if running.mirror is not None:
            self._leases.drop(export.uuid)
            await running.mirror.close()
        else:
            await self._plane.close_volume(running.volume)
        await running.log.close(remove=export.wanted is None)
        await self._make_durable(running)
        export.running = None
        self._reporter.released(export.uuid, export.highest_epoch if export.wanted is None else running.spec.epoch)
        await self._release(running.objects)

    async def _make_durable(self, running: _Running) -> None:
        """Before another host may serve it: what was written here must not sit in this host's page cache alone."""
        for held in running.objects.values():
            try:
                await self._plane.sync(held.number)
            except OSError as error:  # the VVol must still be let go
                _log.error(
                    "the last sync of a VVol failed", uuid=running.spec.uuid, path=held.spec.path, error=str(error)
                )
                self._latched(held, error.errno or 0)

    async def _acquire(
        self, spec: VVolSpec, have: dict[tuple[str, str], HeldObject]
    ) -> dict[tuple[str, str], HeldObject]:
        """Open every object of a VVol, keeping those it has; nothing new stays open on failure."""
        assert self.state is not None
        found: dict[tuple[str, str], HeldObject] = {}
        fresh: dict[tuple[str, str], HeldObject] = {}
        try:
            for leg in spec.legs:
                key = leg.datastore, leg.object
                if key in found:
                    continue
                store = self.state.datastores.get(leg.datastore)
                if store is None:
                    raise NvError(Code.NOT_FOUND, f"control named no datastore {leg.datastore} for this host")
                held = have.get(key)
                if held is None:
                    held = fresh[key] = await self._open_object(store, leg.object, spec.read_only)
                found[key] = held
                self._missing.discard(store.name)
                end = max((run.at + run.n for run in leg.runs if run.s == 0), default=0)
                if end > held.spec.size and end > await self._objects.refresh(store, held):
                    raise NvError(
                        Code.INVALID,
                        f"datastore {store.name}: {held.spec.path} has {held.spec.size} bytes; the map needs {end}",
                        "it was shortened: restore its size",
                    )
        except BaseException:
            await self._release(fresh)
            raise
        return found

    async def _drop_caches(self, spec: VVolSpec, objects: dict[tuple[str, str], HeldObject]) -> None:
        """Another host may have served it since this one did: what this machine remembers of it is no longer true."""
        assert self.state is not None
        for leg in spec.legs:
            ranges = [(run.at, run.n) for run in leg.runs if run.s == 0]
            store = self.state.datastores[leg.datastore]
            await self._objects.drop_cache(store, objects[leg.datastore, leg.object], ranges)

    async def _open_object(self, store: DatastoreSpec, name: str, read_only: bool) -> HeldObject:
        try:
            return await self._objects.acquire(store, name, may_read_only=read_only)
        except NvError as error:
            if error.code is Code.UNAVAILABLE and store.name not in self._missing:
                self._missing.add(store.name)
                self._reporter.notice("datastore_missing", store.name, error.message)
            raise

    async def _release(self, objects: dict[tuple[str, str], HeldObject]) -> None:
        for held in objects.values():
            await self._objects.release(held)


def _block_min(objects: dict[tuple[str, str], HeldObject]) -> int:
    return max((held.spec.align for held in objects.values()), default=1)


def _numbers(objects: dict[tuple[str, str], HeldObject]) -> dict[tuple[str, str], int]:
    return {key: held.number for key, held in objects.items()}
