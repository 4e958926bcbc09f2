"""kind file: one file holds extents of many VVols. It is created, allocated, when it is missing."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from nbdvvol.datastores.base import allocate, broken, sync_folder
from nbdvvol.datastores.single import SingleStore
from nbdvvol.model.errors import Code, NvError


class FileStore(SingleStore):
    """A datastore that is one file."""

    block = False
    mistaken = "is a block device", "use kind: block"

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
