"""Bytes of the handshake: parse what clients send, build what servers answer. No state, no I/O.

Every parser checks inner lengths against the payload it was given and raises BadOption with a sentence that is
sent back (ERR_INVALID); nothing is allocated from a length field.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from nbdvvol.nbd import constants as c
from nbdvvol.nbd.provider import Facts, Listing

HEADER = struct.Struct(">QII")
_REPLY = struct.Struct(">QIII")
_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")


class BadOption(Exception):
    """An option's payload is malformed; the text is for the client's user."""


@dataclass(frozen=True, slots=True)
class InfoRequest:
    """Payload of INFO and GO."""

    name: str
    infos: frozenset[int]


@dataclass(frozen=True, slots=True)
class MetaRequest:
    """Payload of LIST_META_CONTEXT and SET_META_CONTEXT."""

    name: str
    queries: tuple[str, ...]


def parse_string(raw: bytes, what: str) -> str:
    """A protocol string: at most 4096 bytes of UTF-8 without NUL."""
    if len(raw) > c.STRING_BYTES_MAX:
        raise BadOption(f"{what} has {len(raw)} bytes; the protocol's limit is {c.STRING_BYTES_MAX}")
    if 0 in raw:
        raise BadOption(f"{what} contains a NUL byte at offset {raw.index(0)}")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadOption(f"{what} is not UTF-8 at byte {error.start}") from None


def parse_info(payload: bytes) -> InfoRequest:
    """u32 name length, name, u16 count, count x u16, and nothing else."""
    if len(payload) < 6:
        raise BadOption(f"the payload has {len(payload)} bytes; at least 6 are needed")
    length = _U32.unpack_from(payload)[0]
    if length > len(payload) - 6:
        raise BadOption(f"the name length {length} does not fit in a payload of {len(payload)} bytes")
    name = parse_string(payload[4 : 4 + length], "the export name")
    count = _U16.unpack_from(payload, 4 + length)[0]
    rest = len(payload) - 6 - length
    if rest != 2 * count:
        raise BadOption(f"{count} information requests need {2 * count} bytes; there are {rest}")
    return InfoRequest(name, frozenset(struct.unpack_from(f">{count}H", payload, 6 + length)))


def parse_meta(payload: bytes) -> MetaRequest:
    """u32 name length, name, u32 count, count x (u32 length, query), and nothing else."""
    name_raw, at = _sized(payload, 0, "the export name")
    name = parse_string(name_raw, "the export name")
    if len(payload) - at < 4:
        raise BadOption("the payload ends before the number of queries")
    count = _U32.unpack_from(payload, at)[0]
    at += 4
    if count > (len(payload) - at) // 4:
        raise BadOption(f"{count} queries do not fit in the {len(payload) - at} bytes that follow")
    queries = []
    for _ in range(count):
        raw, at = _sized(payload, at, "a query")
        queries.append(parse_string(raw, "a query"))
    if at != len(payload):
        raise BadOption(f"{len(payload) - at} bytes follow the last query")
    return MetaRequest(name, tuple(queries))


def _sized(payload: bytes, at: int, what: str) -> tuple[bytes, int]:
    if len(payload) - at < 4:
        raise BadOption(f"the payload ends before the length of {what}")
    length = _U32.unpack_from(payload, at)[0]
    at += 4
    if length > len(payload) - at:
        raise BadOption(f"{what} has length {length} but {len(payload) - at} bytes follow")
    return payload[at : at + length], at + length


def option_request(option: int, payload: bytes = b"") -> bytes:
    """An option as a client sends it."""
    return HEADER.pack(c.IHAVEOPT, option, len(payload)) + payload


def reply(option: int, kind: c.Reply, payload: bytes = b"") -> bytes:
    """One option reply."""
    return _REPLY.pack(c.OPTION_REPLY_MAGIC, option, kind, len(payload)) + payload


def error_reply(option: int, kind: c.Reply, message: str) -> bytes:
    """An error reply with its sentence."""
    return reply(option, kind, bounded_text(message))


def server_reply(option: int, listing: Listing) -> bytes:
    """One line of LIST."""
    name = listing.name.encode()
    return reply(option, c.Reply.SERVER, _U32.pack(len(name)) + name + bounded_text(listing.description))


def meta_reply(option: int, context: int, name: str) -> bytes:
    """One meta context of LIST_META_CONTEXT (id 0) or SET_META_CONTEXT."""
    return reply(option, c.Reply.META_CONTEXT, _U32.pack(context) + name.encode())


def info_replies(option: int, request: InfoRequest, facts: Facts, tflags: int) -> bytes:
    """The REP_INFO answers of INFO and GO: EXPORT always, the others when asked for and worth saying."""
    answers = [struct.pack(">HQH", c.Info.EXPORT, facts.size, tflags)]
    if c.Info.NAME in request.infos and facts.name != request.name:
        answers.append(_U16.pack(c.Info.NAME) + facts.name.encode())
    if c.Info.DESCRIPTION in request.infos and facts.description:
        answers.append(_U16.pack(c.Info.DESCRIPTION) + bounded_text(facts.description))
    if c.Info.BLOCK_SIZE in request.infos:
        sizes = facts.block_min, facts.block_preferred, facts.block_max
        answers.append(struct.pack(">HIII", c.Info.BLOCK_SIZE, *sizes))
    return b"".join(reply(option, c.Reply.INFO, answer) for answer in answers)


def export_name_reply(facts: Facts, tflags: int, *, padded: bool) -> bytes:
    """The answer to EXPORT_NAME: it has no header and cannot report errors."""
    return struct.pack(">QH", facts.size, tflags) + bytes(c.EXPORT_NAME_PADDING_BYTES if padded else 0)


def bounded_text(text: str) -> bytes:
    """UTF-8 of at most 4096 bytes without NUL, cut between characters."""
    raw = text.replace("\0", " ").encode("utf-8", "replace")
    if len(raw) <= c.STRING_BYTES_MAX:
        return raw
    return raw[: c.STRING_BYTES_MAX].decode("utf-8", "ignore").encode()


def quote(name: str, limit: int = 80) -> str:
    """A client's name inside an error text, shortened."""
    return repr(name) if len(name) <= limit else f"{name[:limit]!r}... ({len(name)} characters)"


def encode_queries(name: str, queries: Sequence[str]) -> bytes:
    """Payload of LIST_META_CONTEXT and SET_META_CONTEXT, as a client sends it."""
    raws = [query.encode() for query in queries]
    head = name.encode()
    return b"".join([_U32.pack(len(head)), head, _U32.pack(len(raws)), *(_U32.pack(len(raw)) + raw for raw in raws)])
