"""The write-back log of a volume on the real plane: what is logged is read, kept and carried, and never another's.

That no acknowledged write is lost and no read too old is judged in the simulator (tests/sim/test_log.py).
"""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdvvol.dataplane.errors import PlaneError
from nbdvvol.dataplane.ffi import ffi, lib
from nbdvvol.dataplane.log import LogEvent, LogEventKind, LogFound, LogPolicy, LogState, LogStats, LogVerdict
from nbdvvol.dataplane.logs import decode_event
from nbdvvol.dataplane.types import Run
from tests.lib import nbdwords as w
from tests.unit.plane_rig import Client, Rig, describe, eventually, running

SIZE = 4 << 20
LOG = 8 << 20
BLOCK = 4096
LAZY = 3_600_000
"""An age at which nothing is carried below while a test runs, milliseconds."""


class Logged:
    """A volume on a file with content, its log in another file."""

    def __init__(self, rig: Rig, *, content: bytes | None = None, size: int = SIZE, **policy: object) -> None:
        self.rig = rig
        if content is not None:
            rig.path("disk").write_bytes(content)
        self.object = rig.file_object(size)
        self.log = rig.file_object(LOG, "log")
        self.volume = rig.call(rig.plane.open_volume, describe(size, [Run(0, size, self.object, 0)]))
        wish = LogPolicy(**{"age_ms": LAZY, **policy})  # type: ignore[arg-type]
        self.found: LogFound = rig.wait(rig.plane.open_log(self.volume, self.log, 0, LOG, wish))

    def allowed(self) -> Logged:
        """The registry has it."""
        self.rig.call(self.rig.plane.allow_log, self.volume)
        return self

    def connect(self) -> Client:
        """A client with structured replies."""
        return self.rig.connect(self.volume, SIZE, "structured")

    def stats(self) -> LogStats:
        """How the log is."""
        return self.rig.call(self.rig.plane.log_stats, self.volume)

    def drain(self) -> None:
        """Carry everything below."""
        self.rig.wait(self.rig.plane.drain_log(self.volume))

    def close(self) -> None:
        """Close the volume and both objects, as they are."""
        self.rig.wait(self.rig.plane.close_volume(self.volume))
        for one in (self.object, self.log):
            self.rig.wait(self.rig.plane.close_object(one))


