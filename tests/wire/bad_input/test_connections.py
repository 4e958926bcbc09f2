"""Bad input, rows T21 to T25: connections that end early, stall, or ask for too much at once."""

from __future__ import annotations

import threading
import time

import pytest

from tests.lib import nbdwords as w
from tests.lib.bystander import Bystander
from tests.lib.facts import memory_kib, open_files
from tests.lib.pattern import difference, pattern
from tests.lib.procs import wait_until
from tests.lib.rawio import STYLES, Request, Style, Transmission, open_export
from tests.lib.rawnbd import Closed
from tests.lib.shared import SharedFarm

MiB, KiB = w.MiB, w.KiB
pytestmark = pytest.mark.timeout(90)
MEMORY_BOUND_KIB = 160 << 10
"""How much a single client may make the filter grow: its own 32 MiB buffer, its share of the pool, and room."""


@pytest.mark.parametrize("style", STYLES)
def test_t21_disc_with_requests_in_flight(shared: SharedFarm, unharmed: Bystander, style: Style) -> None:
    with shared.open("root", style) as nbd:
        blocks = range(64)
        cookies = [nbd.send(w.CMD_WRITE, n * 64 * KiB, 64 * KiB, payload=pattern(21, n, 64 * KiB)) for n in blocks]
        cookies += [nbd.send(w.CMD_READ, 8 * MiB + n * 64 * KiB, 64 * KiB) for n in blocks]
        nbd.send(w.CMD_DISC)
        for cookie in cookies:
            nbd.wait(cookie).check()
        assert nbd.stream.wait_closed(5) == b"", "DISC itself has no reply"
    with shared.open("root") as nbd:
        for n in blocks:
            assert difference(pattern(21, n, 64 * KiB), nbd.read(n * 64 * KiB, 64 * KiB)) == ""


@pytest.mark.parametrize("style", STYLES)
def test_t21_nothing_behind_disc_is_done(shared: SharedFarm, unharmed: Bystander, style: Style) -> None:
    with shared.open("root", style) as nbd:
        nbd.write(0, b"before")
        disc = nbd.header(Request(w.CMD_DISC, 0, 0, 0), 1, payload=False)
        late = nbd.header(Request(w.CMD_WRITE, 0, 0, 6), 2, payload=True) + b"behind"
        nbd.stream.send(disc + late)
        assert nbd.stream.wait_closed(5) == b""
    with shared.open("root") as nbd:
        assert nbd.read(0, 6) == b"before"


@pytest.mark.parametrize("style", STYLES)
def test_t22_half_close_while_replying(shared: SharedFarm, unharmed: Bystander, style: Style) -> None:
    with shared.open("root", style) as nbd:
        data = pattern(22, 0, 2 * MiB)
        nbd.write(0, data)
        cookies = [nbd.send(w.CMD_READ, 0, 2 * MiB) for _ in range(8)]
        last = nbd.send(w.CMD_WRITE, 4 * MiB, 6, payload=b"landed")
        nbd.stream.half_close()
        for cookie in cookies:
            assert difference(data, nbd.wait(cookie).check().data) == ""
        nbd.wait(last).check()
        assert nbd.stream.wait_closed(5) == b""
    with shared.open("root") as nbd:
        assert nbd.read(4 * MiB, 6) == b"landed"


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_t23_reset_while_replying(shared: SharedFarm, unharmed: Bystander, tcp: bool) -> None:
    pid = shared.filter_pid()
    before = open_files(pid)
    address, name = (shared.tcp, "vm1/root") if tcp else (shared.socket(), "root")
    old, new = pattern(231, 0, MiB), pattern(232, 0, MiB)
    for _ in range(10):
        with open_export(address, name) as nbd:
            nbd.write(0, old)
            nbd.send(w.CMD_WRITE, 0, MiB, payload=new)
            for _ in range(8):
                nbd.send(w.CMD_READ, 8 * MiB, 4 * MiB)
            nbd.stream.recv(16)
            nbd.stream.reset()
        with open_export(address, name) as nbd:
            got = nbd.read(0, MiB)
            assert got in (old, new), "an in-flight write is done as a whole or not at all"
    wait_until("all resources are released", lambda: open_files(pid) <= before, 15)


