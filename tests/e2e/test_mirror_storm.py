"""A mirror under verified loads while things around it die: its filter, a leg's server, control, the cables.

The VM's host, the host of its remote leg, and control are network namespaces with cables between them. Two loads run:
one that knows of every acknowledged write, and fio. No acknowledged write is lost, whatever dies in which order, one
alone or several at once. `make storm KILLS=1000 SEED=7` goes on for longer, at other moments.
"""

from __future__ import annotations

import itertools
import os
import random
import time

import pytest

from tests.e2e.test_mirror import local, mirrored
from tests.lib.fioload import FioLoad
from tests.lib.ledger import Ledger, Writer
from tests.lib.nbdwords import MiB
from tests.lib.netfarm import LegFarm, NetFarm, bring_back, three
from tests.lib.netns import Net
from tests.lib.procs import Process

__all__ = ["three"]
KILLS = int(os.environ.get("NBDVVOL_STORM_KILLS", "102"))
SEED = int(os.environ.get("NBDVVOL_SEED", "1"))
VICTIMS = {"filter": 0.7, "server": 0.7, "control": 0.35}
"""How often each dies in a round; control takes longest to start."""
pytestmark = pytest.mark.timeout(180 + 6 * KILLS)


class Storm:
    """One farm with a VVol on a local file and on a server, two loads on it, and what was killed."""

    def __init__(self, farm: NetFarm, legs: LegFarm) -> None:
        self.farm, self.legs = farm, legs
        self.random = random.Random(SEED)
        self.ledger = Ledger(SEED, rest_s=0.001)
        self.writer = Writer(self.ledger, farm.open("disk", wait_s=20))
        self.fio = FioLoad(farm.folder, farm.socket(), "disk", 8 * MiB, 2 * MiB)
        self.kills = 0
        self.cuts = 0

    def kill(self) -> None:
        """Any of them, at almost the same moment, and all back in another order."""
        victims = [name for name, chance in VICTIMS.items() if self.random.random() < chance]
        self.random.shuffle(victims)
        for victim in victims:
            self._process(victim).kill_group()
            self.kills += 1
            time.sleep(self.random.choice((0, 0.02, 0.1)))
        for victim in self.random.sample(victims, len(victims)):
            self._start(victim)
        if "control" in victims:
            self.farm.wait_control()
        if "filter" in victims:
            self.writer.join()
            with self.farm.open("disk", wait_s=40) as nbd:
                self.ledger.verify(nbd)
            self.writer = Writer(self.ledger, self.farm.open("disk", wait_s=20))

    def _process(self, victim: str) -> Process:
        if victim == "control":
            assert self.farm.control is not None
            return self.farm.control
        return self.farm.filters["a"] if victim == "filter" else self.legs.filters["local"]

    def _start(self, victim: str) -> None:
        if victim == "control":
            self.farm.begin_control()
        elif victim == "filter":
            self.farm.start_filter("a")
        else:
            self.legs.start_filter()

    def cut(self) -> None:
        """A cable, or both of host a. Who is cut off lives on, and may still have requests of ours under way."""
        cables = [self.farm.net.cable("a", "b"), self.farm.net.cable("control", "a")]
        chosen = self.random.choice(([cables[0]], [cables[1]], cables))
        for cable in chosen:
            cable.cut(True)
        if len(chosen) == 1:  # else a leg may be lost that nobody can write down: writes wait for control
            self.writer.progress(self.random.randrange(10, 60), timeout_s=30)
        else:
            time.sleep(1.0)
        for cable in chosen:
            cable.cut(False)
        self.cuts += 1


def test_nothing_acknowledged_is_lost(three: Net) -> None:
    with LegFarm(three) as legs:
        legs.start_split()
        with NetFarm(three, mirrored(local("one"), legs.store(), hold="60s")) as farm:
            farm.start_all("a")
            storm = Storm(farm, legs)
            try:
                play(storm)
            finally:
                storm.fio.close()


def play(storm: Storm) -> None:
    for number in itertools.count(1):
        if storm.kills >= KILLS:
            break
        storm.writer.progress(storm.random.randrange(10, 100), timeout_s=60)
        if number % 12 == 0:
            storm.cut()
        else:
            storm.kill()
        if storm.random.random() < 0.4:
            bring_back(storm.farm)
    storm.writer.progress(50, timeout_s=60)
    storm.writer.join()
    bring_back(storm.farm)
    storm.fio.stop()
    with storm.farm.open("disk") as nbd:
        storm.ledger.verify(nbd)
    answer = storm.farm.api("POST", "/v1/vvols/vm1/disk/verify", {"repair": False})
    told = str(storm.farm.task(answer, timeout_s=60)["detail"])
    assert "alike" in told, f"each leg has every acknowledged write, whichever is read: {told}"
    assert storm.kills >= KILLS and storm.cuts >= KILLS // 40 and storm.ledger.answered > 10 * KILLS
    assert storm.fio.runs > 1, storm.fio.runs
