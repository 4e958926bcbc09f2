"""What each kind of task does: the life of a VVol, step by step. Every step can be repeated after a crash."""

from __future__ import annotations

import re
from typing import Any, Literal

from nbdvvol.control.clock import moment
from nbdvvol.control.older import check_older
from nbdvvol.control.registry import bindings, faults, legs, logs, orders, space, stores
from nbdvvol.control.registry.space import LegPlace, Placement
from nbdvvol.control.registry.stores import Store
from nbdvvol.control.tasks import Body, Context
from nbdvvol.datastores import format as disk
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.resources import VVolState


def file_name(full_name: str, uuid: str, leg: int) -> str:
    """The file of a leg in a `dir`: readable, safe, unique. `leg` 0: of a single copy, which has no metadata.

    A mirror's leg says its number: so a rebuild of the registry knows by the name whether there is metadata at the
    file's head, and never takes for it what a VM wrote there."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", full_name.replace("/", "-"))
    return f"{safe[:120]}-{uuid}{f'.leg{leg}' if leg else ''}.img"


async def get_placement(context: Context) -> Placement | None:
    """The task's VVol as it is now; None when it is gone."""
    return await context.registry.run(space.placement, context.job.vvol)


async def _probed(context: Context, name: str) -> Store:
    """The datastore, once a filter has seen it and found it sound."""
    store = await context.store(name)
    if store.state != "online":
        host = await context.host_for(store)
        await context.links.probe(name, host)
        store = await context.store(name)
    return store


async def _format(context: Context, name: str) -> None:
    """Format an unused datastore: directory of zeros first, then the two header copies."""
    async with context.store_lock(name):
        store = await context.store(name)
        if store.use != "unused":
            return
        await context.say(0.1, f"formats datastore {name}")
        found = await context.links.probe(name, await context.host_for(store))
        header = await context.registry.run(stores.plan_format, name, found["header"], found["blank"])
        store = await context.store(name)
        head = [[disk.HEADER_AREA, header.data_offset - disk.HEADER_AREA]]
        await context.work(store, "scrub", "format.directory", ranges=head)
        copy = disk.encode_header(header).hex()
        for index in (0, 1):
            await context.work(store, "write_meta", f"format.header{index}", offset=index * disk.PAGE, data=copy)
        await context.registry.run(stores.formatted, name)
        context.looked_at.add(name)  # nobody else has written there


async def _place(context: Context, placement: Placement) -> None:
    """Give every leg that has none yet its place."""
    if placement.adopt is not None:
        await _place_adopted(context, placement)
        return
    placed = {leg.datastore for leg in placement.legs}
    for number, datastore in enumerate(placement.places, space.FIRST_LEG):
        if datastore not in placed:
            await place_leg(context, placement, number, datastore)


async def place_leg(
    context: Context,
    placement: Placement,
    number: int,
    datastore: str,
    life: Literal["live", "making"] = "live",
    replaces: int | None = None,
) -> None:
    """Give one leg its place on a datastore, which is formatted if it has to be."""
    store = await _probed(context, datastore)
    if store.is_dir:
        mirrored = placement.mirror or life == "making"
        name = file_name(placement.name, placement.uuid, number if mirrored else 0)
        await context.registry.run(space.place_file, placement.uuid, number, datastore, name, life, replaces)
        return
    await _format(context, datastore)
    await check_older(context, await context.store(datastore))
    await context.registry.run(space.place, placement.uuid, number, datastore, life, replaces)


async def _place_adopted(context: Context, placement: Placement) -> None:
    assert placement.adopt is not None, "only for adoptions"
    if placement.legs:
        return
    (name,) = placement.places
    store = await _probed(context, name)
    await context.say(0.2, f"looks at what to adopt on {name}")
    if store.is_dir:
        file = placement.adopt.file or ""
        stat = await context.work(store, "file_stat", "adopt.stat", object=file)
        await context.registry.run(space.place_adopted, placement.uuid, int(stat["size"]), "")
    else:
        found = await context.links.probe(name, await context.host_for(store))
        await context.registry.run(space.place_adopted, placement.uuid, int(found["size"]), found.get("header", ""))


async def make_leg(context: Context, placement: Placement, leg: LegPlace, share: tuple[float, float]) -> None:
    """Zeros over all that a leg took and that may hold another's bytes, or its file; then what says whose it is."""
    store = await context.store(leg.datastore)
    if store.is_dir:
        await context.say(share[0], f"makes its file on datastore {store.name}")
        size = leg.meta_length + placement.size
        await context.work(store, "file_create", f"file.create.{leg.id}", share=share, object=leg.object, size=size)
    else:
        await _scrub(context, placement, leg, share)
        await context.check_cancel()
    await write_metadata(context, placement, leg)


async def _scrub(context: Context, placement: Placement, leg: LegPlace, share: tuple[float, float]) -> None:
    """Zeros over everything this leg took that may hold another's bytes."""
    if leg.scrub:
        store = await context.store(leg.datastore)
        ranges = [list(piece) for piece in leg.scrub]
        await context.work(store, "scrub", f"scrub.{leg.id}", share=share, ranges=ranges)
    await context.registry.run(space.scrubbed, placement.uuid, leg.datastore)


