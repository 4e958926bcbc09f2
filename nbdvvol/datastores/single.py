"""What kinds without files share: the whole datastore is one object, and only the path says which."""

from __future__ import annotations

import os
from typing import ClassVar

from nbdvvol.datastores.base import OpenObject, broken, open_path, path_direct_works
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.link import DatastoreSpec


class SingleStore:
    """A datastore that is one file or one device; a kind adds `prepare` and says what it opens."""

    block: ClassVar[bool]
    """Whether it opens block devices, or regular files."""
    mistaken: ClassVar[tuple[str, str]]
    """What to say of a path of the other sort, and what helps."""

    def __init__(self, spec: DatastoreSpec, farm: str) -> None:
        self.spec = spec
        self._farm = farm

    def open(self, name: str, *, may_read_only: bool = False) -> OpenObject:
        """Open the object."""
        no_name(self.spec, name)
        found = open_path(self.spec, self.spec.path, self._farm, may_read_only=may_read_only)
        if found.spec.block != self.block:
            os.close(found.fd)
            what, hint = self.mistaken
            raise NvError(Code.INVALID, f"datastore {self.spec.name}: {self.spec.path} {what}", hint)
        return found

    def direct_works(self) -> bool:
        """Whether O_DIRECT can be used here."""
        return path_direct_works(self.spec.path)

    def create(self, name: str, size: int) -> None:
        """Not this kind."""
        raise self._no_files()

    def grow(self, name: str, size: int) -> None:
        """Not this kind."""
        raise self._no_files()

    def remove(self, name: str) -> None:
        """Not this kind."""
        raise self._no_files()

    def list(self) -> list[tuple[str, int]]:
        """Not this kind: it is one object."""
        raise self._no_files()

    def size(self, name: str) -> int:
        """Bytes of the object."""
        no_name(self.spec, name)
        try:
            fd = os.open(self.spec.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise broken(self.spec, self.spec.path, error) from error
        try:
            return os.lseek(fd, 0, os.SEEK_END)
        finally:
            os.close(fd)

    def _no_files(self) -> NvError:
        return NvError(
            Code.UNSUPPORTED, f"datastore {self.spec.name} is of kind {self.spec.kind}; only kind dir holds files"
        )


def no_name(spec: DatastoreSpec, name: str) -> None:
    """Refuse an object name where the datastore is one object."""
    if name:
        raise NvError(Code.INVALID, f"datastore {spec.name} is one object; it has no object {name!r} inside")
