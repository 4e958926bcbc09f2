"""A filter's side of a remote datastore without a farm: the data plane, the export, a volume over it, a raw client."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from nbdvvol.dataplane.types import RemoteStats, Run
from nbdvvol.datastores.nbd import RemoteExport
from nbdvvol.model.farm import DatastoreKind, RemoteTls
from nbdvvol.model.link import DatastoreSpec, RemoteSpec
from tests.unit.plane_rig import Client, Rig, running


def spec_of(uri: str, **how: Any) -> DatastoreSpec:
    """The datastore that control would describe."""
    tls = how.pop("tls", None)
    remote = RemoteSpec(**{"connections": 4, "timeout_s": 5.0, "hold_s": 20.0, **how}, tls=tls and RemoteTls(**tls))
    return DatastoreSpec(name="far", kind=DatastoreKind.NBD, path=uri, remote=remote)


class Far:
    """A remote export in use."""

    def __init__(self, rig: Rig, uri: str, *, may_read_only: bool = False, **how: Any) -> None:
        self.rig = rig
        self.told: list[tuple[bool, str]] = []
        self.failed: list[int] = []
        rig.plane.on_sync_failed = lambda _, error: self.failed.append(error)
        opening = RemoteExport.open(rig.plane, spec_of(uri, **how), self._tell, may_read_only=may_read_only)
        self.export = rig.wait(opening, 40)
        self.size = self.export.spec.size

    def _tell(self, up: bool, text: str) -> None:
        self.told.append((up, text))

    def client(
        self, *, style: Any = "structured", timeout_s: float = 30, size: int | None = None, **volume: Any
    ) -> Client:
        """A raw client on a volume that is the whole export, or the first `size` bytes of it."""
        volume.setdefault("block_min", self.export.spec.align)
        size = size or self.size
        number = self.rig.volume(size, [Run(0, size, self.export.number, 0)], **volume)
        return self.rig.connect(number, size, style, block_min=volume["block_min"], timeout_s=timeout_s)

    @property
    def stats(self) -> RemoteStats:
        """The counters now."""
        return self.rig.call(self.export.stats)


@contextlib.contextmanager
def using(uri: str, **how: Any) -> Iterator[Far]:
    """A remote export for the length of a with statement."""
    with running(reactors=2) as rig:
        far = Far(rig, uri, **how)
        try:
            yield far
        finally:
            rig.call(far.export.quit)