def pump(nbd: Transmission, count: int, length: int, stop: threading.Event) -> threading.Thread:
    """Send `count` reads from a thread, which blocks as soon as the server pushes back."""
    nbd.stream.polite = False

    def loop() -> None:
        for number in range(count):
            if stop.is_set():
                return
            try:
                nbd.send(w.CMD_READ, number % 256 * length, length, cookie=number)
            except (Closed, OSError):
                return

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    return thread


def test_t24_sixteen_thousand_requests_in_flight(shared: SharedFarm, unharmed: Bystander) -> None:
    pid = shared.filter_pid()
    before = memory_kib(pid)
    with shared.open("root") as nbd:
        for block in range(256):
            nbd.write(block * 4096, pattern(24, block * 4096, 4096))
        sender = pump(nbd, 16384, 4096, threading.Event())
        time.sleep(1.5)
        unharmed.check(3)
        assert memory_kib(pid) - before < MEMORY_BOUND_KIB
        seen = set()
        for _ in range(16384):
            cookie, answer = nbd.wait_any()
            assert answer.check().data == pattern(24, cookie % 256 * 4096, 4096)
            seen.add(cookie)
        assert seen == set(range(16384))
        sender.join(10)
        nbd.disconnect()


@pytest.mark.parametrize("length", [4096, 2 * MiB])
def test_t25_client_that_never_reads(shared: SharedFarm, unharmed: Bystander, length: int) -> None:
    pid = shared.filter_pid()
    before = memory_kib(pid)
    stop = threading.Event()
    nbd = shared.open("root", "simple")
    if length == 2 * MiB:  # stay inside the export
        sender = threading.Thread(target=lambda: _reads(nbd, 4000, length), daemon=True)
        sender.start()
    else:
        sender = pump(nbd, 100_000, length, stop)
    peak = 0
    for _ in range(30):
        time.sleep(0.1)
        peak = max(peak, memory_kib(pid))
    assert sender.is_alive(), "the server took everything from a client that never reads"
    assert peak - before < MEMORY_BOUND_KIB, f"{(peak - before) >> 10} MiB"
    unharmed.check(3)
    with shared.open("root") as other:
        begun = time.monotonic()
        other.write(60 * MiB, b"progress")
        other.flush()
        assert time.monotonic() - begun < 8
    stop.set()
    nbd.stream.sock.shutdown(2)
    nbd.stream.close()
    sender.join(10)
    assert not sender.is_alive()


def _reads(nbd: Transmission, count: int, length: int) -> None:
    nbd.stream.polite = False
    for number in range(count):
        try:
            nbd.send(w.CMD_READ, number % 16 * length, length, cookie=number)
        except (Closed, OSError):
            return


def test_t25_many_clients_that_never_read(shared: SharedFarm, unharmed: Bystander) -> None:
    pid = shared.filter_pid()
    before = open_files(pid)
    clients = [shared.open("root", "simple") for _ in range(20)]
    threads = [threading.Thread(target=_reads, args=(nbd, 200, MiB), daemon=True) for nbd in clients]
    try:
        for thread in threads:
            thread.start()
        time.sleep(1)
        unharmed.check(5)
        with shared.open("root") as other:
            assert len(other.read(0, 32 * MiB)) == 32 * MiB, "a well-behaved client gets its largest read"
    finally:
        for nbd in clients:
            nbd.stream.sock.shutdown(2)
            nbd.stream.close()
        for thread in threads:
            thread.join(10)
    wait_until("all resources are released", lambda: open_files(pid) <= before, 15)
