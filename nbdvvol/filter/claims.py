"""Who may write to our VVols that are legs of others' mirrors: the highest epoch claimed of each, over every restart.

A claim counts from the moment it is heard: lower ones are refused at once. It is answered only when it is written to
the run directory, and when no connection with a lower one, or whose client knows nothing of claims and may write, has
anything in flight. Several connections with the same claim coexist. An export that was claimed once is writable by
clients that know of claims only, as long as the VVol exists: `EPOCHS_FILE` is where that is written.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog
from pydantic import Field

from nbdvvol.dataplane.types import ConnectionEnd
from nbdvvol.filter.durable import load_file, replace_file
from nbdvvol.model.base import Model
from nbdvvol.nbd.claims import Claim
from nbdvvol.nbd.constants import Reply
from nbdvvol.nbd.provider import Claims, ReplyError

_log = structlog.get_logger("claims")
EPOCHS_FILE = "epochs.json"
_NONE = (0, 0)


class _File(Model):
    exports: dict[str, dict[str, tuple[int, int]]] = Field(default_factory=dict)
    """By VVol of ours, then by leg of the mirror (`Claim.key`): the highest epoch claimed, and its attempt."""


class ClaimBook:
    """Every claim that this host has heard of."""

    def __init__(self, run_dir: Path) -> None:
        """Read what earlier processes wrote. Raises NvError(INVALID) when that is damaged: nobody is let in then."""
        self._path = run_dir / EPOCHS_FILE
        self._lock = asyncio.Lock()
        hint = "restore it; without it a host that was fenced could write again"
        found = load_file(self._path, _File, "which epochs were claimed here", hint) or _File()
        self._written = found.exports
        self._highest: defaultdict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
        for uuid, epochs in found.exports.items():
            self._highest[uuid].update(epochs)

    def claimed(self, uuid: str) -> bool:
        """Whether the VVol is a leg of somebody's mirror."""
        return bool(self._highest.get(uuid))

    def highest(self, uuid: str, claim: Claim) -> tuple[int, int]:
        """The highest epoch claimed of that leg on the VVol, and its attempt; zeros: none."""
        return self._highest.get(uuid, {}).get(claim.key, _NONE)

    async def add(self, uuid: str, claims: tuple[Claim, ...]) -> None:
        """Claims that are not outdated: they count at once, and are durable on return. Raises OSError."""
        for claim in claims:
            self._highest[uuid][claim.key] = max(claim.order, self.highest(uuid, claim))
        async with self._lock:
            if any(self._written.get(uuid, {}).get(claim.key, _NONE) < claim.order for claim in claims):
                whole = {name: dict(epochs) for name, epochs in self._highest.items()}
                await asyncio.to_thread(replace_file, self._path, _File(exports=whole).model_dump_json(indent=1))
                self._written = whole


@dataclass(eq=False, slots=True)
class _Visitor:
    claims: Claims
    end: asyncio.Future[ConnectionEnd]
    hang_up: Callable[[], None]
    read_only: bool


class ExportGate:
    """The gate of one VVol that runs here (provider.Gate)."""

    def __init__(self, uuid: str, book: ClaimBook) -> None:
        self._uuid = uuid
        self._book = book
        self._visitors: set[_Visitor] = set()

    @property
    def claimed(self) -> bool:
        """Whether clients that know nothing of claims may only read."""
        return self._book.claimed(self._uuid)

    async def claim(self, claims: tuple[Claim, ...]) -> None:
        """Let no connection with a lower epoch in any more, and drain those that are. Raises ReplyError."""
        self._check(claims)
        if not claims:
            return
        try:
            await self._book.add(self._uuid, claims)
        except OSError as error:
            _log.error("a claim cannot be written down, and is refused", uuid=self._uuid, error=str(error))
            raise ReplyError(Reply.ERR_PLATFORM, f"the claim cannot be made durable: {error}") from error
        outdated = [visitor for visitor in self._visitors if self._outdated(visitor)]
        for visitor in outdated:
            _log.warning("fenced: a newer epoch was claimed", uuid=self._uuid, claims=[str(one) for one in claims])
            visitor.hang_up()
        if outdated:
            await asyncio.wait([visitor.end for visitor in outdated])
        self._check(claims)

    def admit(self, claims: Claims, *, read_only: bool) -> None:
        """Raises ReplyError when a connection must not enter (any more)."""
        if claims is None:
            if self.claimed and not read_only:
                raise ReplyError(Reply.ERR_POLICY, "this export has become a leg of a mirror: it may only be read")
        else:
            self._check(claims)

    def entered(
        self, claims: Claims, end: asyncio.Future[ConnectionEnd], hang_up: Callable[[], None], *, read_only: bool
    ) -> None:
        """It was admitted, right before; `hang_up` ends it once what is in flight is done."""
        visitor = _Visitor(claims, end, hang_up, read_only)
        self._visitors.add(visitor)
        end.add_done_callback(lambda _: self._visitors.discard(visitor))

    def _outdated(self, visitor: _Visitor) -> bool:
        if visitor.claims is None:
            return not visitor.read_only
        return any(claim.order < self._book.highest(self._uuid, claim) for claim in visitor.claims)

    def _check(self, claims: tuple[Claim, ...]) -> None:
        for claim in claims:
            current = self._book.highest(self._uuid, claim)
            if claim.order < current:
                asked = f"{claim.epoch} (attempt {claim.attempt})"
                raise ReplyError(
                    Reply.ERR_POLICY,
                    f"leg {claim.leg} of VVol {claim.vvol} is served under epoch {current[0]} (attempt {current[1]}) "
                    f"now, not {asked}",
                )
