"""What a rebuild of the registry decides: what was laid down is found again, what cannot be decided is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdvvol.control.rebuild import EPOCH_STEP, Found, FoundLeg, decide, leg_of_file
from nbdvvol.datastores import format as disk
from nbdvvol.model.farm import DatastoreConfig, DatastoreKind, Farm
from nbdvvol.model.rebuild import LegWords, MapWords, Rebuilt, RebuiltVVol

MIB = 1 << 20
SIZE = 4 * MIB
META = disk.region_bytes(SIZE, MIB)
STORES = ("a", "b", "c", "d")
VVOL = UUID(int=77)
NAME = "vm1/root"


def store_uuid(name: str) -> UUID:
    return UUID(int=1000 + ord(name))


@dataclass(frozen=True)
class Laid:
    """A leg as it was laid down: its label, and whether the registry had it in sync."""

    id: int
    store: str
    epoch: int = 3
    generation: int = 5
    syncing: bool = False
    in_sync: bool = True


def farm_of(vms: tuple[str, ...] = ("vm1",)) -> Farm:
    stores = {name: {"kind": "file", "path": f"/x/{name}"} for name in STORES}
    return Farm.model_validate({"datastores": stores, "vms": {vm: {} for vm in vms}})


def words(legs: list[Laid], name: str = "root", mirror: bool = True) -> bytes:
    named = [LegWords(id=leg.id, datastore=leg.store, uuid=str(store_uuid(leg.store))) for leg in legs]
    return MapWords(vm="vm1", name=name, mirror=mirror, next_leg=9, legs=named).model_dump_json().encode()


def metadata(leg: Laid, legs: list[Laid], vvol: UUID = VVOL, at: int = 8 * MIB, version: int = 4) -> FoundLeg:
    """A leg's metadata at `at`, its bytes behind it."""
    return FoundLeg(
        vvol,
        leg.id,
        slot=int(vvol) % 1000,
        meta_offset=at,
        meta_length=META,
        label=disk.Label(vvol, leg.id, leg.epoch, leg.generation, SIZE, 7, leg.syncing),
        map=disk.MapCopy(vvol, leg.id, version, SIZE, (disk.MapRun(0, SIZE, at + META),), words(legs)),
    )


def found(name: str, *legs: FoundLeg, **more: object) -> Found:
    header = disk.plan_header(store_uuid(name), UUID(int=5), MIB, 64 * MIB)
    config = DatastoreConfig(kind=DatastoreKind.FILE, path=f"/x/{name}")
    return replace(Found(name, config, "formatted", size=64 * MIB, header=header, legs=legs), **more)  # type: ignore[arg-type]


def stores_of(legs: list[Laid], change: Callable[[FoundLeg], FoundLeg] = lambda leg: leg) -> dict[str, Found]:
    """Every datastore, with one mirror on some of them."""
    here = {leg.store: change(metadata(leg, legs)) for leg in legs}
    return {name: found(name, *([here[name]] if name in here else [])) for name in STORES}


def only(result: Rebuilt) -> RebuiltVVol:
    assert not result.blockers, result.blockers
    (vvol,) = result.vvols
    return vvol


def blocked(result: Rebuilt) -> set[str]:
    assert all(one.message and one.action for one in result.blockers)
    return {one.code for one in result.blockers}


TWO = [Laid(1, "a"), Laid(2, "b")]


@st.composite
def mirrors(draw: st.DrawFn) -> list[Laid]:
    """One to four legs as a filter may have left them: those in sync have the newest label."""
    count = draw(st.integers(1, 4))
    epoch, generation = draw(st.integers(1, 5)), draw(st.integers(2, 6))
    legs = []
    for number, store in enumerate(draw(st.permutations(STORES))[:count], 1):
        state = "in-sync" if not legs else draw(st.sampled_from(["in-sync", "stale", "copied to"]))
        leg = Laid(number, store, epoch, generation)
        if state == "stale":
            older = draw(st.integers(0, epoch)), draw(st.integers(1, generation))
            syncing = older == (epoch, generation) or draw(st.booleans())
            leg = replace(leg, epoch=older[0], generation=older[1], syncing=syncing, in_sync=False)
        elif state == "copied to":
            leg = replace(leg, generation=generation + draw(st.integers(0, 1)), syncing=True, in_sync=False)
        legs.append(leg)
    return draw(st.permutations(legs))


