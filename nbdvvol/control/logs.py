"""What becomes of a filter's question about a VVol's write-back log, and of the registry's word on it: pure.

The registry's side is three steps on {epoch, generation}: *dirty* (this log may hold data), *clean* (it holds none) and
*forget* (nothing in it is ever replayed). Repeating one changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from nbdvvol.model.log import LogChange

Refusal = Literal["", "epoch", "generation", "other", "draining", "unknown"]


@dataclass(frozen=True, slots=True)
class Standing:
    """What the registry says of a VVol's log."""

    state: Literal["clean", "dirty", "unknown"] = "clean"
    host: str = ""
    """Unknown: who has noted that a log of his holds data; "": nobody has."""
    log: str = ""
    epoch: int = 0
    draining: bool = False
    given_up: int = 0

    @property
    def holds(self) -> bool:
        """A log has, or may have, data that the storage has not."""
        return self.state != "clean"


@dataclass(frozen=True, slots=True)
class Decided:
    """The answer. `after` is what the registry is to say; `moved`: something else than before."""

    refused: Refusal
    message: str
    after: Standing
    moved: bool = False


def decide(now: Standing, host: str, generation: int, change: LogChange) -> Decided:
    """What a host that serves a VVol under the epoch it names is answered; `generation` is the registry's."""
    if change.generation > generation:
        text = f"generation {change.generation} is above the registry's {generation}: the registry is old"
        return Decided("generation", text, now)
    if now.state == "dirty" and (now.host, now.log) != (host, change.log):
        return Decided("other", f"log {now.log} on host {now.host} holds data of it, not {change.log}", now)
    if now.state == "unknown" and now.host not in ("", host):
        return Decided("other", f"a log on host {now.host} may hold data of it", now)
    if change.wanted == "dirty":
        return _dirty(now, host, change)
    if not now.holds and change.wanted == "clean":
        return Decided("", "", now)
    after = replace(now, state="clean", host="", log="")
    if change.wanted == "forget":
        after = replace(after, given_up=max(now.given_up, change.epoch))
    return Decided("", "", after, moved=after != now)


def _dirty(now: Standing, host: str, change: LogChange) -> Decided:
    if now.draining:
        return Decided("draining", "it is being drained", now)
    if not change.log:
        return Decided("other", "a log without an id cannot hold data", now)
    after = replace(now, state="dirty", host=host, log=change.log, epoch=change.epoch)
    return Decided("", "", after, moved=after != now)
