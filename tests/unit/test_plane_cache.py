"""The cache on the real plane: what is served from it, what is not, and what it costs nobody.

That no read is ever too old is judged in the simulator and under threads (tests/sim/test_plain.py, test_cache.py).
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdvvol.dataplane.errors import PlaneError
from nbdvvol.dataplane.types import CacheMode, CachePolicy, CacheStats, Run
from tests.lib import nbdwords as w
from tests.lib.rawio import STYLES, Style
from tests.unit.mirror_rig import MirrorRig
from tests.unit.plane_rig import Rig, describe, eventually, running

SIZE = 4 << 20
BLOCK = 4096
CACHE = 2 << 20
READ = CachePolicy(CacheMode.READ)
WRITETHROUGH = CachePolicy(CacheMode.WRITETHROUGH)


@pytest.fixture
def cached() -> Iterator[Rig]:
    with running(reactors=2, cache_bytes=CACHE) as rig:
        yield rig


def stats(rig: Rig, volume: int) -> CacheStats:
    return rig.call(rig.plane.cache_stats, volume)


def opened(rig: Rig, policy: CachePolicy, size: int = SIZE) -> tuple[int, int, bytes]:
    """A volume on a file with content, under a policy: its number, its object's, and the content."""
    content = os.urandom(size)
    rig.path("disk").write_bytes(content)
    number = rig.file_object(size)
    volume = rig.call(rig.plane.open_volume, describe(size, [Run(0, size, number, 0)]))
    rig.wait(rig.plane.cache_volume(volume, policy))
    return volume, number, content


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("length", [BLOCK, 16 * BLOCK, 64 * BLOCK], ids=["one", "frames", "copied"])
def test_a_second_read_is_a_hit(cached: Rig, style: Style, length: int) -> None:
    volume, number, content = opened(cached, READ)
    client = cached.connect(volume, SIZE, style)
    for _ in range(2):
        assert client.read(3 * BLOCK, length) == content[3 * BLOCK : 3 * BLOCK + length]
    assert client.read(3 * BLOCK + 512, length - 1024) == content[3 * BLOCK + 512 : 3 * BLOCK + length - 512]
    assert cached.call(cached.plane.object_stats, number).reads == 1
    found, blocks = stats(cached, volume), length // BLOCK
    assert (found.misses, found.filled, found.hits) == (blocks, blocks, 2 * blocks)
    assert cached.stats(volume).reads == 3
    eventually("no frame is pinned", lambda: cached.call(cached.plane.cache_totals).pinned_bytes == 0)


@pytest.mark.parametrize("policy", [READ, WRITETHROUGH], ids=["read", "writethrough"])
def test_a_write_is_read_back(cached: Rig, policy: CachePolicy) -> None:
    volume, number, content = opened(cached, policy)
    writer, reader = cached.connect(volume, SIZE), cached.connect(volume, SIZE)
    assert reader.read(0, 4 * BLOCK) == content[: 4 * BLOCK]
    fresh = os.urandom(2 * BLOCK + 512)
    writer.write(BLOCK, fresh)
    before = cached.call(cached.plane.object_stats, number).reads
    assert reader.read(BLOCK, 2 * BLOCK) == fresh[: 2 * BLOCK]
    assert cached.call(cached.plane.object_stats, number).reads - before == (policy is READ)
    assert reader.read(0, 4 * BLOCK) == content[:BLOCK] + fresh + content[3 * BLOCK + 512 : 4 * BLOCK]
    assert stats(cached, volume).written == (0 if policy is READ else 2)


@pytest.mark.parametrize("length", [BLOCK, 3 << 20])
def test_zeroed_blocks_are_dropped(cached: Rig, length: int) -> None:
    volume, _, content = opened(cached, READ)
    client = cached.connect(volume, SIZE)
    assert client.read(0, 8 * BLOCK) == content[: 8 * BLOCK]
    assert client.call(w.CMD_WRITE_ZEROES, BLOCK, length).error == 0
    assert client.read(BLOCK, BLOCK) == bytes(BLOCK)


