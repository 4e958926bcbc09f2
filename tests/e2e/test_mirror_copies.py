"""Copies to legs of real daemons: how they get on is told, they go on after a crash, and which leg reads come from."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.e2e.test_mirror import local, mirrored, remote
from tests.lib.farm import Farm, JsonDict
from tests.lib.nbdwords import CMD_READ, MiB
from tests.lib.netfarm import all_in_sync
from tests.lib.pattern import difference, pattern
from tests.lib.peers import Peer, closed_peers, nbdkit
from tests.lib.procs import wait_until

__all__ = ["closed_peers"]
pytestmark = pytest.mark.timeout(240)
MakeFarm = Callable[..., Farm]
SIZE, PART = 128 * MiB, 16 * MiB


@contextmanager
def readers(farm: Farm) -> Iterator[None]:
    """A client that reads all the time: a copy with a rate keeps to it."""
    stop = threading.Event()

    def read() -> None:
        with farm.open("disk", wait_s=20) as nbd:
            while not stop.wait(0.01):
                nbd.read(0, 4096)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(30)


def now(farm: Farm) -> JsonDict:
    """The second leg, as its host says that it runs it."""
    return farm.vvol("vm1/disk")["legs"][1]["now"] or {}


def test_a_whole_copy_tells_how_it_gets_on_and_goes_on_after_a_kill(farms: MakeFarm) -> None:
    spec = mirrored(local("one"), **{"resync-rate": "12MiB"})
    spec["datastores"] |= {name: {**store, "size": "160MiB"} for name, store in (local("one"), local("two"))}
    spec["vms"]["vm1"]["vvols"]["disk"]["size"] = SIZE
    farm = farms(spec)
    farm.start_split()
    data = pattern(51, 0, PART)
    with farm.open("disk") as nbd:
        for at in range(0, SIZE, PART):
            nbd.write(at, data)
        nbd.flush()
    with readers(farm):
        farm.cli("mirror", "add-leg", "vm1/disk", "--datastore", "two")
        wait_until("it is told how long it takes", lambda: now(farm).get("eta_s"), 20)
        said = farm.cli("status", "-x", check=False).stdout
        assert "LEG_SYNCING vm1/disk" in said and "% copied" in said and "to go" in said
        assert 0 < now(farm)["progress"] < 1 and now(farm)["rate"] > 0
        wait_until("more than half is copied", lambda: now(farm).get("copied_bytes", 0) >= 100 * MiB, 60)
    farm.filters["local"].kill_group()
    farm.start_filter()
    with readers(farm):
        wait_until("it goes on", lambda: now(farm).get("lane") == "syncing", 30)
        assert now(farm)["dirty_bytes"] <= SIZE - 40 * MiB, "it does not begin again"
        wait_until("it is whole", lambda: all_in_sync(farm), 60)
    with farm.open("disk") as nbd:
        assert [at for at in range(0, SIZE, PART) if difference(data, nbd.read(at, PART))] == []
    answer = farm.api("POST", "/v1/vvols/vm1/disk/verify", {"repair": False})
    assert "alike" in farm.task(answer, timeout_s=60)["detail"]


def test_reads_come_from_the_leg_that_the_policy_names(farms: MakeFarm, peers: list[Peer]) -> None:
    """
    A slow leg and a quick one; the policy changes while it is served, and counts once the filter has it. NEAREST tries
    the leg that was measured longest ago, once in 64 reads: three or four of 200, though it had been read more often.
    """
    peers.append(nbdkit(64 * MiB, "--filter=delay", "rdelay=40ms").start())
    spec = mirrored(remote(peers[0]), local("one"), read="primary")
    farm = farms(spec).start()

    def read(policy: str) -> list[int]:
        """How many of 200 reads, of which four are in flight at a time, each leg answered."""
        spec["profiles"]["twice"]["mirror"]["read"] = policy
        farm.apply(spec)
        wait_until("the filter has the policy", lambda: follows(policy), 20)
        before = reads()
        with farm.open("disk") as nbd:
            for number in range(200):
                nbd.send(CMD_READ, number * 7 * 65536 % (32 * MiB), 4096)
                if number >= 4:
                    nbd.wait_any()[1].check()
            for _ in range(4):
                nbd.wait_any()[1].check()
        return [after - one for after, one in zip(reads(), before, strict=True)]

    def reads() -> list[int]:
        (host,) = farm.api("GET", "/v1/counters")
        counted = {store["datastore"]: store["reads"] for store in host["datastores"]}
        return [counted["far"], counted["one"]]

    def follows(policy: str) -> bool:
        """A read goes where only this policy sends it: the slow leg is the primary."""
        before = reads()
        with farm.open("disk") as nbd:
            nbd.read(0, 4096)
        slow, quick = (after - one for after, one in zip(reads(), before, strict=True))
        return slow > 0 if policy == "primary" else quick > 0

    slow, quick = read("primary")
    assert slow >= 200 and quick == 0
    slow, quick = read("nearest")
    assert quick > 190 and slow in (3, 4), "the other one is tried, or nobody would know that it has got nearer"
    slow, quick = read("least-outstanding")
    assert quick > slow > 0
