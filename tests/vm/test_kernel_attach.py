"""The kernel's own nbd driver, attached by netlink from the project's Python inside a guest, the farm outside."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vm.farm import DISK_BYTES, GuestFarm
from tests.vm.guest import HOST, Guest, GuestError
from tests.vm.writer import Writer, assert_no_io_errors, make_file_system, remount

pytestmark = pytest.mark.timeout(480)
ROOT = Path(__file__).parents[2]
PYTHON_LIMIT_S = 120.0
"""The project's imports take 15 s under software emulation."""
IDENTITY = "0b9ce6e2-6f0c-4c3e-9c58-6f5a3e0f6b11"
CONNECTIONS = 3

SHELL = """
import json, os, sys
from pathlib import Path
from nbdvvol.filter.attach import run_attach, run_detach
from nbdvvol.model.errors import NvError

def attach(uri, foreground, tell=lambda attachment: None):
    return run_attach(
        uri, identity=sys.argv[1], connections=int(sys.argv[2]), device=None, dead_timeout_s=120,
        request_timeout_s=20, run_dir=Path("/run/nbdvvol"), foreground=foreground, on_attached=tell,
    )

def answer(body):
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
    with open("/run/answers", "a") as file:
        file.write(json.dumps(body) + "\\n")

for line in open("/run/orders"):
    what, argument = json.loads(line)
    try:
        if what == "detach":
            answer(run_detach(Path("/run/nbdvvol"), argument).model_dump())
        elif what == "attach":
            answer(attach(argument, False).model_dump())
        elif os.fork() == 0:  # "keep": be a keeper in a process of its own, without the long start of a new Python
            attach(argument, True, lambda attachment: answer(attachment.model_dump()))
            os._exit(0)
    except NvError as error:
        answer({"code": error.code, "message": error.message})
"""


class Shell:
    """One Python process in the guest that attaches and detaches on order (Python starts slowly there)."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self._answers = 0
        guest.check(f"mkfifo /run/orders; : >/run/answers; cat >/run/shell.py <<'END'\n{SHELL}\nEND")
        command = f"cd {ROOT}; exec {sys.executable} /run/shell.py {IDENTITY} {CONNECTIONS}"
        guest.background(command, "/run/shell.log")
        guest.background("exec sleep 1000 >/run/orders", "/dev/null")  # keeps it open between orders

    def __call__(self, what: str, argument: str) -> dict[str, Any]:
        """Run one order; return the attachment's record, or the error."""
        self._answers += 1
        self.guest.check(f"echo '{json.dumps([what, argument])}' >/run/orders", PYTHON_LIMIT_S)  # waits for its reader
        try:
            self.guest.wait(f"test $(wc -l </run/answers) -ge {self._answers}", PYTHON_LIMIT_S)
        except GuestError as error:
            raise GuestError(f"{error}\n{self.guest.check('cat /run/shell.log')}") from error
        answer: dict[str, Any] = json.loads(self.guest.check(f"sed -n {self._answers}p /run/answers"))
        return answer


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
    record = shell("attach", uri)
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
    again = shell("keep", uri)
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
