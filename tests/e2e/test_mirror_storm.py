"""A mirror under a verified write load while things around it die: its filter, a leg's server, control, the link.

The VM's host and the host of its remote leg are network namespaces with a cable between them, each with its own filter;
control is in a third. No acknowledged write is lost, whatever dies in which order. NBDVVOL_SEED chooses other moments,
NBDVVOL_STORM_KILLS another number.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator

import pytest

from tests.e2e.test_mirror import all_in_sync, local, mirrored, remote
from tests.lib.farm import Farm
from tests.lib.ledger import Ledger, Writer
from tests.lib.nbdwords import MiB
from tests.lib.netns import Cable, cable
from tests.lib.peers import FarmPeer, Peer, closed_peers
from tests.lib.procs import wait_until

__all__ = ["closed_peers"]
KILLS = int(os.environ.get("NBDVVOL_STORM_KILLS", "102"))
SEED = int(os.environ.get("NBDVVOL_SEED", "1"))
pytestmark = pytest.mark.timeout(600)
MakeFarm = Callable[..., Farm]


class Storm:
    """One farm with a VVol on a local file and on a server, a load on it, and what was killed."""

    def __init__(self, farm: Farm, peer: Peer, cable: Cable) -> None:
        self.farm, self.peer, self.cable = farm, peer, cable
        self.random = random.Random(SEED)
        self.ledger = Ledger(SEED)
        self.writer = Writer(self.ledger, farm.open("disk", wait_s=20))
        self.kills = 0

    def filter_dies(self) -> None:
        """What it had acknowledged is there when it is back, on whatever legs are."""
        process = self.farm.filters["local"]
        process.popen.send_signal(signal.SIGKILL)
        process.popen.wait(10)
        self.writer.join()
        self.farm.start_filter()
        with self.farm.open("disk", wait_s=40) as nbd:
            self.ledger.verify(nbd)
        self.writer = Writer(self.ledger, self.farm.open("disk", wait_s=20))
        self.kills += 1

    def server_dies(self) -> None:
        """Writes go on without it, once control knows; and it comes back."""
        self.peer.kill()
        self.kills += 1
        self.writer.progress(self.random.randrange(10, 60), timeout_s=30)
        self.peer.start()

    def control_dies(self) -> None:
        """While both legs are there nobody notices. Where a leg is lost meanwhile, writes wait for it."""
        assert self.farm.control is not None
        self.farm.control.popen.send_signal(signal.SIGKILL)
        self.farm.control.popen.wait(10)
        self.kills += 1
        also = self.random.random() < 0.3
        if also:
            self.peer.kill()
            self.kills += 1
        self.farm.start_control()
        if also:
            self.peer.start()
        self.writer.progress(10, timeout_s=30)

    def link_is_cut(self) -> None:
        """Its server lives on and may still have writes of ours: the claim of the next opening ends those."""
        self.cable.cut(True)
        self.writer.progress(self.random.randrange(10, 60), timeout_s=30)
        self.cable.cut(False)


class FarFarm(FarmPeer):
    """The other farm of ours, in its own namespace, on TCP."""

    def __init__(self, size: int, cable: Cable) -> None:
        super().__init__(size)
        where = f"{cable.far_address}:10809"
        self.farm.inside = cable.enter(cable.far)
        self.farm.write_file(
            self.farm.spec | {"hosts": {"local": {"listen": {"address": where, "tls": "none", "plaintext": True}}}}
        )
        self.uri = f"nbd://{where}/far/e"

    def start(self) -> Peer:
        """Its filter; the first time, the rest of the farm too."""
        if self.farm.control is None:
            self.farm.start_split()
        else:
            self.farm.start_filter()
        return self

    def kill(self) -> None:
        """SIGKILL to its filter."""
        process = self.farm.filters["local"]
        process.popen.send_signal(signal.SIGKILL)
        process.popen.wait(10)


@pytest.fixture
def wire() -> Iterator[Cable]:
    with cable() as one:
        yield one


def test_nothing_acknowledged_is_lost(wire: Cable, farms: MakeFarm, peers: list[Peer]) -> None:
    peers.append(FarFarm(64 * MiB, wire).start())
    farm = farms(mirrored(local("one"), remote(peers[0])))
    farm.inside = wire.enter(wire.near)
    farm.start_split()
    storm = Storm(farm, peers[0], wire)
    rounds = [storm.filter_dies, storm.server_dies, storm.control_dies, storm.link_is_cut]
    weights = [8, 6, 8, 1]  # a cut is noticed by time-outs only
    while storm.kills < KILLS:
        storm.writer.progress(storm.random.randrange(10, 100), timeout_s=30)
        storm.random.choices(rounds, weights)[0]()
        if storm.random.random() < 0.15:
            wait_until("both legs are in sync", lambda: all_in_sync(farm), timeout_s=60)
    storm.writer.progress(50, timeout_s=30)
    storm.writer.join()
    wait_until("both legs are in sync", lambda: all_in_sync(farm), timeout_s=60)
    with farm.open("disk") as nbd:
        storm.ledger.verify(nbd)
    assert storm.kills >= KILLS and storm.ledger.answered > 10 * KILLS
