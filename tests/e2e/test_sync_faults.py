"""A sync that really fails (a loop device whose backing file system is full): FLUSH fails until the operator's word,
whatever is killed and restarted meanwhile, and nobody else is concerned.

Needs root and the kernel's loop driver."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lib import nbdwords as w
from tests.lib.farm import Farm
from tests.lib.nbdwords import MiB
from tests.lib.pattern import pattern
from tests.lib.procs import need, run, short_dir, wait_until
from tests.lib.rawio import NbdError

pytestmark = pytest.mark.timeout(240)
MakeFarm = Callable[..., Farm]
DISK_BYTES = 8 * MiB


class Lun:
    """A block device on a file system of its own, which can be filled up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "lun.img"
        run([need("mount", "mount"), "-t", "tmpfs", "-o", "size=48m", "lun", folder])
        with self.file.open("wb") as file:
            file.truncate(24 * MiB)
        self.device = Path(run([need("losetup", "mount"), "--show", "--find", self.file]).stdout.strip())

    def fill_up(self, offset: int, length: int) -> None:
        """These bytes have no place any more, nor can they get one."""
        run([need("fallocate", "util-linux"), "--punch-hole", "-o", str(offset), "-l", str(length), self.file])
        ballast = (self.folder / "ballast").open("wb", buffering=0)
        with ballast, pytest.raises(OSError, match="No space"):
            while True:
                ballast.write(bytes(MiB))

    def make_room(self) -> None:
        """The storage is sound again."""
        (self.folder / "ballast").unlink()

    def remove(self) -> None:
        run([need("losetup", "mount"), "--detach", self.device])
        run([need("umount", "mount"), self.folder])


@pytest.fixture
def lun() -> Iterator[Lun]:
    folder = short_dir()
    lun = Lun(folder)
    try:
        yield lun
    finally:
        lun.remove()
        shutil.rmtree(folder)


def spec_of(lun: Lun) -> dict[str, Any]:
    return {
        "datastores": {
            "san": {"kind": "block", "path": str(lun.device)},
            "main": {"kind": "file", "path": "main.img", "size": "16MiB"},
        },
        "vms": {
            "vm1": {
                "vvols": {
                    "disk": {"size": DISK_BYTES, "datastore": "san"},
                    "safe": {"size": "4MiB", "datastore": "main"},
                }
            }
        },
    }


def flushes(farm: Farm, name: str) -> bool:
    """Whether a new client's FLUSH succeeds, after a write that does."""
    with farm.open(name, wait_s=20) as nbd:
        nbd.write(0, pattern(3, 0, 4096))
        answer = nbd.call(w.CMD_FLUSH)
        assert answer.error in (0, errno.EIO)
        return answer.error == 0


def kill(farm: Farm, *, control: bool = False, local: bool = False) -> None:
    for process in ([farm.control] if control else []) + ([farm.filters["local"]] if local else []):
        assert process is not None
        process.popen.send_signal(signal.SIGKILL)
        process.popen.wait(10)


def problems(farm: Farm) -> set[str]:
    return {problem["code"] for problem in farm.api("GET", "/v1/status")["problems"]}


def test_a_failed_sync_stays_failed_over_every_restart_until_the_operator_clears_it(lun: Lun, farms: MakeFarm) -> None:
    farm = farms(spec_of(lun))
    farm.start_split()
    region = farm.vvol("vm1/disk")["legs"][0]["regions"][0]
    with farm.open("disk") as nbd:
        nbd.write(0, pattern(1, 0, DISK_BYTES))
        nbd.flush()
        kill(farm, control=True)  # nobody is there to be told
        lun.fill_up(region["object_offset"], region["length"])
        nbd.write(0, pattern(2, 0, DISK_BYTES))
        for _ in range(2):
            with pytest.raises(NbdError) as failed:
                nbd.flush()
            assert failed.value.error == errno.EIO
        lun.make_room()
        with pytest.raises(NbdError):
            nbd.flush()  # although the storage would take it now
    memory = farm.run / "sync-faults.json"
    wait_until("it is written down", memory.exists)
    kill(farm, local=True)

    farm.start_control()
    farm.start_filter()
    assert not flushes(farm, "disk"), "a new process called lost writes clean"
    assert flushes(farm, "safe"), "another datastore has no part in it"
    wait_until("control remembers it", lambda: not memory.exists())
    assert problems(farm) == {"SYNC_FAILED"}

    kill(farm, control=True, local=True)
    farm.start_control()
    farm.start_filter()
    assert not flushes(farm, "disk")
    farm.filters["local"].stop()
    farm.start_filter()
    assert not flushes(farm, "disk"), "a clean stop clears nothing"

    with farm.open("disk") as nbd:
        assert farm.cli("datastore", "clear-fault", "san").stdout.startswith("san: fault cleared")
        nbd.write(0, pattern(4, 0, DISK_BYTES))
        nbd.flush()
    assert problems(farm) == set()
    kill(farm, local=True)
    farm.start_filter()
    with farm.open("disk", wait_s=20) as nbd:
        nbd.flush()
        assert nbd.read(0, DISK_BYTES) == pattern(4, 0, DISK_BYTES)
    fd = os.open(lun.device, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(fd, DISK_BYTES, region["object_offset"]) == pattern(4, 0, DISK_BYTES)
    finally:
        os.close(fd)
