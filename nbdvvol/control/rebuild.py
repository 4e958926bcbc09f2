"""A registry from what the datastores say: which VVols there are, which of their legs hold all that was acknowledged.

Pure: `decide` gets what was found (`Found`, read by nbdvvol/survey.py) and the farm file, and gives what the registry
is to hold, or what stands in the way. It rests on docs/mirror.md:

- The newest map copy of a VVol says what it is called and which legs it has. A leg that it names and that was not found
  may be newer than all that were: then nothing is decided without the operator's word.
- Before a write is acknowledged that a leg has missed, every survivor's label was made newer than that leg's. So the
  legs with the newest stamp among labels that say "in sync" have everything; they differ from each other at most where
  an intent is set, which the next attach reconciles. Every other leg is stale, and is copied to as a whole.
- Directory entries, not labels, say where a leg lies: no VM can write one. In a `dir` the file's name says whose it is;
  a mirror's leg has its metadata at the head of its own file, a single copy's file has none.

What is decided raises every epoch far above what was found (`EPOCH_STEP`, `floor`): a host that serves by the old
registry is outdated, whatever it was told that no label tells of.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from uuid import UUID

from pydantic import ValidationError

from nbdvvol.control.lifecycle import file_name
from nbdvvol.control.registry.rebuilt import hosts_of, logs_writes, pieces
from nbdvvol.control.registry.space import FIRST_LEG
from nbdvvol.datastores import format as disk
from nbdvvol.model.farm import DatastoreConfig, DatastoreKind, Farm, VVolConfig
from nbdvvol.model.mirror import Stamp
from nbdvvol.model.rebuild import FoundKind, MapWords, Rebuilt, RebuiltLeg, RebuiltStore, RebuiltVVol
from nbdvvol.model.resources import Problem
from nbdvvol.model.units import format_size

EPOCH_STEP = 1 << 20
"""More binds than can have happened without a trace in a label."""
_FILE = re.compile(r".*-([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(?:\.leg([1-9][0-9]*))?\.img")


@dataclass(frozen=True, slots=True)
class FoundLeg:
    """A leg's metadata, as a directory entry or a file's name leads to it."""

    vvol: UUID
    id: int
    object: str = ""
    object_size: int = 0
    slot: int | None = None
    meta_offset: int = 0
    meta_length: int = 0
    label: disk.Label | None = None
    map: disk.MapCopy | None = None
    error: str = ""
    """What of it is damaged."""


@dataclass(frozen=True, slots=True)
class Found:
    """What was found on one datastore."""

    name: str
    config: DatastoreConfig
    found: FoundKind
    error: str = ""
    size: int = 0
    direct_ok: bool | None = None
    header: disk.Header | None = None
    legs: tuple[FoundLeg, ...] = ()
    damaged_slots: tuple[int, ...] = ()
    files: tuple[tuple[str, int], ...] = ()
    """kind dir: single copies (`leg_of_file` says 0), each with its size."""


@dataclass(frozen=True, slots=True)
class _Leg:
    store: str
    leg: FoundLeg
    given_up: bool
    """By the operator."""

    @property
    def key(self) -> tuple[int, int]:
        """Its stamp, to be compared."""
        label = self.leg.label
        return (label.epoch, label.generation) if label is not None else (-1, -1)

    @property
    def in_sync(self) -> bool:
        """Whether its label says so."""
        return self.leg.label is not None and not self.leg.label.syncing

    def words(self) -> str:
        """For people."""
        where = f"leg {self.leg.id} on datastore {self.store}"
        label = self.leg.label
        if label is None:
            return where
        return f"{where} (epoch {label.epoch}, generation {label.generation}{', not in sync' if label.syncing else ''})"


def _option(vvol: UUID | str, leg: int) -> str:
    """How the operator names a leg to give up."""
    return f"{vvol}:{leg}"


def leg_of_file(name: str) -> tuple[UUID, int] | None:
    """Whose file of a `dir` this is, by its name; None: nobody's. Leg 0 is a single copy and has no metadata."""
    match = _FILE.fullmatch(name)
    return (UUID(match[1]), int(match[2] or 0)) if match is not None else None