@given(legs=mirrors())
@settings(max_examples=80, deadline=None)
def test_what_was_laid_down_is_found_again(legs: list[Laid]) -> None:
    legs = sorted(legs, key=lambda leg: leg.id)
    vvol = only(decide(stores_of(legs).values(), farm_of()))
    assert (vvol.uuid, vvol.full_name, vvol.size, vvol.mirror, vvol.map_version) == (str(VVOL), NAME, SIZE, True, 4)
    assert [(leg.id, leg.datastore, leg.state == "in-sync", leg.life) for leg in vvol.legs] == [
        (leg.id, leg.store, leg.in_sync, "live") for leg in legs
    ]
    assert vvol.epoch >= max(leg.epoch for leg in legs) + EPOCH_STEP, "old filters are fenced"
    assert vvol.generation > max(leg.generation for leg in legs), "no label is newer than the registry"
    for leg, laid in zip(vvol.legs, legs, strict=True):
        assert (leg.stamp.epoch, leg.stamp.generation) == (laid.epoch, laid.generation)
        assert leg.runs == [(0, SIZE, 8 * MIB + META, 0)] and leg.meta_length == META


@given(legs=mirrors().filter(lambda legs: len(legs) > 1), data=st.data())
@settings(max_examples=80, deadline=None)
def test_without_a_leg_that_may_be_newer_it_is_refused(legs: list[Laid], data: st.DataObject) -> None:
    """Nobody can tell a leg that is behind from one that is ahead by looking at the others."""
    gone = data.draw(st.sampled_from(legs))
    stores = stores_of(legs)
    stores[gone.store] = found(gone.store)
    result = decide(stores.values(), farm_of())
    (problem,) = [one for one in result.blockers if one.code == "LEG_MISSING"]
    assert f"leg {gone.id} on datastore {gone.store}" in problem.message and NAME in problem.subject
    assert f"--without {VVOL}:{gone.id}" in problem.action and "may be lost" in problem.action
    rest = [leg for leg in legs if leg is not gone]
    for consent in (f"{VVOL}:{gone.id}", gone.store):
        result = decide(stores.values(), farm_of(), [consent])
        whole = [leg for leg in rest if not leg.syncing]
        if not whole:
            assert blocked(result) == {"NO_LEG_IN_SYNC"}
            continue
        newest = max((leg.epoch, leg.generation) for leg in whole)
        vvol = only(result)
        best = {leg.id for leg in whole if (leg.epoch, leg.generation) == newest}
        assert {leg.id for leg in vvol.legs if leg.state == "in-sync"} == best
        assert vvol.map_version == 5, "the legs are others than the map copies say"
        assert "LEG_GIVEN_UP" in {note.code for note in result.notes}


def test_a_promoted_leg_of_an_earlier_epoch_is_stale() -> None:
    """Its label was whole when the filter died, but the registry never knew: the next epoch went on without it."""
    vvol = only(decide(stores_of([Laid(1, "a", epoch=4), Laid(2, "b", epoch=3)]).values(), farm_of()))
    assert [leg.state for leg in vvol.legs] == ["in-sync", "stale"]