def test_off_and_on_again_finds_nothing_old(cached: Rig) -> None:
    volume, _, content = opened(cached, READ)
    client = cached.connect(volume, SIZE)
    assert client.read(0, BLOCK) == content[:BLOCK]
    cached.wait(cached.plane.cache_volume(volume, CachePolicy()))
    with cached.path("disk").open("r+b") as file:  # as another host might, while it holds the VVol
        file.write(b"n" * BLOCK)
    assert client.read(0, BLOCK) == b"n" * BLOCK
    cached.wait(cached.plane.cache_volume(volume, READ))
    assert client.read(0, BLOCK) == b"n" * BLOCK
    assert stats(cached, volume).hits == 0


def test_a_map_that_says_something_else_drops_what_was_there(cached: Rig) -> None:
    volume, number, content = opened(cached, READ)
    client = cached.connect(volume, SIZE)
    assert client.read(0, BLOCK) == content[:BLOCK]
    half = SIZE // 2
    runs = [Run(0, half, number, half), Run(half, half, number, 0)]
    cached.wait(cached.plane.change_volume(volume, describe(SIZE, runs, version=2, start=1)))
    assert client.read(0, BLOCK) == content[half : half + BLOCK]


def test_growth_keeps_what_is_cached(cached: Rig) -> None:
    volume, number, content = opened(cached, READ)
    client = cached.connect(volume, SIZE)
    assert client.read(0, BLOCK) == content[:BLOCK]
    os.truncate(cached.path("disk"), 2 * SIZE)
    cached.call(cached.plane.set_object_size, number, 2 * SIZE)
    bigger = describe(2 * SIZE, [Run(0, 2 * SIZE, number, 0)], version=2, start=1)
    cached.wait(cached.plane.change_volume(volume, bigger))
    assert client.read(0, BLOCK) == content[:BLOCK]
    assert stats(cached, volume).hits == 1


def test_the_cache_command_fetches(cached: Rig) -> None:
    volume, _, content = opened(cached, READ)
    client = cached.connect(volume, SIZE)
    assert client.call(w.CMD_CACHE, 0, 100 * BLOCK).error == 0
    eventually("it is fetched", lambda: stats(cached, volume).filled == 100)
    assert client.read(0, 100 * BLOCK) == content[: 100 * BLOCK]
    found = stats(cached, volume)
    assert (found.hits, found.misses, found.ahead, found.ahead_used) == (100, 0, 100, 100)
    assert cached.stats(volume).reads == 1


def test_a_stream_is_read_ahead(cached: Rig) -> None:
    volume, _, content = opened(cached, CachePolicy(CacheMode.READ, ahead_bytes=64 << 10))
    client = cached.connect(volume, SIZE)
    for at in range(0, 1 << 20, BLOCK):
        assert client.read(at, BLOCK) == content[at : at + BLOCK]
    found = stats(cached, volume)
    assert found.ahead_used > 128, "at least half of a stream of 256 blocks was there before it was asked for"
    assert found.ahead <= 256 + 16


def test_a_long_read_uses_what_was_fetched_ahead_for_it(cached: Rig) -> None:
    """However little that is: it is not read twice."""
    volume, _, content = opened(cached, CachePolicy(CacheMode.READ, ahead_bytes=64 << 10))
    client, long = cached.connect(volume, SIZE), 256 * BLOCK
    for at in range(0, SIZE, long):
        assert client.read(at, long) == content[at : at + long]
        eventually("what it fetches has come", lambda: stats(cached, volume).filled > 0)
    found = stats(cached, volume)
    assert 0 < found.ahead <= found.ahead_used + 16, "all but the last is used"


