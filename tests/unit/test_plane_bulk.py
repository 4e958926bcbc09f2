"""Large payloads over TCP, where the plane waits for much of one at once: whatever the pieces in which they come, it
never waits for a byte that nobody owes it, and who sends one does not hold others up."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from tests.lib import nbdwords as w
from tests.lib.rawio import Transmission
from tests.unit.plane_rig import Rig, rig, running, tcp_pair
from tests.unit.test_plane_tls import entered, server

__all__ = ["rig", "server"]
SIZE = 1 << 20
WATER = 128 << 10
LENGTHS = [16 << 10, (16 << 10) + 1, 48 << 10, (64 << 10) + 1, WATER - 1, WATER + 1, 2 * WATER + 5, 700_001]


def in_pieces(client: Transmission, size: int) -> None:
    """From now on its bytes leave `size` at a time, each as a segment of its own."""
    send = client.stream.send

    def pieces(data: bytes | bytearray | memoryview) -> None:
        for at in range(0, len(data), size):
            send(data[at : at + size])
            time.sleep(0.0002)

    client.stream.send = pieces  # type: ignore[method-assign]


def written_one_after_another(client: Transmission) -> None:
    """Nothing is behind a payload that could end a wait for too much of it."""
    for length in LENGTHS:
        data = os.urandom(length)
        client.write(7, data)
        assert client.read(7, length) == data


@pytest.mark.parametrize("size", [5000, 100_000, SIZE])
def test_in_pieces(rig: Rig, size: int) -> None:
    client = rig.connect(rig.volume(SIZE), SIZE, pair=tcp_pair)
    in_pieces(client, size)
    written_one_after_another(client)


@pytest.mark.parametrize("size", [5000, 100_000, SIZE])
def test_in_pieces_through_tls(rig: Rig, server: object, pki: Path, size: int) -> None:
    client = entered(rig, server, pki, pair=tcp_pair)  # type: ignore[arg-type]
    in_pieces(client, size)
    written_one_after_another(client)


def test_who_leaves_in_the_middle(rig: Rig) -> None:
    volume = rig.volume(SIZE)
    client, other = (rig.connect(volume, SIZE, pair=tcp_pair) for _ in range(2))
    client.send(w.CMD_WRITE, 0, 512 << 10, payload=b"x" * 50_000)
    client.stream.close()
    assert client.ended().errno == errno.ECONNRESET
    assert other.read(0, 4096) == bytes(4096), "a write that has not come whole is none"


def test_beside_one_that_stands_still() -> None:
    """One reactor, which waits for much from one client, is there at once for another."""
    with running(reactors=1, spin_us=200) as rig:
        volume = rig.volume(SIZE)
        large, small = (rig.connect(volume, SIZE, pair=tcp_pair) for _ in range(2))
        data = os.urandom(512 << 10)
        cookie = large.send(w.CMD_WRITE, 0, len(data), payload=data[:200_000])
        for i in range(300):
            small.write(700_000, bytes([i % 256]) * 4096)
            assert small.read(700_000, 1) == bytes([i % 256])
        large.stream.send(data[200_000:])
        large.wait(cookie).check()
        assert small.read(0, len(data)) == data
