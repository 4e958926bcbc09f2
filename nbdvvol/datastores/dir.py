"""kind dir: a directory (local, or an NFS mount) with one file for each leg.

A new file gets a temporary name until it is allocated and durable, so that a crash leaves no half-made leg.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from pathlib import Path

from nbdvvol.datastores.base import OpenObject, allocate, broken, open_path, path_direct_works, sync_folder
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.link import DatastoreSpec

_NAME_BYTES_MAX = 240


class DirStore:
    """A datastore that is a directory."""

    def __init__(self, spec: DatastoreSpec, farm: str) -> None:
        self.spec = spec
        self._farm = farm

    def open(self, name: str, *, may_read_only: bool = False) -> OpenObject:
        """Open one file of the directory; a symbolic link is refused."""
        path = self._path(name)
        found = open_path(self.spec, path, self._farm, may_read_only=may_read_only, follow=False)
        if found.spec.block:
            os.close(found.fd)
            raise NvError(Code.INVALID, f"datastore {self.spec.name}: {path} is a block device", "use kind: block")
        return found

    def prepare(self, create_size: int) -> None:
        """Check that the directory is there; it is never made, or a missing mount would go unseen."""
        del create_size
        if not Path(self.spec.path).is_dir():
            raise broken(self.spec, self.spec.path, OSError(errno.ENOENT, os.strerror(errno.ENOENT)))

    def direct_works(self) -> bool:
        """Whether O_DIRECT can be used on files here: tried on a file without a name."""
        try:
            with tempfile.TemporaryFile(dir=self.spec.path) as probe:
                probe.write(bytes(64 << 10))
                probe.flush()
                return path_direct_works(f"/proc/self/fd/{probe.fileno()}")
        except OSError:
            return False

    def create(self, name: str, size: int) -> None:
        """A fully allocated file of zeros; it is all there or not at all."""
        path = self._path(name)
        if Path(path).exists():
            have = self.size(name)
            if have != size:
                raise NvError(Code.EXISTS, f"datastore {self.spec.name}: {path} has {have} bytes already, not {size}")
            return
        fresh = str(Path(path).with_name(f".{name}.new"))
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(fresh)  # noqa: PTH108
            fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise broken(self.spec, fresh, error) from error
        try:
            allocate(self.spec, path, fd, size)
            os.rename(fresh, path)  # noqa: PTH104
            sync_folder(path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(fresh)  # noqa: PTH108
            raise
        finally:
            os.close(fd)

    def grow(self, name: str, size: int) -> None:
        """Make a file longer, allocated; never shorter."""
        path = self._path(name)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise broken(self.spec, path, error) from error
        try:
            allocate(self.spec, path, fd, size)
        finally:
            os.close(fd)

    def remove(self, name: str) -> None:
        """Remove a file. Repeating it is fine."""
        path = self._path(name)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)  # noqa: PTH108
            sync_folder(path)
        except OSError as error:
            raise broken(self.spec, path, error) from error

    def list(self) -> list[tuple[str, int]]:
        """Names and sizes of the files in it."""
        try:
            with os.scandir(self.spec.path) as entries:
                files = [one for one in entries if one.is_file(follow_symlinks=False)]
                found = [(one.name, one.stat(follow_symlinks=False).st_size) for one in files]
        except OSError as error:
            raise broken(self.spec, self.spec.path, error) from error
        return sorted(found)

    def size(self, name: str) -> int:
        """Bytes of a file."""
        path = self._path(name)
        try:
            return Path(path).lstat().st_size
        except OSError as error:
            raise broken(self.spec, path, error) from error

    def _path(self, name: str) -> str:
        """The file's path; the name comes from outside and must stay inside the directory."""
        good = name not in ("", ".", "..") and "/" not in name and "\0" not in name
        if not good or len(name.encode()) > _NAME_BYTES_MAX:
            raise NvError(
                Code.INVALID,
                f"datastore {self.spec.name}: {name!r} cannot be a file's name",
                f"use 1..{_NAME_BYTES_MAX} bytes without a slash",
            )
        return str(Path(self.spec.path) / name)
