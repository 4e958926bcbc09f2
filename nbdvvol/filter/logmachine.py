"""What is to be done with a VVol's write-back log next: pure, no I/O, no clock.

Its inputs are what was found when the log was opened, control's wish and answers, and what the log tells; its outputs
are questions to control and calls into the data plane. Invariants: nothing is logged before the registry says that
this log may hold data of the VVol, under this epoch; the registry is asked to say that it holds none only while it is
empty and nothing may be logged; one question is out at a time, and after one that may have struck the log out, the
registry counts as not knowing of it.
"""

from __future__ import annotations

import enum

from nbdvvol.model.log import LogRecord


class Do(enum.Enum):
    """A step."""

    ASK_DIRTY = "ask that it may hold data"
    ASK_CLEAN = "ask that it holds none"
    ASK_FORGET = "ask that it is never replayed"
    ALLOW = "log"
    DRAIN = "drain"
    FORGET = "forget"


class Plane(enum.Enum):
    """What the data plane does with the log."""

    THROUGH = "through"
    SERVING = "serving"
    DRAINING = "draining"
    FAILED = "failed"
    VOID = "void"


class LogMachine:
    """One log that could be used, at one epoch. `held`: the registry said that it holds data."""

    def __init__(self, *, on: bool, held: bool) -> None:
        self.plane = Plane.THROUGH
        self.dead = False
        """The VVol is another host's, or of another epoch: nothing is asked or logged any more."""
        self.clean = not held
        """The registry says that no log holds data of the VVol; nothing was asked that could have changed it."""
        self._on = on
        self._empty = not held
        self._dirty = False  # the registry says so, under this epoch
        self._asked: Do | None = None
        self._refused = False
        self._word = False  # it cannot be made void on its device

    def next(self) -> Do | None:
        """The next step, which counts as taken; None: there is none now."""
        if self.dead or self._asked is not None or self._refused:
            return None
        if self._word:
            return self._ask(Do.ASK_FORGET)
        match self.plane:
            case Plane.DRAINING | Plane.FAILED:
                return None
            case Plane.VOID:
                return None if self.clean else self._ask(Do.ASK_CLEAN)
            case _:
                return self._log() if self._on else self._end()

    def _log(self) -> Do | None:
        if self.plane is Plane.SERVING:
            return None
        if not self._dirty:
            return self._ask(Do.ASK_DIRTY)
        self.plane, self._empty = Plane.SERVING, False
        return Do.ALLOW

    def _end(self) -> Do | None:
        if not self._empty:
            self.plane = Plane.DRAINING
            return Do.DRAIN
        return None if self.clean else self._ask(Do.ASK_CLEAN)

    def _ask(self, what: Do) -> Do:
        self._asked = what
        if what is Do.ASK_DIRTY:
            self.clean = False
        else:
            self._dirty = False
        return what

    def answered(self, answer: LogRecord) -> Do | None:
        """Control has answered what was asked; the step that this brings, if it is not `next`'s to say."""
        asked, self._asked = self._asked, None
        if answer.refused in ("epoch", "unknown"):
            self.dead = True
        elif answer.refused:
            self._refused = True
        elif asked is Do.ASK_DIRTY:
            self._dirty = True
        elif asked is Do.ASK_CLEAN:
            self.clean = True
        elif asked is Do.ASK_FORGET:
            self.clean, self._word = True, False
            return Do.FORGET
        return None

    @property
    def over(self) -> bool:
        """It holds nothing, the registry knows that, and nothing is asked or done: it may be taken out."""
        return self.clean and self._empty and self._asked is None and self.plane in (Plane.THROUGH, Plane.VOID)

    def wish(self, *, on: bool) -> None:
        """Control wants it on, or drained and off."""
        self._on, self._refused = on, False

    def again(self) -> None:
        """Control is there again: what was asked may be lost; or what it refused may be possible now."""
        self._asked, self._refused = None, False

    def drained(self, *, void: bool) -> None:
        """Nothing is in it any more; `void`: nor will be, its device has failed."""
        self._empty = True
        self.plane = Plane.VOID if void else Plane.THROUGH

    def failed(self) -> None:
        """Its device has failed: what it holds is being carried below."""
        self.plane = Plane.FAILED

    def needs_word(self) -> None:
        """It cannot be made void on its device."""
        self._word = True
