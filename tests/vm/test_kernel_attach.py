"""The kernel's own nbd driver, attached by netlink from the project's Python inside a guest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from tests.vm.farm import DISK_BYTES, GuestFarm
from tests.vm.guest import HOST, Guest
from tests.vm.shell import Shell
from tests.vm.writer import Writer, assert_no_io_errors, make_file_system, remount

pytestmark = pytest.mark.timeout(600)
IDENTITY = "0b9ce6e2-6f0c-4c3e-9c58-6f5a3e0f6b11"
CONNECTIONS = 3


@pytest.fixture
def farm() -> Iterator[GuestFarm]:
    made = GuestFarm()
    with made:
        made.start()
        yield made


def device_size(guest: Guest) -> int:
    return 512 * int(guest.check("cat /sys/block/nbd0/size"))


def restart(farm: GuestFarm) -> None:
    farm.kill_everything()
    time.sleep(1.0)
    farm.start()


def test_netlink_attach_survives_restarts_and_follows_the_size(farm: GuestFarm, boot: Callable[..., Guest]) -> None:
    guest = boot()
    shell = Shell(guest)
    uri = f"nbd://{HOST}:{farm.port}/vm1/net"
    assert guest.run("test -e /sys/module/nbd").status == 1, "attach is to load the driver by itself"
    record = shell("attach", uri, IDENTITY, CONNECTIONS)
    assert record.get("device") == "/dev/nbd0", record
    assert (record["size"], record["vvol"]) == (DISK_BYTES, "vm1/net")
    assert device_size(guest) == DISK_BYTES
    assert guest.check("cat /sys/block/nbd0/backend").strip() == IDENTITY
    assert guest.check("ls /sys/block/nbd0/mq").split() == ["0", "1"], "a queue for each socket, at most one a CPU"

    make_file_system(guest, "/dev/nbd0", "/mnt/net")
    writer = Writer(guest, "/mnt/net")
    writer.wait_for(3)
    restart(farm)  # while the guest writes
    writer.wait_for(writer.count() + 3)
    # the driver's receive thread of a dead socket may take a fresh one down with it: then that is replaced too
    assert guest.check("dmesg").count("reconnected socket") >= CONNECTIONS

    farm.grow("net", 2 * DISK_BYTES)
    guest.wait(f"test $(cat /sys/block/nbd0/size) = {2 * DISK_BYTES // 512}", 20)
    guest.check("resize2fs /dev/nbd0", 60)
    assert int(guest.check("df --output=size -B1 /mnt/net | tail -n1")) > DISK_BYTES

    guest.check(f"kill -KILL {record['keeper_pid']}")
    in_use = shell("detach", "vm1/net")
    assert in_use.get("code") == "BUSY", in_use
    again = shell("keep", uri, IDENTITY, CONNECTIONS)
    assert (again.get("device"), again.get("size")) == ("/dev/nbd0", 2 * DISK_BYTES), again
    assert again["keeper_pid"] != record["keeper_pid"]
    restart(farm)  # the new keeper takes over the sockets of the killed one
    writer.wait_for(writer.count() + 3)
    writer.stop()

    remount(guest, "/dev/nbd0", "/mnt/net")
    assert writer.verify() >= 9
    guest.check("umount /mnt/net")
    detached = shell("detach", "/dev/nbd0")
    assert detached.get("identity") == IDENTITY, detached
    gone = shell("detach", "/dev/nbd0")
    assert gone.get("code") == "NOT_FOUND", gone
    assert device_size(guest) == 0
    assert guest.run(f"test -e /proc/{again['keeper_pid']}").status == 1, "the keeper still runs"
    assert_no_io_errors(guest)


def test_filter_and_kernel_client_on_one_linux_6_1(boot: Callable[..., Guest]) -> None:
    """The data plane needs nothing newer than the guest's kernel, and its unix socket can be a kernel's device."""
    guest = boot(memory_mib=768)
    guest.check("truncate -s 64M /run/disk.img")
    shell = Shell(guest)
    assert shell("listen", "/run/filter.sock") == "listening"
    server = shell("serve", "/run/disk.img", "root")
    uri = "nbd+unix:///root?socket=/run/filter.sock"
    guest.wait(f"timeout 60 nbdinfo --size '{uri}'", 90)  # it starts slowly
    record = shell("keep", uri, IDENTITY, CONNECTIONS)
    assert record.get("device") == "/dev/nbd0", record

    make_file_system(guest, "/dev/nbd0", "/mnt/disk")
    writer = Writer(guest, "/mnt/disk")
    writer.wait_for(3)
    guest.check(f"kill -KILL {server}")
    assert isinstance(shell("serve", "/run/disk.img", "root"), int)
    writer.wait_for(writer.count() + 3)
    writer.stop()
    remount(guest, "/dev/nbd0", "/mnt/disk")
    assert writer.verify() >= 6
    guest.check("fstrim /mnt/disk; umount /mnt/disk")
    assert shell("detach", "root").get("identity") == IDENTITY
    guest.check("e2fsck -fn /run/disk.img", 60)  # the image is what the device was
    assert_no_io_errors(guest)
