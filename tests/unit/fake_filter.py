"""A filter in Python that speaks the link in-process, over datastores that are byte arrays.

It keeps the link's rules: it serves only what control named, says `released` when something is taken away, and
carries out work orders once by id. Tests can hold orders and releases back, and disconnect or kill it.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

from nbdvvol.control.link import Links
from nbdvvol.model import link
from nbdvvol.model.errors import Code
from nbdvvol.model.log import LogNote
from nbdvvol.model.mirror import NotServed
from nbdvvol.model.observe import HostCounters, TraceReport

MIB = 1 << 20


class Disks:
    """What lies behind the datastores of a test: path (and file) → bytes. Survives filters and controls."""

    def __init__(self) -> None:
        self.bytes: dict[str, bytearray] = {}
        self.log: list[tuple[str, str, dict[str, Any]]] = []
        """(host, what, args) of every order that was begun."""

    @staticmethod
    def key(args: dict[str, Any]) -> str:
        """The object an order is about."""
        return str(args["store"]["path"]) + ("/" + args["object"] if args.get("object") else "")

    def at(self, args: dict[str, Any]) -> bytearray:
        """The bytes an order is about. Raises KeyError when they are missing."""
        return self.bytes[self.key(args)]


class Pipe:
    """One end of an in-process WebSocket."""

    def __init__(self) -> None:
        self.inbox: asyncio.Queue[str | None] = asyncio.Queue()
        self.peer: Pipe | None = None
        self.closed = False

    @classmethod
    def pair(cls) -> tuple[Pipe, Pipe]:
        """Two ends."""
        one, other = cls(), cls()
        one.peer, other.peer = other, one
        return one, other

    async def receive(self) -> str:
        """The next message. Raises ConnectionError after the close."""
        if self.closed and self.inbox.empty():
            raise ConnectionError("closed")
        text = await self.inbox.get()
        if text is None:
            raise ConnectionError("closed")
        return text

    async def send(self, text: str) -> None:
        """Send to the peer. Raises ConnectionError when closed."""
        assert self.peer is not None
        if self.closed or self.peer.closed:
            raise ConnectionError("closed")
        self.peer.inbox.put_nowait(text)

    async def close(self) -> None:
        """Close both ends."""
        for end in (self, self.peer):
            assert end is not None
            if not end.closed:
                end.closed = True
                end.inbox.put_nowait(None)


class FakeFilter:
    """One filter process of a host."""

    def __init__(self, host: str, disks: Disks, run_dir: str = "/run/fake") -> None:
        self.host = host
        self.disks = disks
        self.run_dir = run_dir
        self.instance = str(uuid.uuid4())
        self.revision = 0
        self.control = ""
        self.state = link.HostState(host=host)
        self.serving: dict[str, link.VVolSpec] = {}
        self.logs: list[LogNote] = []
        """What it says of its write-back logs when it connects."""
        self.heard: list[Any] = []
        self.leaving: set[str] = set()
        """Taken away by control but not drained yet."""
        self.hold_release = False
        self.hold_applied = False
        self.unsure = False
        """The servers of legs that it lets go may still work on something."""
        self.hold_work: set[str] = set()
        """Kinds of orders that are begun but not answered."""
        self.fail_work: dict[str, str] = {}
        self.done: dict[int, link.WorkDone] = {}
        self.counters = HostCounters(host=host, instance=self.instance, uptime_s=1.0)
        self.silent = False
        """Questions are heard and not answered."""
        self.report: TraceReport | link.Traced | None = None
        """What a trace finds, or the refusal; None: it goes on."""
        self.refused = ""
        self.on_serve: Callable[[FakeFilter, link.VVolSpec], None] = lambda _fake, _spec: None
        """Called before a VVol is served, or served anew."""
        self.refuses: dict[str, NotServed] = {}
        """VVols that it does not serve, and why; `on_serve` may change it."""
        self._pipe: Pipe | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._working: list[asyncio.Task[None]] = []
        self._began: set[int] = set()

    async def connect(self, links: Links) -> None:
        """Connect to control and wait for the snapshot or the resume."""
        mine, theirs = Pipe.pair()
        self._pipe = mine
        held = [
            link.Held(
                uuid=v.uuid,
                epoch=v.epoch,
                generation=v.generation,
                map_version=v.map_version,
                legs=[leg.id for leg in v.legs],
            )
            for v in self.serving.values()
        ]
        hello = link.Hello(
            host=self.host,
            instance=self.instance,
            revision=self.revision,
            control=self.control,
            held=held,
            run_dir=self.run_dir,
            logs=self.logs,
        )
        self._spawn(links.serve(self.host, theirs))
        await mine.send(hello.model_dump_json())
        first = link.from_control.validate_json(await mine.receive())
        if isinstance(first, link.Refused):
            self.refused = first.reason
            return
        assert isinstance(first, link.Welcome)
        self.control = first.control
        await self._take(link.from_control.validate_json(await mine.receive()))
        self._spawn(self._loop(mine))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.ensure_future(work))

    async def stop(self) -> None:
        """End cleanly: all is drained, control writes that down and closes the link."""
        self.serving.clear()
        self.leaving.clear()
        await self.say(link.Stopped())
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.die()

    async def disconnect(self) -> None:
        """Lose the link; go on serving and working."""
        if self._pipe is not None:
            await self._pipe.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    async def die(self) -> None:
        """The process ends: nothing of it works or serves on."""
        self.serving.clear()
        self.leaving.clear()
        for work in self._working:
            work.cancel()
        await asyncio.gather(*self._working, return_exceptions=True)
        await self.disconnect()

    async def say(self, message: Any) -> None:
        """Send a message if connected."""
        if self._pipe is not None:
            with contextlib.suppress(ConnectionError):
                await self._pipe.send(message.model_dump_json())

    async def _loop(self, pipe: Pipe) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                await self._take(link.from_control.validate_json(await pipe.receive()))

    async def _take(self, message: Any) -> None:
        self.heard.append(message)
        if isinstance(message, link.Snapshot):
            self.state = message.state
            await self._follow(dict(message.state.vvols), message.revision, whole=True)
        elif isinstance(message, link.Resumed):
            await self._report(self.serving.values())
        elif isinstance(message, link.Delta):
            assert message.revision > self.revision, "changes come in order"
            self.state.datastores |= {k: v for k, v in message.datastores.items() if v is not None}
            self.state.vms |= {k: v for k, v in message.vms.items() if v is not None}
            self.state.faults |= message.faults
            await self._follow(message.vvols, message.revision, whole=False)
        elif isinstance(message, link.Look) and not self.silent:
            await self.say(link.Counters(id=message.id, counters=self.counters))
        elif isinstance(message, link.TraceOrder) and isinstance(self.report, TraceReport):
            await self.say(link.Traced(id=message.id, report=self.report))
        elif isinstance(message, link.TraceOrder) and self.report is not None:
            await self.say(self.report.model_copy(update={"id": message.id}))
        elif isinstance(message, link.Work):
            self._working.append(asyncio.ensure_future(self._work(message)))

    async def _follow(self, wanted: dict[str, Any], revision: int, *, whole: bool) -> None:
        gone = [u for u in self.serving if u not in wanted] if whole else [u for u, spec in wanted.items() if not spec]
        self.leaving |= {key for key in gone if key in self.serving}
        self.leaving -= {key for key, spec in wanted.items() if spec is not None}
        if not self.hold_release:
            await self.release()
        fresh = [spec for spec in wanted.values() if spec is not None]
        for spec in fresh:
            self.on_serve(self, spec)
            before = self.serving.get(spec.uuid)
            self.serving[spec.uuid] = spec
            await self._let_go(before, spec)
        self.revision = revision
        await self._report(fresh)
        if not self.hold_applied:
            await self.say(link.Applied(revision=revision))

    async def _let_go(self, before: link.VVolSpec | None, spec: link.VVolSpec) -> None:
        for leg in before.legs if before is not None else []:
            if leg.id not in [now.id for now in spec.legs]:
                await self.say(link.LegReleased(uuid=spec.uuid, epoch=spec.epoch, leg=leg.id, doubt=self.unsure))

    async def release(self) -> None:
        """Drain what control took away, and say so."""
        self.hold_release = False
        for key in sorted(self.leaving):
            held = self.serving.pop(key)
            await self.say(link.Released(uuid=key, epoch=held.epoch))
        self.leaving.clear()

    async def _report(self, specs: Any) -> None:
        reports = [
            link.ExportReport(
                uuid=spec.uuid,
                epoch=spec.epoch,
                size=spec.size,
                flags=0x165,
                block_min=1,
                block_preferred=4096,
                block_max=32 * MIB,
                error="refused" if spec.uuid in self.refuses else "",
                why=self.refuses.get(spec.uuid, ""),
            )
            for spec in specs
        ]
        if reports:
            await self.say(link.Exports(exports=reports))

    async def _work(self, order: link.Work) -> None:
        if order.id in self.done:
            await self.say(self.done[order.id])
            return
        if order.id in self._began:
            return
        self._began.add(order.id)
        self.disks.log.append((self.host, order.what, order.args))
        while order.what in self.hold_work:
            await asyncio.sleep(0.005)
        if order.what in self.fail_work:
            done = link.WorkDone(id=order.id, error=self.fail_work[order.what], code=Code.IO)
        else:
            try:
                done = link.WorkDone(id=order.id, result=DOERS[order.what](self.disks, order.args))
            except KeyError as error:
                done = link.WorkDone(id=order.id, error=f"missing {error}", code=Code.NOT_FOUND)
        self.done[order.id] = done
        await self.say(done)


def _probe(disks: Disks, args: dict[str, Any]) -> dict[str, Any]:
    key = Disks.key(args)
    if args["store"]["kind"] == "dir":
        return {"size": 1 << 40, "block_size": 4096, "header": "", "blank": True, "direct_ok": True}
    before = len(disks.bytes.get(key, b""))
    if args.get("create_size", 0) > before:
        disks.bytes.setdefault(key, bytearray()).extend(bytes(args["create_size"] - before))
    data = disks.bytes[key]
    head = bytes(data[:8192])
    return {
        "size": len(data),
        "block_size": 512,
        "header": head.hex(),
        "blank": not any(head),
        "direct_ok": True,
    }


def _write_meta(disks: Disks, args: dict[str, Any]) -> dict[str, Any]:
    data = bytes.fromhex(args["data"])
    disks.at(args)[args["offset"] : args["offset"] + len(data)] = data
    return {}


def _read_meta(disks: Disks, args: dict[str, Any]) -> dict[str, Any]:
    return {"data": disks.at(args)[args["offset"] : args["offset"] + args["length"]].hex()}


def _scrub(disks: Disks, args: dict[str, Any]) -> dict[str, Any]:
    for offset, length in args["ranges"]:
        disks.at(args)[offset : offset + length] = bytes(length)
    return {}


def _file_create(disks: Disks, args: dict[str, Any]) -> dict[str, Any]:
    disks.bytes.setdefault(Disks.key(args), bytearray(args["size"]))
    return {}


def _file_grow(disks: Disks, args: dict[str, Any]) -> dict[str, Any]:
    data = disks.at(args)
    data.extend(bytes(max(0, args["size"] - len(data))))
    return {}


def _file_remove(disks: Disks, args: dict[str, Any]) -> dict[str, Any]:
    disks.bytes.pop(Disks.key(args), None)
    return {}


def _dir_list(disks: Disks, args: dict[str, Any]) -> dict[str, Any]:
    inside = Disks.key(args) + "/"
    found = [(key.removeprefix(inside), len(data)) for key, data in disks.bytes.items() if key.startswith(inside)]
    return {"files": [{"name": name, "size": size} for name, size in sorted(found)]}


def _verify(_disks: Disks, args: dict[str, Any]) -> dict[str, Any]:
    return {"compared_bytes": MIB, "differed": 2, "repaired": 2 if args["repair"] else 0}


def _file_stat(disks: Disks, args: dict[str, Any]) -> dict[str, Any]:
    return {"size": len(disks.at(args))}


DOERS: dict[str, Callable[[Disks, dict[str, Any]], dict[str, Any]]] = {
    "probe": _probe,
    "write_meta": _write_meta,
    "read_meta": _read_meta,
    "scrub": _scrub,
    "file_create": _file_create,
    "file_grow": _file_grow,
    "file_remove": _file_remove,
    "file_stat": _file_stat,
    "dir_list": _dir_list,
    "log_remove": lambda _disks, _args: {},
    "verify": _verify,
}
