"""What `nbdvvol doctor` looks at: can this machine run a farm, and how well. Changes nothing."""

from __future__ import annotations

import asyncio
import os
import platform
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from nbdvvol.model.base import Model
from nbdvvol.model.check import place_of
from nbdvvol.model.errors import NvError
from nbdvvol.model.farm import CONNECTIONS_DEFAULT, DatastoreConfig, DatastoreKind, Farm
from nbdvvol.model.link import DatastoreSpec, remote_spec
from nbdvvol.model.units import format_size
from nbdvvol.nbd.client import ExportInfo
from nbdvvol.nbd.constants import TransmissionFlag

KERNEL_MIN = (6, 1)
MEMLOCK_WANTED = 256 << 20
FILES_WANTED = 4096
POOL_BYTES = 4 << 20


class Finding(Model):
    """One thing looked at. `missing`: nbdvvol cannot work; `slower`: it works without."""

    name: str
    verdict: Literal["ok", "slower", "missing", "absent"]
    value: str
    action: str = ""


def examine(farm: Farm | None) -> list[Finding]:
    """Look at this machine and, when a farm is given, at its datastores here."""
    found = [_kernel(), _io_uring(), _memlock(), _open_files(), *_data_plane(), _nbd_driver()]
    for name, datastore in (farm.datastores if farm else {}).items():
        found.append(_datastore(name, datastore))
    return found


def _kernel() -> Finding:
    release = platform.release()
    match = re.match(r"(\d+)\.(\d+)", release)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    if version >= KERNEL_MIN:
        return Finding(name="kernel", verdict="ok", value=release)
    wanted = ".".join(map(str, KERNEL_MIN))
    return Finding(name="kernel", verdict="missing", value=release, action=f"boot Linux {wanted} or newer")


def _io_uring() -> Finding:
    path = Path("/proc/sys/kernel/io_uring_disabled")
    value = path.read_text().strip() if path.exists() else "0"
    if value == "0":
        return Finding(name="io_uring", verdict="ok", value="allowed")
    who = "nobody" if value == "2" else "only root and the group of kernel.io_uring_group"
    usable = value == "1" and os.geteuid() == 0
    action = "" if usable else "sysctl -w kernel.io_uring_disabled=0"
    return Finding(name="io_uring", verdict="ok" if usable else "missing", value=f"allowed to {who}", action=action)


def _memlock() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    value = "unlimited" if soft == resource.RLIM_INFINITY else format_size(soft)
    if soft == resource.RLIM_INFINITY or soft >= MEMLOCK_WANTED or os.geteuid() == 0:
        return Finding(name="locked memory", verdict="ok", value=value)
    action = f"raise it to {format_size(MEMLOCK_WANTED)}: LimitMEMLOCK= in the service, or limits.conf"
    return Finding(name="locked memory", verdict="slower", value=value, action=action)


def _open_files() -> Finding:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= FILES_WANTED:
        return Finding(name="open files", verdict="ok", value=str(hard))
    action = f"raise it to {FILES_WANTED}: LimitNOFILE= in the service"
    return Finding(name="open files", verdict="slower", value=str(hard), action=action)


def _data_plane() -> Iterator[Finding]:
    """Start a reactor for a moment: what works for it will work for the filter."""
    try:
        features = asyncio.run(_features())
    except (ImportError, OSError) as error:
        action = (
            "run `make native`" if isinstance(error, ImportError) else "see kernel, io_uring and locked memory above"
        )
        yield Finding(name="data plane", verdict="missing", value=str(error), action=action)
        return
    yield Finding(name="data plane", verdict="ok", value="a reactor starts and stops")
    for feature, used in features.items():
        yield Finding(
            name=f"data plane: {feature}", verdict="ok" if used else "slower", value="in use" if used else "no"
        )


async def _features() -> dict[str, bool]:
    from nbdvvol.dataplane.plane import Plane
    from nbdvvol.dataplane.types import PlaneConfig

    plane = Plane(PlaneConfig(reactors=1, pool_bytes=POOL_BYTES, connections_max=1))
    try:
        return plane.features()
    finally:
        await plane.close()


