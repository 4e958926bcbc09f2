"""kind file: one file holds extents of many VVols. It is created, allocated, when it is missing."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from nbdvvol.datastores.base import OpenObject, allocate, broken, open_path, path_direct_works, sync_folder
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.link import DatastoreSpec


class FileStore:
    """A datastore that is one file."""

    def __init__(self, spec: DatastoreSpec, farm: str) -> None:
        self.spec = spec
        self._farm = farm

    def open(self, name: str, *, may_read_only: bool = False) -> OpenObject:
        """Open the file."""
        no_name(self.spec, name)
        found = open_path(self.spec, self.spec.path, self._farm, may_read_only=may_read_only)
        if found.spec.block:
            os.close(found.fd)
            raise NvError(
                Code.INVALID, f"datastore {self.spec.name}: {self.spec.path} is a block device", "use kind: block"
            )
        return found

    def prepare(self, create_size: int) -> None:
        """Create the file (and its folder, one level) or grow it to `create_size` bytes."""
        path = self.spec.path
        if not create_size:
            return
        try:
            Path(path).parent.mkdir(exist_ok=True)
            fd, fresh = self._create_or_open(path)
        except OSError as error:
            raise broken(self.spec, path, error) from error
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise NvError(Code.INVALID, f"datastore {self.spec.name}: {path} is no regular file", "use kind: block")
            allocate(self.spec, path, fd, create_size)
            sync_folder(path)
        except BaseException:
            if fresh:
                os.unlink(path)  # noqa: PTH108
            raise
        finally:
            os.close(fd)

    def _create_or_open(self, path: str) -> tuple[int, bool]:
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), True
        except FileExistsError:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC), False

    def direct_works(self) -> bool:
        """Whether O_DIRECT can be used on the file."""
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
        """Bytes of the file."""
        no_name(self.spec, name)
        try:
            return Path(self.spec.path).stat().st_size
        except OSError as error:
            raise broken(self.spec, self.spec.path, error) from error


def no_name(spec: DatastoreSpec, name: str) -> None:
    """Refuse an object name where the datastore is one object."""
    if name:
        raise NvError(Code.INVALID, f"datastore {spec.name} is one object; it has no object {name!r} inside")


def no_files(spec: DatastoreSpec) -> NvError:
    """The error for file work on a datastore without files."""
    return NvError(Code.UNSUPPORTED, f"datastore {spec.name} is of kind {spec.kind}; only kind dir holds files")
