"""Who owns which extents of a datastore: pure logic over a list of areas, no I/O, no SQL.

An area is a stretch of whole extents in one state. The areas of a formatted datastore tile it without a gap,
from 0 to the last whole extent; a tail shorter than an extent is never used. States and the only ways between:

    dirty ──take──▶ scrubbing ──zeros written and flushed──▶ reserved ──commit──▶ allocated
    clean ──take───────────────────────────────────────────▶ reserved
    allocated ──its VVol is deleted, every holder released──▶ freeing ──zeros written and flushed──▶ clean
    scrubbing, reserved ──given up──▶ dirty: a label may have been written already

So a byte belongs to one owner at most, and none that held anything reaches an owner before it was scrubbed.
An adopted datastore is not tiled: its areas are the adopted parts, byte for byte, and nothing is ever taken.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from nbdvvol.model.errors import Code, NvError


class AreaState(enum.StrEnum):
    """State of an area."""

    META = "meta"
    CLEAN = "clean"
    DIRTY = "dirty"
    SCRUBBING = "scrubbing"
    RESERVED = "reserved"
    ALLOCATED = "allocated"
    FREEING = "freeing"
    ADOPTED = "adopted"


FREE = (AreaState.CLEAN, AreaState.DIRTY)


@dataclass(frozen=True, slots=True, order=True)
class Area:
    """Bytes [offset, offset+length) of a datastore, in one state, of one owner (a VVol's UUID)."""

    offset: int
    length: int
    state: AreaState
    owner: str = ""

    @property
    def end(self) -> int:
        """First byte behind it."""
        return self.offset + self.length


def _merged(areas: Iterable[Area]) -> list[Area]:
    out: list[Area] = []
    for area in sorted(areas):
        last = out[-1] if out else None
        if last is not None and last.end == area.offset and (last.state, last.owner) == (area.state, area.owner):
            out[-1] = Area(last.offset, last.length + area.length, last.state, last.owner)
        elif area.length:
            out.append(area)
    return out


class Space:
    """The extents of one formatted datastore."""

    def __init__(self, extent: int, areas: Iterable[Area]) -> None:
        self.extent = extent
        self.areas = _merged(areas)
        self.check()

    @classmethod
    def format(cls, extent: int, size: int, head: int) -> Space:
        """A fresh datastore: `head` bytes of metadata, all the rest of unknown content."""
        space = cls(extent, [Area(0, head, AreaState.META)])
        space.extend(size)
        return space

    @property
    def end(self) -> int:
        """Bytes tiled so far."""
        return self.areas[-1].end if self.areas else 0

    @property
    def free(self) -> int:
        """Bytes that can be taken."""
        return sum(area.length for area in self.areas if area.state in FREE)

    def check(self) -> None:
        """Assert that the areas tile the space in whole extents."""
        at = 0
        for area in self.areas:
            assert area.offset == at and area.length > 0, f"areas leave a gap or overlap at {at}: {area}"
            assert area.length % self.extent == 0, f"{area} is not whole extents of {self.extent}"
            assert bool(area.owner) == (area.state not in (AreaState.META, *FREE)), f"{area} has a wrong owner"
            at = area.end

    def extend(self, size: int) -> None:
        """The datastore now has `size` bytes: tile the new whole extents, of unknown content. Never shrinks."""
        end = size // self.extent * self.extent
        if end > self.end:
            self.areas = _merged([*self.areas, Area(self.end, end - self.end, AreaState.DIRTY)])
        self.check()

    def take(self, length: int, owner: str, *, near: int | None = None, one_run: bool = False) -> list[tuple[int, int]]:
        """Take whole extents for at least `length` bytes in as few runs as possible; return (offset, length)s.

        `near` is where the owner's last run ends: what is free right there comes first. Raises NO_SPACE and
        takes nothing when there is not enough."""
        assert owner and length > 0, "an owner takes at least a byte"
        need = -(-length // self.extent) * self.extent
        if need > self.free:
            self._no_space(need)
        taken: list[tuple[int, int]] = []
        spans = self._spans()
        while need:
            span = self._choose(spans, need, near)
            got = min(span[1], need)
            if one_run and got < need:
                self._no_space(need)
            spans.remove(span)
            taken.append((span[0], got))
            near, need = span[0] + got, need - got
        for offset, got in taken:
            self._claim(offset, got, owner)
        self.check()
        return taken

    def _no_space(self, need: int) -> None:
        raise NvError(
            Code.NO_SPACE,
            f"{need} bytes are needed in whole extents, {self.free} are free"
            + (" but not in one piece" if need <= self.free else ""),
            "grow the datastore, delete a VVol, or name another datastore",
        )

    def _spans(self) -> list[tuple[int, int]]:
        """Free stretches, clean and dirty together."""
        spans: list[tuple[int, int]] = []
        for area in self.areas:
            if area.state not in FREE:
                continue
            if spans and sum(spans[-1]) == area.offset:
                spans[-1] = (spans[-1][0], spans[-1][1] + area.length)
            else:
                spans.append((area.offset, area.length))
        return spans

    def _choose(self, spans: list[tuple[int, int]], need: int, near: int | None) -> tuple[int, int]:
        """Right behind `near`; else the tightest span that fits, of equals one without scrubbing; else the largest."""
        for span in spans:
            if span[0] == near:
                return span
        fitting = [span for span in spans if span[1] >= need]
        if fitting:
            return min(fitting, key=lambda span: (self._dirty(span[0], need) > 0, span[1], span[0]))
        return max(spans, key=lambda span: (span[1], -span[0]))

    def _dirty(self, offset: int, length: int) -> int:
        end = offset + length
        return sum(
            min(area.end, end) - max(area.offset, offset)
            for area in self.areas
            if area.state is AreaState.DIRTY and area.offset < end and area.end > offset
        )

    def _claim(self, offset: int, length: int, owner: str) -> None:
        after = {AreaState.CLEAN: AreaState.RESERVED, AreaState.DIRTY: AreaState.SCRUBBING}
        out: list[Area] = []
        end = offset + length
        for area in self.areas:
            low, high = max(area.offset, offset), min(area.end, end)
            if low >= high:
                out.append(area)
                continue
            out.append(Area(area.offset, low - area.offset, area.state, area.owner))
            out.append(Area(low, high - low, after[area.state], owner))
            out.append(Area(high, area.end - high, area.state, area.owner))
        self.areas = _merged(area for area in out if area.length)

    def owned(self, owner: str, *states: AreaState) -> list[tuple[int, int]]:
        """(offset, length) of the owner's areas in these states."""
        return [(a.offset, a.length) for a in self.areas if a.owner == owner and a.state in states]

    def _move(self, owner: str, moves: dict[AreaState, AreaState]) -> None:
        def moved(area: Area) -> Area:
            if area.owner != owner or area.state not in moves:
                return area
            state = moves[area.state]
            return Area(area.offset, area.length, state, "" if state in FREE else owner)

        self.areas = _merged(moved(area) for area in self.areas)
        self.check()

    def scrubbed(self, owner: str) -> None:
        """Zeros are on stable storage over all that the owner had in `scrubbing`."""
        self._move(owner, {AreaState.SCRUBBING: AreaState.RESERVED})

    def commit(self, owner: str) -> None:
        """The owner's reserved extents become its own. Nothing may be left to scrub."""
        assert not self.owned(owner, AreaState.SCRUBBING), "extents are handed out only after they were scrubbed"
        self._move(owner, {AreaState.RESERVED: AreaState.ALLOCATED})

    def give_up(self, owner: str) -> None:
        """What the owner took but never committed is free again, and dirty: nobody says what was written."""
        self._move(owner, {AreaState.RESERVED: AreaState.DIRTY, AreaState.SCRUBBING: AreaState.DIRTY})

    def release(self, owner: str) -> None:
        """Every holder released the owner's extents: all it has waits to be scrubbed."""
        busy = (AreaState.ALLOCATED, AreaState.RESERVED, AreaState.SCRUBBING)
        self._move(owner, dict.fromkeys(busy, AreaState.FREEING))

    def freed(self, owner: str) -> None:
        """Zeros are on stable storage over all that the owner had in `freeing`: anybody may have them."""
        self._move(owner, {AreaState.FREEING: AreaState.CLEAN})


def adopt(areas: Iterable[Area], offset: int, length: int | None, size: int, owner: str) -> Area:
    """The area of an adoption in an object of `size` bytes. Raises INVALID outside it, CONFLICT on an overlap."""
    taken = length if length is not None else size - offset
    if taken <= 0 or offset < 0 or offset + taken > size:
        raise NvError(
            Code.INVALID,
            f"bytes {offset}..{offset + max(taken, 0)} to adopt are not inside the object's {size} bytes",
            "give an offset and a length that lie inside it",
        )
    new = Area(offset, taken, AreaState.ADOPTED, owner)
    for other in areas:
        if other.offset < new.end and new.offset < other.end:
            raise NvError(
                Code.CONFLICT,
                f"bytes {offset}..{new.end} overlap {other.offset}..{other.end}, adopted already",
                "adopt a part that nobody has, or delete the other VVol (its bytes stay)",
            )
    return new