async def write_metadata(context: Context, placement: Placement, leg: LegPlace) -> None:
    """The leg's map copy, its label, then its directory entry: each names only what is there already."""
    if leg.adopted or not leg.meta_length:
        return
    await write_map(context, placement, leg)
    label = await context.registry.run(space.label, placement.uuid, leg.id)
    if label is not None:
        at = leg.meta_offset + disk.region_layout(leg.meta_length, placement.size).labels[label.sequence % 2]
        await _write_at(context, leg, f"meta.label.{leg.id}", at, disk.encode_label(label))
    if leg.slot is not None:
        await _write_directory(context, await context.store(leg.datastore), leg.slot)


async def write_map(context: Context, placement: Placement, leg: LegPlace) -> None:
    """The leg's map copy. Its slot is free for it, or holds its newest copy: then the other one is written first."""
    copy, written = await context.registry.run(space.map_copy, placement.uuid, leg.id)
    slots = disk.region_layout(leg.meta_length, placement.size).maps
    raw = disk.encode_map(copy)
    if written != copy.version and written % 2 == copy.version % 2:
        at = leg.meta_offset + slots[(copy.version + 1) % 2]
        await _write_at(context, leg, f"meta.map.{leg.id}.other", at, raw)
    await _write_at(context, leg, f"meta.map.{leg.id}", leg.meta_offset + slots[copy.version % 2], raw)
    await context.registry.run(space.map_is_written, placement.uuid, leg.id, copy.version)


async def _write_at(context: Context, leg: LegPlace, key: str, offset: int, data: bytes) -> None:
    store = await context.store(leg.datastore)
    where: dict[str, Any] = {"object": leg.object} if leg.object else {}
    await context.work(store, "write_meta", key, offset=offset, data=data.hex(), **where)


async def _write_directory(context: Context, store: Store, slot: int) -> None:
    async with context.store_lock(store.name):
        offset, page = await context.registry.run(stores.directory_page, store.name, slot)
        await context.work(store, "write_meta", f"meta.directory.{store.name}", offset=offset, data=page.hex())


async def create(context: Context) -> None:
    """Place, scrub, write metadata (or make the files), be ready, then bind to the VM's host."""
    placement = await get_placement(context)
    if placement is not None and placement.state == VVolState.DELETING:
        await _give_back(context)
        await context.registry.run(space.start_over, context.job.vvol, **context.job.args["instead"])
        placement = await get_placement(context)
    if placement is None:
        return
    if placement.state == VVolState.CREATING:
        await context.settled(but_mine=True)
        await _place(context, placement)
        await _make(context)
        await context.registry.run(space.ready, placement.uuid)
    home = await context.registry.run(bindings.home, placement.uuid)
    await _bind_to(context, home, force=False)


async def _make(context: Context) -> None:
    placement = await get_placement(context)
    assert placement is not None and placement.legs, "a VVol is placed before it is made"
    for index, leg in enumerate(placement.legs):
        if not leg.adopted:
            await make_leg(context, placement, leg, share_of(index, len(placement.legs), 0.3, 0.8))


def share_of(index: int, count: int, begin: float, end: float) -> tuple[float, float]:
    """The part of a task's progress that one of several equal steps has."""
    step = (end - begin) / count
    return begin + index * step, begin + (index + 1) * step


async def _bind_to(context: Context, host: str, *, force: bool) -> None:
    """Bind, then wait for the host's word while it is connected."""
    uuid = context.job.vvol
    await context.until(0.9, lambda: context.registry.run(bindings.bind, uuid, host, force, moment()), again_s=2.0)
    hint = f"look at the log of host {host}'s filter"

    async def served() -> str:
        state, error = await context.registry.run(bindings.state, uuid, host)
        if error:
            raise NvError(Code.IO, f"host {host} cannot serve {context.job.subject}: {error}", hint)
        waits = state in ("assigned", "binding") and host in context.links.connected
        return f"host {host} to serve it" if waits else ""

    await context.until(0.95, served)


async def bind(context: Context) -> None:
    """Bind to a host under the next epoch."""
    await _bind_to(context, context.job.args["host"], force=context.job.args.get("force", False))


async def unbind(context: Context) -> None:
    """Take the VVol from its host, and wait until that host released it."""
    force = context.job.args.get("force", False)
    await context.until(0.5, lambda: context.registry.run(bindings.unbind, context.job.vvol, force), cancellable=False)


