"""The allocator: no byte has two owners, none that held anything is handed out unscrubbed or unreleased."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from nbdvvol.control.allocator import FREE, Area, AreaState, Space, adopt
from nbdvvol.model.errors import Code, NvError

EXTENT = 64
HEAD = 2 * EXTENT


class Extents(RuleBasedStateMachine):
    """Checks the allocator against a byte-wise model: who owns each extent, and who wrote to it last."""

    owners = Bundle("owners")
    leaving = Bundle("leaving")

    def __init__(self) -> None:
        super().__init__()
        self.space = Space.format(EXTENT, 40 * EXTENT + 17, HEAD)
        self.owner: dict[int, str] = {}
        self.content: dict[int, str] = dict.fromkeys(range(HEAD // EXTENT, 40), "foreign")
        """What lies in an extent: a writer's name, or nothing once it was scrubbed."""
        self.visible: dict[str, set[int]] = {}
        self.count = 0

    def _extents(self, pieces: list[tuple[int, int]]) -> set[int]:
        return {at // EXTENT for offset, length in pieces for at in range(offset, offset + length, EXTENT)}

    @rule(target=owners, extents=st.integers(1, 15), odd=st.integers(0, EXTENT - 1), one_run=st.booleans())
    def create(self, extents: int, odd: int, one_run: bool) -> object:
        self.count += 1
        name = f"v{self.count}"
        before = list(self.space.areas)
        try:
            pieces = self.space.take(extents * EXTENT - odd, name, one_run=one_run)
        except NvError:
            assert self.space.areas == before, "a refusal takes nothing"
            assert one_run or self.space.free < extents * EXTENT
            return multiple()
        assert not one_run or len(pieces) == 1
        taken = self._extents(pieces)
        assert len(taken) == extents
        assert not taken & set(self.owner), "a byte was handed out twice"
        assert min(taken) >= HEAD // EXTENT and max(taken) < 40, "only whole extents behind the head"
        self.owner |= dict.fromkeys(taken, name)
        return name

    @rule(name=owners)
    def scrub_and_commit(self, name: str) -> None:
        for extent in self._extents(self.space.owned(name, AreaState.SCRUBBING)):
            self.content.pop(extent, None)
        self.space.scrubbed(name)
        self.space.commit(name)
        mine = self._extents(self.space.owned(name, AreaState.ALLOCATED))
        fresh = mine - self.visible.get(name, set())
        assert not fresh & set(self.content), "an unscrubbed extent was handed out"
        self.visible.setdefault(name, set()).update(mine)
        self.content |= dict.fromkeys(mine, name)

    @rule(name=owners, extents=st.integers(1, 6))
    def grow(self, name: str, extents: int) -> None:
        mine = self.space.owned(name, AreaState.ALLOCATED)
        near = sum(mine[-1]) if mine else None
        try:
            pieces = self.space.take(extents * EXTENT, name, near=near)
        except NvError:
            return
        taken = self._extents(pieces)
        assert not taken & set(self.owner)
        self.owner |= dict.fromkeys(taken, name)

    @rule(name=owners)
    def give_up(self, name: str) -> None:
        kept = self._extents(self.space.owned(name, AreaState.ALLOCATED, AreaState.FREEING))
        self.space.give_up(name)
        self.owner = {extent: who for extent, who in self.owner.items() if who != name or extent in kept}

    @rule(target=leaving, name=consumes(owners))
    def release(self, name: str) -> str:
        self.space.release(name)
        assert not self.space.owned(name, AreaState.ALLOCATED, AreaState.RESERVED, AreaState.SCRUBBING)
        return name

    @rule(name=consumes(leaving))
    def scrub_freed(self, name: str) -> None:
        for extent in self._extents(self.space.owned(name, AreaState.FREEING)):
            self.content.pop(extent, None)
            self.owner.pop(extent, None)
        self.space.freed(name)

    @rule(extents=st.integers(0, 8))
    def nothing_shrinks(self, extents: int) -> None:
        before = list(self.space.areas)
        self.space.extend(extents * EXTENT)
        assert self.space.areas == before

    @invariant()
    def tiles(self) -> None:
        self.space.check()
        assert self.space.end == 40 * EXTENT, "the tail shorter than an extent is never used"
        free = self._extents([(a.offset, a.length) for a in self.space.areas if a.state in FREE])
        assert not free & set(self.owner), "owned extents are not free"
        clean = self._extents([(a.offset, a.length) for a in self.space.areas if a.state is AreaState.CLEAN])
        assert not clean & set(self.content), "what holds bytes is not clean"


Extents.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestExtents = Extents.TestCase


def test_growing_in_place_and_few_runs() -> None:
    space = Space.format(EXTENT, 20 * EXTENT, HEAD)
    assert space.take(4 * EXTENT, "a") == [(HEAD, 4 * EXTENT)]
    space.scrubbed("a")
    space.commit("a")
    assert space.take(2 * EXTENT, "a", near=HEAD + 4 * EXTENT) == [(HEAD + 4 * EXTENT, 2 * EXTENT)]
    assert space.take(1, "b") == [(8 * EXTENT, EXTENT)]


def test_the_tightest_hole_that_fits_is_taken() -> None:
    areas = [
        Area(0, EXTENT, AreaState.META),
        Area(EXTENT, 6 * EXTENT, AreaState.CLEAN),
        Area(7 * EXTENT, EXTENT, AreaState.ALLOCATED, "x"),
        Area(8 * EXTENT, 2 * EXTENT, AreaState.CLEAN),
        Area(10 * EXTENT, EXTENT, AreaState.ALLOCATED, "x"),
    ]
    assert Space(EXTENT, areas).take(2 * EXTENT, "y") == [(8 * EXTENT, 2 * EXTENT)]
    assert Space(EXTENT, areas).take(7 * EXTENT, "y") == [(EXTENT, 6 * EXTENT), (8 * EXTENT, EXTENT)]
    with pytest.raises(NvError, match="not in one piece"):
        Space(EXTENT, areas).take(7 * EXTENT, "y", one_run=True)


def test_committing_what_was_not_scrubbed_is_a_bug() -> None:
    space = Space.format(EXTENT, 20 * EXTENT, HEAD)
    space.take(EXTENT, "a")
    with pytest.raises(AssertionError, match="scrubbed"):
        space.commit("a")


def test_areas_that_overlap_are_refused() -> None:
    with pytest.raises(AssertionError, match="overlap"):
        Space(EXTENT, [Area(0, 2 * EXTENT, AreaState.META), Area(EXTENT, EXTENT, AreaState.CLEAN)])


@pytest.mark.parametrize(
    ("offset", "length", "code"),
    [
        (0, None, Code.CONFLICT),
        (10, 10, None),
        (0, 11, Code.CONFLICT),
        (29, 1, Code.CONFLICT),
        (30, None, None),
        (30, 70, None),
        (30, 71, Code.INVALID),
        (100, None, Code.INVALID),
    ],
)
def test_adoption_overlaps_nothing(offset: int, length: int | None, code: Code | None) -> None:
    have = [Area(5, 5, AreaState.ADOPTED, "a"), Area(20, 10, AreaState.ADOPTED, "b")]
    if code is None:
        area = adopt(have, offset, length, 100, "c")
        assert (area.offset, area.length) == (offset, length or 100 - offset)
    else:
        with pytest.raises(NvError) as refused:
            adopt(have, offset, length, 100, "c")
        assert refused.value.code is code
