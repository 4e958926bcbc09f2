"""Instructions per request above the I/O port, counted by callgrind: exact, so they are held to a limit.

Whoever makes the code cheaper lowers the limit; whoever makes it dearer has to say why here. The limits leave room for
another compiler, not for another loop.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from perf import callgrind

LIMITS = {"read": 1350, "structured": 1373, "write": 1286, "mirror": 2580}
"""Instructions a request of 4 KiB in a full batch, -O2, assertions on.

Ten more than at first: limits and shares, the trace's hooks and the counters of datastores cost that together. Another
ten for mirrors and the cache: a volume without them asks at half a dozen places whether it has them. Two
more, shared by a batch: whether it is in the middle of a large payload, and how much of that to wait for. Two dozen
to three, so that a write-back log can go in and out under load: each request is counted below the gate, and each
write-like one as narrow or not (volume/switch.h)."""


@pytest.fixture(scope="module")
def steady() -> Path:
    return callgrind.build()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("load", callgrind.LOADS)
def test_instructions_per_request(steady: Path, load: str) -> None:
    rooms = callgrind.per_request(steady, load)
    assert set(rooms) == set(callgrind.ROOMS) and min(rooms.values()) > 0
    assert sum(rooms.values()) <= LIMITS[load], rooms


@pytest.mark.timeout(600)
def test_a_warm_regions_intent_check_is_cheap(steady: Path) -> None:
    """At most 3 % of what a write to a mirror of two legs costs: the region's bit is set, one look says so."""
    part = callgrind.share(steady, "mirror", callgrind.INTENT_FILES)
    assert 0 < part <= 0.03


def test_the_count_is_the_same_every_time(steady: Path) -> None:
    assert callgrind.per_request(steady, "read") == callgrind.per_request(steady, "read")


def test_a_resync_keeps_to_its_rate_from_a_clients_first_request_on(steady: Path) -> None:
    """In simulated time. Without clients it is as fast as it can, which the first one must not wait behind."""
    done = subprocess.run([str(steady), "resync", "40"], capture_output=True, text=True, check=True)
    busy = re.search(r"(\d+) bytes copied in (\d+) us at (\d+) a second, clients being busy", done.stdout)
    after = re.search(r"(\d+) of (\d+) a second later, clients being quiet", done.stdout)
    assert busy and after, done.stdout
    copied, took_us, rate = map(int, busy.groups())
    at_last, size = map(int, after.groups())
    piece, late_us = 128 << 10, 2000
    assert took_us > 1_000_000 and copied > 0.5 * rate * took_us / 1e6
    assert copied <= rate * (took_us + late_us) / 1e6 + piece
    assert at_last == size