async def resize(context: Context) -> None:
    """Take what is missing on every leg, scrub it, commit the size, tell the holders, write the legs' metadata."""
    size = int(context.job.args["size"])
    placement = await get_placement(context)
    assert placement is not None, "a VVol with a task is not deleted"
    await context.settled(but_mine=True)
    if placement.size < size:
        for leg in placement.legs:
            await check_older(context, await _probed(context, leg.datastore))
        await context.registry.run(space.reserve_growth, placement.uuid, size)
        reserved = await get_placement(context)
        assert reserved is not None, "a VVol with a task is not deleted"
        for index, leg in enumerate(reserved.legs):
            await _grow_leg(context, reserved, leg, size, share_of(index, len(reserved.legs), 0.2, 0.8))
        await context.check_cancel()
    await context.registry.run(space.commit_growth, placement.uuid, size)
    context.firm = True
    grown = await get_placement(context)
    assert grown is not None, "a VVol with a task is not deleted"
    for leg in grown.legs:
        await write_metadata(context, grown, leg)


async def _grow_leg(
    context: Context, placement: Placement, leg: LegPlace, size: int, share: tuple[float, float]
) -> None:
    store = await context.store(leg.datastore)
    if store.is_dir:
        length = leg.meta_length + size
        await context.work(store, "file_grow", f"file.grow.{leg.id}", share=share, object=leg.object, size=length)
    else:
        await _scrub(context, placement, leg, share)


async def delete(context: Context) -> None:
    """Wait for every holder, scrub (adopted bytes stay as they are), then give the space back."""
    uuid = context.job.vvol
    if context.job.args.get("force", False):
        await context.registry.run(bindings.give_up_holders, uuid)

    async def released() -> str:
        await context.registry.run(bindings.unbind, uuid)
        hosts = await context.registry.run(bindings.unreleased, uuid)
        if hosts:
            return f"host {', '.join(hosts)} to release it"
        return await context.registry.run(legs.doubts, uuid)

    if await get_placement(context) is None:
        return
    await context.until(0.1, released, cancellable=False)
    await _remove_log(context)
    await _give_back(context)
    await context.registry.run(space.finish_delete, uuid)


async def _remove_log(context: Context) -> None:
    """What a log holds of a VVol that is deleted goes with it; on a host that is away its file is left behind."""
    job = context.job
    host, file = await context.registry.run(logs.left_behind, job.vvol)
    if host not in context.links.connected:
        return
    order = await context.registry.run(orders.outstanding, job.id, "log.remove")
    if order is None:
        args = {"vvol": job.vvol, "file": file}
        order = await context.registry.run(orders.give, job.id, job.vvol, "log.remove", host, "log_remove", args)
    await context.carry_out(order, (0.1, 0.2))


async def _give_back(context: Context) -> None:
    """Scrub what a VVol has, or remove its files; adopted bytes stay as they are."""
    await context.settled(but_mine=True)
    await context.registry.run(space.begin_freeing, context.job.vvol)
    placement = await get_placement(context)
    assert placement is not None, "only this task takes away what the VVol has"
    for index, leg in enumerate(placement.legs):
        await wipe_leg(context, leg, share_of(index, len(placement.legs), 0.2, 0.9))


async def wipe_leg(context: Context, leg: LegPlace, share: tuple[float, float]) -> None:
    """Scrub what a leg has, or remove its file, once nobody names it any more; adopted bytes stay as they are."""
    store = await context.store(leg.datastore)
    if store.is_dir and not leg.adopted:
        await context.work(store, "file_remove", f"file.remove.{leg.id}", object=leg.object)
    elif leg.slot is not None:
        await _write_directory(context, store, leg.slot)
        ranges = [list(piece) for piece in leg.freeing]
        if ranges:
            await context.work(store, "scrub", f"free.scrub.{leg.id}", share=share, ranges=ranges)


async def probe(context: Context) -> None:
    """Have a filter look at a datastore that was declared or changed."""
    store = await context.store(context.job.args["datastore"])
    host = await context.host_for(store)
    await context.links.probe(store.name, host)


async def clear_fault(context: Context) -> None:
    """The operator accepts what failed syncs may have lost: filters clear what is listed no more."""
    name = context.job.args["datastore"]
    revision, hosts = await context.registry.run(faults.clear, name)

    async def heard() -> str:
        late = [host for host in hosts if not context.links.runs(host, revision)]
        return f"host {', '.join(late)} to hear of it" if late else ""

    await context.until(0.5, heard, cancellable=False)


async def undo_bind(context: Context, error: str) -> None:
    """It stays where it is: what was to be drained for the move is logged again."""
    del error
    await context.registry.run(logs.resume, context.job.vvol)


async def undo_create(context: Context, error: str) -> None:
    """A VVol whose creation failed stays visible, with the reason, until it is deleted or tried again."""
    await context.registry.run(space.failed, context.job.vvol, error)


async def undo_resize(context: Context, error: str) -> None:
    """Give back what growing had taken, once nothing writes on it any more."""
    await context.settled()
    await context.registry.run(space.drop_growth, context.job.vvol)


BODIES: dict[str, Body] = {
    "create": create,
    "bind": bind,
    "unbind": unbind,
    "resize": resize,
    "delete": delete,
    "probe": probe,
    "clear-fault": clear_fault,
}
UNDO = {"create": undo_create, "bind": undo_bind, "resize": undo_resize}
