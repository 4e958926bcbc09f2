"""kind block: a disk, partition or LUN. Never created, never grown by us; its size is what the device says."""

from __future__ import annotations

import os

from nbdvvol.datastores.base import OpenObject, broken, open_path, path_direct_works
from nbdvvol.datastores.file import no_files, no_name
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.link import DatastoreSpec


class BlockStore:
    """A datastore that is one block device."""

    def __init__(self, spec: DatastoreSpec, farm: str) -> None:
        self.spec = spec
        self._farm = farm

    def open(self, name: str, *, may_read_only: bool = False) -> OpenObject:
        """Open the device."""
        no_name(self.spec, name)
        found = open_path(self.spec, self.spec.path, self._farm, may_read_only=may_read_only)
        if not found.spec.block:
            os.close(found.fd)
            raise NvError(
                Code.INVALID, f"datastore {self.spec.name}: {self.spec.path} is no block device", "use kind: file"
            )
        return found

    def prepare(self, create_size: int) -> None:
        """A device is there or not."""
        del create_size

    def direct_works(self) -> bool:
        """Whether O_DIRECT can be used on the device."""
        return path_direct_works(self.spec.path)

    def create(self, name: str, size: int) -> None:
        """Not this kind."""
        raise no_files(self.spec)

    def grow(self, name: str, size: int) -> None:
        """Not this kind."""
        raise no_files(self.spec)

    def remove(self, name: str) -> None:
        """Not this kind."""
        raise no_files(self.spec)

    def size(self, name: str) -> int:
        """Bytes of the device."""
        no_name(self.spec, name)
        try:
            fd = os.open(self.spec.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise broken(self.spec, self.spec.path, error) from error
        try:
            return os.lseek(fd, 0, os.SEEK_END)
        finally:
            os.close(fd)
