"""Data integrity: random operations against a model, over every shape of map, object and memory pressure."""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Iterator

import pytest

from nbdvvol.dataplane.types import Run, RunState
from tests.lib import nbdwords as w
from tests.lib.rawio import STYLES, NbdError, Style
from tests.unit.plane_rig import Client, Rig, rig, running

__all__ = ["rig"]
SIZE = 8 << 20


def assert_old_or_zero(now: bytes, was: bytes) -> None:
    """A trimmed byte is what it was, or zero."""
    for at in range(0, len(now), 256):
        new, old = now[at : at + 256], was[at : at + 256]
        assert new == old or not any(new) or all(a in (b, 0) for a, b in zip(new, old, strict=True))


class Model:
    """A client whose every answer is compared with what plain bytes would hold."""

    def __init__(self, client: Client, size: int, unit: int, seed: int) -> None:
        self.client = client
        self.bytes = bytearray(client.read(0, size))
        self.unit = unit
        self.random = random.Random(seed)

    def span(self) -> tuple[int, int]:
        size = len(self.bytes) // self.unit
        length = min(
            size, self.random.choice([1, 3, 8, 9, 40, 300, 3000]) * 512 // self.unit + self.random.randrange(2)
        )
        length = max(length, 1)
        return self.random.randrange(size - length + 1) * self.unit, length * self.unit

    def step(self) -> None:
        offset, length = self.span()
        flags = w.CMD_FLAG_FUA if self.random.random() < 0.03 else 0
        match self.random.choice("wwwwwrrrrrzztt" + "f" * (self.random.random() < 0.1)):
            case "w":
                data = self.random.randbytes(length)
                self.client.write(offset, data, flags=flags)
                self.bytes[offset : offset + length] = data
            case "r":
                assert self.client.read(offset, length) == self.bytes[offset : offset + length]
            case "z":
                self.client.zero(offset, length, flags=flags | self.random.choice([0, w.CMD_FLAG_NO_HOLE]))
                self.bytes[offset : offset + length] = bytes(length)
            case "t":
                self.client.trim(offset, length, flags=flags)
                now = self.client.read(offset, length)
                assert_old_or_zero(now, bytes(self.bytes[offset : offset + length]))
                self.bytes[offset : offset + length] = now
            case "f":
                self.client.flush()

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()
        assert self.client.read(0, len(self.bytes)) == self.bytes


def scattered(rig: Rig, piece: int, align: int = 1, **how: object) -> list[Run]:
    """Runs over two objects, in an order of their own, with gaps between."""
    objects = [rig.file_object(2 * SIZE, f"part{i}", align=align, **how) for i in range(2)]
    places = [(obj, offset) for obj in objects for offset in range(0, 2 * SIZE - piece, 2 * piece)]
    random.Random(piece).shuffle(places)
    return [Run(offset, piece, *places[i]) for i, offset in enumerate(range(0, SIZE, piece))]


@pytest.mark.parametrize("style", STYLES)
def test_random_operations_on_one_run(rig: Rig, style: Style) -> None:
    Model(rig.connect(rig.volume(SIZE), SIZE, style), SIZE, 1, seed=1).run(300)


@pytest.mark.parametrize("piece", [4096, 65536, 1 << 20])
def test_random_operations_across_runs(rig: Rig, piece: int) -> None:
    volume = rig.volume(SIZE, scattered(rig, piece))
    Model(rig.connect(volume, SIZE, "structured"), SIZE, 1, seed=piece).run(300)


def test_odd_places_of_an_adopted_part(rig: Rig) -> None:
    obj = rig.file_object(SIZE + 1000)
    runs = [Run(0, SIZE, obj, 777)]
    Model(rig.connect(rig.volume(SIZE, runs), SIZE), SIZE, 1, seed=5).run(200)
    raw = rig.path("disk").read_bytes()
    assert raw[:777] == bytes(777), "not a byte outside the adopted part changes"
    assert raw[SIZE + 777 :] == bytes(1000 - 777)


@pytest.mark.parametrize("style", STYLES)
def test_direct_objects(rig: Rig, style: Style) -> None:
    try:
        runs = scattered(rig, 65536, align=4096, direct=True)
    except OSError:
        pytest.fail("the file system of /tmp has no O_DIRECT: run the tests where it has")
    client = rig.connect(rig.volume(SIZE, runs, block_min=4096), SIZE, style)
    Model(client, SIZE, 4096, seed=9).run(200)


def test_zero_runs_read_as_zeros_and_refuse_writes(rig: Rig) -> None:
    obj = rig.file_object(SIZE)
    half = SIZE // 2
    volume = rig.volume(SIZE, [Run(0, half, obj, 0), Run(half, half, 0, 0, RunState.ZERO)])
    client = rig.connect(volume, SIZE, "structured")
    client.write(0, b"x" * half)
    assert client.read(half - 10, 20) == b"x" * 10 + bytes(10)
    with pytest.raises(NbdError):
        client.write(half - 10, bytes(20))
    client.zero(half - 10, 20)
    assert client.read(half - 20, 40) == b"x" * 10 + bytes(30)
    assert client.status(half, half) == [(half, 3)]