def test_reading_ahead_grows_with_a_stream_and_shrinks_when_it_was_in_vain(cached: Rig) -> None:
    most = 64
    volume, _, content = opened(cached, CachePolicy(CacheMode.READ, ahead_bytes=most * BLOCK))
    client, position = cached.connect(volume, SIZE), 0

    def read(blocks: int) -> int:
        """Go on; how far ahead of the reader it has been fetched, in blocks."""
        nonlocal position
        for _ in range(blocks):
            assert client.read(position * BLOCK, BLOCK) == content[position * BLOCK : (position + 1) * BLOCK]
            position += 1
            eventually("all is there that was asked for", settled)
        return furthest() - position

    def furthest() -> int:
        found = stats(cached, volume)
        return found.ahead + found.misses  # all of them in order, each block once

    def settled() -> bool:
        found = stats(cached, volume)
        return found.filled == found.ahead + found.misses

    assert read(1) == 0, "one request is no stream"
    assert 0 < read(1) <= 4, "a stream that has just begun is hardly trusted"
    assert 4 < read(8) <= 16
    assert most // 2 - 1 <= read(100) <= most
    before = stats(cached, volume)
    cached.wait(cached.plane.cache_volume(volume, CachePolicy()))
    cached.wait(cached.plane.cache_volume(volume, CachePolicy(CacheMode.READ, ahead_bytes=most * BLOCK)))
    while stats(cached, volume).ahead == before.ahead:
        assert position < SIZE // BLOCK - 2 * most
        client.read(position * BLOCK, BLOCK)
        position += 1
    assert stats(cached, volume).ahead - before.ahead <= most // 4, "what was fetched was gone again"


