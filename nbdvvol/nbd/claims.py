"""Claims: how the client of an export says which leg of which mirror it writes there, and under which epoch.

The meta context `x-nbdvvol:epoch:UUID:LEG:N` claims leg LEG of the VVol UUID for epoch N; before the server answers, no
connection that claims a lower epoch of that leg is left, and none will be let in. `...:N:A` is the same for attempt A
of epoch N, which a client counts up where it must be sure that nothing of an earlier one lands late; without it A is 0.
Several connections with the same claim coexist. The context `x-nbdvvol:epoch` says
that the client claims whatever it writes (or writes nothing that needs it), and asks whether the server knows claims.
Neither tells anything of blocks: BLOCK_STATUS answers for other contexts only. Sans I/O.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

EPOCH_CONTEXT = "x-nbdvvol:epoch"
CLAIMS_MAX = 16
"""Most claims of one connection."""
_UUID = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_NUMBERS = "([1-9][0-9]{0,9}):([1-9][0-9]{0,18})(?::([1-9][0-9]{0,8}))?"
_CLAIM = re.compile(f"{EPOCH_CONTEXT}:({_UUID}):{_NUMBERS}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Claim:
    """A leg of a mirror, and the epoch it is written under."""

    vvol: str
    leg: int
    epoch: int
    attempt: int = 0

    @property
    def order(self) -> tuple[int, int]:
        """Of two claims of one leg, the higher one counts."""
        return self.epoch, self.attempt

    @property
    def key(self) -> str:
        """What is claimed, without the epoch."""
        return f"{self.vvol}:{self.leg}"

    def __str__(self) -> str:
        """The name of its meta context."""
        return f"{EPOCH_CONTEXT}:{self.key}:{self.epoch}" + (f":{self.attempt}" if self.attempt else "")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a client's queries say about claims."""

    aware: bool
    """It knows of claims."""
    claims: tuple[Claim, ...]
    rest: tuple[str, ...]
    """The queries that are about something else."""


def sort_out(queries: Sequence[str]) -> Asked:
    """Take the claims out of SET_META_CONTEXT's queries. Raises ValueError when one is none that we understand."""
    mine = [query for query in queries if query == EPOCH_CONTEXT or query.startswith(f"{EPOCH_CONTEXT}:")]
    claims: dict[str, Claim] = {}
    for query in mine:
        if query == EPOCH_CONTEXT:
            continue
        claim = parse_claim(query)
        if claims.get(claim.key, claim) != claim:
            raise ValueError(f"leg {claim.leg} of {claim.vvol} is claimed twice, and differently")
        claims[claim.key] = claim
    if len(claims) > CLAIMS_MAX:
        raise ValueError(f"{len(claims)} legs are claimed; the limit of one connection is {CLAIMS_MAX}")
    return Asked(bool(mine), tuple(claims.values()), tuple(query for query in queries if query not in mine))


def parse_claim(query: str) -> Claim:
    """The claim that a context's name makes. Raises ValueError."""
    match = _CLAIM.fullmatch(query)
    if match is None or int(match[2]) >= 1 << 32 or int(match[3]) >= 1 << 63:
        raise ValueError(f"a claim is {EPOCH_CONTEXT}:UUID:LEG:EPOCH[:ATTEMPT], in lower case, with numbers from 1 on")
    return Claim(match[1], int(match[2]), int(match[3]), int(match[4] or 0))