def burst(client: Client, seed: int, steps: int) -> None:
    """Many requests in flight; each client keeps to its own slice of the volume."""
    rand = random.Random(seed)
    base = (seed % 4) * (SIZE // 4)
    image = bytearray(SIZE // 4)
    client.stream.polite = False
    for _ in range(steps):
        writes = []
        for slot in rand.sample(range(16), 8):
            data = rand.randbytes(rand.choice([10, 4096, 30_000, 128 << 10]))
            writes.append(client.send(w.CMD_WRITE, base + slot * (128 << 10), len(data), payload=data))
            image[slot * (128 << 10) : slot * (128 << 10) + len(data)] = data
        for cookie in writes:
            client.wait(cookie).check()
        offset, length = rand.randrange(len(image) // 2), rand.choice([1, 5000, 700_000])
        assert client.read(base + offset, length) == image[offset : offset + length]


@pytest.mark.parametrize("pool", [4 << 20, 64 << 20])
def test_parallel_connections_under_memory_pressure(pool: int) -> None:
    with running(reactors=2, pool_bytes=pool) as rig:
        volume = rig.volume(SIZE)
        failures: list[BaseException] = []

        def run(seed: int) -> None:
            try:
                burst(rig.connect(volume, SIZE, STYLES[seed % 3], timeout_s=30), seed, 30)
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not failures, failures
        for sock in rig.sockets:
            sock.shutdown(socket.SHUT_RDWR)
        # Whatever was taken from the pool is back once the connections are gone.
        for _ in range(100):
            stats = rig.call(rig.plane.reactor_stats)
            if all(one.connections == 0 for one in stats):
                break
            threading.Event().wait(0.02)
        assert [one.pool_free_bytes for one in stats] == [pool, pool]


def test_overlapping_writes_of_two_connections_run_in_parse_order(rig: Rig) -> None:
    """A later overlapping write, on a connection of another reactor, never shows beneath an earlier one."""
    volume = rig.volume(SIZE)
    first, second = rig.connect(volume, SIZE), rig.connect(volume, SIZE)
    for turn in range(60):
        old = first.send(w.CMD_WRITE, 0, 256 << 10, payload=bytes([turn]) * (256 << 10))
        first.wait(old).check()
        cookies = [first.send(w.CMD_WRITE, i * 1000, 100_000, payload=b"\xff" * 100_000) for i in range(8)]
        for cookie in cookies:
            first.wait(cookie).check()
        second.write(0, bytes([turn]) * 107_000)
        assert first.read(0, 107_000) == bytes([turn]) * 107_000


def test_small_writes_go_out_without_a_copy(rig: Rig) -> None:
    client = rig.connect(rig.volume(SIZE), SIZE)
    before = sum(one.copies_bytes for one in rig.call(rig.plane.reactor_stats))
    for i in range(512):
        client.write(i * 4096, b"y" * 4096)
    for i in range(16):
        client.write(i << 18, b"z" * (256 << 10))
    for i in range(100):
        client.read(i * 4096, 4096)
    copied = sum(one.copies_bytes for one in rig.call(rig.plane.reactor_stats)) - before
    assert copied < 0.15 * (512 * 4096 + (16 << 18)), f"{copied} bytes copied"


def test_jobs_read_write_zero_in_the_objects_own_mode(rig: Rig) -> None:
    for direct, align in ((False, 1), (True, 4096)):
        obj = rig.file_object(1 << 20, f"meta{align}", direct=direct, align=align)
        data = os.urandom(256 << 10)
        rig.wait(rig.plane.write(obj, 4096, data))
        assert rig.wait(rig.plane.read(obj, 4096, len(data))) == data
        rig.wait(rig.plane.zero(obj, 8192, 1 << 19))
        assert rig.wait(rig.plane.read(obj, 4096, 8192)) == data[:4096] + bytes(4096)
        with pytest.raises(OSError, match="outside"):
            rig.wait(rig.plane.read(obj, 1 << 20, 4096))
        rig.wait(rig.plane.close_object(obj))


@pytest.fixture
def ro_file(rig: Rig) -> Iterator[int]:
    path = rig.path("ro")
    path.write_bytes(b"r" * 65536)
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def test_read_only_objects(rig: Rig, ro_file: int) -> None:
    obj = rig.fd_object(ro_file, 65536, read_only=True)
    with pytest.raises(OSError, match="read-only"):
        rig.volume(65536, [Run(0, 65536, obj, 0)])
    client = rig.connect(rig.volume(65536, [Run(0, 65536, obj, 0)], read_only=True), 65536)
    assert client.read(0, 65536) == b"r" * 65536
    client.flush()


def test_an_object_that_shrank_is_an_error_never_stale_memory(rig: Rig) -> None:
    client = rig.connect(rig.volume(SIZE), SIZE, "structured")
    client.write(0, b"s" * SIZE)
    os.truncate(rig.path("disk"), 4096)
    with pytest.raises(NbdError) as caught:
        client.read(0, 8192)
    assert caught.value.error == 5
    assert client.read(0, 4096) == b"s" * 4096