@dataclass(slots=True)
class _Work:
    farm: Farm
    without: frozenset[str]
    floor: int
    result: Rebuilt = field(default_factory=Rebuilt)
    used: set[str] = field(default_factory=set)
    """What of `without` meant something."""

    def block(self, code: str, subject: str, message: str, action: str) -> None:
        self.result.blockers.append(Problem(code=code, subject=subject, message=message, action=action))

    def note(self, code: str, subject: str, message: str, action: str = "") -> None:
        self.result.notes.append(Problem(code=code, subject=subject, message=message, action=action))

    def epoch(self, labels: Iterable[disk.Label]) -> int:
        """Above every epoch that there was."""
        return max(max((label.epoch for label in labels), default=0) + EPOCH_STEP, self.floor)

    def gives_up(self, datastore: str, vvol: UUID, leg: int) -> bool:
        """Whether the operator goes on without a leg."""
        names = {datastore, _option(vvol, leg)} & self.without
        self.used |= names
        return bool(names)


def decide(stores: Iterable[Found], farm: Farm, without: Iterable[str] = (), floor: int = 0) -> Rebuilt:
    """What a registry rebuilt from these datastores holds. `without`: datastores (NAME) and legs (UUID:LEG) to give up.
    `floor`: the least that an epoch may be; one that grows from rebuild to rebuild, because a single copy's label does
    not say which epochs there were.

    Where `blockers` are left in the answer, it must not be written."""
    work = _Work(farm, frozenset(without), floor)
    found = sorted(stores, key=lambda store: store.name)
    for store in found:
        _look_at_store(work, store)
    _same_store_twice(work, found)
    legs: defaultdict[UUID, list[_Leg]] = defaultdict(list)
    for store in found:
        if store.name not in work.without:
            for leg in store.legs:
                legs[leg.vvol].append(_Leg(store.name, leg, work.gives_up("", leg.vvol, leg.id)))
    vvols = [_Decision(work, uuid, legs[uuid]).vvol() for uuid in sorted(legs)]
    work.result.vvols += [vvol for vvol in vvols if vvol is not None]
    _single_files(work, found)
    _same_name_twice(work)
    for store in found:
        _overlaps(work, store)
    _undeclared(work)
    _logged(work)
    work.result.vvols.sort(key=lambda vvol: (vvol.vm, vvol.name))
    for name in sorted(work.without - work.used):
        work.block("NOT_GIVEN_UP", name, "nothing is given up by it", "say the name of a datastore, or UUID:LEG")
    return work.result


# ---- datastores ----


def _look_at_store(work: _Work, store: Found) -> None:
    left_out = store.name in work.without
    header = store.header
    said = RebuiltStore(name=store.name, found=store.found, size=store.size, direct_ok=store.direct_ok)
    if left_out:
        work.used.add(store.name)
        said = RebuiltStore(name=store.name, found="left out")
        if store.config.format == "force":
            text = "it says `format: force`: it would be formatted over as soon as it is there again"
            work.block("FORCE", store.name, text, "say `format: blank` in the farm file first")
    elif header is not None:
        known = {"uuid": str(header.uuid), "header": disk.encode_header(header).hex()}
        room = {"extent_size": header.extent_size, "data_offset": header.data_offset, "legs": len(store.legs)}
        said = said.model_copy(update=known | room)
        _look_at_header(work, store, header)
    elif store.found in ("unreadable", "damaged"):
        text = f"it cannot be looked at, so that legs on it may be newer than all others: {store.error}"
        work.block(f"DATASTORE_{store.found.upper()}", store.name, text, _give_up(store.name))
    elif store.found == "something else":
        text = "what lies there is not nbdvvol's: nothing is taken from it"
        work.note("NOT_OURS", store.name, text, "bytes that were adopted are adopted anew by `apply`")
    work.result.datastores.append(said)


def _look_at_header(work: _Work, store: Found, header: disk.Header) -> None:
    if store.size < header.size:
        text = f"it shrank: {store.size} bytes of {header.size} are there"
        work.block("DATASTORE_SHRANK", store.name, text, "restore its size")
    if header.extent_size != store.config.extent_size:
        sizes = f"{format_size(header.extent_size)}, not {format_size(store.config.extent_size)} as the farm file says"
        work.block("EXTENT_SIZE", store.name, f"its extents have {sizes}", "correct extent_size in the farm file")
    if store.damaged_slots:
        slots = ", ".join(map(str, store.damaged_slots))
        text = f"its directory is damaged in slot {slots}: a leg that is named there may be newer than all others"
        work.block("DIRECTORY_DAMAGED", store.name, text, _give_up(store.name))


