"""Places that hold bytes: one module a kind, behind the Store protocol of base.py."""

from __future__ import annotations

from collections.abc import Callable

from nbdvvol.datastores.base import Store
from nbdvvol.datastores.block import BlockStore
from nbdvvol.datastores.dir import DirStore
from nbdvvol.datastores.file import FileStore
from nbdvvol.datastores.nbd import NbdStore
from nbdvvol.model.farm import DatastoreKind
from nbdvvol.model.link import DatastoreSpec

_KINDS: dict[DatastoreKind, Callable[[DatastoreSpec, str], Store]] = {
    DatastoreKind.FILE: FileStore,
    DatastoreKind.DIR: DirStore,
    DatastoreKind.BLOCK: BlockStore,
    DatastoreKind.NBD: NbdStore,
}


def store_of(spec: DatastoreSpec, farm: str) -> Store:
    """The store of a datastore, opened for the farm with this identity."""
    return _KINDS[spec.kind](spec, farm)
