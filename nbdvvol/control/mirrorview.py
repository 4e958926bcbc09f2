"""Mirrored VVols as people see them: the registry's record with what hosts report, and what is wrong with them.

Pure. Each problem has a stable code (docs/mirror.md lists them) and says what, where, and what to do next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from nbdvvol.model.mirror import LegProgress, MirrorReport
from nbdvvol.model.resources import Datastore, Leg, LegNow, MirrorNow, Problem, VVol

COPIES = ("syncing", "promoting")
"""Lanes of a leg that a copy goes to."""


def with_report(vvol: VVol, report_of: Callable[[str, str], MirrorReport | None]) -> VVol:
    """A VVol with what its host says of it, if that is of the epoch that the host serves."""
    binding = vvol.binding
    if vvol.mirror is None or binding is None:
        return vvol
    report = report_of(binding.host, vvol.uuid)
    if report is None or report.epoch != binding.epoch:
        return vvol
    now = MirrorNow(
        host=binding.host,
        state=report.state,
        region_bytes=report.region_bytes,
        intent_regions=report.intent_regions,
        doubtful_regions=report.doubtful_regions,
        repairs=report.repairs,
    )
    said = {leg.id: leg for leg in report.legs}
    legs = [
        leg.model_copy(update={"now": _leg_now(said[leg.id], report.region_bytes)}) if leg.id in said else leg
        for leg in vvol.legs
    ]
    return vvol.model_copy(update={"now": now, "legs": legs})


def _leg_now(said: LegProgress, region_bytes: int) -> LegNow:
    whole = said.copied_bytes + said.dirty_bytes
    progress = None
    if said.lane in COPIES:
        progress = said.copied_bytes / whole if whole else 1.0
    regions = -(-said.dirty_bytes // region_bytes) if region_bytes else 0
    return LegNow(**dict(said), dirty_regions=regions, progress=progress)


class StuckCopies:
    """Legs that the registry has as `syncing` while nothing is copied to them: their hosts asked, and cannot go on."""

    def __init__(self) -> None:
        self._since: dict[tuple[str, int], float] = {}

    def look(self, reports: Iterable[MirrorReport], now_s: float) -> dict[tuple[str, int], float]:
        """By VVol and leg, for how many seconds it has been so in every look; times are of a monotonic clock."""
        idle = {
            (report.uuid, leg.id)
            for report in reports
            for leg in report.legs
            if leg.lane in ("stale", "absent") and leg.why
        }
        self._since = {key: self._since.get(key, now_s) for key in idle}
        return {key: now_s - since for key, since in self._since.items()}


# ---- what is wrong ----


def mirror_problems(vvols: Iterable[VVol], stores: Sequence[Datastore]) -> list[Problem]:
    """What is wrong with mirrors, the worst first."""
    known = {store.name: store for store in stores}
    found: list[Problem] = []
    for part in (_held, _last, _lost, _differ, _spares, _copying):
        for vvol in vvols:
            if vvol.mirror is not None and vvol.state == "ready":
                found += part(vvol, known)
    return found


def _live(vvol: VVol) -> list[Leg]:
    return [leg for leg in vvol.legs if leg.life == "live"]


def _name(leg: Leg) -> str:
    return f"leg {leg.id} on datastore {leg.datastore}"


def _held(vvol: VVol, _: dict[str, Datastore]) -> Iterator[Problem]:
    """Writes that wait, or fail, until control knows of a failed leg."""
    if vvol.now is None or vvol.now.state not in ("frozen", "expired"):
        return
    failing = [leg for leg in _live(vvol) if leg.now is not None and leg.now.lane == "failing"]
    names = ", ".join(_name(leg) for leg in failing) or "a leg"
    why = next((f": {leg.now.why}" for leg in failing if leg.now is not None and leg.now.why), "")
    yield Problem(
        code="WRITES_HELD" if vvol.now.state == "frozen" else "WRITES_FAIL",
        subject=vvol.full_name,
        message=(
            f"{names} has failed on host {vvol.now.host}{why}; until control has written that down, writes "
            + ("wait there" if vvol.now.state == "frozen" else "have waited for longer than `hold` and get errors")
        ),
        action=f"nothing, if it is gone in a moment; if it stays, look at the log of host {vvol.now.host}'s filter",
    )


def _last(vvol: VVol, _: dict[str, Datastore]) -> Iterator[Problem]:
    """One copy is all there is."""
    live = _live(vvol)
    whole = [leg for leg in live if leg.state == "in-sync"]
    if len(live) < 2 or len(whole) != 1:
        return
    if any(leg.now is not None and leg.now.lane == "syncing" for leg in live):
        action = "wait until the copy that runs is done"
    else:
        action = "bring another leg back"
    yield Problem(
        code="LAST_LEG",
        subject=vvol.full_name,
        message=f"{_name(whole[0])} is the only one of {len(live)} legs in sync: what is written lies there alone",
        action=f"{action}, or add one: nbdvvol mirror add-leg {vvol.full_name} --datastore NAME; "
        f"leave datastore {whole[0].datastore} as it is until then",
    )


def _copies(leg: Leg) -> bool:
    return leg.now is not None and leg.now.lane in COPIES


def _is_lost(leg: Leg) -> bool:
    """It misses something, nothing is copied to it, and that is not about to begin.

    The registry may have it as `syncing`: its host asked for that, and then could not begin."""
    begins = leg.state == "syncing" and leg.now is not None and not leg.now.why
    return leg.state != "in-sync" and not _copies(leg) and not begins


def _lost(vvol: VVol, known: dict[str, Datastore]) -> Iterator[Problem]:
    """Legs that miss something and are not copied to."""
    for leg in _live(vvol):
        if _is_lost(leg):
            since = f" since {leg.lost:%Y-%m-%dT%H:%M:%SZ}" if leg.lost is not None else ""
            why = leg.reason
            yield Problem(
                code="LEG_STALE",
                subject=vvol.full_name,
                message=f"{_name(leg)} is not in sync{since}{f': {why}' if why else ''}",
                action=_bring_back(vvol, leg, known.get(leg.datastore)),
            )


def _bring_back(vvol: VVol, leg: Leg, store: Datastore | None) -> str:
    again = f"nbdvvol mirror resync {vvol.full_name} {leg.id}"
    why = leg.reason
    if leg.resync == "off":
        return f"it is left so by request; copy to it: {again}"
    if vvol.binding is None:
        return f"it is copied to when a host serves the VVol: nbdvvol bind {vvol.full_name}"
    if leg.doubt and not leg.fences:
        return f"restart the server of datastore {leg.datastore}, then: {again}"
    if store is not None and store.state in ("missing", "reconnecting", "faulty"):
        return f"bring datastore {store.name} back; then it is copied to by itself"
    if "no valid label" in why:
        return f"if datastore {leg.datastore} is the right one, copy everything to it: {again} --full"
    if leg.now is None:
        return f"it is copied to when the filter of host {vvol.binding.host} is connected and serves the VVol"
    if not why:
        return f"wait: host {vvol.binding.host} begins to copy to it by itself; at once: {again}"
    return f"mend the cause; it is tried again by itself, or at once: {again}"


def _differ(vvol: VVol, _: dict[str, Datastore]) -> Iterator[Problem]:
    if vvol.differed:
        yield Problem(
            code="LEGS_DIFFER",
            subject=vvol.full_name,
            message=f"the last comparison of its legs: {vvol.differed}",
            action=f"make them what the first one in sync has: nbdvvol mirror verify {vvol.full_name} --repair",
        )


def _spares(vvol: VVol, _: dict[str, Datastore]) -> Iterator[Problem]:
    """A spare that stands in, or none where one is needed."""
    assert vvol.mirror is not None
    live = _live(vvol)
    if vvol.error:
        yield Problem(
            code="NO_SPARE",
            subject=vvol.full_name,
            message=f"no spare can take the place of its lost leg: {vvol.error}",
            action="mend that, or name another spare in its profile and apply",
        )
    used = {leg.datastore for leg in vvol.legs}
    away = [name for name in vvol.mirror.legs if name not in {leg.datastore for leg in live}]
    free = [name for name in vvol.mirror.spares if name not in used]
    left = f"spares left: {', '.join(free)}" if free else "no spare is left"
    for leg in live:
        if leg.datastore not in vvol.mirror.spares:
            continue
        lost = next((one for one in live if one.id == leg.replaces), None)
        if lost is not None:
            place = f"the place of {_name(lost)}"
            action = f"mend datastore {lost.datastore}, or wait: that leg is removed once the spare is in sync"
        else:
            place = "a place among its legs" + (f" ({', '.join(away)} has none)" if away else "")
            action = "make it a leg in the profile, and name another spare"
            if away:
                back = f"nbdvvol mirror add-leg {vvol.full_name} --datastore {away[0]}"
                action += f"; or go back: {back}, then remove-leg {leg.datastore}"
        yield Problem(
            code="SPARE_USED",
            subject=vvol.full_name,
            message=f"spare datastore {leg.datastore} has taken {place}; {left}",
            action=action,
        )


def _copying(vvol: VVol, _: dict[str, Datastore]) -> Iterator[Problem]:
    for leg in _live(vvol):
        if leg.state != "in-sync" and not _is_lost(leg):
            words = leg.now.copy_words() if leg.now is not None and _copies(leg) else "it is to be copied to"
            yield Problem(
                code="LEG_SYNCING",
                subject=vvol.full_name,
                message=f"{_name(leg)} is not in sync yet: {words}",
                action="wait; reads are answered by the others meanwhile",
            )
