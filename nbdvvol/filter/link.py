"""The filter's only door to control: one WebSocket (model/link.py), dialled again for as long as the filter lives.

It authenticates, says what is held, takes the snapshot or the resumed changes in order, and carries reports,
work orders and queries. What must not be lost while control is away (released epochs) is said again after every
connect; facts of exports are too. What control says is interpreted elsewhere (`Handler`).
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol
from uuid import uuid4

import structlog
from pydantic import BaseModel, ValidationError
from websockets.asyncio.client import ClientConnection, connect, unix_connect
from websockets.exceptions import InvalidHandshake, WebSocketException

from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.link import (
    MESSAGE_BYTES_MAX,
    Answer,
    Applied,
    Delta,
    ExportReport,
    Exports,
    Fault,
    Forget,
    Held,
    Hello,
    LegReleased,
    Look,
    Notice,
    Query,
    Refused,
    Released,
    Resumed,
    Snapshot,
    Stopped,
    TraceOrder,
    Welcome,
    Work,
    from_control,
)
from nbdvvol.model.log import LogChange, LogNote, LogRecord, LogReport
from nbdvvol.model.mirror import Leased, LegChange, LegDoubt, LegRecord, MirrorReport, Renew

_log = structlog.get_logger("link")
QUERY_S = 2.0
"""How long a VM's LIST or INFO waits for control before the last state answers."""
_RETRY_MIN_S, _RETRY_MAX_S = 0.1, 5.0
_OPEN_S = 5.0
_PING_S = 5.0
_FAREWELL_S = 2.0
_NOTICES_MAX = 1000

Question = Look | TraceOrder | Forget


@dataclass(frozen=True, slots=True)
class LinkOptions:
    """Where control is and who we are."""

    host: str
    control: str
    """`unix:PATH` or `https://ADDRESS:PORT`."""
    run_dir: str
    token_file: Path | None = None
    ca_file: Path | None = None
    """Certificate authority of control's https certificate; None: the system's."""
    cert_file: Path | None = None
    key_file: Path | None = None
    """Client certificate of this host, instead of a token."""


class Handler(Protocol):
    """What the filter does with what control says. All of it is quick; slow work goes on in tasks."""

    def held(self) -> list[Held]:
        """What the data plane still has."""

    def address(self) -> str:
        """Address of the TCP listener, or ""."""

    def logs(self) -> list[LogNote]:
        """Write-back logs of this host that may hold data."""

    def faults(self) -> list[Fault]:
        """Failed syncs that control may not have heard of."""

    def snapshot(self, control: str, message: Snapshot) -> None:
        """The whole state."""

    def change(self, message: Delta) -> None:
        """An ordered change."""

    def connected(self) -> None:
        """The held epochs stand, or a snapshot was taken: say what is worth repeating."""

    def work(self, message: Work) -> None:
        """A work order."""

    def question(self, message: Question) -> None:
        """Something to be answered by `send`, or no longer to be answered."""

    def disconnected(self) -> None:
        """Control is away: nobody waits for answers any more."""