def _nbd_driver() -> Finding:
    if Path("/sys/module/nbd").exists():
        return Finding(name="kernel nbd", verdict="ok", value="loaded")
    modprobe = shutil.which("modprobe") or "/sbin/modprobe"
    try:
        there = subprocess.run([modprobe, "-n", "-q", "nbd"], check=False, capture_output=True).returncode == 0
    except OSError:
        there = False
    if there:
        return Finding(name="kernel nbd", verdict="ok", value="can be loaded")
    action = "only `nbdvvol attach` needs it: install a kernel with the nbd module; QEMU attaches without it"
    return Finding(name="kernel nbd", verdict="absent", value="this kernel has no nbd driver", action=action)


def _datastore(name: str, datastore: DatastoreConfig) -> Finding:
    title = f"datastore {name}"
    if datastore.kind is DatastoreKind.NBD:
        return _remote(title, name, datastore)
    path = Path(datastore.path or "")
    if not path.exists():
        if datastore.kind is DatastoreKind.FILE and datastore.size is not None:
            return _room(title, path, datastore.size)
        action = "create or mount it, or correct the path"
        return Finding(name=title, verdict="missing", value=f"{path} does not exist", action=action)
    if not os.access(path, os.R_OK | os.W_OK):
        return Finding(
            name=title, verdict="missing", value=f"{path} cannot be written", action="run as its owner or root"
        )
    if datastore.kind is DatastoreKind.DIR:
        free = shutil.disk_usage(path).free
        return Finding(name=title, verdict="ok", value=f"{path}: {_about(free)} free")
    return Finding(name=title, verdict="ok", value=f"{path}: {_direct(path)}")


def _remote(title: str, name: str, datastore: DatastoreConfig) -> Finding:
    """Connect to the server as a filter would."""
    try:
        info = asyncio.run(_inspect(name, datastore))
    except (ImportError, OSError) as error:
        return Finding(name=title, verdict="missing", value=str(error), action="see data plane above")
    except NvError as error:
        return Finding(name=title, verdict="missing", value=error.message, action=error.hint)
    many = bool(info.flags & TransmissionFlag.CAN_MULTI_CONN)
    count = (datastore.connections or CONNECTIONS_DEFAULT) if many else 1
    form = "extended headers" if info.extended else "structured replies" if info.structured else "simple replies"
    value = f"{datastore.uri}: {_about(info.size)}, {form}, {count} connection{'s' * (count > 1)}"
    return Finding(name=title, verdict="ok", value=value)


async def _inspect(name: str, datastore: DatastoreConfig) -> ExportInfo:
    from nbdvvol.dataplane.plane import Plane
    from nbdvvol.dataplane.types import PlaneConfig
    from nbdvvol.datastores.nbd import inspect

    spec = DatastoreSpec(name=name, kind=datastore.kind, path=place_of(datastore), remote=remote_spec(datastore))
    plane = Plane(PlaneConfig(reactors=1, pool_bytes=POOL_BYTES, connections_max=1))
    try:
        return await inspect(plane, spec)
    finally:
        await plane.close()


def _room(title: str, path: Path, size: int) -> Finding:
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    value = f"{path} will be created with {format_size(size)}; {_about(free)} are free there"
    if free >= size:
        return Finding(name=title, verdict="ok", value=value)
    return Finding(name=title, verdict="missing", value=value, action="make room, or give the datastore a smaller size")


def _about(size: int) -> str:
    return f"{size / (1 << 30):.1f}GiB"


def _direct(path: Path) -> str:
    from nbdvvol.datastores.base import direct_alignment

    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        return f"no O_DIRECT ({error.strerror}); buffered only"
    try:
        return f"O_DIRECT at multiples of {direct_alignment(fd, path.is_block_device())} bytes"
    except OSError as error:
        return f"no O_DIRECT ({error.strerror}); buffered only"
    finally:
        os.close(fd)