def _give_up(name: str) -> str:
    return (
        f"bring it back; if it is gone for good: --without {name} (VVols that lie there alone are given up, and of "
        "mirrors what was written after the other legs were left)"
    )


def _same_store_twice(work: _Work, found: list[Found]) -> None:
    seen: dict[UUID, str] = {}
    for store in found:
        if store.header is None or store.name in work.without:
            continue
        other = seen.setdefault(store.header.uuid, store.name)
        if other != store.name:
            text = f"datastores {other} and {store.name} are the same one, {store.header.uuid}: one is a copy"
            action = "take the copy out of the farm file, or --without it; which one is newer cannot be told"
            work.block("DATASTORE_TWICE", store.name, text, action)


# ---- one VVol ----


class _Decision:
    """What becomes of one VVol; `vvol` gives None when it cannot be had (the work's blockers say why)."""

    def __init__(self, work: _Work, uuid: UUID, legs: list[_Leg]) -> None:
        self.work = work
        self.uuid = uuid
        self.gone = [one for one in legs if one.given_up]
        self.legs = sorted((one for one in legs if not one.given_up), key=lambda one: one.leg.id)
        self.by_id = {one.leg.id: one for one in self.legs}
        self.subject = str(uuid)

    def vvol(self) -> RebuiltVVol | None:
        """Decide."""
        if not self.legs:
            return self._give_up()
        if self._leg_twice():
            return None
        newest = max((one.leg.map.version for one in self.legs if one.leg.map is not None), default=None)
        if newest is None:
            where = "; ".join(f"{one.words()}: {one.leg.error}" for one in self.legs)
            self._block("MAP_LOST", f"no leg of it has a map copy: {where}", self._leave_out())
            return None
        tops = [one for one in self.legs if one.leg.map is not None and one.leg.map.version == newest]
        words = self._words(tops, newest)
        if words is None:
            return None
        self.subject = f"{words.vm}/{words.name} ({self.uuid})"
        (size,) = {one.leg.map.size for one in tops if one.leg.map is not None}
        members = self._members(words, size)
        if members is None:
            return None
        return self._make(words, members, newest, size)

    def _block(self, code: str, message: str, action: str) -> None:
        self.work.block(code, self.subject, message, action)

    def _leave_out(self) -> str:
        every = " ".join(f"--without {_option(self.uuid, one.leg.id)}" for one in self.legs)
        return f"bring back the datastore of another leg; to give the VVol up, with all its bytes: {every}"

    def _give_up(self) -> RebuiltVVol | None:
        """It is deleted, as the operator said: not forgotten, because a host may still write where it lies."""
        words = next((words for one in self.gone if (words := words_of(one.leg)) is not None), None)
        vms = self.work.farm.vms
        vm = words.vm if words is not None and words.vm in vms else next(iter(vms), None)
        if vm is None:
            self._block("VM_UNDECLARED", "the farm file declares no VM, not even for what is to be deleted", "add one")
            return None
        was = f"{words.vm}/{words.name}" if words is not None else "its name is not known"
        self.work.note("VVOL_GIVEN_UP", self.subject, f"given up ({was}): it is deleted, and its space scrubbed")
        return RebuiltVVol(
            uuid=str(self.uuid),
            vm=vm,
            name=f"given-up-{str(self.uuid)[:8]}",
            state="deleting",
            size=max((one.leg.map.size for one in self.gone if one.leg.map is not None), default=0),
            epoch=self.work.epoch(one.leg.label for one in self.gone if one.leg.label is not None),
            generation=1,
            map_version=1,
            legs=[self._leaving(one, "given up") for one in self.gone],
        )

    def _leg_twice(self) -> bool:
        seen: dict[int, _Leg] = {}
        for one in self.legs:
            other = seen.setdefault(one.leg.id, one)
            if other is not one:
                text = f"{other.words()} and {one.words()} are the same leg: one is a copy"
                action = "take the copy's datastore out of the farm file, or --without it"
                self._block("LEG_TWICE", text, action)
                return True
        return False

    def _words(self, tops: list[_Leg], version: int) -> MapWords | None:
        """What the newest map copies say, if they agree."""
        said: list[tuple[_Leg, MapWords]] = []
        for one in tops:
            words = words_of(one.leg)
            if words is not None:
                said.append((one, words))
        if not said:
            text = f"the words of every map copy of version {version} are damaged: its name and legs are not known"
            self._block("WORDS_LOST", text, self._leave_out())
            return None
        sizes = {one.leg.map.size for one in tops if one.leg.map is not None}
        first = said[0][1]
        for one, words in said[1:]:
            if (words.vm, words.name, words.legs, words.mirror) != (first.vm, first.name, first.legs, first.mirror):
                text = f"map copies of version {version} disagree: {said[0][0].words()} and {one.words()}"
                self._block("MAPS_DISAGREE", text, "restore the registry; these copies cannot both be right")
                return None
        if len(sizes) > 1:
            text = f"map copies of version {version} disagree about its size: {', '.join(map(str, sorted(sizes)))}"
            self._block("MAPS_DISAGREE", text, "restore the registry; these copies cannot both be right")
            return None
        return first.model_copy(update={"next_leg": max(words.next_leg for _, words in said)})

    def _members(self, words: MapWords, size: int) -> list[_Leg] | None:
        """The legs that it has, all of which were found, or given up by the operator."""
        good = True
        members: list[_Leg] = []
        for named in words.legs:
            one = self.by_id.get(named.id)
            if one is None or (words.mirror and one.leg.label is None):
                good &= self._missing(one, named.id, named.datastore, named.uuid)
            elif (found := self._uuid_of(one.store)) != named.uuid:
                text = f"{one.words()} should lie on datastore {named.uuid or 'of kind dir'}, not on {found or 'a dir'}"
                self._block("LEG_ELSEWHERE", text, "take the copy's datastore out of the farm file")
                good = False
            else:
                members.append(one)
        named_ids = {named.id for named in words.legs}
        members += [one for one in self.legs if one.leg.id not in named_ids and self._came_later(one, named_ids)]
        for one in members:
            if one.leg.label is not None and one.leg.label.size > size:
                text = f"{one.words()} was made for {one.leg.label.size} bytes; the newest map copy describes {size}"
                self._block(
                    "SIZE_UNKNOWN", text, "restore the registry: where its newer bytes lie is written nowhere else"
                )
                good = False
        if good and not members:
            self._block("NO_LEG", "no leg of it is left", self._leave_out())
            return None
        return members if good else None

    def _uuid_of(self, store: str) -> str:
        return next(one.uuid for one in self.work.result.datastores if one.name == store)

    def _came_later(self, one: _Leg, named: set[int]) -> bool:
        """Whether a leg that the newest map copy does not name was added after that was written, and is in use."""
        own = words_of(one.leg)
        says_so = own is not None and one.leg.id in [leg.id for leg in own.legs]
        return not says_so and one.in_sync and one.key > (0, 0) and one.leg.id > max(named, default=0)

    def _missing(self, one: _Leg | None, leg: int, datastore: str, uuid: str) -> bool:
        """A leg that may be newer is not there: whether the operator goes on without it."""
        best = max((other for other in self.legs if other.in_sync), key=lambda other: other.key, default=None)
        newest = f"the newest that was found is {best.words()}" if best is not None else "no leg in sync was found"
        what = f"leg {leg} on datastore {datastore}{f' ({uuid})' if uuid else ''}"
        state = "was not found" if one is None else f"is damaged: {one.leg.error}"
        if self.work.gives_up(datastore, self.uuid, leg):
            text = f"{what} {state} and is given up: what it alone had is lost; {newest}"
            self.work.note("LEG_GIVEN_UP", self.subject, text, "compare with a backup what its VM had written last")
            return True
        after = f"after {best.words()} was left" if best is not None else "to it"
        self._block(
            "LEG_MISSING",
            f"{what} {state} and may be newer; {newest}",
            f"bring datastore {datastore} back, and name it in the farm file; if it is gone for good: --without "
            f"{_option(self.uuid, leg)} (what was written {after} may be lost)",
        )
        return False

    def _make(self, words: MapWords, members: list[_Leg], newest: int, size: int) -> RebuiltVVol | None:
        mirror = words.mirror or len(members) > 1
        whole = [one for one in members if not mirror or one.in_sync]
        best = max((one.key for one in whole), default=None)
        if best is None:
            text = f"every leg that was found was being copied to: {', '.join(one.words() for one in members)}"
            self._block("NO_LEG_IN_SYNC", text, self._leave_out())
            return None
        legs = [self._leg(one, members, mirror, best, size) for one in self.legs]
        legs += [self._leaving(one, "given up") for one in self.gone]
        live = [leg for leg in legs if leg.life == "live"]
        if not any(leg.state == "in-sync" for leg in live):
            text = f"the map copy of each leg that is in sync is lost or older than its {size} bytes"
            self._block("MAP_LOST", text, self._leave_out())
            return None
        every = [*self.legs, *self.gone]
        labels = [one.leg.label for one in every if one.leg.label is not None]
        as_was = [leg.id for leg in live] == [leg.id for leg in words.legs] and mirror == words.mirror
        return RebuiltVVol(
            uuid=str(self.uuid),
            vm=words.vm,
            name=words.name,
            size=size,
            type=words.type,
            profile=words.profile,
            read_only=words.read_only,
            mirror=mirror,
            epoch=self.work.epoch(labels),
            generation=max((label.generation for label in labels), default=0) + 1,
            map_version=newest if as_was else newest + 1,
            next_leg=max(words.next_leg, *(one.leg.id + 1 for one in every)),
            legs=legs,
        )

    def _leg(self, one: _Leg, members: list[_Leg], mirror: bool, best: tuple[int, int], size: int) -> RebuiltLeg:
        if one not in members:
            return self._leaving(one, "the newest map copy does not name it")
        leg = self._place(one)
        if mirror and one.leg.label is not None:
            leg.stamp = Stamp(epoch=one.leg.label.epoch, generation=one.leg.label.generation)
        if not covers(leg.runs, size):
            why = f"its map copy does not describe {size} bytes"
            self.work.note("LEG_GIVEN_UP", self.subject, f"{one.words()}: {why}", "add a leg there again")
            return self._leaving(one, why)
        if mirror and (not one.in_sync or one.key != best):
            leg.state = "stale"
            leg.why = f"at the rebuild its label was {'not in sync' if not one.in_sync else 'older than the newest'}"
        return leg

    def _leaving(self, one: _Leg, why: str) -> RebuiltLeg:
        """No part of the VVol any more: its space is scrubbed once no host can have anything of it in flight."""
        return self._place(one).model_copy(update={"life": "leaving", "state": "stale", "why": why})

    def _place(self, one: _Leg) -> RebuiltLeg:
        found, label, copy = one.leg, one.leg.label, one.leg.map
        return RebuiltLeg(
            id=found.id,
            datastore=one.store,
            object=found.object,
            slot=found.slot,
            meta_offset=found.meta_offset,
            meta_length=found.meta_length,
            label_sequence=label.sequence if label is not None else 0,
            map_written=copy.version if copy is not None else 0,
            runs=[(run.offset, run.length, run.at, run.state) for run in copy.runs] if copy is not None else [],
        )


