"""kind block: a disk, partition or LUN. Never created, never grown by us; its size is what the device says."""

from __future__ import annotations

from nbdvvol.datastores.single import SingleStore


class BlockStore(SingleStore):
    """A datastore that is one block device."""

    block = True
    mistaken = "is no block device", "use kind: file"

    def prepare(self, create_size: int) -> None:
        """A device is there or not."""
        del create_size
