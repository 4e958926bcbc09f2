"""The server side of the link: one WebSocket a host, messages of `nbdvvol.model.link`.

Invariants: one live filter a host; changes go out in revision order, after the snapshot (or `resumed`) that they
follow; an order's answer is acted on only after its row is settled. It does not decide what a host serves: that
is the registry's feed. A link that answers no ping for 8 seconds is dead (the server's ping, see api/server.py).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

import structlog
from pydantic import ValidationError

from nbdvvol.control import queries
from nbdvvol.control.clock import moment
from nbdvvol.control.registry import Registry, bindings, faults, feed, leases, legs, logs, mirrors, orders, stores
from nbdvvol.control.registry.orders import Order
from nbdvvol.control.signal import Signals
from nbdvvol.model import link
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.log import LogChange, LogReport
from nbdvvol.model.mirror import Leased, LegChange, LegDoubt, MirrorReport, Renew

log = structlog.get_logger()
HELLO_TIMEOUT_S = 10.0
EPHEMERAL = 1 << 52
LOG_WRITTEN_S = 5.0
"""How often at most what a host says of a log is written down."""
EPOCH_ANY = (1 << 63) - 1

Progress = Callable[[float], None]
A = TypeVar("A", link.Counters, link.Traced)


def question_id() -> int:
    """A number that no other question of this or an earlier control has."""
    return secrets.randbits(51)


def _away(host: str) -> NvError:
    return NvError(
        Code.UNAVAILABLE, f"the filter of host {host} is not connected", f"start it: nbdvvol filter --host {host}"
    )


class Channel(Protocol):
    """A WebSocket, as far as the link needs one."""

    async def receive(self) -> str:
        """The next text message. Raises ConnectionError when the peer is gone."""

    async def send(self, text: str) -> None:
        """Send a text message. Raises ConnectionError when the peer is gone."""

    async def close(self) -> None:
        """Close it; harmless when it is closed."""


class HostLink:
    """One filter's connection."""

    def __init__(self, host: str, instance: str, channel: Channel) -> None:
        self.host = host
        self.instance = instance
        self.channel = channel
        self.dirty = asyncio.Event()
        self.told: set[str] = set()
        self.ready = False
        """Welcomed and told its state: orders may be sent."""
        self.sent = 0
        self.runs = 0
        """The revision up to which the filter said that it runs everything."""
        self.questions: dict[int, tuple[type[Any], asyncio.Future[Any]]] = {}
        """Asked and not answered yet: the kind of answer, and who waits for it."""
        self.mirrors: dict[str, MirrorReport] = {}
        """What it said last of each mirror that it runs."""
        self.logs: dict[str, LogReport] = {}
        """... and of each write-back log ..."""
        self.written: dict[str, float] = {}
        """... and when that was written down last, by the loop's clock."""

    def answered(self, answer: link.Counters | link.Traced) -> None:
        """Hand an answer to whoever waits for it; one of the wrong kind, or to nobody, is ignored."""
        kind, future = self.questions.get(answer.id, (None, None))
        if kind is type(answer) and future is not None and not future.done():
            future.set_result(answer)

    async def send(self, message: link.FromControl) -> None:
        """Send one message."""
        await self.channel.send(message.model_dump_json())


