"""Write-back logs as people see them: the registry's record with what hosts report, and what is wrong with them.

Pure. Each problem has a stable code (docs/cache.md lists them) and says what, where, and what to do next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from nbdvvol.model.log import LogReport, holding_words, range_words
from nbdvvol.model.resources import LogNow, Problem, VVol
from nbdvvol.model.units import about_size, about_time, format_rate, format_size

LATE = 4
"""A log whose oldest write waits for so many times the profile's `age` is late ..."""
LATE_MS_MIN = 10_000
"""... but not below so many milliseconds: a look is a second old."""
AGAIN = "is tried again by itself, after 5 minutes at most"


def with_log(vvol: VVol, report_of: Callable[[str, str], LogReport | None]) -> VVol:
    """A VVol with what its host says of its log, if that is of the epoch under which the host has it."""
    binding = vvol.binding
    report = report_of(binding.host, vvol.uuid) if binding is not None else None
    if binding is None or report is None or report.epoch != binding.epoch:
        return vvol
    said = report.model_dump(include=set(LogNow.model_fields) - {"host"})
    return vvol.model_copy(update={"log_now": LogNow(host=binding.host, **said)})


def log_problems(vvols: Iterable[VVol], connected: frozenset[str]) -> list[Problem]:
    """What is wrong with logs, the worst first."""
    found: list[Problem] = []
    for part in (_lost, _failed, _left, _refused, _late, _waits):
        for vvol in vvols:
            if vvol.state == "ready":
                found += part(vvol, connected)
    return found


def _lost(vvol: VVol, _: frozenset[str]) -> Iterator[Problem]:
    """Acknowledged writes that can be read nowhere."""
    now = vvol.log_now
    if now is None or not now.lost_bytes:
        return
    yield Problem(
        code="LOG_DATA_LOST",
        subject=vvol.full_name,
        message=f"{format_size(now.lost_bytes)} that were logged on host {now.host} can be read nowhere: "
        f"{range_words(now.lost, now.lost_bytes)} of it; reads of them fail, and so does FLUSH, until they are "
        "overwritten",
        action=f"check the device of {now.file}; restore those bytes from a backup by writing them",
    )


def _failed(vvol: VVol, _: frozenset[str]) -> Iterator[Problem]:
    """Its device has failed."""
    now = vvol.log_now
    if now is None or now.state not in ("failed", "void"):
        return
    why = f": {now.why}" if now.why else ""
    if now.state == "failed":
        held = holding_words(now.dirty_bytes, now.oldest_age_ms)
        message = (
            f"its log {now.file} on host {now.host} has failed{why}; {held} of it are being carried to the storage"
        )
        action = "nothing, if that ends soon; if it does not, look at the VVol's storage"
    else:
        message = (
            f"its log {now.file} on host {now.host} has failed{why}; all it held is in the storage, and it is served "
        )
        message += "without: nothing was lost, writes are slower"
        action = f"mend that device, or name another place in the profile: the log {AGAIN}"
    yield Problem(code="LOG_FAILED", subject=vvol.full_name, message=message, action=action)


def _left(vvol: VVol, connected: frozenset[str]) -> Iterator[Problem]:
    """Data of it is in the log of a host that does not serve it now."""
    log, binding = vvol.log, vvol.binding
    at_home = log is not None and log.host in connected and binding is not None and binding.host == log.host
    if log is None or at_home:  # there, that host tells what is wrong
        return
    if not log.known and not log.host:
        yield Problem(
            code="LOG_UNCHECKED",
            subject=vvol.full_name,
            message="the registry was rebuilt, and a write-back log on one of its hosts may hold data of it",
            action="name the host that served it last, and say that: "
            f"nbdvvol bind {vvol.full_name} --host HOST --force",
        )
        return
    action = f"start the filter of host {log.host}"
    if binding is None or binding.host != log.host:
        action += f" and bind it there: nbdvvol bind {vvol.full_name} --host {log.host}"
    if not log.known:
        action += f"; if that host served it last: nbdvvol cache recover {vvol.full_name}"
    yield Problem(
        code="LOG_PINNED",
        subject=vvol.full_name,
        message=f"{log.words()}; no other host can serve it until that is in the storage",
        action=action,
    )


def _refused(vvol: VVol, _: frozenset[str]) -> Iterator[Problem]:
    """What lies in its place cannot be used; it is served without."""
    now = vvol.log_now
    if now is None or now.state != "refused" or vvol.binding is None or vvol.binding.state != "bound":
        return
    if now.file:
        again = f"nbdvvol cache discard {vvol.full_name}"
        action = f"mend it, or have what lies there overwritten: {again}; {AGAIN}"
    else:
        action = f"mend it on host {now.host}, or change the profile; {AGAIN}"
    yield Problem(
        code="LOG_REFUSED",
        subject=vvol.full_name,
        message=f"it is served without its log, which only makes it slower: {now.why}",
        action=action,
    )


def _late(vvol: VVol, _: frozenset[str]) -> Iterator[Problem]:
    """What is logged waits for long."""
    now = vvol.log_now
    policy = vvol.cache.log if vvol.cache is not None else None
    limit_ms = max(LATE * policy.age * 1000, LATE_MS_MIN) if policy is not None else LATE_MS_MIN
    if now is None or now.state == "failed" or now.oldest_age_ms <= limit_ms:
        return
    message = f"its log on host {now.host} holds {about_size(now.dirty_bytes)}, the oldest logged "
    message += f"{about_time(now.oldest_age_ms / 1000)} ago: "
    action = "look at that storage: whether it fails, or is slower than what is written"
    if policy is not None and policy.destage_rate is not None:
        message += f"its storage does not take it, or destage-rate {format_rate(policy.destage_rate)} is less than "
        message += "what is written"
        action += "; or raise destage-rate in the profile"
    else:
        message += "its storage does not take what is carried to it"
    yield Problem(code="LOG_LATE", subject=vvol.full_name, message=message, action=action)


def _waits(vvol: VVol, _: frozenset[str]) -> Iterator[Problem]:
    """A log that could not go in yet, for what is under way takes too long."""
    now = vvol.log_now
    if now is None or now.state != "waits":
        return
    yield Problem(
        code="LOG_WAITS",
        subject=vvol.full_name,
        message=f"it is served without a log so far: {now.why}",
        action="look at its storage, which is slow; the log is put in again and again by itself",
    )
