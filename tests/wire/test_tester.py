"""The cases of the nbd project's nbd-tester-client, which Debian does not package, done by the raw client.

Its modes: throughput (reads of 1,048,590 bytes, from offsets 1 and 2 too), writes, flush between, oversized requests,
integrity with flush and FUA over 50 MiB, handshake (option 0x7654321 must get UNSUP, then ABORT), list, unix and TCP,
and all of it through EXPORT_NAME with 124 zero bytes, as that tool does it.
"""

from __future__ import annotations

import random
import time

import pytest

from tests.lib import nbdwords as w
from tests.lib.pattern import difference, pattern
from tests.lib.rawio import Transmission
from tests.lib.rawnbd import Closed, Haggle
from tests.lib.shared import ROOT_SIZE, SharedFarm

MiB = w.MiB
pytestmark = pytest.mark.timeout(90)
ODD_READ = 1_048_590


def old_style(shared: SharedFarm, *, tcp: bool = False) -> Transmission:
    """As nbd-tester-client connects: EXPORT_NAME, no NO_ZEROES."""
    haggle = Haggle(shared.tcp if tcp else shared.socket())
    haggle.begin(w.FLAG_FIXED_NEWSTYLE)
    haggle.export_name("vm1/root", zeroes=True)
    return Transmission(haggle.stream, haggle.agreed)


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
@pytest.mark.parametrize(("start", "length"), [(0, 4096), (1, ODD_READ), (2, 2 * ODD_READ)])
def test_throughput_pipelined(shared: SharedFarm, tcp: bool, start: int, length: int) -> None:
    data = pattern(60, 0, 16 * MiB)
    with shared.open("root") as nbd:
        nbd.write(0, data)
    with old_style(shared, tcp=tcp) as nbd:
        waiting: list[tuple[int, int]] = []
        offset = start
        while offset + length <= len(data) or waiting:
            if offset + length <= len(data) and len(waiting) < 16:
                waiting.append((nbd.send(w.CMD_READ, offset, length), offset))
                offset += max(length, 65536)
            else:
                cookie, at = waiting.pop(0)
                assert difference(data[at : at + length], nbd.wait(cookie).check().data) == ""
        nbd.disconnect()


@pytest.mark.parametrize("flags", [0, w.CMD_FLAG_FUA], ids=["plain", "fua"])
@pytest.mark.parametrize("flush", [False, True], ids=["no flush", "flush"])
def test_writes(shared: SharedFarm, flags: int, flush: bool) -> None:
    with old_style(shared) as nbd:
        for step in range(64):
            nbd.write(step * 131_071, pattern(61, step, 4096), flags)
            if flush:
                nbd.flush()
        for step in range(64):
            assert nbd.read(step * 131_071, 4096) == pattern(61, step, 4096)


@pytest.mark.parametrize("flush", [False, True], ids=["fua", "flush"])
def test_integrity(shared: SharedFarm, flush: bool) -> None:
    """50 MiB, random sizes, 32 in flight; reads that overlap a write in flight wait for it, as the tool's own do."""
    rng = random.Random(62)
    span, block = 50 * MiB, 65536
    version: dict[int, int] = {}
    with old_style(shared) as nbd:
        nbd.zero(0, span)
        flight: dict[int, tuple[int, int | None]] = {}

        def reap() -> None:
            cookie, answer = nbd.wait_any()
            number, wrote = flight.pop(cookie)
            answer.check()
            if wrote is None:
                want = pattern(version[number], number * block, block) if number in version else bytes(block)
                assert difference(want, answer.data) == ""
            else:
                version[number] = wrote

        for step in range(1, 3000):
            number = rng.randrange(span // block)
            while len(flight) >= 32 or any(number == busy for busy, _ in flight.values()):
                reap()
            if rng.random() < 0.5:
                data = pattern(step, number * block, block)
                flags = 0 if flush else w.CMD_FLAG_FUA * (step % 4 == 0)
                flight[nbd.send(w.CMD_WRITE, number * block, block, payload=data, flags=flags)] = (number, step)
            else:
                flight[nbd.send(w.CMD_READ, number * block, block)] = (number, None)
            if flush and step % 100 == 0:
                while flight:
                    reap()
                nbd.flush()
        while flight:
            reap()
        nbd.disconnect()


def test_oversized_requests(shared: SharedFarm) -> None:
    with old_style(shared) as nbd:
        for length in (w.PAYLOAD_MAX + 1, 2**31, 2**32 - 1):
            assert nbd.call(w.CMD_READ, 0, length).error in (w.EINVAL, w.EOVERFLOW)
        nbd.send(w.CMD_WRITE, 0, 2**32 - 1)
        begun = time.monotonic()
        with pytest.raises(Closed):
            for _ in range(4096):
                nbd.stream.send(bytes(MiB))
        assert time.monotonic() - begun < 10


def test_handshake(shared: SharedFarm) -> None:
    with Haggle(shared.socket()) as haggle:
        haggle.begin(w.FLAG_FIXED_NEWSTYLE)
        assert haggle.refused(0x7654321).type == w.REP_ERR_UNSUP
        haggle.abort()


def test_list(shared: SharedFarm) -> None:
    with Haggle(shared.tcp) as haggle:
        haggle.begin(w.FLAG_FIXED_NEWSTYLE)
        assert {"vm1/root", "vm2/root"} <= set(haggle.list_exports())
        haggle.abort()


def test_size_by_export_name(shared: SharedFarm) -> None:
    with old_style(shared, tcp=True) as nbd:
        assert nbd.size == ROOT_SIZE and not nbd.flags & w.TFLAG_SEND_DF
