"""A VVol as a guest's disk through QEMU's own NBD client, and another inside the guest by nbd-client over TCP."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lib.procs import need, run
from tests.vm.farm import DISK_BYTES, GuestFarm
from tests.vm.guest import HOST, Guest
from tests.vm.writer import Writer, assert_no_io_errors, make_file_system, remount

pytestmark = pytest.mark.timeout(900)
Boot = Callable[..., Guest]


@pytest.fixture
def farm() -> Iterator[GuestFarm]:
    made = GuestFarm()
    with made:
        made.start()
        yield made


def nbd_client(guest: Guest, farm: GuestFarm, device: str = "/dev/nbd0") -> None:
    """Attach vm1/net inside the guest, over TCP."""
    need("nbd-client", "nbd-client")
    guest.check(f"modprobe nbd; nbd-client {HOST} {farm.port} -N vm1/net {device}")


def test_two_disks_keep_every_byte_through_a_kill_of_the_daemon(farm: GuestFarm, boot: Boot) -> None:
    guest = boot(drives=[farm.drive("disk")])
    assert int(guest.check("blockdev --getsize64 /dev/vda")) == DISK_BYTES
    nbd_client(guest, farm)
    assert int(guest.check("blockdev --getsize64 /dev/nbd0")) == DISK_BYTES

    make_file_system(guest, "/dev/vda", "/mnt/disk")
    make_file_system(guest, "/dev/nbd0", "/mnt/net")
    disk, net = Writer(guest, "/mnt/disk"), Writer(guest, "/mnt/net")
    disk.wait_for(4)
    net.wait_for(4)
    net.stop()
    remount(guest, "/dev/nbd0", "/mnt/net")
    assert net.verify() >= 4
    guest.check("umount /mnt/net; nbd-client -d /dev/nbd0")

    before = disk.count()
    farm.kill_everything()  # while the guest writes
    time.sleep(1.0)
    farm.start()
    disk.wait_for(before + 4)  # QEMU reconnected and sent again what was not answered
    disk.stop()
    remount(guest, "/dev/vda", "/mnt/disk")
    assert disk.verify() >= before + 4

    nbd_client(guest, farm)  # what the other one wrote before the kill is there too
    guest.check("e2fsck -fn /dev/nbd0; mount /dev/nbd0 /mnt/net", 60)
    assert net.verify() >= 4
    guest.check("fstrim /mnt/net; umount /mnt/net /mnt/disk; nbd-client -d /dev/nbd0", 60)
    guest.check("e2fsck -fn /dev/vda", 60)
    assert_no_io_errors(guest)


def test_a_guest_starts_from_a_vvol_and_finds_what_it_wrote(farm: GuestFarm, boot: Boot) -> None:
    image = busybox_disk(farm.folder)
    run([need("qemu-img", "qemu-utils"), "convert", "-n", "-f", "raw", "-O", "raw", image, farm.uri("disk")])
    guest = boot(drives=[farm.drive("disk")], root="/dev/vda")
    assert guest.check("mount").startswith("/dev/vda on / type ext4")
    guest.check("head -c 3000000 /dev/urandom >/etc/blob; sha256sum /etc/blob >/etc/blob.sum; sync")
    guest.power_off()
    farm.stop()
    farm.start()
    guest = boot(drives=[farm.drive("disk")], root="/dev/vda")
    assert guest.check("sha256sum -c /etc/blob.sum").strip() == "/etc/blob: OK"
    assert_no_io_errors(guest)


def busybox_disk(folder: Path) -> Path:
    """An ext4 image of the size of `disk` that holds the least a guest needs."""
    tree = folder / "tree"
    for name in ("bin", "usr/bin", "etc", "proc", "sys", "dev", "tmp", "run", "mnt"):
        (tree / name).mkdir(parents=True)
    shutil.copy(need("busybox", "busybox-static"), tree / "bin/busybox")
    for name in ("sh", "mount", "head", "sha256sum", "sync", "dmesg", "cat"):
        (tree / "bin" / name).symlink_to("busybox")
    (tree / "usr/bin/timeout").symlink_to("/bin/busybox")
    image = folder / "root.img"
    run([need("mke2fs", "e2fsprogs"), "-q", "-t", "ext4", "-d", tree, image, f"{DISK_BYTES >> 10}k"])
    return image