def words_of(leg: FoundLeg) -> MapWords | None:
    """What a leg's map copy says of its VVol; None: nothing that can be read."""
    try:
        return MapWords.model_validate_json(leg.map.words) if leg.map is not None else None
    except ValidationError:
        return None


def covers(runs: list[tuple[int, int, int, int]], size: int) -> bool:
    """Whether the runs say where every byte of a VVol lies, each once."""
    at = 0
    for offset, length, _, _ in runs:
        if offset != at or length <= 0:
            return False
        at += length
    return at == size


# ---- single copies in directories ----


def _single_files(work: _Work, found: list[Found]) -> None:
    """A single copy in a `dir` has no metadata: its file's name and length, and the farm file, say what it is."""
    for store in found:
        if store.name in work.without:
            continue
        for name, size in store.files:
            whose = leg_of_file(name)
            assert whose is not None and whose[1] == 0, "only single copies are listed"
            declared = list(_declared_as(work.farm, name, str(whose[0])))
            if len(declared) != 1:
                text = f"file {name} is no VVol that the farm file declares: it is left alone"
                action = "declare its VM and its name, to have it rebuilt; else remove it"
                work.note("FILE_LEFT_ALONE", store.name, text, action)
                continue
            ((vm, short, config),) = declared
            profile = work.farm.profiles.get(config.profile or "")
            work.result.vvols.append(
                RebuiltVVol(
                    uuid=str(whose[0]),
                    vm=vm,
                    name=short,
                    size=size,
                    type=config.type,
                    profile=config.profile or "",
                    read_only=config.read_only or (profile is not None and profile.read_only),
                    epoch=work.epoch(()),
                    generation=1,
                    map_version=1,
                    next_leg=FIRST_LEG + 1,
                    legs=[RebuiltLeg(id=FIRST_LEG, datastore=store.name, object=name, runs=[(0, size, 0, 0)])],
                )
            )