class Links:
    """Every connected filter, and the orders that are out."""

    def __init__(self, registry: Registry, changed: Signals) -> None:
        self.registry = registry
        self.changed = changed
        self.connected: dict[str, HostLink] = {}
        self._waiting: dict[int, tuple[Order, asyncio.Future[link.WorkDone], Progress | None]] = {}
        self._closing = False

    def poke(self, hosts: Iterable[str]) -> None:
        """The state of these hosts moved."""
        for host in hosts:
            if host in self.connected:
                self.connected[host].dirty.set()

    def mirror(self, host: str, uuid: str) -> MirrorReport | None:
        """What a host said last of a mirror that it runs; None when it is away or said nothing."""
        me = self.connected.get(host)
        return me.mirrors.get(uuid) if me is not None else None

    def log(self, host: str, uuid: str) -> LogReport | None:
        """What a host said last of a VVol's write-back log; None when it is away or said nothing."""
        me = self.connected.get(host)
        return me.logs.get(uuid) if me is not None else None

    def runs(self, host: str, revision: int) -> bool:
        """Whether the host's filter runs everything up to a revision, or is away and will hear of it first."""
        me = self.connected.get(host)
        return me is None or me.runs >= revision

    async def close(self) -> None:
        """End every link; orders stay written down."""
        self._closing = True
        for host_link in list(self.connected.values()):
            await host_link.channel.close()
        for _, future, _ in self._waiting.values():
            future.cancel()

    async def serve(self, host: str, channel: Channel) -> None:
        """Serve the filter of an authenticated host until its connection ends."""
        refusal = await self._hello(host, channel)
        if isinstance(refusal, str):
            log.warning("filter refused", host=host, reason=refusal)
            try:
                await channel.send(link.Refused(reason=refusal).model_dump_json())
                await channel.close()
            except ConnectionError:
                log.debug("refused filter is gone already", host=host)
            return
        me = refusal
        log.info("filter connected", host=host)
        self.changed.fire_all()
        helpers = [asyncio.create_task(self._push(me)), asyncio.create_task(self._probe_all(me))]
        try:
            while True:
                text = await channel.receive()
                message = link.from_filter.validate_json(text)
                try:
                    if isinstance(message, link.Stopped):
                        await self._stopped(me, helpers)
                        break
                    await self._take(me, message)
                except NvError as error:
                    log.warning("what the filter says cannot be kept", host=host, error=str(error))
        except ConnectionError as error:
            log.info("filter disconnected", host=host, reason=str(error))
        except ValidationError as error:
            log.error("filter speaks nonsense", host=host, error=str(error))
        finally:
            for helper in helpers:
                helper.cancel()
            if self.connected.get(host) is me:
                del self.connected[host]
            await self._write_logs(me, list(me.logs.values()))
            for _, future in me.questions.values():
                if not future.done():
                    future.set_exception(_away(host))
            await channel.close()
            self.changed.fire_all()

    async def _stopped(self, me: HostLink, helpers: list[asyncio.Task[None]]) -> None:
        """Its last word. First nobody tells it of anything more, then what it says is written down."""
        me.ready = False
        for helper in helpers:
            helper.cancel()
        await asyncio.gather(*helpers, return_exceptions=True)
        await self.registry.run(bindings.stopped, me.host, me.instance)
        log.info("filter stopped", host=me.host)

    async def _hello(self, host: str, channel: Channel) -> HostLink | str:
        """Take the hello and send what follows. Returns the link, or why the filter is refused."""
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                hello = link.from_filter.validate_json(await channel.receive())
        except (TimeoutError, ConnectionError):
            return "no hello came"
        except ValidationError as error:
            return f"the first message is not a hello: {error.errors()[0]['msg']}"
        if not isinstance(hello, link.Hello):
            return f"the first message is {hello.kind}, not hello"
        if hello.protocol != link.PROTOCOL:
            return f"the filter speaks version {hello.protocol} of the link, control speaks {link.PROTOCOL}"
        if hello.host != host:
            return f"the credential is host {host}'s; it may not claim to be host {hello.host}"
        if host in self.connected or self._closing:
            return f"a filter of host {host} is connected already; it counts as gone after 8 s without an answer"
        me = HostLink(host, hello.instance, channel)
        self.connected[host] = me
        try:
            await self._welcome(me, hello)
        except BaseException as error:
            del self.connected[host]
            if isinstance(error, ConnectionError):
                return "it is gone"
            raise
        me.dirty.set()
        return me

    async def _welcome(self, me: HostLink, hello: link.Hello) -> None:
        """Snapshot or resume, then every order whose outcome is unknown. Sent twice, an order is carried out once."""
        first = await self.registry.run(bindings.connect, hello)
        await me.send(link.Welcome(control=self.registry.identity, instance=hello.instance))
        await me.send(first)
        me.sent = first.revision
        me.told = {held.uuid for held in hello.held}
        if isinstance(first, link.Snapshot):
            me.told |= set(first.state.vvols)
        else:
            me.runs = first.revision
        me.ready = True
        missed = {order.id: order for order in await self.registry.run(orders.of_host, me.host)}
        missed |= {order.id: order for order, _, _ in self._waiting.values() if order.host == me.host}
        for number in sorted(missed):
            await self._send_order(me, missed[number])

    async def _push(self, me: HostLink) -> None:
        """Send every change, in order."""
        try:
            while True:
                await me.dirty.wait()
                me.dirty.clear()
                delta = await self.registry.run(feed.changes, me.host, me.sent)
                if delta is None:
                    continue
                unknown = [uuid for uuid, spec in delta.vvols.items() if spec is None and uuid not in me.told]
                me.told |= {uuid for uuid, spec in delta.vvols.items() if spec is not None}
                await me.send(delta)
                me.sent = delta.revision
                for uuid in unknown:
                    await self.registry.run(bindings.released, me.host, uuid, EPOCH_ANY)
        except ConnectionError:
            await me.channel.close()
        except NvError as error:
            log.error("the change feed stopped", host=me.host, error=str(error))
            await me.channel.close()

    async def _probe_all(self, me: HostLink) -> None:
        """Look at every datastore the host sees."""
        try:
            for name in await self.registry.run(stores.seen_by, me.host):
                await self.probe(name, me.host)
        except NvError as error:
            log.info("probing stopped", host=me.host, error=str(error))

    async def _take(self, me: HostLink, message: link.FromFilter) -> None:
        match message:
            case link.Hello():
                raise ConnectionError("a second hello on one connection")
            case link.Applied():
                me.runs = min(message.revision, me.sent)
                await self.registry.run(feed.applied, me.host, me.runs)
                self.changed.fire([""])
            case link.Fault():
                await self.registry.run(faults.record, me.host, message)
            case link.Exports():
                await self.registry.run(bindings.report, me.host, message.exports)
            case link.Released():
                await self.registry.run(bindings.released, me.host, message.uuid, message.epoch)
                me.told.discard(message.uuid)
                me.mirrors.pop(message.uuid, None)
                me.logs.pop(message.uuid, None)
            case LegChange() | LegDoubt() | link.LegReleased() | Renew() | MirrorReport() | LogChange() | LogReport():
                await self._take_of_layers(me, message)
            case link.Notice():
                await self._notice(me.host, message)
            case link.WorkProgress():
                self._progress(message)
            case link.WorkDone():
                await self._done(message)
            case link.Query():
                await me.send(await queries.answer(self.registry, me.host, message))
            case link.Counters() | link.Traced():
                me.answered(message)

    def _progress(self, message: link.WorkProgress) -> None:
        entry = self._waiting.get(message.id)
        if entry is not None and entry[2] is not None:
            entry[2](message.progress)

    async def _take_of_layers(
        self,
        me: HostLink,
        message: LegChange | LegDoubt | link.LegReleased | Renew | MirrorReport | LogChange | LogReport,
    ) -> None:
        """Mirrors and write-back logs."""
        match message:
            case LogChange():
                await me.send(await self.registry.run(logs.log_change, me.host, message))
            case LogReport():
                await self._take_log(me, message)
            case LegDoubt():
                await self.registry.run(legs.leg_doubt, me.host, message)
            case LegChange():
                await me.send(await self.registry.run(legs.leg_change, me.host, message))
            case link.LegReleased():
                await self.registry.run(legs.leg_released, me.host, message.uuid, message.leg, message.doubt)
            case Renew():
                given = await self.registry.run(leases.renew, me.host, message.vvols, moment())
                await me.send(Leased(id=message.id, vvols=given))
            case MirrorReport():
                me.mirrors[message.uuid] = message

    async def _take_log(self, me: HostLink, message: LogReport) -> None:
        """Keep what a host says of a log; write it down now and then, for when the host is gone."""
        before = me.logs.get(message.uuid)
        me.logs[message.uuid] = message
        now = asyncio.get_running_loop().time()
        if now - me.written.get(message.uuid, -LOG_WRITTEN_S) >= LOG_WRITTEN_S:
            me.written[message.uuid] = now
            await self._write_logs(me, [message])
        if before is None or (before.state, before.dirty_bytes) != (message.state, message.dirty_bytes):
            self.changed.fire([message.uuid])

    async def _write_logs(self, me: HostLink, reports: list[LogReport]) -> None:
        if not reports:
            return
        try:
            await self.registry.run(logs.reported, me.host, reports)
        except NvError as error:
            log.warning("what a host said of its logs is not written down", host=me.host, error=str(error))

    async def _notice(self, host: str, message: link.Notice) -> None:
        await self.registry.run(bindings.notice, host, message.event, message.subject, message.message)
        if message.event == "datastore_missing":
            await self.registry.run(stores.missing, message.subject, f"host {host}: {message.message}")
        elif message.event == "remote_lost":
            await self.registry.run(stores.lost, message.subject, f"host {host}: {message.message}")
        elif message.event == "remote_back":
            await self.registry.run(stores.back, message.subject)
            await self.registry.run(mirrors.store_is_back, message.subject)

    async def _done(self, message: link.WorkDone) -> None:
        entry = self._waiting.pop(message.id, None)
        if message.id < EPHEMERAL:
            await self.registry.run(orders.settle if entry is not None else orders.settle_if_over, message.id)
        if entry is not None and not entry[1].done():
            entry[1].set_result(message)

    async def _send_order(self, me: HostLink, order: Order) -> None:
        await me.send(link.Work.model_validate({"id": order.id, "what": order.what, "args": order.args}))

    async def carry_out(self, order: Order, progress: Progress | None = None) -> dict[str, Any]:
        """Send an order (again, when its host reconnects) and wait for its result. Raises its NvError."""
        future: asyncio.Future[link.WorkDone] = asyncio.get_running_loop().create_future()
        self._waiting[order.id] = (order, future, progress)
        try:
            me = self.connected.get(order.host)
            if me is not None and me.ready:
                try:
                    await self._send_order(me, order)
                except ConnectionError:
                    log.info("order waits for the filter", host=order.host, order=order.id)
            done = await future
        finally:
            self._waiting.pop(order.id, None)
        if done.error:
            code = Code(done.code) if done.code in Code.__members__ else Code.IO
            raise NvError(code, f"host {order.host}: {done.error}")
        return done.result

    async def ask(self, host: str, question: link.Look | link.TraceOrder, answer: type[A], timeout_s: float) -> A:
        """Ask a host's filter something about now. Raises UNAVAILABLE when it is away, TIMEOUT when it is silent."""
        me = self.connected.get(host)
        if me is None or not me.ready:
            raise _away(host)
        future: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        me.questions[question.id] = answer, future
        try:
            await me.send(question)
            async with asyncio.timeout(timeout_s):
                return await future
        except ConnectionError:
            raise _away(host) from None
        except TimeoutError:
            text = f"the filter of host {host} has not answered within {timeout_s:g} s"
            raise NvError(Code.TIMEOUT, text, "repeat it; its log says more") from None
        finally:
            del me.questions[question.id]
            if not future.done() or future.cancelled():
                await self._forget(me, question.id)

    async def _forget(self, me: HostLink, question: int) -> None:
        try:
            await me.send(link.Forget(id=question))
        except ConnectionError:
            log.debug("nobody to tell that its answer is no longer wanted", host=me.host)

    async def probe(self, name: str, host: str) -> dict[str, Any]:
        """Have a host look at a datastore now, and remember what it found. Raises its NvError."""
        store = await self.registry.run(stores.store, name)
        args: dict[str, Any] = {"store": store.spec.model_dump(mode="json")}
        if store.config.size is not None:
            args["create_size"] = store.config.size
        order = Order(EPHEMERAL | secrets.randbits(51), host, "probe", args)
        try:
            result = await self.carry_out(order)
        except NvError as error:
            await self.registry.run(stores.missing, name, error.message)
            raise
        wrong = await self.registry.run(stores.probed, name, host, result)
        if wrong:
            raise NvError(
                Code.CONFLICT, f"datastore {name} is not what it was: {wrong}", "check its path; nothing was changed"
            )
        if store.state not in ("online", "unknown"):
            await self.registry.run(mirrors.store_is_back, name)
        return result