def test_epochs_grow_from_rebuild_to_rebuild() -> None:
    """A single copy's label is not written anew at each attach: it does not tell how far a first rebuild went."""
    vvol = only(decide(stores_of(TWO).values(), farm_of(), floor=2 * EPOCH_STEP))
    assert vvol.epoch == 2 * EPOCH_STEP


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("LEG_MISSING", lambda leg: replace(leg, label=None, error="no valid label") if leg.id == 2 else leg),
        ("MAP_LOST", lambda leg: replace(leg, map=None, error="no valid map copy")),
        ("WORDS_LOST", lambda leg: replace(leg, map=replace(leg.map, words=b"{"))),
        ("SIZE_UNKNOWN", lambda leg: replace(leg, label=replace(leg.label, size=2 * SIZE))),
        ("NO_LEG_IN_SYNC", lambda leg: replace(leg, label=replace(leg.label, syncing=True))),
        ("MAPS_DISAGREE", lambda leg: replace(leg, map=replace(leg.map, size=leg.map.size + leg.id * 4096))),
        ("MAPS_DISAGREE", lambda leg: replace(leg, map=replace(leg.map, words=words(TWO[: leg.id])))),
        ("BEYOND_END", lambda leg: replace(leg, meta_offset=64 * MIB)),
        ("CLAIMED_TWICE", lambda leg: replace(leg, meta_offset=8 * MIB + META)),
        ("MAP_LOST", lambda leg: replace(leg, map=replace(leg.map, runs=(disk.MapRun(0, MIB, 9 * MIB),)))),
    ],
)
def test_what_cannot_be_decided_is_refused(code: str, change: Callable[[FoundLeg], FoundLeg]) -> None:
    assert code in blocked(decide(stores_of(TWO, change).values(), farm_of()))


@pytest.mark.parametrize(
    ("code", "store"),
    [
        ("DATASTORE_UNREADABLE", found("c", found="unreadable", error="it is missing", header=None)),
        ("DATASTORE_DAMAGED", found("c", found="damaged", error="both header copies are damaged", header=None)),
        ("DATASTORE_SHRANK", found("c", size=63 * MIB)),
        ("DIRECTORY_DAMAGED", found("c", damaged_slots=(3,))),
        ("DATASTORE_TWICE", found("c", header=found("a").header)),
        ("LEG_TWICE", found("c", metadata(Laid(1, "c"), TWO))),
        ("NAME_TWICE", found("c", metadata(Laid(1, "c"), [Laid(1, "c")], UUID(int=78)))),
    ],
)
def test_a_datastore_that_raises_doubts_is_refused_or_left_out(code: str, store: Found) -> None:
    stores = stores_of(TWO) | {"c": store}
    assert code in blocked(decide(stores.values(), farm_of()))
    result = decide(stores.values(), farm_of(), ["c"])
    assert only(result).legs[0].datastore == "a"
    assert [one.found for one in result.datastores] == ["formatted", "formatted", "left out", "formatted"]


def test_a_leg_on_another_datastore_than_its_map_says_is_refused() -> None:
    stores = stores_of(TWO)
    stores["c"], stores["b"] = found("c", *stores["b"].legs), found("b")
    assert blocked(decide(stores.values(), farm_of())) == {"LEG_ELSEWHERE"}


def test_a_datastore_that_would_be_formatted_over_is_not_left_out() -> None:
    config = DatastoreConfig(kind=DatastoreKind.FILE, path="/x/c", format="force")
    stores = stores_of(TWO) | {"c": found("c", config=config)}
    assert blocked(decide(stores.values(), farm_of(), ["c"])) == {"FORCE"}


def test_a_word_that_gives_nothing_up_is_refused() -> None:
    assert blocked(decide(stores_of(TWO).values(), farm_of(), ["nowhere"])) == {"NOT_GIVEN_UP"}


def test_a_vm_that_the_farm_file_lacks_is_named() -> None:
    assert blocked(decide(stores_of(TWO).values(), farm_of(("vm2",)))) == {"VM_UNDECLARED"}


def test_the_newest_map_copy_says_which_legs_there_are() -> None:
    """Leg 3 was removed; the copy on leg 2, which was away then, does not know it."""
    three = [*TWO, Laid(3, "c")]
    old = metadata(Laid(2, "b", generation=4), three, version=3)
    stores = stores_of(TWO) | {
        "b": found("b", old),
        "c": found("c", metadata(Laid(3, "c", generation=4), three, version=3)),
    }
    vvol = only(decide(stores.values(), farm_of()))
    assert [(leg.id, leg.life, leg.state) for leg in vvol.legs] == [
        (1, "live", "in-sync"),
        (2, "live", "stale"),
        (3, "leaving", "stale"),
    ]
    assert vvol.map_version == 4


