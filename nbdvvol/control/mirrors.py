"""What the tasks of mirrors do, step by step. Every step can be repeated after a crash (see lifecycle.py)."""

from __future__ import annotations

import asyncio

import structlog

from nbdvvol.control.lifecycle import get_placement, make_leg, place_leg, wipe_leg, write_map, write_metadata
from nbdvvol.control.registry import bindings, legs, mirrors, orders, space
from nbdvvol.control.registry.space import Placement
from nbdvvol.control.tasks import Body, CancelledByRequestError, Context, Undo
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.mirror import VerifyResult, verify_args
from nbdvvol.model.units import format_size

log = structlog.get_logger()
WIPE_AGAIN_S = 5.0
"""How long after a datastore did not answer it is tried again."""
LOOK_S = 1.0
"""How often a verification looks whether it was cancelled."""


async def _needed(context: Context) -> Placement:
    placement = await get_placement(context)
    assert placement is not None, "a VVol with a task is not deleted"
    return placement


async def add_leg(context: Context) -> None:
    """Place the leg, scrub and label it, then let filters know of it: the copying is theirs."""
    args = context.job.args
    number = int(args["leg"])
    await context.settled(but_mine=True)
    placement = await _needed(context)
    if placement.leg(number) is None:
        await context.say(0.1, f"takes space on datastore {args['datastore']}")
        await place_leg(context, placement, number, args["datastore"], "making", args["replaces"])
        placement = await _needed(context)
    leg = placement.leg(number)
    assert leg is not None, "the leg was placed"
    if leg.life == "making":
        await make_leg(context, placement, leg, (0.2, 0.8))
        if not placement.mirror:
            await _label_only_copy(context, placement)
        await context.check_cancel()
        await context.registry.run(legs.leg_made, placement.uuid, number)
    context.firm = True
    await _write_maps(context)


async def _label_only_copy(context: Context, placement: Placement) -> None:
    """A single copy becomes a mirror's leg: its map copy and label say its number, which may be new, and its stamp."""
    for leg in placement.legs:
        if leg.life == "live":
            await write_metadata(context, placement, leg)


async def _write_maps(context: Context) -> None:
    """What the legs' map copies say of the VVol has changed. A leg that is away gets its copy when it is back."""
    placement = await _needed(context)
    for leg in placement.legs:
        store = await context.store(leg.datastore)
        there = any(host in context.links.connected for host in store.hosts)
        if leg.life != "live" or not leg.meta_length or store.state != "online" or not there:
            continue
        try:
            await write_map(context, placement, leg)
        except NvError as error:
            log.warning("a map copy is not written", vvol=placement.name, leg=leg.id, error=str(error))


async def write_maps(context: Context) -> None:
    """Map copies of legs that were away when the map changed."""
    await context.settled(but_mine=True)
    context.firm = True
    await _write_maps(context)


async def undo_add_leg(context: Context, error: str) -> None:
    """What the leg took is scrubbed and given back by a task of its own."""
    placement = await get_placement(context)
    leg = placement.leg(int(context.job.args["leg"])) if placement is not None else None
    if leg is not None and leg.life == "making":
        log.info("a leg is given up", vvol=context.job.subject, leg=leg.id, error=error)
        await context.settled(but_mine=True)
        await context.registry.run(legs.take_out, context.job.vvol, leg.id)


async def remove_leg(context: Context) -> None:
    """Wait until the leg counts no more, then take it out of the record."""
    number = int(context.job.args["leg"])
    await context.settled(but_mine=True)
    placement = await _needed(context)
    leg = placement.leg(number)
    if leg is not None and leg.life == "live":

        async def unused() -> str:
            return await context.registry.run(legs.out_of_use, placement.uuid, number)

        await context.until(0.2, unused)
        await context.registry.run(legs.take_out, placement.uuid, number)
    context.firm = True
    await _write_maps(context)


