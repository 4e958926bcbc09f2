"""A guest on a mirrored VVol: its file system never notices that one leg dies and comes back, and then the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.lib.netfarm import bring_back, states
from tests.lib.peers import Peer, qemu_nbd
from tests.vm.farm import DISK_BYTES, GuestFarm
from tests.vm.guest import Guest
from tests.vm.writer import Writer, assert_no_io_errors, make_file_system, remount

pytestmark = pytest.mark.timeout(600)
LEG_BYTES = 2 * DISK_BYTES


@pytest.fixture
def peers() -> Iterator[dict[str, Peer]]:
    with ExitStack() as stack:
        made = {}
        for name in ("left", "right"):
            made[name] = qemu_nbd(LEG_BYTES)
            stack.callback(made[name].close)
            made[name].start()
        yield made


@pytest.fixture
def farm(peers: dict[str, Peer]) -> Iterator[GuestFarm]:
    stores = {
        name: {"kind": "nbd", "uri": peer.uri, "timeout": "2s", "hold": "1s", "connections": 2}
        for name, peer in peers.items()
    }
    mirror = {"legs": list(stores), "write-deadline": "3s", "intent-idle": "200ms"}
    disk = {"size": DISK_BYTES, "profile": "twice"}
    spec = {
        "datastores": stores,
        "profiles": {"twice": {"mirror": mirror}},
        "vms": {"vm1": {"vvols": {"disk": disk}}},
    }
    made = GuestFarm(spec)
    with made:
        made.start()
        yield made


def test_a_guest_runs_on_while_one_leg_dies_and_comes_back_then_the_other(
    farm: GuestFarm, peers: dict[str, Peer], boot: Callable[..., Guest]
) -> None:
    guest = boot(drives=[farm.drive("disk")])
    make_file_system(guest, "/dev/vda", "/mnt/disk")
    writer = Writer(guest, "/mnt/disk")
    writer.wait_for(3)
    for lost, kept in (("left", "right"), ("right", "left")):
        peers[lost].kill()
        writer.wait_for(writer.count() + 3)
        assert states(farm) == {lost: "stale", kept: "in-sync"}
        peers[lost].start()
        bring_back(farm)
        writer.wait_for(writer.count() + 3)
    peers["left"].kill()  # what is there now was copied, both ways
    writer.wait_for(writer.count() + 3)
    writer.stop()
    remount(guest, "/dev/vda", "/mnt/disk")
    assert writer.verify() >= 15
    guest.check("umount /mnt/disk; e2fsck -fn /dev/vda", 60)
    assert_no_io_errors(guest)
    peers["left"].start()
