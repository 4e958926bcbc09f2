"""The kernel's own nbd driver, attached by netlink from the project's Python inside a guest.

Both tests share one guest and one Python in it, because those are slow to start. Each has a VVol identity, a
mount point and a device of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vm.farm import DISK_BYTES, GuestFarm
from tests.vm.guest import HOST, Guest
from tests.vm.shell import Shell
from tests.vm.writer import Writer, assert_no_io_errors, make_file_system, remount

pytestmark = pytest.mark.timeout(900)
IDENTITIES = ("0b9ce6e2-6f0c-4c3e-9c58-6f5a3e0f6b11", "5f6a2f0e-8f3b-4a56-8e2b-0d7c9b1a4e22")
CONNECTIONS = 3


@pytest.fixture(scope="module")
def shell(initramfs: Path) -> Iterator[Shell]:
    """A guest that runs the project's Python; it has no nbd driver loaded at first."""
    with Guest(initramfs, memory_mib=768, cpus=2) as guest:
        yield Shell(guest)


@pytest.fixture
def farm() -> Iterator[GuestFarm]:
    made = GuestFarm()
    with made:
        made.start()
        yield made


def attached(record: dict[str, Any]) -> str:
    """The device of a record, /dev/nbdN; fails when it is an error."""
    assert "device" in record, record
    return str(record["device"])


def sysfs(guest: Guest, device: str, name: str) -> str:
    return guest.check(f"cat /sys/block/{Path(device).name}/{name}").strip()


def restart(farm: GuestFarm) -> None:
    farm.kill_everything()
    time.sleep(1.0)
    farm.start()


def test_netlink_attach_survives_restarts_and_follows_the_size(shell: Shell, farm: GuestFarm) -> None:
    guest = shell.guest
    uri = f"nbd://{HOST}:{farm.port}/vm1/net"
    assert guest.run("test -e /sys/module/nbd").status == 1, "attach is to load the driver by itself"
    record = shell("attach", uri, IDENTITIES[0], CONNECTIONS)
    device = attached(record)
    assert (record["size"], record["vvol"]) == (DISK_BYTES, "vm1/net")
    assert int(sysfs(guest, device, "size")) * 512 == DISK_BYTES
    assert sysfs(guest, device, "backend") == IDENTITIES[0]
    queues = guest.check(f"ls /sys/block/{Path(device).name}/mq").split()
    assert queues == ["0", "1"], "a queue for each socket, at most one a CPU"

    make_file_system(guest, device, "/mnt/net")
    writer = Writer(guest, "/mnt/net")
    writer.wait_for(3)
    restart(farm)  # while the guest writes
    writer.wait_for(writer.count() + 3)
    # the driver's receive thread of a dead socket may take a fresh one down with it: then that is replaced too
    assert guest.check("dmesg").count("reconnected socket") >= CONNECTIONS

    farm.grow("net", 2 * DISK_BYTES)
    guest.wait(f"test $(cat /sys/block/{Path(device).name}/size) = {2 * DISK_BYTES // 512}", 30)
    guest.check(f"resize2fs {device}", 60)
    assert int(guest.check("df --output=size -B1 /mnt/net | tail -n1")) > DISK_BYTES

    guest.check(f"kill -KILL {record['keeper_pid']}")
    assert shell("detach", "vm1/net").get("code") == "BUSY", "it is mounted"
    again = shell("keep", uri, IDENTITIES[0], CONNECTIONS)
    assert attached(again) == device
    assert again["size"] == 2 * DISK_BYTES
    assert again["keeper_pid"] != record["keeper_pid"]
    restart(farm)  # the new keeper takes over the sockets of the killed one
    writer.wait_for(writer.count() + 3)
    writer.stop()

    remount(guest, device, "/mnt/net")
    assert writer.verify() >= 9
    guest.check("umount /mnt/net")
    assert shell("detach", device).get("identity") == IDENTITIES[0]
    assert shell("detach", device).get("code") == "NOT_FOUND"
    assert sysfs(guest, device, "size") == "0"
    assert guest.run(f"test -e /proc/{again['keeper_pid']}").status == 1, "the keeper still runs"
    assert_no_io_errors(guest)


def test_filter_and_kernel_client_on_one_linux_6_1(shell: Shell) -> None:
    """The data plane needs nothing newer than the guest's kernel, and its unix socket can be a kernel's device."""
    guest = shell.guest
    guest.check("truncate -s 64M /run/disk.img")
    uri = "nbd+unix:///root?socket=/run/filter.sock"
    assert shell("listen", "/run/filter.sock") == "listening"
    server = shell("serve", "/run/disk.img", "root")
    guest.wait(f"timeout 60 nbdinfo --size '{uri}'", 90)  # it starts slowly
    device = attached(shell("keep", uri, IDENTITIES[1], CONNECTIONS))

    make_file_system(guest, device, "/mnt/disk")
    writer = Writer(guest, "/mnt/disk")
    writer.wait_for(3)
    guest.check(f"kill -KILL {server}")
    assert isinstance(shell("serve", "/run/disk.img", "root"), int)
    writer.wait_for(writer.count() + 3)
    writer.stop()
    remount(guest, device, "/mnt/disk")
    assert writer.verify() >= 6
    guest.check("fstrim /mnt/disk; umount /mnt/disk")
    assert shell("detach", "root").get("identity") == IDENTITIES[1]
    guest.check("e2fsck -fn /run/disk.img", 60)  # the image is what the device was
    assert_no_io_errors(guest)
