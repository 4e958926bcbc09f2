"""Whether the registry is older than a datastore: looked at before control takes space there.

A registry that was put back from a backup may call extents free that hold what it does not know of. Its directory, and
the labels that are written whenever a VVol grows or is attached as a mirror, show that. Looked at once a datastore by
each process of control: from then on it is this registry that changes them.
"""

from __future__ import annotations

from nbdvvol.control.registry import stores
from nbdvvol.control.registry.stores import KnownLeg, Store
from nbdvvol.control.tasks import Context
from nbdvvol.datastores import format as disk
from nbdvvol.model.errors import Code, NvError

PIECE_BYTES = 16 * disk.PAGE
"""Of the directory, read at once; slots are taken from the lowest, so behind an empty piece there is nothing."""


async def check_older(context: Context, store: Store) -> None:
    """Raise STALE when a formatted datastore tells of legs, or of changes of legs, that the registry does not know."""
    if store.is_dir or store.use != "formatted" or store.name in context.looked_at:
        return
    async with context.store_lock(store.name):
        before = await context.registry.run(stores.known_legs, store.name)
        entries = await _directory(context, store, before)
        labels = {
            slot: label for slot, entry in entries.items() if (label := await _label(context, store, slot, entry))
        }
    after = await context.registry.run(stores.known_legs, store.name)
    for slot, entry in entries.items():
        mine = [leg for known in (before, after) if (leg := known.get(slot)) and leg.is_at(entry)]
        name = f"leg {entry.leg} of VVol {entry.vvol}"
        if not mine:  # one that comes or goes meanwhile is in one of them
            raise _older(store, f"its directory names {name}, which the registry does not know")
        label, leg = labels.get(slot), mine[-1]
        if label is not None and label.vvol == entry.vvol and _newer(label, leg):
            raise _older(
                store,
                f"the label of {name} ({leg.name}) has epoch {label.epoch}, generation {label.generation}; "
                f"the registry knows epoch {leg.epoch}, generation {leg.generation}",
            )
    context.looked_at.add(store.name)


def _newer(label: disk.Label, leg: KnownLeg) -> bool:
    return label.epoch > leg.epoch or label.generation > leg.generation


def _older(store: Store, what: str) -> NvError:
    return NvError(
        Code.STALE,
        f"datastore {store.name}: {what}: nothing is placed there by a registry that is older than the datastore",
        "stop control, then restore the newer registry.db, or rebuild it: nbdvvol registry rebuild -f FARM.yaml",
    )


async def _directory(context: Context, store: Store, known: dict[int, KnownLeg]) -> dict[int, disk.Entry]:
    """What the directory names. A damaged entry is for a rebuild to look at."""
    header = disk.decode_header(bytes.fromhex(store.header) * 2)
    entries: dict[int, disk.Entry] = {}
    for at in range(0, header.directory_length, PIECE_BYTES):
        length = min(PIECE_BYTES, header.directory_length - at)
        raw = await _read(context, store, f"older.directory.{store.name}.{at}", header.directory_offset + at, length)
        first = at // disk.PAGE
        entries |= disk.decode_pages(raw, first)[0]
        if disk.is_blank(raw) and all(slot < first * disk.ENTRIES_A_PAGE for slot in known):
            break
    return entries


async def _label(context: Context, store: Store, slot: int, entry: disk.Entry) -> disk.Label | None:
    raw = await _read(context, store, f"older.label.{store.name}.{slot}", entry.offset, 2 * disk.PAGE)
    try:
        return disk.decode_label(raw)
    except NvError:
        return None  # it was being made, or a rebuild has to look at it


async def _read(context: Context, store: Store, key: str, offset: int, length: int) -> bytes:
    result = await context.work(store, "read_meta", key, offset=offset, length=length)
    return bytes.fromhex(result["data"])