def test_nothing_is_fetched_ahead_of_who_reads_here_and_there(cached: Rig) -> None:
    volume, _, content = opened(cached, CachePolicy(CacheMode.READ, ahead_bytes=256 << 10))
    client = cached.connect(volume, SIZE)
    blocks = list(range(0, SIZE // BLOCK, 3))
    random.Random(3).shuffle(blocks)
    for block in blocks[:200]:
        assert client.read(block * BLOCK, BLOCK) == content[block * BLOCK : (block + 1) * BLOCK]
    assert stats(cached, volume).ahead == 0


def test_a_client_with_many_requests_under_way_is_not_read_ahead_of(cached: Rig) -> None:
    """It asks for what would be fetched ahead at once: both would read the same from the storage."""
    volume, number, content = opened(cached, CachePolicy(CacheMode.READ, ahead_bytes=512 << 10))
    client = cached.connect(volume, SIZE)
    step = 16 * BLOCK
    cookies = [client.send(w.CMD_READ, at, step) for at in range(0, SIZE, step)]
    got = b"".join(client.wait(cookie).check().data for cookie in cookies)
    assert got == content
    assert cached.call(cached.plane.object_stats, number).read_bytes <= SIZE * 5 // 4


def test_a_scan_pushes_nothing_out_the_first_time(cached: Rig) -> None:
    """While there is room it is kept; what comes then is only remembered, and enters when it comes again."""
    volume, _, content = opened(cached, READ)
    client = cached.connect(volume, SIZE)
    for at in range(0, SIZE, 16 * BLOCK):
        assert client.read(at, 16 * BLOCK) == content[at : at + 16 * BLOCK]
    assert stats(cached, volume).filled == CACHE // BLOCK
    assert cached.call(cached.plane.cache_totals).evictions == 0
    last = SIZE - BLOCK
    for _ in range(2):
        assert client.read(last, BLOCK) == content[last:]
    assert stats(cached, volume).hits == 1, "what is read again is kept"


def test_a_scan_pushes_nothing_out_where_room_ends_in_the_middle_of_a_read(cached: Rig) -> None:
    volume, _, content = opened(cached, READ)
    client = cached.connect(volume, SIZE)
    assert client.read(SIZE - BLOCK, BLOCK) == content[SIZE - BLOCK :]
    for at in range(0, SIZE - 16 * BLOCK, 16 * BLOCK):
        assert client.read(at, 16 * BLOCK) == content[at : at + 16 * BLOCK]
    assert stats(cached, volume).filled == CACHE // BLOCK
    assert cached.call(cached.plane.cache_totals).evictions == 0


def test_a_stalled_client_pins_little(cached: Rig) -> None:
    """It reads nothing: what it pins is bounded, others are served, and it gets the right bytes in the end."""
    volume, _, content = opened(cached, READ)
    stalled, other = cached.connect(volume, SIZE), cached.connect(volume, SIZE)
    assert other.read(0, 16 * BLOCK) == content[: 16 * BLOCK]
    cookies = [stalled.send(w.CMD_READ, 0, 16 * BLOCK) for _ in range(200)]
    assert other.read(BLOCK, BLOCK) == content[BLOCK : 2 * BLOCK]
    assert cached.call(cached.plane.cache_totals).pinned_bytes <= CACHE // 4
    other.write(0, bytes(BLOCK))
    assert other.read(0, BLOCK) == bytes(BLOCK)
    for cookie in cookies:
        assert stalled.wait(cookie).check().data[BLOCK:] == content[BLOCK : 16 * BLOCK]


def test_storage_in_memory_is_bypassed(cached: Rig) -> None:
    fd = os.memfd_create("disk")
    os.ftruncate(fd, SIZE)
    number = cached.fd_object(fd, SIZE)
    os.close(fd)
    volume = cached.call(cached.plane.open_volume, describe(SIZE, [Run(0, SIZE, number, 0)]))
    cached.wait(cached.plane.cache_volume(volume, READ))
    client = cached.connect(volume, SIZE)
    assert client.read(0, BLOCK) == client.read(0, BLOCK) == bytes(BLOCK)
    found = stats(cached, volume)
    assert found.bypassed and not found.filled and not found.held_bytes


def test_floors_are_cut_to_half_of_the_cache(cached: Rig) -> None:
    first, number, _ = opened(cached, CachePolicy(CacheMode.READ, floor_bytes=CACHE))
    second = cached.call(cached.plane.open_volume, describe(SIZE, [Run(0, SIZE, number, 0)]))
    cached.wait(cached.plane.cache_volume(second, CachePolicy(CacheMode.READ, floor_bytes=CACHE)))
    assert stats(cached, first).floor_bytes == stats(cached, second).floor_bytes == CACHE // 4


@pytest.mark.parametrize("floor", [0, CACHE // 4], ids=["none", "floor"])
def test_a_floor_is_what_neighbours_cannot_take(cached: Rig, floor: int) -> None:
    """Another volume reads more than the cache holds, at random, most of it twice."""
    mine, number, content = opened(cached, CachePolicy(CacheMode.READ, floor_bytes=floor))
    other = cached.call(cached.plane.open_volume, describe(SIZE, [Run(0, SIZE, number, 0)]))
    cached.wait(cached.plane.cache_volume(other, READ))
    blocks = list(range(SIZE // BLOCK))
    held = blocks[: CACHE // 4 // BLOCK]
    rand = random.Random(4)
    client, greedy = cached.connect(mine, SIZE), cached.connect(other, SIZE)
    rand.shuffle(held)
    for block in held:
        client.read(block * BLOCK, BLOCK)
    for _ in range(3):
        rand.shuffle(blocks)
        for cookie in [greedy.send(w.CMD_READ, block * BLOCK, BLOCK) for block in blocks]:
            greedy.wait(cookie).check()
    before = stats(cached, mine)
    for block in held:
        assert client.read(block * BLOCK, BLOCK) == content[block * BLOCK : (block + 1) * BLOCK]
    hits = stats(cached, mine).hits - before.hits
    assert cached.call(cached.plane.cache_totals).evictions > len(blocks)
    assert hits == len(held) if floor else hits < len(held) // 4


def test_writes_go_through_to_all_legs(tmp_path: Path) -> None:
    rig = MirrorRig(tmp_path, cache_bytes=CACHE)
    try:
        volume = rig.serve()
        rig.wait(rig.plane.cache_volume(volume, WRITETHROUGH))
        client, data = rig.client(), os.urandom(8 * BLOCK)
        client.write(BLOCK, data)
        assert [rig.bytes_of(leg)[BLOCK : 9 * BLOCK] for leg in (1, 2)] == [data, data]
        found = stats(rig, volume)
        assert (found.written, client.read(BLOCK, 8 * BLOCK)) == (8, data)
        assert stats(rig, volume).hits - found.hits == 8
    finally:
        rig.close()


def test_bad_policies_and_missing_memory_are_refused(cached: Rig) -> None:
    volume, _, _ = opened(cached, READ)
    with pytest.raises(PlaneError, match="ahead"):
        cached.wait(cached.plane.cache_volume(volume, CachePolicy(CacheMode.READ, ahead_bytes=1 << 30)))
    with running() as bare:
        other = bare.volume()
        with pytest.raises(PlaneError, match="without memory") as refused:
            bare.wait(bare.plane.cache_volume(other, READ))
        assert refused.value.errno == errno.ENOSYS
