"""Clients under a clean stop, and beside hostile neighbours."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from tests.lib.farm import Farm, plain_spec
from tests.lib.ledger import Ledger, Writer
from tests.lib.nbdwords import MiB
from tests.lib.rawio import Transmission
from tests.lib.rawnbd import Closed

pytestmark = pytest.mark.timeout(120)
MakeFarm = Callable[..., Farm]


def test_clean_stop_under_load(farms: MakeFarm) -> None:
    farm = farms(plain_spec())
    ledger = Ledger(6)
    for _ in range(2):
        farm.start()
        with farm.open("root", wait_s=5) as nbd:
            ledger.verify(nbd)
        writer = Writer(ledger, farm.open("root"))
        writer.progress(200)
        idle, lazy = farm.open("root"), farm.open("root")
        for _ in range(8):
            lazy.send(0, 0, 4 * MiB)  # replies that nobody takes must not hold the stop up for long
        farm.stop()
        writer.join()
        assert not list((farm.run / "vms").glob("*.sock")), "sockets are removed"
        idle.stream.wait_closed(2)
        for nbd in (idle, lazy):
            nbd.stream.close()
    farm.start()
    with farm.open("root", wait_s=5) as nbd:
        ledger.verify(nbd)


def test_a_slow_and_a_hostile_client_leave_others_their_throughput(farms: MakeFarm) -> None:
    farm = farms(plain_spec())
    farm.start()
    ledger = Ledger(7)
    writer = Writer(ledger, farm.open("root"))
    writer.progress(200)
    alone = rate(ledger)
    hostile = [farm.open("root", "simple") for _ in range(6)]
    threads = [threading.Thread(target=flood, args=(nbd,), daemon=True) for nbd in hostile]
    for thread in threads:
        thread.start()
    drip = farm.open("root", "simple")
    drip.stream.send(b"\x25\x60")
    time.sleep(0.5)
    crowded = rate(ledger)
    assert crowded > alone / 5, f"{crowded:.0f} writes/s beside hostile clients, {alone:.0f} alone"
    for nbd in [*hostile, drip]:
        nbd.stream.sock.shutdown(2)
        nbd.stream.close()
    for thread in threads:
        thread.join(10)
    writer.progress(200)
    writer.join()
    with farm.open("root") as nbd:
        ledger.verify(nbd)


def rate(ledger: Ledger, seconds: float = 1.5) -> float:
    """Answered writes per second over a while."""
    before, begun = ledger.answered, time.monotonic()
    time.sleep(seconds)
    return (ledger.answered - before) / (time.monotonic() - begun)


def flood(nbd: Transmission) -> None:
    """Ask for much, take nothing."""
    nbd.stream.polite = False
    try:
        for number in range(10_000):
            nbd.send(0, number % 8 * MiB, MiB, cookie=number)
    except (Closed, OSError):
        return