async def undo_remove_leg(context: Context, error: str) -> None:
    """It stays, and is copied to again as before."""
    log.info("a leg stays", vvol=context.job.subject, leg=context.job.args["leg"], error=error)
    await context.registry.run(
        mirrors.keep_leg, context.job.vvol, int(context.job.args["leg"]), context.job.args["wish"]
    )


async def free_leg(context: Context) -> None:
    """Scrub what a removed leg had, once no host can have anything of it in flight, and give it back."""
    number = int(context.job.args["leg"])

    async def let_go() -> str:
        if not await _leaving(context, number):
            return ""
        hosts = await context.registry.run(legs.leg_users, context.job.vvol, number)
        if hosts:
            return f"host {', '.join(hosts)} to let go of leg {number}"
        return await context.registry.run(legs.doubts, context.job.vvol, number)

    await context.until(0.1, let_go, cancellable=False)
    await context.settled(but_mine=True)
    if not await _leaving(context, number):
        return
    await context.registry.run(space.begin_freeing_leg, context.job.vvol, number)
    while await _leaving(context, number):
        if await _wiped(context, number):
            await context.registry.run(space.leg_gone, context.job.vvol, number)
            return
        await asyncio.sleep(WIPE_AGAIN_S)


async def _wiped(context: Context, number: int) -> bool:
    """Scrub the leg. False: its datastore is away; a leg that was lost is often removed while it is."""
    placement = await _needed(context)
    leg = placement.leg(number)
    assert leg is not None, "only this task, and the one that deletes the VVol, take the leg away"
    try:
        await wipe_leg(context, leg, (0.2, 0.9))
    except NvError as error:
        if error.code not in (Code.UNAVAILABLE, Code.TIMEOUT):
            raise
        await context.say(0.2, f"waits for datastore {leg.datastore}: {error.message}")
        return False
    return True


async def _leaving(context: Context, number: int) -> bool:
    """Whether the leg is still to be freed here: a VVol that is being deleted frees all it has."""
    placement = await get_placement(context)
    return placement is not None and placement.state != "deleting" and placement.leg(number) is not None


async def verify(context: Context) -> None:
    """Have the VVol's host compare its in-sync legs, and tell what it found."""
    uuid, repair = context.job.vvol, bool(context.job.args["repair"])
    order = await context.registry.run(orders.outstanding, context.job.id, "verify")
    if order is None:
        found = await context.registry.run(bindings.serving, uuid)
        if found is None:
            hint = f"bind it: nbdvvol bind {context.job.subject}"
            raise NvError(Code.UNAVAILABLE, f"no host serves VVol {context.job.subject}", hint)
        host, epoch = found
        args = verify_args(uuid, epoch, repair)
        order = await context.registry.run(orders.give, context.job.id, uuid, "verify", host, "verify", args)
    work = asyncio.ensure_future(context.carry_out(order, (0.0, 1.0)))
    try:
        while not (await asyncio.wait({work}, timeout=LOOK_S))[0]:
            await context.check_cancel()
    except CancelledByRequestError:
        await context.registry.run(orders.settle, order.id)
        raise
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
    await _tell(context, VerifyResult.model_validate(work.result()), repair)


async def _tell(context: Context, result: VerifyResult, repair: bool) -> None:
    size = format_size(result.compared_bytes)
    if not result.differed:
        text = f"all in-sync legs are alike: {size} compared"
    elif repair:
        text = f"{result.differed} pieces of {size} differed; {result.repaired} were made what the first leg has"
    else:
        text = f"{result.differed} pieces of {size} differ; nothing was changed"
    left = max(result.differed - result.repaired, 0)
    await context.registry.run(legs.verified, context.job.vvol, text, result.differed, left)
    await context.say(1.0, text)


BODIES: dict[str, Body] = {
    "add-leg": add_leg,
    "remove-leg": remove_leg,
    "free-leg": free_leg,
    "write-maps": write_maps,
    "verify": verify,
}
UNDO: dict[str, Undo] = {"add-leg": undo_add_leg, "remove-leg": undo_remove_leg}
