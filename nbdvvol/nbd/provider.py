"""What the haggling asks about exports: facts, listings, and the protocol that answers.

The filter answers LIST, INFO and LIST_META_CONTEXT through control and the rest by itself; control's own
target answers the first three and refuses the rest. This module knows neither.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from nbdvvol.dataplane.types import ConnectionEnd
from nbdvvol.nbd.claims import Claim
from nbdvvol.nbd.constants import BASE_ALLOCATION, BLOCK_PREFERRED_BYTES, PAYLOAD_BYTES_MAX, Reply


class ReplyError(Exception):
    """An option is answered with an error reply: its type and a sentence for the client's user."""

    def __init__(self, reply: Reply, message: str) -> None:
        super().__init__(message)
        self.reply = reply
        self.message = message


@dataclass(frozen=True, slots=True)
class Listing:
    """One line of a LIST answer."""

    name: str
    description: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a client learns about an export. Sizes are bytes.

    `flags` are the transmission flags of a connection with structured replies; the haggling takes away what a
    connection did not agree on. `name` is the canonical name on this socket."""

    name: str
    size: int
    flags: int
    description: str = ""
    block_min: int = 1
    block_preferred: int = BLOCK_PREFERRED_BYTES
    block_max: int = PAYLOAD_BYTES_MAX
    contexts: tuple[str, ...] = (BASE_ALLOCATION,)
    claimed: bool = False
    """It is a leg of somebody's mirror: a client that knows nothing of claims may only read it."""


Claims = tuple[Claim, ...] | None
"""What a connection claims; None: its client knows nothing of claims."""


class Gate(Protocol):
    """Who may write to an export that legs of mirrors lie on."""

    async def claim(self, claims: tuple[Claim, ...]) -> None:
        """Let no connection with a lower epoch in any more, and drain those that are. Raises ReplyError."""

    def admit(self, claims: Claims, *, read_only: bool) -> None:
        """Raises ReplyError when a connection must not enter (any more)."""

    def entered(
        self, claims: Claims, end: asyncio.Future[ConnectionEnd], hang_up: Callable[[], None], *, read_only: bool
    ) -> None:
        """It was admitted and is in transmission now; `hang_up` ends it once what is in flight is done."""


@dataclass(frozen=True, slots=True)
class Opened:
    """An export that may be entered: its facts, the data plane's volume, and its gate where claims are known."""

    facts: Facts
    volume: int
    gate: Gate | None = None


class Provider(Protocol):
    """Answers for one connection: what it may see depends on its socket or its TLS identity.

    Every method raises ReplyError for what it refuses; the caller bounds how long it waits."""

    async def list(self) -> Sequence[Listing]:
        """Every export this client may see (LIST)."""

    async def info(self, name: str) -> Facts:
        """Facts of an export (INFO)."""

    async def list_meta(self, name: str, queries: Sequence[str]) -> Sequence[str]:
        """Meta contexts of an export that match (LIST_META_CONTEXT); no queries means all."""

    async def open(self, name: str) -> Opened:
        """The export to serve (SET_META_CONTEXT, GO, EXPORT_NAME): never asks control."""


def match_contexts(queries: Sequence[str], available: Sequence[str]) -> list[str]:
    """The contexts of `available` that LIST_META_CONTEXT queries name: none means all, `base:` all of base."""
    if not queries:
        return list(available)
    wanted = set(queries)
    return [name for name in available if name in wanted or name.partition(":")[0] + ":" in wanted]
