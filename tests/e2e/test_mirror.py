"""Mirrored VVols with real daemons: legs that die and come back, servers and daemons that are killed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.lib.farm import Farm
from tests.lib.nbdwords import MiB
from tests.lib.netfarm import all_in_sync, states
from tests.lib.pattern import difference, pattern
from tests.lib.peers import Peer, closed_peers, nbd_server, nbdkit, our_farm, qemu_nbd
from tests.lib.procs import wait_until
from tests.wire.test_remote_tls import MAKES

__all__ = ["closed_peers"]
pytestmark = pytest.mark.timeout(240)
MakeFarm = Callable[..., Farm]
SIZE = 32 * MiB


def mirrored(*stores: tuple[str, dict[str, Any]], **mirror: Any) -> dict[str, Any]:
    """A farm file with one VVol that has a leg on each datastore."""
    policy = {"legs": [name for name, _ in stores], "write-deadline": "3s", "intent-idle": "200ms", **mirror}
    return {
        "datastores": dict(stores),
        "profiles": {"twice": {"mirror": policy}},
        "vms": {"vm1": {"vvols": {"disk": {"size": "32MiB", "profile": "twice"}}}},
    }


def local(name: str) -> tuple[str, dict[str, Any]]:
    return name, {"kind": "file", "path": f"./data/{name}.img", "size": "64MiB"}


def remote(peer: Peer) -> tuple[str, dict[str, Any]]:
    return "far", {"kind": "nbd", "uri": peer.uri, "timeout": "2s", "hold": "1s", "connections": 2}


def test_two_local_legs(farms: MakeFarm) -> None:
    farm = farms(mirrored(local("one"), local("two"))).start()
    data = pattern(21, 0, SIZE)
    with farm.open("disk") as nbd:
        nbd.write(0, data)
        nbd.flush()
    farm.kill_everything()
    farm.start()
    with farm.open("disk", wait_s=20) as nbd:
        assert difference(data, nbd.read(0, SIZE)) == ""
    assert all_in_sync(farm)


@pytest.mark.parametrize(
    "make", [nbdkit, qemu_nbd, nbd_server, our_farm], ids=["nbdkit", "qemu-nbd", "nbd-server", "nbdvvol"]
)
def test_a_remote_leg_dies_and_comes_back(farms: MakeFarm, peers: list[Peer], make: Callable[[int], Peer]) -> None:
    peers.append(make(64 * MiB).start())
    dies_and_comes_back(farms(mirrored(local("one"), remote(peers[0]))).start(), peers[0])


def test_a_leg_through_tls_dies_and_comes_back(farms: MakeFarm, peers: list[Peer], pki: Path) -> None:
    peer, tls = MAKES["nbdkit-psk"](pki)
    os.truncate(peer.file, 64 * MiB)
    peers.append(peer.start())
    name, store = remote(peer)
    dies_and_comes_back(farms(mirrored(local("one"), (name, store | {"tls": tls}))).start(), peer)


def dies_and_comes_back(farm: Farm, peer: Peer) -> None:
    data = bytearray(pattern(22, 0, SIZE))
    with farm.open("disk") as nbd:
        nbd.write(0, data)
        nbd.flush()
        peer.kill()
        nbd.write(8 * MiB, b"degraded" * 512)
        nbd.flush()
        data[8 * MiB : 8 * MiB + 4096] = b"degraded" * 512
        assert states(farm) == {"one": "in-sync", "far": "stale"}
        peer.start()
        wait_until("it is copied again", lambda: all_in_sync(farm), timeout_s=60)
        assert difference(bytes(data), nbd.read(0, SIZE)) == ""
    kinds = farm.events()
    assert kinds.index("leg_failed") < kinds.index("leg_in_sync")