def _declared_as(farm: Farm, file: str, uuid: str) -> Iterator[tuple[str, str, VVolConfig]]:
    for vm, config in farm.vms.items():
        for short, vvol in config.vvols.items():
            if file_name(f"{vm}/{short}", uuid, 0) == file:
                yield vm, short, vvol


# ---- all together ----


def _same_name_twice(work: _Work) -> None:
    seen: dict[str, RebuiltVVol] = {}
    for vvol in work.result.vvols:
        other = seen.setdefault(vvol.full_name, vvol)
        if other is not vvol:
            legs = " ".join(f"--without {_option(vvol.uuid, leg.id)}" for leg in vvol.legs)
            text = f"two VVols are called so: {other.uuid} on {_places(other)}, {vvol.uuid} on {_places(vvol)}"
            work.block("NAME_TWICE", vvol.full_name, text, f"give one up, with all its bytes: {legs}")


def _places(vvol: RebuiltVVol) -> str:
    return ", ".join(leg.datastore for leg in vvol.legs)


def _overlaps(work: _Work, store: Found) -> None:
    """No byte has two owners, and every owner's bytes are there."""
    claims: list[tuple[int, int, str, str]] = []
    step = 1
    if store.header is not None:
        step = store.header.extent_size
        claims.append((0, store.header.data_offset, "", "the datastore's head"))
    for vvol in work.result.vvols:
        for leg in vvol.legs:
            if leg.datastore != store.name:
                continue
            name = f"leg {leg.id} of VVol {vvol.full_name}"
            claims += [(at, at + length, leg.object, name) for at, length in pieces(leg, step)]
    sizes = dict(store.files) | {leg.object: leg.object_size for leg in store.legs if leg.object}
    claims.sort(key=lambda claim: (claim[2], claim[0]))
    for index, (start, end, obj, name) in enumerate(claims):
        size = sizes.get(obj, 0) if obj else store.size
        if end > size or start % step:
            text = f"{name} claims bytes {start}..{end}; {obj or 'it'} has {size} in extents of {step}"
            work.block("BEYOND_END", store.name, text, "restore its size, or the registry")
        if index and claims[index - 1][2] == obj and claims[index - 1][1] > start:
            other = claims[index - 1]
            text = f"{name} and {other[3]} both claim bytes {start}..{min(end, other[1])}"
            work.block("CLAIMED_TWICE", store.name, text, "restore the registry; these map copies cannot both be right")