def test_a_leg_that_came_after_the_newest_map_copy_counts() -> None:
    """It was added and copied to; then every other leg was lost before the map copies named it."""
    later = metadata(Laid(3, "c", generation=9), TWO, version=3)
    stores = stores_of(TWO) | {"c": found("c", later)}
    vvol = only(decide(stores.values(), farm_of()))
    assert [(leg.id, leg.state) for leg in vvol.legs] == [(1, "stale"), (2, "stale"), (3, "in-sync")]
    new = metadata(Laid(3, "c", epoch=0, generation=0, syncing=True), TWO)
    vvol = only(decide((stores_of(TWO) | {"c": found("c", new)}).values(), farm_of()))
    assert [(leg.id, leg.life) for leg in vvol.legs] == [(1, "live"), (2, "live"), (3, "leaving")], (
        "it was in the making"
    )


def test_a_vvol_that_is_given_up_is_deleted_not_forgotten() -> None:
    lost = stores_of(TWO, lambda leg: replace(leg, map=None, error="no valid map copy"))
    every = [f"{VVOL}:1", f"{VVOL}:2"]
    vvol = only(decide(lost.values(), farm_of(), every))
    assert (vvol.state, [leg.life for leg in vvol.legs]) == ("deleting", ["leaving", "leaving"])


def test_one_leg_given_up_leaves_the_vvol() -> None:
    result = decide(stores_of(TWO).values(), farm_of(), [f"{VVOL}:2"])
    assert [(leg.id, leg.life) for leg in only(result).legs] == [(1, "live"), (2, "leaving")]


def test_a_single_copy_needs_no_label() -> None:
    one = replace(
        metadata(Laid(0, "a"), [Laid(0, "a")]),
        label=None,
        map=disk.MapCopy(VVOL, 0, 2, SIZE, (disk.MapRun(0, SIZE, 12 * MIB),), words([Laid(0, "a")], mirror=False)),
    )
    vvol = only(decide([found("a", one)], farm_of()))
    assert (vvol.mirror, vvol.legs[0].state, vvol.epoch) == (False, "in-sync", EPOCH_STEP)


def test_files_of_a_directory_are_what_their_names_say() -> None:
    assert leg_of_file(f"vm1-root-{VVOL}.img") == (VVOL, 0)
    assert leg_of_file(f"vm1-root-{VVOL}.leg2.img") == (VVOL, 2)
    assert [leg_of_file(name) for name in ("x.img", f"{VVOL}.img", f"vm1-{VVOL}.leg0.img", f".vm1-{VVOL}.img.new")] == [
        None
    ] * 4


def test_a_single_copy_in_a_directory_comes_by_its_name() -> None:
    farm = Farm.model_validate(
        {
            "datastores": {"d": {"kind": "dir", "path": "/x/d"}},
            "vms": {"vm1": {"vvols": {"root": {"size": "4MiB", "type": "swap"}}}},
        }
    )
    files = ((f"vm1-root-{VVOL}.img", 6 * MIB), (f"vm1-other-{UUID(int=5)}.img", MIB))
    store = Found("d", farm.datastores["d"], "directory", files=files)
    result = decide([store], farm)
    vvol = only(result)
    assert (vvol.uuid, vvol.full_name, vvol.size, vvol.type) == (str(VVOL), NAME, 6 * MIB, "swap")
    assert [note.code for note in result.notes] == ["FILE_LEFT_ALONE"]


def test_what_the_farm_file_declares_and_nobody_has_is_told() -> None:
    farm = farm_of().model_dump(mode="json", by_alias=True)
    farm["vms"]["vm1"]["vvols"] = {
        "new": {"size": MIB, "datastore": "a"},
        "old": {"adopt": {"datastore": "d"}},
    }
    result = decide(stores_of(TWO).values(), Farm.model_validate(farm))
    assert {(note.code, note.subject) for note in result.notes} == {
        ("NOT_FOUND", "vm1/new"),
        ("ADOPTED_ANEW", "vm1/old"),
    }
