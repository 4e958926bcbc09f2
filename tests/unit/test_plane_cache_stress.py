"""The cache and the write-back log under clients of several reactors at once, while they are switched about.

Each block has one writer, who stamps it with a version everywhere. Whoever reads notes before he asks which version of
a block was acknowledged, or seen by anybody; after that nothing older may come, on any connection. The same with the
sanitizer for data races: test_sanitizers.py.
"""

from __future__ import annotations

import random
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from nbdvvol.dataplane.log import LogPolicy
from nbdvvol.dataplane.types import CacheMode, CachePolicy, CacheStats, Run
from tests.lib import nbdwords as w
from tests.lib.rawio import STYLES
from tests.unit.plane_rig import Rig, describe, eventually, running

BLOCK, SECTOR = 4096, 512
BLOCKS = 512
SIZE = BLOCKS * BLOCK
CACHE = SIZE // 2
LOG = 1 << 20
WRITERS, READERS, REACTORS = 3, 4, 3
MOST = 16
"""Blocks of a request."""
SECONDS = 1.5
POLICIES = (
    CachePolicy(CacheMode.READ, ahead_bytes=64 << 10, floor_bytes=CACHE // 4),
    CachePolicy(CacheMode.WRITETHROUGH),
    CachePolicy(),
    CachePolicy(CacheMode.READ),
)


def stamped(block: int, version: int) -> bytes:
    return struct.pack("<QQ", block + 1, version) * (BLOCK // 16)


@dataclass
class Truth:
    """Versions by block; a version of which nothing is stored is zeros."""

    begun: list[int] = field(default_factory=lambda: [0] * BLOCKS)
    least: list[int] = field(default_factory=lambda: [0] * BLOCKS)
    """Acknowledged, or seen."""
    zeros: list[set[int]] = field(default_factory=lambda: [{0} for _ in range(BLOCKS)])
    lock: threading.Lock = field(default_factory=threading.Lock)
    reads: int = 0

    def judge(self, first: int, least: list[int], data: bytes) -> None:
        """What a read returned that was asked for when `least` was the least."""
        for i, low in enumerate(least):
            block, oldest = first + i, self.begun[first + i]
            for at in range(i * BLOCK, (i + 1) * BLOCK, SECTOR):
                oldest = min(oldest, self._version(block, low, data[at : at + SECTOR]))
            with self.lock:
                self.least[block] = max(self.least[block], oldest)

    def _version(self, block: int, low: int, sector: bytes) -> int:
        """The oldest; while it is being written a read may find several."""
        oldest = self.begun[block]
        zeros = min((one for one in list(self.zeros[block]) if one >= low), default=0)
        for name, number in set(struct.iter_unpack("<QQ", sector)):
            version = int(number) if name else zeros
            assert name in (0, block + 1), f"block {block} has another's bytes"
            assert low <= version <= self.begun[block], f"block {block} has version {version}, older than {low}"
            oldest = min(oldest, version)
        return oldest


def write(rig: Rig, volume: int, truth: Truth, index: int, until: float) -> None:
    """Own every run of MOST blocks whose number is `index` modulo WRITERS: a few requests of other blocks at a time."""
    rand = random.Random(index)
    client = rig.connect(volume, SIZE, STYLES[index % 3], timeout_s=20)
    runs = range(index, BLOCKS // MOST, WRITERS)
    while time.monotonic() < until:
        sent = []
        for run in rand.sample(runs, 4):
            start = rand.randrange(MOST)
            first, count = run * MOST + start, rand.choice([1, 1, 1, 2, MOST])
            count = min(count, MOST - start)
            zero = rand.random() < 0.15
            for block in range(first, first + count):
                if zero:
                    truth.zeros[block].add(truth.begun[block] + 1)
                truth.begun[block] += 1
            data = b"".join(stamped(block, truth.begun[block]) for block in range(first, first + count))
            command, payload = (w.CMD_WRITE_ZEROES, None) if zero else (w.CMD_WRITE, data)
            sent.append((client.send(command, first * BLOCK, count * BLOCK, payload=payload), first, count))
        if rand.random() < 0.1:
            client.flush()
        for cookie, first, count in sent:
            client.wait(cookie).check()
            with truth.lock:
                for block in range(first, first + count):
                    truth.least[block] = truth.begun[block]
    client.disconnect()


def read(rig: Rig, volume: int, truth: Truth, index: int, until: float) -> None:
    """Some of it often, some of it in sequence."""
    rand = random.Random(100 + index)
    client = rig.connect(volume, SIZE, STYLES[index % 3], timeout_s=20)
    at = 0
    while time.monotonic() < until:
        sent = []
        for _ in range(8):
            count = rand.choice([1, 1, 2, MOST])
            at = at if index == 0 else rand.randrange(rand.choice([64, BLOCKS]))
            first = min(at, BLOCKS - count)
            at = (first + count) % BLOCKS
            least = truth.least[first : first + count]
            sent.append((client.send(w.CMD_READ, first * BLOCK, count * BLOCK), first, least))
        for cookie, first, least in sent:
            truth.judge(first, least, client.wait(cookie).check().data)
            truth.reads += 1
    client.disconnect()


def switch_cache(rig: Rig, volume: int, turn: int) -> None:
    rig.wait(rig.plane.cache_volume(volume, POLICIES[turn % len(POLICIES)]))


def switch_log(rig: Rig, volume: int, turn: int) -> None:
    """It drains, and is written again; the cache stands before it."""
    switch_cache(rig, volume, turn)
    if turn % 3 == 2:
        rig.wait(rig.plane.drain_log(volume))
        rig.call(rig.plane.allow_log, volume)


def under_load(rig: Rig, volume: int, switch: Callable[[Rig, int, int], None]) -> Truth:
    truth, failures = Truth(), list[BaseException]()
    until = time.monotonic() + SECONDS

    def guarded(job: Callable[..., None], index: int) -> None:
        try:
            job(rig, volume, truth, index, until)
        except BaseException as failure:
            failures.append(failure)

    jobs = [(write, i) for i in range(WRITERS)] + [(read, i) for i in range(READERS)]
    threads = [threading.Thread(target=guarded, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    turn = 0
    while time.monotonic() < until:
        switch(rig, volume, turn)
        turn += 1
        time.sleep(0.03)
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a client hangs"
    assert not failures, failures
    return truth


def whole(rig: Rig, volume: int, truth: Truth) -> CacheStats:
    """Nothing is under way: each block is its last version, wherever it is read from; what the cache did."""
    client = rig.connect(volume, SIZE, timeout_s=20)
    for _ in range(2):
        for first in range(0, BLOCKS, MOST):
            assert truth.least[first : first + MOST] == truth.begun[first : first + MOST]
            truth.judge(first, truth.least[first : first + MOST], client.read(first * BLOCK, MOST * BLOCK))
    client.disconnect()
    eventually("no frame is pinned", lambda: rig.call(rig.plane.cache_totals).pinned_bytes == 0)
    return rig.call(rig.plane.cache_stats, volume)


@pytest.mark.parametrize("logged", [False, True], ids=["cache", "cache-and-log"])
def test_no_read_is_older_than_what_was_acknowledged_or_seen(logged: bool) -> None:
    with running(reactors=REACTORS, cache_bytes=CACHE) as rig:
        disk = rig.file_object(SIZE)
        volume = rig.call(rig.plane.open_volume, describe(SIZE, [Run(0, SIZE, disk, 0)]))
        if logged:
            log = rig.file_object(LOG, "log", direct=True, align=512)
            rig.wait(rig.plane.open_log(volume, log, 0, LOG, LogPolicy(age_ms=20, bypass_bytes=64 << 10)))
            rig.call(rig.plane.allow_log, volume)
        truth = under_load(rig, volume, switch_log if logged else switch_cache)
        stats = whole(rig, volume, truth)
        assert truth.reads > 300 and sum(truth.begun) > 300
        assert stats.hits > 100 and stats.filled > 100 and stats.written > 0
        assert rig.call(rig.plane.cache_totals).evictions > 0
        if logged:
            found = rig.call(rig.plane.log_stats, volume)
            assert found.logged and found.bypassed and found.destaged_bytes
        else:
            busy = [one.requests for one in rig.call(rig.plane.reactor_stats)]
            assert all(busy), f"every reactor serves some of it: {busy}"
