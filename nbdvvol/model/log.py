"""Words about write-back logs that the link, the API and the registry share (docs/cache.md sections 7 to 10).

The registry says of each VVol whether a log holds data of it that its storage may not have: on which host, and which
log (its id stands in the log itself). The filter asks for that to be written down before it logs anything, and to be
struck out once everything is carried below; control answers each `log_change` with `log_record`. A lost, repeated or
late question does no harm: who asked, asks again. All sizes are bytes; ids are 32 hexadecimal digits.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from nbdvvol.model.base import Model
from nbdvvol.model.farm import CacheLog
from nbdvvol.model.mirror import Count
from nbdvvol.model.units import about_size, about_time

LogWanted = Literal["dirty", "clean", "forget"]
"""What the filter asks for. `dirty`: this log may hold data from now on. `clean`: it holds none any more, all is below.
`forget`: it cannot be made void on its device; nothing in it is ever to be replayed."""
LogId = Annotated[str, Field(pattern=r"^([0-9a-f]{32})?$")]
LogPhase = Literal["recovering", "through", "serving", "draining", "failed", "void", "refused", "waits"]
"""What a log does for its VVol now. `through`: nothing is logged: control's word is awaited, or it was to be drained.
`failed`: its device is not trusted, what it holds is being carried below; `void`: that is done, writes go below.
`refused`: what lies there cannot be used, the VVol is served without. `waits`: it cannot go in before the VVol yet.
"""


class LogSpec(Model):
    """How a filter runs a VVol's log."""

    on: bool = True
    """False: log nothing, carry below what it holds."""
    folder: str = ""
    """Where its file is made, or the device that it is."""
    log: CacheLog | None = None
    """Its size and limits; None: there is to be none any more."""
    held: LogId = ""
    """The log that holds data of the VVol; empty: none does."""
    file: str = ""
    """Where that one lies."""
    discard: bool = False
    """By the operator's word, whatever lies there may be overwritten."""
    given_up: Count = 0
    """What logs of this epoch and older ones hold was given up: it is never replayed, and missed by nobody."""


class LogChange(Model):
    """Filter → control: change what the registry says of a log, if the VVol still is at this epoch."""

    kind: Literal["log_change"] = "log_change"
    id: int
    """Numbers the questions of one connection; the answer names it."""
    vvol: str
    epoch: Count
    generation: Count
    log: LogId
    wanted: LogWanted
    file: str = ""
    """Where the log lies."""
    reason: str = Field(default="", max_length=1000)


class LogRecord(Model):
    """Control → filter: the answer to a `log_change`, done or not."""

    kind: Literal["log_record"] = "log_record"
    id: int
    vvol: str
    refused: Literal["", "epoch", "generation", "other", "draining", "unknown"] = ""
    """"": done, or it was so already. `epoch`: the VVol was given another one, or was taken from this host.
    `generation`: the registry has an older one than the asker. `other`: another log holds data of it. `draining`: it is
    to be drained. `unknown`: there is no such VVol."""
    message: str = ""


class FoundLog(Model):
    """A log that a host has found just now; empty: none. No part of a request for something to be done with it: that is
    the same request when it comes again, whatever is found by then."""

    host: str = Field(default="", exclude=True)
    log: LogId = Field(default="", exclude=True)
    file: str = Field(default="", exclude=True)


class LogNote(Model):
    """Filter → control, in its hello: a log of this host that may hold data of a VVol, whatever the registry says."""

    vvol: str
    log: LogId
    file: str
    epoch: Count
    """Under which it was opened last."""
    generation: Count = 0
    dirty_bytes: Count | None = None
    """What it holds; null: that is not known."""


LOST_MAX = 64
"""Ranges that a report names."""


class LostRange(Model):
    """Bytes of a VVol that were logged and can be read nowhere any more."""

    offset: int
    length: int


class LogReport(Model):
    """Filter → control: how a log is. Sent when something changed, each second at most."""

    kind: Literal["log"] = "log"
    uuid: str
    epoch: int
    state: LogPhase
    why: str = ""
    """Why it is failed, void, refused or waits."""
    file: str = ""
    found: LogId = ""
    """Refused: the log that lies there."""
    verdict: str = ""
    """Refused: what is wrong with it, in a word."""
    ring_bytes: int = 0
    used_bytes: int = 0
    dirty_bytes: int = 0
    """Not carried below yet; of a log that is refused: what it holds."""
    oldest_age_ms: int = 0
    destage_rate: int = 0
    """Bytes a second, smoothed."""
    lost_bytes: int = 0
    """That can be read nowhere any more."""
    lost: list[LostRange] = Field(default_factory=list, max_length=LOST_MAX)
    """Where that lies, from the VVol's beginning on; `lost_bytes` may be more."""


def range_words(lost: list[LostRange], lost_bytes: int) -> str:
    """For people: which bytes of a VVol are lost, each range as offset+length."""
    named = sum(one.length for one in lost)
    places = ", ".join(f"{one.offset}+{one.length}" for one in lost)
    more = f" and {lost_bytes - named} more" if lost_bytes > named else ""
    return f"bytes {places}{more}" if lost else f"{lost_bytes} bytes"


def holding_words(dirty_bytes: int, oldest_age_ms: int) -> str:
    """For people: how much a log holds that is not below."""
    age = f", the oldest logged {about_time(oldest_age_ms / 1000)} ago" if oldest_age_ms else ""
    return f"{about_size(dirty_bytes)}{age}"