def _logged(work: _Work) -> None:
    """VVols that may have data in a write-back log, of which no datastore tells."""
    for vvol in work.result.vvols:
        hosts = hosts_of(work.farm, vvol)
        if vvol.state == "ready" and logs_writes(work.farm, vvol):
            text = f"it has a write-back log, which may hold data that no datastore has, on host {', '.join(hosts)}"
            if len(hosts) == 1:
                action = f"that host is asked: if its log holds data, decide by nbdvvol cache recover {vvol.full_name}"
            else:
                action = f"name the host that served it last: nbdvvol bind {vvol.full_name} --host HOST --force"
            work.note("LOG_UNCHECKED", vvol.full_name, text, action)


def _undeclared(work: _Work) -> None:
    """VVols whose VM the farm file lacks; VVols that it declares and that were not found."""
    for vvol in work.result.vvols:
        if vvol.vm not in work.farm.vms:
            action = f"add it under vms, with its host: the VVol comes from the datastores ({vvol.vm}: {{}})"
            work.block("VM_UNDECLARED", vvol.full_name, f"the farm file declares no VM {vvol.vm}", action)
    found = {vvol.full_name for vvol in work.result.vvols}
    stores = work.farm.datastores
    for vm, config in work.farm.vms.items():
        for short, declared in config.vvols.items():
            name = f"{vm}/{short}"
            if declared.adopt is not None:
                kind = (
                    stores[declared.adopt.datastore].kind if declared.adopt.datastore in stores else DatastoreKind.FILE
                )
                what = (
                    f"file {declared.adopt.file}"
                    if kind is DatastoreKind.DIR
                    else f"datastore {declared.adopt.datastore}"
                )
                text = f"adopted bytes hold nothing of ours: `apply` adopts {what} anew, under another UUID"
                work.note("ADOPTED_ANEW", name, text, "see to it that no host still serves it by the old registry")
            elif name not in found:
                text = "the farm file declares it, and no datastore holds it: `apply` creates it anew, empty"
                work.note("NOT_FOUND", name, text, "if it existed, look why it was not found before you apply")