@pytest.fixture(params=[1, 2], ids=["one-reactor", "two"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with running(reactors=request.param, cache_bytes=2 << 20) as one:
        yield one


def disk(rig: Rig) -> bytes:
    return rig.path("disk").read_bytes()


def test_what_is_logged_is_read_at_once_and_drained(rig: Rig) -> None:
    content, fresh = os.urandom(SIZE), os.urandom(2 * BLOCK)
    one = Logged(rig, content=content).allowed()
    assert one.found.verdict is LogVerdict.USABLE
    client, other = one.connect(), one.connect()
    client.write(3 * BLOCK, fresh)
    assert other.read(2 * BLOCK, 4 * BLOCK) == content[2 * BLOCK : 3 * BLOCK] + fresh + content[5 * BLOCK : 6 * BLOCK]
    assert client.call(w.CMD_FLUSH).error == 0
    assert disk(rig) == content, "nothing is carried below before its time"
    found = one.stats()
    assert (found.state, found.dirty_bytes, found.logged, found.bypassed) == (LogState.SERVING, 2 * BLOCK, 1, 0)
    assert found.syncs >= 1
    one.drain()
    assert disk(rig) == content[: 3 * BLOCK] + fresh + content[5 * BLOCK :]
    assert one.stats().dirty_bytes == 0
    one.drain()
    client.write(0, b"t" * BLOCK)
    assert disk(rig)[:BLOCK] == b"t" * BLOCK, "a drained log is written through"
    one.allowed()
    client.write(0, b"l" * BLOCK)
    eventually("it is logged again", lambda: one.stats().state is LogState.SERVING)
    client.write(0, b"m" * BLOCK)
    assert disk(rig)[:BLOCK] in (b"t" * BLOCK, b"l" * BLOCK)
    assert other.read(0, BLOCK) == b"m" * BLOCK


def test_other_limits_hold_from_then_on(rig: Rig) -> None:
    one = Logged(rig, content=bytes(SIZE)).allowed()
    client = one.connect()
    client.write(0, b"a" * BLOCK)
    assert (one.stats().logged, one.stats().bypassed) == (1, 0)
    rig.call(rig.plane.limit_log, one.volume, LogPolicy(bypass_bytes=BLOCK, age_ms=1))
    eventually("the oldest is carried by the new age", lambda: one.stats().dirty_bytes == 0)
    client.write(BLOCK, b"b" * BLOCK)
    assert (one.stats().logged, one.stats().bypassed) == (1, 1)
    assert disk(rig)[: 2 * BLOCK] == b"a" * BLOCK + b"b" * BLOCK
    with pytest.raises(PlaneError, match="smallest to bypass"):
        rig.call(rig.plane.limit_log, one.volume, LogPolicy(bypass_bytes=1 << 20))


def test_a_rate_holds_destaging_back_and_a_drain_takes_no_notice(rig: Rig) -> None:
    one = Logged(rig, content=bytes(SIZE), age_ms=1, destage_rate=1).allowed()
    client, fresh = one.connect(), os.urandom(2 << 20)
    for at in range(0, len(fresh), 64 << 10):
        client.write(at, fresh[at : at + (64 << 10)])
    eventually("a first piece is carried", lambda: one.stats().destaged_bytes > 0)
    client.flush()
    found = one.stats()
    assert found.destaged_bytes <= 128 << 10, "at a byte a second the rest takes weeks"
    assert found.dirty_bytes == len(fresh) - found.destaged_bytes
    rig.call(rig.plane.limit_log, one.volume, LogPolicy(age_ms=1))
    eventually("without a rate it is carried at once", lambda: one.stats().dirty_bytes == 0)
    rig.call(rig.plane.limit_log, one.volume, LogPolicy(age_ms=1, destage_rate=1))
    for at in range(0, len(fresh), 64 << 10):
        client.write(at, fresh[at : at + (64 << 10)][::-1])
    one.drain()
    assert one.stats().dirty_bytes == 0
    assert disk(rig)[: 64 << 10] == fresh[: 64 << 10][::-1]
    one.allowed()
    eventually("it is logged again", lambda: one.stats().state is LogState.SERVING)
    for at in range(0, len(fresh), 64 << 10):
        client.write(at, bytes(64 << 10))
    one.close()  # whatever is being carried


def test_nothing_is_logged_before_it_is_allowed(rig: Rig) -> None:
    one = Logged(rig, content=bytes(SIZE))
    one.connect().write(0, b"x" * BLOCK)
    assert disk(rig)[:BLOCK] == b"x" * BLOCK
    assert (one.stats().state, one.stats().logged) == (LogState.THROUGH, 0)


@pytest.mark.parametrize(("offset", "length"), [(512, 512), (BLOCK - 512, 1024), (100, 3 * BLOCK), (1, SIZE - 2)])
def test_blocks_written_in_part_keep_the_rest(rig: Rig, offset: int, length: int) -> None:
    content, fresh = os.urandom(SIZE), os.urandom(length)
    one = Logged(rig, content=content).allowed()
    client = one.connect()
    client.write(offset, fresh)
    wanted = content[:offset] + fresh + content[offset + length :]
    assert b"".join(client.read(at, 1 << 20) for at in range(0, SIZE, 1 << 20)) == wanted
    assert client.call(w.CMD_WRITE_ZEROES, offset + 1, length - 2).error == 0
    assert client.call(w.CMD_TRIM, offset + 2, 3).error == 0
    wanted = wanted[: offset + 1] + bytes(length - 2) + wanted[offset + length - 1 :]
    assert b"".join(client.read(at, 1 << 20) for at in range(0, SIZE, 1 << 20)) == wanted
    one.drain()
    assert disk(rig) == wanted


def test_a_volume_that_ends_inside_a_block(rig: Rig) -> None:
    size = SIZE - 1536
    one = Logged(rig, content=bytes(size), size=size).allowed()
    client = rig.connect(one.volume, size)
    client.write(size - 512, b"e" * 512)
    assert client.read(size - 1024, 1024) == bytes(512) + b"e" * 512
    one.drain()
    assert len(disk(rig)) == size
    assert disk(rig)[-1024:] == bytes(512) + b"e" * 512


def test_long_writes_bypass_and_what_was_logged_under_them_is_gone(rig: Rig) -> None:
    one = Logged(rig, content=bytes(SIZE), bypass_bytes=64 << 10).allowed()
    client, long = one.connect(), os.urandom(64 << 10)
    client.write(BLOCK, b"s" * BLOCK)
    client.write(0, long)
    assert client.read(0, 64 << 10) == long
    assert disk(rig)[: 64 << 10] == long
    found = one.stats()
    assert (found.logged, found.bypassed, found.tombstones, found.dirty_bytes) == (1, 1, 1, 0)
    assert client.call(w.CMD_FLUSH).error == 0


def test_block_status_knows_what_is_logged(rig: Rig) -> None:
    rig.path("disk").touch()
    os.truncate(rig.path("disk"), SIZE)
    one = Logged(rig).allowed()
    client = one.connect()
    client.write(64 * BLOCK, b"d" * BLOCK)
    extents = client.status(64 * BLOCK, BLOCK)
    assert extents == [(BLOCK, 0)]
    assert client.read(64 * BLOCK, BLOCK) == b"d" * BLOCK


def test_a_log_that_was_not_drained_is_read_back(rig: Rig) -> None:
    content, fresh = os.urandom(SIZE), os.urandom(BLOCK)
    one = Logged(rig, content=content).allowed()
    one.connect().write(BLOCK, fresh)
    one.close()
    assert disk(rig) == content
    again = Logged(rig, held=one.found.id)
    assert (again.found.verdict, again.found.dirty_bytes, again.found.id) == (LogVerdict.USABLE, BLOCK, one.found.id)
    client = again.connect()
    assert client.read(0, 3 * BLOCK) == content[:BLOCK] + fresh + content[2 * BLOCK : 3 * BLOCK]
    again.drain()
    assert disk(rig) == content[:BLOCK] + fresh + content[2 * BLOCK :]
    assert client.read(BLOCK, BLOCK) == fresh


def test_a_copy_taken_while_it_runs_has_every_acknowledged_write(rig: Rig, tmp_path: Path) -> None:
    """What a kill leaves: both files as they are, with nobody to end anything."""
    one = Logged(rig, content=bytes(SIZE)).allowed()
    client, wrote = one.connect(), {at: os.urandom(BLOCK) for at in range(0, 64 * BLOCK, 2 * BLOCK)}
    for at, data in wrote.items():
        client.write(at, data)
    copies = {name: rig.path(name).read_bytes() for name in ("disk", "log")}
    with running(reactors=1) as after:
        for name, data in copies.items():
            after.path(name).write_bytes(data)
        again = Logged(after, held=one.found.id)
        reader = again.connect()
        assert all(reader.read(at, BLOCK) == data for at, data in wrote.items())


@pytest.mark.parametrize(
    ("held", "verdict"), [(None, LogVerdict.UNKNOWN_DATA), (b"another log's id", LogVerdict.OTHER_LOG)]
)
def test_another_log_is_refused_and_nothing_is_served(rig: Rig, held: bytes | None, verdict: LogVerdict) -> None:
    one = Logged(rig, content=bytes(SIZE)).allowed()
    one.connect().write(0, b"x" * BLOCK)
    one.close()
    again = Logged(rig, held=held)
    assert again.found.verdict is verdict
    assert again.stats().state is LogState.CLOSED
    client = again.connect()
    assert client.call(w.CMD_READ, 0, BLOCK).error == errno.EIO
    assert client.call(w.CMD_WRITE, 0, BLOCK, payload=b"y" * BLOCK).error == errno.EIO
    assert client.call(w.CMD_FLUSH).error == errno.EIO
    again.close()
    emptied = Logged(rig, discard=True)
    assert emptied.found.verdict is LogVerdict.USABLE
    assert emptied.connect().read(0, BLOCK) == bytes(BLOCK)


@pytest.mark.parametrize(
    ("other", "verdict"),
    [
        ({"uuid": b"another VVol's id"[:16]}, LogVerdict.OTHER_VVOL),
        ({"epoch": 1}, LogVerdict.REGISTRY_OLD),
        ({"generation": 1}, LogVerdict.REGISTRY_OLD),
    ],
    ids=["vvol", "epoch", "generation"],
)
def test_a_log_of_another_vvol_or_of_what_comes_later_is_refused(
    rig: Rig, other: dict[str, object], verdict: LogVerdict
) -> None:
    """An older registry gives an epoch or a generation that the log has seen the end of."""
    disk = rig.file_object(SIZE)
    made = dataclasses.replace(describe(SIZE, [Run(0, SIZE, disk, 0)]), epoch=2, generation=2)
    log, held = rig.file_object(LOG, "log"), None
    for desc in (made, dataclasses.replace(made, **other)):  # type: ignore[arg-type]
        volume = rig.call(rig.plane.open_volume, desc)
        found = rig.wait(rig.plane.open_log(volume, log, 0, LOG, LogPolicy(held=held, age_ms=LAZY)))
        client = rig.connect(volume, SIZE)
        if held is None:
            rig.call(rig.plane.allow_log, volume)
            client.write(0, b"x" * BLOCK)
            held = found.id
        rig.wait(rig.plane.close_volume(volume))
    assert found.verdict is verdict
    assert rig.path("disk").read_bytes()[:BLOCK] == bytes(BLOCK), "nothing of it is carried to the other's place"


def test_a_log_that_holds_data_behind_the_vvols_end_is_refused(rig: Rig) -> None:
    """A registry that was put back may know the VVol as it was before it grew."""
    disk, log = rig.file_object(SIZE), rig.file_object(LOG, "log")
    held = None
    for size in (SIZE, SIZE // 2):
        volume = rig.call(rig.plane.open_volume, describe(size, [Run(0, size, disk, 0)]))
        found = rig.wait(rig.plane.open_log(volume, log, 0, LOG, LogPolicy(held=held, age_ms=LAZY)))
        if held is None:
            rig.call(rig.plane.allow_log, volume)
            rig.connect(volume, size).write(SIZE - BLOCK, b"x" * BLOCK)
            held = found.id
        rig.wait(rig.plane.close_volume(volume))
    assert found.verdict is LogVerdict.REGISTRY_OLD
    assert rig.path("disk").read_bytes() == bytes(SIZE)


def test_no_log_where_there_is_none(rig: Rig) -> None:
    rig.path("log").write_bytes(b"somebody's" * 819200)
    assert Logged(rig, content=bytes(SIZE)).found.verdict is LogVerdict.FOREIGN
    assert rig.path("log").read_bytes().startswith(b"somebody's")
    missing = describe(SIZE, [Run(0, SIZE, rig.file_object(SIZE), 0)])
    volume = rig.call(rig.plane.open_volume, missing)
    gone = LogPolicy(held=b"0123456789abcdef")
    found = rig.wait(rig.plane.open_log(volume, rig.file_object(LOG, "new"), 0, LOG, gone))
    assert found.verdict is LogVerdict.MISSING


def test_a_log_comes_before_the_first_connection(rig: Rig) -> None:
    volume = rig.volume(SIZE)
    rig.connect(volume, SIZE)
    with pytest.raises(PlaneError, match="before its first connection") as raised:
        rig.wait(rig.plane.open_log(volume, rig.file_object(LOG, "log"), 0, LOG, LogPolicy()))
    assert raised.value.errno == errno.EBUSY
    with pytest.raises(PlaneError, match="has no log"):
        rig.call(rig.plane.log_stats, volume)


def test_what_cannot_have_a_log_says_why(rig: Rig) -> None:
    log = rig.file_object(LOG, "log")
    disk_object = rig.file_object(SIZE)
    runs = [Run(0, SIZE, disk_object, 0)]
    volume = rig.call(rig.plane.open_volume, describe(SIZE, runs))
    for obj, offset, length, why in [
        (disk_object, 0, SIZE, "bytes of the volume itself"),
        (log, 512, LOG - 512, "not aligned to 4096"),
        (log, 0, 2 * LOG, "is outside object"),
        (log, 0, 64 << 10, "are possible"),
        (999, 0, LOG, "is not open"),
    ]:
        with pytest.raises(PlaneError, match=why):
            rig.wait(rig.plane.open_log(volume, obj, offset, length, LogPolicy()))
    coarse = rig.call(rig.plane.open_volume, describe(SIZE, runs, block_min=65536))
    with pytest.raises(PlaneError, match="minimum block"):
        rig.wait(rig.plane.open_log(coarse, log, 0, LOG, LogPolicy()))
    rig.wait(rig.plane.open_log(volume, log, 0, LOG, LogPolicy()))
    with pytest.raises(PlaneError, match="has a log"):
        rig.wait(rig.plane.open_log(volume, log, 0, LOG, LogPolicy()))


def test_a_volume_with_a_log_grows(rig: Rig) -> None:
    one = Logged(rig, content=bytes(SIZE)).allowed()
    os.truncate(rig.path("disk"), 2 * SIZE)
    rig.call(rig.plane.set_object_size, one.object, 2 * SIZE)
    bigger = describe(2 * SIZE, [Run(0, 2 * SIZE, one.object, 0)], version=2, start=1)
    rig.wait(rig.plane.change_volume(one.volume, bigger))
    client = rig.connect(one.volume, 2 * SIZE)
    client.write(2 * SIZE - BLOCK, b"g" * BLOCK)
    assert client.read(2 * SIZE - BLOCK, BLOCK) == b"g" * BLOCK
    one.drain()
    assert disk(rig)[-BLOCK:] == b"g" * BLOCK
    smaller = describe(SIZE, [Run(0, SIZE, one.object, 0)], version=3, start=2)
    with pytest.raises(PlaneError, match="cannot shrink"):
        rig.wait(rig.plane.change_volume(one.volume, smaller))


def test_what_is_old_is_carried_by_itself(rig: Rig) -> None:
    one = Logged(rig, content=bytes(SIZE), age_ms=1).allowed()
    one.connect().write(0, b"o" * BLOCK)
    eventually("it is below", lambda: disk(rig)[:BLOCK] == b"o" * BLOCK)
    eventually("the log says so", lambda: one.stats().dirty_bytes == 0)


def test_a_device_that_cannot_be_written_says_so(rig: Rig) -> None:
    volume = rig.volume(SIZE)
    rig.path("log").write_bytes(bytes(LOG))
    fd = os.open(rig.path("log"), os.O_RDONLY)
    log = rig.fd_object(fd, LOG)
    os.close(fd)
    found = rig.wait(rig.plane.open_log(volume, log, 0, LOG, LogPolicy()))
    assert (found.verdict, found.errno) == (LogVerdict.UNREADABLE, errno.EBADF)


@pytest.mark.parametrize("kind", LogEventKind)
def test_what_a_log_tells_by_itself(kind: LogEventKind) -> None:
    event = ffi.new("nv_event *")
    event.kind, event.volume, event.result = getattr(lib, f"NV_EVENT_{kind.value}"), 7, -errno.EIO
    event.args = [5 * BLOCK, 2, 0, 0, 0]
    assert decode_event(event) == LogEvent(kind, 7, errno.EIO, 5 * BLOCK, 2)
    event.token = 1
    assert (decode_event(event) is None) == (kind is LogEventKind.DRAINED), "a drain that somebody waits for is his"
