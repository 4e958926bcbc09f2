"""Killed under a verified write load, at least twenty times each: filter, control, and the whole of `up`.

A process kill loses no acknowledged byte; bindings come back by themselves; epochs only grow.
NBDVVOL_SEED chooses other moments; NBDVVOL_KILLS other counts.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable

import pytest

from tests.lib.farm import Farm, plain_spec
from tests.lib.ledger import Ledger, Writer
from tests.lib.procs import running, wait_until

KILLS = int(os.environ.get("NBDVVOL_KILLS", "20"))
SEED = int(os.environ.get("NBDVVOL_SEED", "1"))
pytestmark = pytest.mark.timeout(600)
MakeFarm = Callable[..., Farm]


def split_farm(farms: MakeFarm) -> Farm:
    """Control and filter as processes of their own, the farm applied."""
    farm = farms(plain_spec())
    farm.start_split()
    return farm


def test_filter_killed_under_load(farms: MakeFarm) -> None:
    farm = split_farm(farms)
    rng = random.Random(SEED)
    ledger, epochs = Ledger(SEED), [farm.vvol("vm1/root")["epoch"]]
    for _ in range(KILLS):
        writer = Writer(ledger, farm.open("root", wait_s=20))
        writer.progress(rng.randrange(20, 300))
        farm.filters["local"].popen.send_signal(signal.SIGKILL)
        farm.filters["local"].popen.wait(10)
        writer.join()
        farm.start_filter()
        with farm.open("root", wait_s=20) as nbd:
            ledger.verify(nbd)
        epochs.append(farm.vvol("vm1/root")["epoch"])
    assert all(a < b for a, b in itertools.pairwise(epochs)), f"a new filter process, a new epoch: {epochs}"
    assert ledger.answered > KILLS * 20


def test_control_killed_under_load(farms: MakeFarm) -> None:
    """The data path does not notice: one client's connection lives through every kill."""
    farm = split_farm(farms)
    rng = random.Random(SEED + 1)
    ledger = Ledger(SEED + 1)
    writer = Writer(ledger, farm.open("root"))
    filter_pid = farm.filter_pid()
    before = farm.vvol("vm1/root")
    for number in range(KILLS):
        writer.progress(rng.randrange(20, 200))
        assert farm.control is not None
        farm.control.popen.send_signal(signal.SIGKILL)
        farm.control.popen.wait(10)
        writer.progress(50)
        farm.start_control()
        if number % 5 == 0:
            wait_until("the filter is connected again", lambda: connected(farm), 20)
    wait_until("the filter is connected again", lambda: connected(farm), 20)
    writer.progress(50)
    writer.join()
    assert farm.filter_pid() == filter_pid and running(filter_pid)
    after = farm.wait_bound("vm1/root")
    assert (after["uuid"], after["epoch"], after["size"]) == (before["uuid"], before["epoch"], before["size"])
    with farm.open("root") as nbd:
        ledger.verify(nbd)
    farm.create("vm1", "later", size="4MiB", profile="plain")
    with farm.open("later", wait_s=5) as nbd:
        assert not any(nbd.read(0, 4 << 20))


def connected(farm: Farm) -> bool:
    """Whether control has the host's filter."""
    return any(host["connected"] for host in farm.api("GET", "/v1/hosts"))


def test_up_killed_under_load(farms: MakeFarm) -> None:
    """All processes at once, or `up` alone (its children must not outlive it)."""
    farm = farms(plain_spec())
    rng = random.Random(SEED + 2)
    ledger, epoch = Ledger(SEED + 2), 0
    for number in range(KILLS):
        farm.start()
        with farm.open("root", wait_s=5) as nbd:
            ledger.verify(nbd)
        now = farm.vvol("vm1/root")["epoch"]
        assert now > epoch, "epochs only grow"
        epoch = now
        writer = Writer(ledger, farm.open("root"))
        writer.progress(rng.randrange(20, 300))
        if number % 2:
            farm.kill_everything()
        else:
            assert farm.up is not None
            farm.up.popen.send_signal(signal.SIGKILL)
            farm.up.popen.wait(10)
            wait_until("the children end with their parent", lambda: not farm.strays(), 10)
        writer.join()
    farm.start()
    with farm.open("root", wait_s=5) as nbd:
        ledger.verify(nbd)


def test_up_killed_while_it_starts(farms: MakeFarm) -> None:
    """At any moment of a first start, too: the next start finishes what was begun."""
    rng = random.Random(SEED + 3)
    farm = farms(plain_spec())
    for _ in range(6):
        farm.begin()
        time.sleep(rng.uniform(0.1, 2.0))
        farm.kill_everything()
    farm.start()
    with farm.open("root") as nbd:
        assert not any(nbd.read(0, nbd.size))
    assert [vvol["name"] for vvol in farm.api("GET", "/v1/vvols")] == ["root"]


def test_up_restarts_its_children(farms: MakeFarm) -> None:
    farm = farms(plain_spec())
    farm.start()
    ledger = Ledger(SEED + 4)
    for role in ("filter", "control"):
        writer = Writer(ledger, farm.open("root", wait_s=20))
        writer.progress(100)
        pid = farm.filter_pid() if role == "filter" else farm.control_pid
        os.kill(pid, signal.SIGKILL)
        wait_until(f"{role} is gone", lambda pid=pid: not running(pid))
        wait_until("control answers", farm.api_answers)
        with farm.open("root", wait_s=20) as nbd:
            if role == "filter":
                writer.join()
            else:
                writer.progress(100)
                writer.join()
            ledger.verify(nbd)
    wait_until("the filter is connected again", lambda: connected(farm), 20)