@dataclass(slots=True)
class ControlLink:
    """The link; also the Reporter of exports and the Control of views."""

    options: LinkOptions
    handler: Handler
    revision: int = field(default=0, init=False)
    control: str = field(default="", init=False)
    """Identity of the control whose state we have; "" before the first."""
    instance: str = field(default_factory=lambda: str(uuid4()), init=False)
    up: bool = field(default=False, init=False)
    _outbox: asyncio.Queue[BaseModel] = field(default_factory=asyncio.Queue, init=False)
    _released: dict[str, int] = field(default_factory=dict, init=False)
    _notices: list[Notice] = field(default_factory=list, init=False)
    _queries: dict[int, asyncio.Future[Answer]] = field(default_factory=dict, init=False)
    _query_id: int = field(default=0, init=False)
    _asked: dict[int, Callable[[Any], None]] = field(default_factory=dict, init=False)
    """Who waits for the answer to a `leg_change`, `log_change` or `renew` of this connection."""
    _legs_released: dict[tuple[str, int, int], LegReleased] = field(default_factory=dict, init=False)
    _leaving: bool = field(default=False, init=False)
    _left: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    async def run(self) -> None:
        """Dial control until cancelled, or until control took our farewell."""
        delay_s = _RETRY_MIN_S
        complained = ""
        while not self._leaving:
            try:
                async with self._dial() as socket:
                    await self._talk(socket)
                    delay_s, complained = _RETRY_MIN_S, ""
            except (OSError, TimeoutError, WebSocketException, NvError, ValidationError) as error:
                text = _words(error)
                if text != complained and not self._leaving:
                    _log.warning("no link to control; serving goes on", control=self.options.control, error=text)
                    complained = text
            except Exception:
                # A bug must not cost the data path: start over from a whole snapshot.
                _log.exception("the link failed")
                self.revision = 0
            except asyncio.CancelledError:
                self.up = False  # we stop: that is no loss to complain about
                raise
            finally:
                self._down()
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _RETRY_MAX_S)

    # ---- reports (Reporter) ----

    def export(self, report: ExportReport) -> None:
        """Facts of one export; dropped while control is away, and then said again."""
        self.send(Exports(exports=[report]))

    def released(self, uuid: str, epoch: int) -> None:
        """Drained; remembered and repeated at every connect."""
        if epoch:
            self._released[uuid] = max(epoch, self._released.get(uuid, 0))
            self.send(Released(uuid=uuid, epoch=epoch))

    def ask_leg(self, change: LegChange, answer: Callable[[LegRecord], None]) -> None:
        """Ask for a change of a leg; no answer comes when control goes away first."""
        self._ask(change, answer)

    def doubt(self, said: LegDoubt) -> None:
        """Whether a leg's server may still carry out what it was asked; dropped while control is away."""
        self.send(said)

    def ask_log(self, change: LogChange, answer: Callable[[LogRecord], None]) -> None:
        """Ask for a change of what is known of a log; no answer comes when control goes away first."""
        self._ask(change, answer)

    def log(self, report: LogReport) -> None:
        """How a log is; dropped while control is away, and then said again."""
        self.send(report)

    def renew(self, vvols: dict[str, int], answer: Callable[[Leased], None]) -> None:
        """Ask for leases; no answer comes when control goes away first."""
        self._ask(Renew(id=0, vvols=vvols), answer)

    def _ask(self, question: LegChange | LogChange | Renew, answer: Callable[[Any], None]) -> None:
        if self.up:
            self._query_id += 1
            self._asked[self._query_id] = answer
            self.send(question.model_copy(update={"id": self._query_id}))

    def mirror(self, report: MirrorReport) -> None:
        """How a mirror is; dropped while control is away, and then said again."""
        self.send(report)

    def leg_released(self, uuid: str, epoch: int, leg: int, doubt: bool) -> None:
        """A leg was let go; remembered and repeated at every connect."""
        message = self._legs_released[uuid, epoch, leg] = LegReleased(uuid=uuid, epoch=epoch, leg=leg, doubt=doubt)
        self.send(message)

    def fault(self, fault: Fault) -> None:
        """A sync failed; the handler repeats it at every connect until control lists it."""
        self.send(fault)

    def notice(self, event: str, subject: str, message: str) -> None:
        """For control's event list; kept while control is away."""
        news = Notice(event=event, subject=subject, message=message)
        if self.up:
            self.send(news)
        elif len(self._notices) < _NOTICES_MAX:
            self._notices.append(news)

    def applied(self, revision: int) -> None:
        """Everything up to this revision runs."""
        self.send(Applied(revision=revision))

    def send(self, message: BaseModel) -> None:
        """Send to control if it is there."""
        if self.up:
            self._outbox.put_nowait(message)

    async def farewell(self, *, clean: bool) -> None:
        """Our last words, given a moment to arrive. Clean: nothing of any VVol is under way in this process, nor will
        be; control writes that down and closes the link."""
        if not self.up:
            return
        self._leaving = True
        if clean:
            self.send(Stopped())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL_S):
                await (self._left.wait() if clean else self._outbox.join())

    # ---- queries (Control) ----

    async def query(
        self, what: Literal["list", "info", "list_meta"], vm: str | None, name: str, queries: Sequence[str]
    ) -> Answer | None:
        """Ask control; None when it does not answer in time."""
        if not self.up:
            return None
        self._query_id += 1
        number = self._query_id
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._queries[number] = future
        try:
            self.send(Query(id=number, what=what, vm=vm, name=name, queries=list(queries)))
            async with asyncio.timeout(QUERY_S):
                return await future
        except TimeoutError:
            _log.warning("control did not answer in time; the last state does", what=what, seconds=QUERY_S)
            return None
        except ConnectionError:
            return None
        finally:
            self._queries.pop(number, None)

    # ---- one connection ----

    @contextlib.asynccontextmanager
    async def _dial(self) -> AsyncIterator[ClientConnection]:
        headers = {"X-Nbdvvol-Host": self.options.host, **self._credential()}
        settings: dict[str, Any] = {
            "additional_headers": headers,
            "max_size": MESSAGE_BYTES_MAX,
            "open_timeout": _OPEN_S,
            "ping_interval": _PING_S,
            "ping_timeout": _PING_S,
            "close_timeout": 1.0,
            "compression": None,
        }
        where = self.options.control
        if where.startswith("unix:"):
            async with unix_connect(where.removeprefix("unix:"), "ws://control/v1/link", **settings) as socket:
                yield socket
        elif where.startswith("https://"):
            uri = f"wss://{where.removeprefix('https://').rstrip('/')}/v1/link"
            async with connect(uri, ssl=self._tls(), proxy=None, **settings) as socket:
                yield socket
        else:
            raise NvError(Code.USAGE, f"control's address {where!r} is neither unix:PATH nor https://ADDRESS:PORT")

    def _credential(self) -> dict[str, str]:
        if self.options.token_file is None:
            return {}
        try:
            token = self.options.token_file.read_text(encoding="ascii").strip()
        except OSError as error:
            raise NvError(Code.DENIED, f"the host's token: {error}", "control makes it; see the farm file") from error
        return {"Authorization": f"Bearer {token}"}

    def _tls(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.options.ca_file)
        if self.options.cert_file:
            context.load_cert_chain(self.options.cert_file, self.options.key_file)
        return context

    async def _talk(self, socket: ClientConnection) -> None:
        hello = Hello(
            host=self.options.host,
            instance=self.instance,
            revision=self.revision,
            control=self.control,
            held=self.handler.held(),
            address=self.handler.address(),
            run_dir=self.options.run_dir,
            logs=self.handler.logs(),
        )
        await socket.send(hello.model_dump_json())
        async with asyncio.timeout(_OPEN_S):  # wait_for of Python 3.11 may swallow a cancellation
            welcome = _parse(await socket.recv())
        if not isinstance(welcome, Welcome):
            raise NvError(Code.DENIED, f"control does not take this filter: {_reason(welcome)}")
        sender = asyncio.create_task(self._send_all(socket))
        try:
            async for raw in socket:
                self._take(welcome.control, _parse(raw))
        except asyncio.CancelledError:
            await socket.close()
            raise
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)
        raise ConnectionError("control closed the link")

    async def _send_all(self, socket: ClientConnection) -> None:
        while True:
            message = await self._outbox.get()
            try:
                await socket.send(message.model_dump_json())
            finally:
                self._outbox.task_done()

    def _take(self, control: str, message: BaseModel) -> None:
        match message:
            case Snapshot():
                self.control, self.revision = control, message.revision
                self.handler.snapshot(control, message)
                self._ready()
            case Resumed():
                if control != self.control:
                    raise NvError(Code.STALE, f"control {control} resumes what control {self.control} began")
                self._ready()
            case Delta():
                if self.control != control:
                    raise NvError(Code.STALE, "control sent a change before a snapshot")
                self.revision = message.revision
                self.handler.change(message)
            case Work():
                self.handler.work(message)
            case Look() | TraceOrder() | Forget():
                self.handler.question(message)
            case LegRecord() | LogRecord() | Leased():
                if (answered := self._asked.pop(message.id, None)) is not None:
                    answered(message)
            case Answer():
                future = self._queries.get(message.id)
                if future is not None and not future.done():
                    future.set_result(message)
            case _:
                raise NvError(Code.DENIED, f"control ended the link: {_reason(message)}")

    def _ready(self) -> None:
        if not self.up:
            _log.info("linked to control", control=self.options.control, revision=self.revision)
        self.up = True
        for fault in self.handler.faults():
            self.send(fault)
        for uuid, epoch in self._released.items():
            self.send(Released(uuid=uuid, epoch=epoch))
        for gone in self._legs_released.values():
            self.send(gone)
        for news in self._notices:
            self.send(news)
        self._notices.clear()
        self.handler.connected()

    def _down(self) -> None:
        if self.up and not self._leaving:
            _log.warning("the link to control is down; serving goes on from the last state")
        self.up = False
        self._left.set()
        self._asked.clear()
        self.handler.disconnected()
        while not self._outbox.empty():
            lost = self._outbox.get_nowait()
            self._outbox.task_done()
            if isinstance(lost, Notice):
                self._notices.append(lost)
        for future in self._queries.values():
            if not future.done():
                future.set_exception(ConnectionError("control is away"))


def _parse(raw: str | bytes) -> BaseModel:
    return from_control.validate_json(raw)


def _reason(message: BaseModel) -> str:
    return message.reason if isinstance(message, Refused) else f"unexpected {type(message).__name__}"


def _words(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return f"control speaks another version of the link: {error.error_count()} fields do not fit"
    if isinstance(error, InvalidHandshake):
        return f"control refused the WebSocket: {error}"
    return str(error) or type(error).__name__
