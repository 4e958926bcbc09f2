"""The server's side of the handshake: fixed newstyle option haggling as a machine without I/O.

A driver owns the socket and the clock. It sends `hello()`, gives the client's flags to `client_flags()`, frames
options with `parse_header()` and gives each to `option()`, which returns the bytes to send and what to do next.
The only thing awaited in here is the Provider. `Drop` means: close now, send nothing.

Invariants: a meta context set, and what the client claims with it (claims.py), lives only until the next
SET_META_CONTEXT (also a failed one), STARTTLS, or GO of another export; nothing agreed before STARTTLS survives it;
after ENTER, CLOSE or START_TLS no option is taken (START_TLS: until `started_tls()`).
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from nbdvvol.dataplane.types import ConnectionParams, ContextId
from nbdvvol.nbd import constants as c
from nbdvvol.nbd import options as o
from nbdvvol.nbd.claims import EPOCH_CONTEXT, sort_out
from nbdvvol.nbd.constants import HandshakeFlag, Option, Reply, TransmissionFlag
from nbdvvol.nbd.provider import Claims, Facts, Opened, Provider, ReplyError, match_contexts

SERVER_FLAGS = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
_TLS_WANTED = "this listener serves encrypted clients only; use TLS (nbds:// or STARTTLS)"


class TlsRule(enum.Enum):
    """How a listener treats TLS; constant for one connection (NOTLS, SELECTIVETLS without secrets, FORCEDTLS)."""

    OFF = "off"
    OFFERED = "offered"
    REQUIRED = "required"


class Then(enum.Enum):
    """What the driver does after it has sent an answer."""

    CONTINUE = "continue"
    CLOSE = "close"
    START_TLS = "start TLS"
    ENTER = "enter"


@dataclass(frozen=True, slots=True)
class Enter:
    """The client goes on to the transmission phase of this export."""

    opened: Opened
    params: ConnectionParams
    claims: Claims = None


@dataclass(frozen=True, slots=True)
class Answer:
    """Bytes to send, then what to do; `enter` is set with Then.ENTER only."""

    data: bytes
    then: Then = Then.CONTINUE
    enter: Enter | None = None


class Drop(Exception):
    """The connection ends here, without an answer; the text is for our log."""


def parse_header(header: bytes) -> tuple[int, int]:
    """Option number and payload length of 16 header bytes. Raises Drop when it is none, or too long to read."""
    magic, option, length = o.HEADER.unpack(header)
    if magic != c.IHAVEOPT:
        raise Drop(f"option magic is {magic:#x}")
    if length > c.OPTION_BYTES_MAX:
        raise Drop(f"option {option} has {length} bytes; the limit is {c.OPTION_BYTES_MAX}")
    return option, length


_READ_ONLY_NEVER = TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_FAST_ZERO


def connection_flags(flags: int, *, structured: bool, extended: bool) -> int:
    """Transmission flags of one connection: what it did not agree on is taken away."""
    told = TransmissionFlag(flags & 0xFFFF) | TransmissionFlag.HAS_FLAGS
    told &= ~(TransmissionFlag.SEND_RESIZE | TransmissionFlag.BLOCK_STATUS_PAYLOAD)
    if extended:
        told |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
    elif not structured:
        told &= ~TransmissionFlag.SEND_DF
    return int(told)


class Haggle:
    """One connection's haggling."""

    def __init__(self, provider: Provider, tls: TlsRule = TlsRule.OFF) -> None:
        self.stopping = False
        """Set it when the server stops: every option but ABORT then gets ERR_SHUTDOWN."""
        self._provider = provider
        self._tls = tls
        self._in_tls = False
        self._taken = 0
        self._fixed = False
        self._no_zeroes = False
        self._over = False
        self._structured = False
        self._extended = False
        self._contexts: tuple[ContextId, ...] = ()
        self._contexts_of = ""
        self._claims: Claims = None
        self._handlers: dict[int, Callable[[bytes], Awaitable[Answer]]] = {
            Option.EXPORT_NAME: self._export_name,
            Option.ABORT: self._abort,
            Option.LIST: self._list,
            Option.STARTTLS: self._starttls,
            Option.INFO: self._info,
            Option.GO: self._go,
            Option.STRUCTURED_REPLY: self._structured_reply,
            Option.LIST_META_CONTEXT: self._list_meta,
            Option.SET_META_CONTEXT: self._set_meta,
            Option.EXTENDED_HEADERS: self._extended_headers,
        }

    def hello(self) -> bytes:
        """The server's first 18 bytes."""
        return struct.pack(">QQH", c.INIT_PASSWD, c.IHAVEOPT, SERVER_FLAGS)

    def client_flags(self, raw: bytes) -> None:
        """Take the client's 4 flag bytes. Raises Drop on a flag that was not offered."""
        flags = struct.unpack(">I", raw)[0]
        if flags & ~int(SERVER_FLAGS):
            raise Drop(f"client flags {flags:#x} have bits that were not offered")
        self._fixed = bool(flags & HandshakeFlag.FIXED_NEWSTYLE)
        self._no_zeroes = bool(flags & HandshakeFlag.NO_ZEROES)

    def started_tls(self, provider: Provider) -> None:
        """TLS is up and the peer's identity chose `provider`: everything agreed before is forgotten."""
        assert not self._in_tls and self._over
        self._provider = provider
        self._in_tls = True
        self._over = False
        self._structured = self._extended = False
        self._forget_contexts()

    async def option(self, number: int, payload: bytes) -> Answer:
        """Take one option. Raises Drop; every other outcome is an Answer."""
        if self._over:
            raise Drop("an option after the handshake was over")
        answer = await self._dispatch(number, payload)
        self._over = answer.then is not Then.CONTINUE
        return answer

    async def _dispatch(self, number: int, payload: bytes) -> Answer:
        self._taken += 1
        if self._taken > c.OPTIONS_MAX:
            raise Drop(f"more than {c.OPTIONS_MAX} options")
        if not self._fixed and number != Option.EXPORT_NAME:
            raise Drop(f"option {number} from a client without fixed newstyle")
        try:
            self._admit(number)
            handler = self._handlers.get(number)
            if handler is None:
                raise ReplyError(Reply.ERR_UNSUP, f"option {number} is not supported")
            return await handler(payload)
        except o.BadOption as error:
            return self._refuse(number, Reply.ERR_INVALID, str(error))
        except ReplyError as error:
            return self._refuse(number, error.reply, error.message)

    def _admit(self, number: int) -> None:
        """The rules that stand before any single option's own."""
        if number == Option.ABORT:
            return
        if self.stopping:
            raise ReplyError(Reply.ERR_SHUTDOWN, "the server is stopping; try again later")
        if self._tls is TlsRule.REQUIRED and not self._in_tls and number != Option.STARTTLS:
            raise ReplyError(Reply.ERR_TLS_REQD, _TLS_WANTED)

    def _refuse(self, number: int, kind: Reply, message: str) -> Answer:
        if number == Option.EXPORT_NAME:
            raise Drop(message)
        then = Then.CLOSE if kind == Reply.ERR_SHUTDOWN else Then.CONTINUE
        return Answer(o.error_reply(number, kind, message), then)

    def _forget_contexts(self) -> None:
        self._contexts = ()
        self._contexts_of = ""
        self._claims = None

    # ---- the options ----

    async def _abort(self, payload: bytes) -> Answer:
        del payload  # ABORT is honoured whatever it carries
        return Answer(o.reply(Option.ABORT, Reply.ACK), Then.CLOSE)

    async def _list(self, payload: bytes) -> Answer:
        _no_payload(payload)
        lines = [o.server_reply(Option.LIST, listing) for listing in await self._provider.list()]
        return Answer(b"".join(lines) + o.reply(Option.LIST, Reply.ACK))

    async def _starttls(self, payload: bytes) -> Answer:
        _no_payload(payload)
        if self._in_tls:
            raise ReplyError(Reply.ERR_INVALID, "this connection is encrypted already")
        if self._tls is TlsRule.OFF:
            raise ReplyError(Reply.ERR_POLICY, "TLS is not offered here")
        return Answer(o.reply(Option.STARTTLS, Reply.ACK), Then.START_TLS)

    async def _structured_reply(self, payload: bytes) -> Answer:
        _no_payload(payload)
        if self._extended:
            raise ReplyError(Reply.ERR_EXT_HEADER_REQD, "extended headers were agreed; they include structured replies")
        self._structured = True
        return Answer(o.reply(Option.STRUCTURED_REPLY, Reply.ACK))

    async def _extended_headers(self, payload: bytes) -> Answer:
        _no_payload(payload)
        self._extended = True
        return Answer(o.reply(Option.EXTENDED_HEADERS, Reply.ACK))

    async def _info(self, payload: bytes) -> Answer:
        request = o.parse_info(payload)
        facts = self._as_seen(await self._provider.info(request.name))
        answers = o.info_replies(Option.INFO, request, facts, self._flags(facts))
        return Answer(answers + o.reply(Option.INFO, Reply.ACK))

    async def _go(self, payload: bytes) -> Answer:
        request = o.parse_info(payload)
        opened = await self._open(request.name)
        answers = o.info_replies(Option.GO, request, opened.facts, self._flags(opened.facts))
        return Answer(answers + o.reply(Option.GO, Reply.ACK), Then.ENTER, self._enter(opened))

    async def _export_name(self, payload: bytes) -> Answer:
        if self._extended:
            raise Drop("EXPORT_NAME after extended headers were agreed")
        opened = await self._open(o.parse_string(payload, "the export name"))
        data = o.export_name_reply(opened.facts, self._flags(opened.facts), padded=not self._no_zeroes)
        return Answer(data, Then.ENTER, self._enter(opened))

    async def _list_meta(self, payload: bytes) -> Answer:
        self._want_structured()
        request = o.parse_meta(payload)
        names = await self._provider.list_meta(request.name, request.queries)
        lines = [o.meta_reply(Option.LIST_META_CONTEXT, 0, name) for name in names]
        return Answer(b"".join(lines) + o.reply(Option.LIST_META_CONTEXT, Reply.ACK))

    async def _set_meta(self, payload: bytes) -> Answer:
        self._forget_contexts()
        self._want_structured()
        request = o.parse_meta(payload)
        try:
            asked = sort_out(request.queries)
        except ValueError as error:
            raise o.BadOption(str(error)) from None
        opened = await self._provider.open(request.name)
        facts = opened.facts
        # Here a bare namespace selects nothing, and no query selects nothing.
        exact = [query for query in asked.rest if not query.endswith(":")]
        names = match_contexts(exact, facts.contexts) if exact else []
        self._contexts = tuple(ContextId(number, name) for number, name in enumerate(names, start=1))
        self._contexts_of = facts.name
        chosen = list(self._contexts)
        if asked.aware and opened.gate is not None:
            await opened.gate.claim(asked.claims)
            self._claims = asked.claims
            told = [EPOCH_CONTEXT] if EPOCH_CONTEXT in request.queries else []
            for name in told + [str(claim) for claim in asked.claims]:
                chosen.append(ContextId(len(chosen) + 1, name))
        lines = [o.meta_reply(Option.SET_META_CONTEXT, context.id, context.name) for context in chosen]
        return Answer(b"".join(lines) + o.reply(Option.SET_META_CONTEXT, Reply.ACK))

    def _want_structured(self) -> None:
        if not self._structured and not self._extended:
            raise ReplyError(Reply.ERR_INVALID, "meta contexts need structured replies or extended headers first")

    # ---- what was agreed ----

    async def _open(self, name: str) -> Opened:
        """The export, as this client may enter it."""
        opened = await self._provider.open(name)
        seen = replace(opened, facts=self._as_seen(opened.facts))
        if opened.gate is not None:
            read_only = bool(seen.facts.flags & TransmissionFlag.READ_ONLY)
            opened.gate.admit(self._claims_on(opened.facts), read_only=read_only)
        return seen

    def _claims_on(self, facts: Facts) -> Claims:
        """Claims are of the export they were made on."""
        return self._claims if self._contexts_of == facts.name else None

    def _as_seen(self, facts: Facts) -> Facts:
        """Whoever knows nothing of claims may look at a leg of a mirror, and write nothing."""
        if not facts.claimed or self._claims_on(facts) is not None:
            return facts
        flags = TransmissionFlag(facts.flags) & ~_READ_ONLY_NEVER | TransmissionFlag.READ_ONLY
        return replace(facts, flags=int(flags))

    def _flags(self, facts: Facts) -> int:
        return connection_flags(facts.flags, structured=self._structured, extended=self._extended)

    def _enter(self, opened: Opened) -> Enter:
        facts = opened.facts
        params = ConnectionParams(
            structured=self._structured or self._extended,
            extended=self._extended,
            read_only=bool(facts.flags & TransmissionFlag.READ_ONLY),
            tflags=self._flags(facts),
            block_min=facts.block_min,
            payload_max=facts.block_max,
            contexts=self._contexts if self._contexts_of == facts.name else (),
        )
        return Enter(opened, params, self._claims_on(facts))


def _no_payload(payload: bytes) -> None:
    if payload:
        raise o.BadOption(f"this option takes no data; {len(payload)} bytes came with it")
