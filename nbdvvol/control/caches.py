"""What the tasks of caches do. Every step can be repeated after a crash (see lifecycle.py)."""

from __future__ import annotations

from nbdvvol.control.registry import views
from nbdvvol.control.tasks import Body, Context


async def drain(context: Context) -> None:
    """A write is answered once the VVol's storage has it, in every mode that there is: nothing waits in a cache."""
    vvol = await context.registry.run(views.resolve, context.job.vvol)
    has = f"its cache (mode {vvol.cache.mode})" if vvol.cache is not None else "without a cache it"
    await context.say(1.0, f"nothing to drain: {has} keeps no write back")


BODIES: dict[str, Body] = {"drain-cache": drain}
