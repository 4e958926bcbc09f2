"""What one client sees: the exports of its VM (unix socket, TLS identity) or of the whole host.

LIST, INFO and LIST_META_CONTEXT are control's to answer, and come from the last state it gave when it is away.
The facts of an export that runs here are always this filter's own, so that INFO and GO agree. `open` is local:
it waits a moment for an export that is just coming up, then says why it is not served.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Literal, Protocol

from nbdvvol.filter.exports import Export, ExportTable
from nbdvvol.model.link import Answer
from nbdvvol.nbd.constants import Reply
from nbdvvol.nbd.options import quote
from nbdvvol.nbd.provider import Facts, Listing, Opened, ReplyError, match_contexts

SETTLE_S = 5.0
"""How long GO waits for an export that is being opened or moved to a new epoch."""


class Control(Protocol):
    """The link, as far as a view needs it."""

    async def query(
        self, what: Literal["list", "info", "list_meta"], vm: str | None, name: str, queries: Sequence[str]
    ) -> Answer | None:
        """Ask control; None when it does not answer in time."""


class View:
    """A Provider for clients that may see `vm`'s exports (None: all of this host, by full name)."""

    def __init__(self, table: ExportTable, control: Control, vm: str | None) -> None:
        self._table = table
        self._control = control
        self._vm = vm

    async def list(self) -> Sequence[Listing]:
        """The exports this client may attach."""
        answer = await self._control.query("list", self._vm, "", ())
        if answer is None:
            return [Listing(self._name(e), e.wanted.description if e.wanted else "") for e in self._table.of(self._vm)]
        _raise_error(answer)
        return [Listing(line.name, line.description) for line in answer.exports]

    async def info(self, name: str) -> Facts:
        """Facts of an export."""
        answer = await self._control.query("info", self._vm, name, ())
        export = self._find(name)
        if answer is not None and (export is None or answer.error == "UNKNOWN"):
            _raise_error(answer)
        if export is None and answer is not None and answer.info is not None:
            info = answer.info
            sizes = info.block_min, info.block_preferred, info.block_max
            return Facts(info.name, info.size, info.flags, info.description, *sizes)
        return (await self.open(name)).facts

    async def list_meta(self, name: str, queries: Sequence[str]) -> Sequence[str]:
        """Meta contexts of an export."""
        answer = await self._control.query("list_meta", self._vm, name, queries)
        if answer is not None:
            _raise_error(answer)
            return answer.contexts
        export = self._known(name)
        return match_contexts(queries, Facts(self._name(export), 0, 0).contexts)

    async def open(self, name: str) -> Opened:
        """The export to enter."""
        export = self._known(name)
        try:
            async with asyncio.timeout(SETTLE_S):
                while export.volume is None and not export.settled.is_set():
                    await export.settled.wait()
        except TimeoutError:
            raise _not_served(name, "it is still being opened; try again") from None
        if export.wanted is None:
            raise self._unknown(name)
        if export.volume is None:
            raise _not_served(name, export.error or "control has not confirmed it yet; try again")
        return Opened(export.facts(self._name(export)), export.volume, export.gate)

    def _name(self, export: Export) -> str:
        """The canonical name on this client's socket."""
        full = export.full_name()
        return full if self._vm is None else full.removeprefix(f"{self._vm}/")

    def _find(self, name: str) -> Export | None:
        exports = self._table.of(self._vm)
        if not name:
            return exports[0] if len(exports) == 1 else None
        return next((e for e in exports if name in (e.full_name(), self._name(e))), None)

    def _known(self, name: str) -> Export:
        export = self._find(name)
        if export is None:
            raise self._unknown(name)
        return export

    def _unknown(self, name: str) -> ReplyError:
        if not name:
            count = len(self._table.of(self._vm))
            return ReplyError(Reply.ERR_UNKNOWN, f"there are {count} exports here; name one (LIST shows them)")
        where = f"VM {self._vm}" if self._vm is not None else "this host"
        return ReplyError(Reply.ERR_UNKNOWN, f"{where} has no export {quote(name)} (LIST shows what there is)")


class Nothing:
    """A Provider for clients that may see nothing: everything is refused with the reason."""

    def __init__(self, reason: str) -> None:
        self._error = ReplyError(Reply.ERR_POLICY, reason)

    async def list(self) -> Sequence[Listing]:
        """Refused."""
        raise self._error

    async def info(self, name: str) -> Facts:
        """Refused."""
        raise self._error

    async def list_meta(self, name: str, queries: Sequence[str]) -> Sequence[str]:
        """Refused."""
        raise self._error

    async def open(self, name: str) -> Opened:
        """Refused."""
        raise self._error


def _raise_error(answer: Answer) -> None:
    if answer.error:
        kind = Reply.__members__.get(f"ERR_{answer.error}", Reply.ERR_POLICY)
        raise ReplyError(kind, answer.message or "control refused")


def _not_served(name: str, why: str) -> ReplyError:
    return ReplyError(Reply.ERR_POLICY, f"{quote(name)} is not served now: {why}")
