"""The kernel's own nbd driver, attached by netlink by the command line, and by the project's Python, inside a guest.

Both tests share one guest and one Python in it, because those are slow to start. Each has a VVol identity, a
mount point and a device of its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vm.farm import DISK_BYTES, GuestFarm
from tests.vm.guest import Guest
from tests.vm.shell import Shell, command_line
from tests.vm.writer import Writer, assert_no_io_errors, make_file_system, remount

pytestmark = pytest.mark.timeout(900)
IDENTITY = "5f6a2f0e-8f3b-4a56-8e2b-0d7c9b1a4e22"
RUN = "/run/nbdvvol"
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


def test_the_attach_command_survives_restarts_and_follows_the_size(shell: Shell, farm: GuestFarm) -> None:
    guest = shell.guest
    assert guest.run("test -e /sys/module/nbd").status == 1, "attach is to load the driver by itself"
    run = farm.run_dir_in_guest(guest)
    done = command_line(guest, "attach", "net", "--connections", str(CONNECTIONS), "--run", run)
    assert (done.status, done.output) == (0, "/dev/nbd0\n"), done
    device = "/dev/nbd0"
    identity = farm.vvol("vm1/net")["uuid"]
    record = json.loads(guest.check(f"cat {run}/attach/{identity}.json"))
    assert (record["vvol"], record["size"], record["connections"]) == ("vm1/net", DISK_BYTES, CONNECTIONS)
    assert int(sysfs(guest, device, "size")) * 512 == DISK_BYTES
    assert sysfs(guest, device, "backend") == identity
    queues = guest.check(f"ls /sys/block/{Path(device).name}/mq").split()
    assert queues == ["0", "1"], "a queue for each socket, at most one a CPU"

    make_file_system(guest, device, "/mnt/net")
    writer = Writer(guest, "/mnt/net")
    writer.wait_for(3)
    restart(farm)  # while the guest writes
    writer.wait_for(writer.count() + 3)
    # the driver's receive thread of a dead socket may take a fresh one down with it: then that is replaced too
    assert guest.check("dmesg").count("reconnected socket") >= CONNECTIONS

    assert farm.cli("resize", "vvol", "net", str(2 * DISK_BYTES)).stdout == "vm1/net is 192MiB now\n"
    guest.wait(f"test $(cat /sys/block/{Path(device).name}/size) = {2 * DISK_BYTES // 512}", 30)
    guest.check(f"resize2fs {device}", 60)
    assert int(guest.check("df --output=size -B1 /mnt/net | tail -n1")) > DISK_BYTES

    guest.check(f"kill -KILL {record['keeper_pid']}")
    assert shell("detach", "vm1/net", run).get("code") == "BUSY", "it is mounted"
    again = shell("keep", record["uri"], "vm1/net", identity, CONNECTIONS, run)
    assert attached(again) == device
    assert again["size"] == 2 * DISK_BYTES
    assert again["keeper_pid"] != record["keeper_pid"]
    restart(farm)  # the new keeper takes over the sockets of the killed one
    writer.wait_for(writer.count() + 3)
    writer.stop()

    remount(guest, device, "/mnt/net")
    assert writer.verify() >= 9
    refused = command_line(guest, "detach", "vm1/net", "--run", run)
    assert refused.status == 1, refused
    assert refused.output == f"error: BUSY: {device} (vm1/net) is in use -- unmount it first\n"
    guest.check("umount /mnt/net")
    done = command_line(guest, "detach", "vm1/net", "--run", run)
    assert (done.status, done.output) == (0, f"{device} detached\n"), done
    assert shell("detach", device, run).get("code") == "NOT_FOUND"
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
    device = attached(shell("keep", uri, "root", IDENTITY, CONNECTIONS, RUN))

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
    assert shell("detach", "root", RUN).get("identity") == IDENTITY
    guest.check("e2fsck -fn /run/disk.img", 60)  # the image is what the device was
    assert_no_io_errors(guest)
