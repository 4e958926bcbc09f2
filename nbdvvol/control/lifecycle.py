"""What each kind of task does: the life of a VVol, step by step. Every step can be repeated after a crash."""

from __future__ import annotations

import re

from nbdvvol.control.registry import bindings, faults, space, stores
from nbdvvol.control.registry.space import Placement
from nbdvvol.control.registry.stores import Store
from nbdvvol.control.tasks import Body, Context
from nbdvvol.datastores import format as disk
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.resources import VVolState


def file_name(full_name: str, uuid: str) -> str:
    """The file of a leg in a `dir`: readable, safe, unique."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", full_name.replace("/", "-"))
    return f"{safe[:120]}-{uuid}.img"


async def _placement(context: Context) -> Placement | None:
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


async def _place(context: Context, placement: Placement) -> None:
    store = await _probed(context, placement.datastore)
    if placement.adopt is not None:
        await context.say(0.2, f"looks at what to adopt on {store.name}")
        if store.is_dir:
            file = placement.adopt.file or ""
            stat = await context.work(store, "file_stat", "adopt.stat", object=file)
            await context.registry.run(space.place_adopted, placement.uuid, int(stat["size"]), "")
        else:
            found = await context.links.probe(store.name, await context.host_for(store))
            header = found.get("header", "")
            await context.registry.run(space.place_adopted, placement.uuid, int(found["size"]), header)
    elif store.is_dir:
        await context.registry.run(space.place_file, placement.uuid, file_name(placement.name, placement.uuid))
    else:
        await _format(context, store.name)
        await context.registry.run(space.place, placement.uuid)


async def _scrub(context: Context, placement: Placement, share: tuple[float, float]) -> None:
    """Zeros over everything this VVol took that may hold another's bytes."""
    if placement.scrub:
        store = await context.store(placement.datastore)
        ranges = [list(piece) for piece in placement.scrub]
        await context.work(store, "scrub", "scrub", share=share, ranges=ranges)
    await context.registry.run(space.scrubbed, placement.uuid)


async def _write_metadata(context: Context, placement: Placement) -> None:
    """The leg's map copy, its label, then its directory entry: each names only what is there already."""
    if placement.slot is None:
        return
    store = await context.store(placement.datastore)
    layout = disk.region_layout(placement.meta_length, placement.size)
    label, copy = await context.registry.run(space.stamp, placement.uuid)
    at = placement.meta_offset
    map_at = at + layout.maps[copy.version % 2]
    await context.work(store, "write_meta", "meta.map", offset=map_at, data=disk.encode_map(copy).hex())
    label_at = at + layout.labels[label.sequence % 2]
    await context.work(store, "write_meta", "meta.label", offset=label_at, data=disk.encode_label(label).hex())
    await _write_directory(context, store, placement.slot)


async def _write_directory(context: Context, store: Store, slot: int) -> None:
    async with context.store_lock(store.name):
        offset, page = await context.registry.run(stores.directory_page, store.name, slot)
        await context.work(store, "write_meta", "meta.directory", offset=offset, data=page.hex())


async def create(context: Context) -> None:
    """Place, scrub, write metadata (or make the file), be ready, then bind to the VM's host."""
    placement = await _placement(context)
    if placement is not None and placement.state == VVolState.DELETING:
        await _give_back(context)
        await context.registry.run(space.start_over, context.job.vvol, **context.job.args["instead"])
        placement = await _placement(context)
    if placement is None:
        return
    if placement.state == VVolState.CREATING:
        await context.settled(but_mine=True)
        if not placement.placed:
            await _place(context, placement)
        await _make(context)
        await context.registry.run(space.ready, placement.uuid)
    home = await context.registry.run(bindings.home, placement.uuid)
    await _bind_to(context, home, force=False)


async def _make(context: Context) -> None:
    placement = await _placement(context)
    assert placement is not None and placement.placed, "a VVol is placed before it is made"
    store = await context.store(placement.datastore)
    if placement.adopted:
        return
    if store.is_dir:
        await context.say(0.3, "makes its file")
        where = {"object": placement.object, "size": placement.size}
        await context.work(store, "file_create", "file.create", share=(0.3, 0.9), **where)
        return
    await _scrub(context, placement, (0.3, 0.8))
    await context.check_cancel()
    await _write_metadata(context, placement)


async def _bind_to(context: Context, host: str, *, force: bool) -> None:
    """Bind, then wait for the host's word while it is connected."""
    uuid = context.job.vvol
    await context.until(0.9, lambda: context.registry.run(bindings.bind, uuid, host, force))
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
    """Take what is missing, scrub it, commit the size, tell the holders, write the leg's metadata."""
    size = int(context.job.args["size"])
    placement = await _placement(context)
    assert placement is not None, "a VVol with a task is not deleted"
    await context.settled(but_mine=True)
    store = await _probed(context, placement.datastore)
    if placement.size < size and store.is_dir:
        await context.registry.run(space.reserve_file_growth, placement.uuid, size)
        await context.work(store, "file_grow", "file.grow", share=(0.2, 0.8), object=placement.object, size=size)
    elif placement.size < size:
        await context.registry.run(space.reserve_growth, placement.uuid, size)
        reserved = await _placement(context)
        assert reserved is not None, "a VVol with a task is not deleted"
        await _scrub(context, reserved, (0.2, 0.8))
        await context.check_cancel()
    await context.registry.run(space.commit_growth, placement.uuid, size)
    context.firm = True
    grown = await _placement(context)
    assert grown is not None, "a VVol with a task is not deleted"
    await _write_metadata(context, grown)


async def delete(context: Context) -> None:
    """Wait for every holder, scrub (adopted bytes stay as they are), then give the space back."""
    uuid = context.job.vvol
    if context.job.args.get("force", False):
        await context.registry.run(bindings.give_up_holders, uuid)

    async def released() -> str:
        await context.registry.run(bindings.unbind, uuid)
        hosts = await context.registry.run(bindings.unreleased, uuid)
        return f"host {', '.join(hosts)} to release it" if hosts else ""

    if await _placement(context) is None:
        return
    await context.until(0.1, released, cancellable=False)
    await _give_back(context)
    await context.registry.run(space.finish_delete, uuid)


async def _give_back(context: Context) -> None:
    """Scrub what a VVol has, or remove its file; adopted bytes stay as they are."""
    await context.settled(but_mine=True)
    await context.registry.run(space.begin_freeing, context.job.vvol)
    placement = await _placement(context)
    assert placement is not None, "only this task takes away what the VVol has"
    store = await context.store(placement.datastore)
    if placement.placed and not placement.adopted and store.is_dir:
        await context.work(store, "file_remove", "file.remove", object=placement.object)
    elif placement.slot is not None:
        await _write_directory(context, store, placement.slot)
        ranges = [list(piece) for piece in placement.freeing]
        if ranges:
            await context.work(store, "scrub", "free.scrub", share=(0.2, 0.9), ranges=ranges)


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
UNDO = {"create": undo_create, "resize": undo_resize}
