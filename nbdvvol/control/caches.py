"""What the tasks of caches do. Every step can be repeated after a crash (see lifecycle.py)."""

from __future__ import annotations

from nbdvvol.control.registry import logs, views
from nbdvvol.control.tasks import Body, Context, Undo
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.log import LogReport
from nbdvvol.model.units import about_size

DRAIN_LOOK_S = 0.5
"""How often a drain looks how far it is."""


async def drain(context: Context) -> None:
    """Have what the VVol's log holds carried to its storage; then it is logged again, as its profile says."""
    uuid = context.job.vvol
    vvol = await context.registry.run(views.resolve, uuid)
    if vvol.log is not None and not vvol.log.known:
        hint = f"nbdvvol cache recover {vvol.full_name}, or nbdvvol cache discard {vvol.full_name}"
        raise NvError(Code.CONFLICT, f"{vvol.log.words()}: decide first what becomes of it", hint)
    if vvol.log is None:
        await context.registry.run(logs.resume, uuid)  # it was done, perhaps, when control was stopped
        has = f"its cache (mode {vvol.cache.mode})" if vvol.cache is not None else "without a cache it"
        if vvol.cache is not None and vvol.cache.mode == "writeback":
            has = "its log holds nothing: the cache"
        await context.say(1.0, f"nothing to drain: {has} keeps no write back")
        return
    host, file, most = vvol.log.host, vvol.log.file, 0
    done = 0.0
    await context.registry.run(logs.drain, uuid)

    async def left() -> str:
        nonlocal most, done
        kept = await context.registry.run(logs.kept, uuid)
        if kept is None:
            return ""
        if host not in context.links.connected:
            return f"the filter of host {host}, which is not connected, to carry what its log holds to the storage"
        report = context.links.log(host, uuid)
        if report is None:
            return f"host {host} to carry what its log holds to the storage"
        most = max(most, report.dirty_bytes)
        done = 1 - report.dirty_bytes / most if most else 0.0
        return _left(host, report)

    await context.until(lambda: min(done, 0.99), left, again_s=DRAIN_LOOK_S)
    await context.registry.run(logs.resume, uuid)
    await context.say(1.0, f"drained: {about_size(most)} carried from {file} on host {host} to the storage")


def _left(host: str, report: LogReport) -> str:
    speed = f", {about_size(report.destage_rate)}/s" if report.destage_rate else ""
    lost = f"; {report.lost_bytes} bytes cannot be read, and keep it from ending" if report.lost_bytes else ""
    return f"host {host} to carry {about_size(report.dirty_bytes)} to the storage{speed}{lost}"


async def undo_drain(context: Context, error: str) -> None:
    """It goes on as before."""
    del error
    await context.registry.run(logs.resume, context.job.vvol)


BODIES: dict[str, Body] = {"drain-cache": drain}
UNDO: dict[str, Undo] = {"drain-cache": undo_drain}
