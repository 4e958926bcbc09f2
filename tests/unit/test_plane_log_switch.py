"""A write-back log that goes in before a volume, out, and in again while connections write to it, on the real plane.

Nothing is lost, refused or out of order: each writer reads back what it wrote last, all the time and in the end. What
happens at every other moment is judged in the simulators (tests/sim).
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdvvol.dataplane.errors import PlaneError
from nbdvvol.dataplane.log import LogPolicy, LogState, LogVerdict
from nbdvvol.dataplane.types import Run
from tests.lib import nbdwords as w
from tests.unit.mirror_rig import MirrorRig
from tests.unit.plane_rig import Client, Rig, describe, eventually, running

SIZE = 4 << 20
LOG = 2 << 20
BLOCK = 4096
ROUNDS = 4


class Log:
    """The log of a volume, which comes and goes."""

    def __init__(self, rig: Rig, volume: int) -> None:
        self.rig = rig
        self.volume = volume
        self.object = 0

    def opened(self, **policy: object) -> LogVerdict:
        """Beside the volume."""
        self.object = self.rig.file_object(LOG, "log")
        wish = LogPolicy(**{"beside": True, "age_ms": 1, **policy})  # type: ignore[arg-type]
        return self.rig.wait(self.rig.plane.open_log(self.volume, self.object, 0, LOG, wish)).verdict

    def put_in(self) -> None:
        """Open it, and have it written to."""
        assert self.opened() is LogVerdict.USABLE
        self.rig.wait(self.rig.plane.attach_log(self.volume))
        self.rig.call(self.rig.plane.allow_log, self.volume)

    def take_out(self) -> None:
        """Drain it, and go on without; its object is free."""
        self.rig.wait(self.rig.plane.drain_log(self.volume))
        self.rig.wait(self.rig.plane.detach_log(self.volume))
        self.rig.wait(self.rig.plane.close_object(self.object))

    def logged(self) -> int:
        return self.rig.call(self.rig.plane.log_stats, self.volume).logged


class Writer(threading.Thread):
    """Writes to a part of a volume that is its own and ends inside blocks, and reads it back."""

    def __init__(self, client: Client, first: int, size: int) -> None:
        super().__init__(daemon=True)
        self.client = client
        self.first = first
        self.known = bytearray(client.read(first, size))
        self.over = threading.Event()
        self.wrote = 0
        self.wrong = ""

    def run(self) -> None:
        while not self.over.is_set() and not self.wrong:
            at = (self.wrote * 1536) % (len(self.known) - 6000)
            data = os.urandom(512 if self.wrote % 3 else 6000)
            self.client.write(self.first + at, data)
            self.known[at : at + len(data)] = data
            if self.wrote % 16 == 0:
                self.client.flush()
            if self.client.read(self.first, len(self.known)) != self.known:
                self.wrong = f"after write {self.wrote} at {self.first + at}"
            self.wrote += 1

    def end(self) -> bytes:
        """What it has written, all of which it has read."""
        self.over.set()
        self.join(20)
        assert not self.wrong and not self.is_alive(), self.wrong
        return bytes(self.known)


@pytest.fixture(params=[1, 2], ids=["one-reactor", "two"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with running(reactors=request.param, cache_bytes=2 << 20) as one:
        yield one


def in_and_out(log: Log, clients: list[Client]) -> bytes:
    """Under writers whose parts end inside blocks; what they have written."""
    part = 3 * BLOCK + 512
    writers = [Writer(client, index * part, part) for index, client in enumerate(clients)]
    for writer in writers:
        writer.start()

    def go_on() -> None:
        before = [writer.wrote for writer in writers]
        pairs = list(zip(writers, before, strict=True))
        eventually("all write on", lambda: all(one.wrote > count + 5 or one.wrong for one, count in pairs))

    for _ in range(ROUNDS):
        log.put_in()
        go_on()
        assert log.logged() > 0
        log.take_out()
        go_on()
    log.put_in()
    go_on()
    return b"".join(writer.end() for writer in writers)


def test_a_log_goes_in_and_out_under_a_plain_volume_s_connections(rig: Rig) -> None:
    rig.path("disk").write_bytes(os.urandom(SIZE))
    volume = rig.call(rig.plane.open_volume, describe(SIZE, [Run(0, SIZE, rig.file_object(SIZE), 0)]))
    clients = [rig.connect(volume, SIZE) for _ in range(3)]
    log = Log(rig, volume)
    data = in_and_out(log, clients)
    log.take_out()
    assert rig.path("disk").read_bytes()[: len(data)] == data
    assert all(client.call(w.CMD_FLUSH).error == 0 for client in clients)


def test_it_goes_in_and_out_under_a_mirror_s_connections(tmp_path: Path) -> None:
    mirror = MirrorRig(tmp_path)
    try:
        log = Log(mirror, mirror.serve())
        data = in_and_out(log, [mirror.client(), mirror.client()])
        log.take_out()
        assert mirror.bytes_of(1)[: len(data)] == data
        assert mirror.bytes_of(1) == mirror.bytes_of(2)
    finally:
        mirror.close()


def test_what_holds_something_stays_and_what_is_refused_concerns_nobody(rig: Rig) -> None:
    volume = rig.call(rig.plane.open_volume, describe(SIZE, [Run(0, SIZE, rig.file_object(SIZE), 0)]))
    client, log = rig.connect(volume, SIZE), Log(rig, volume)
    assert log.opened(age_ms=3_600_000) is LogVerdict.USABLE
    client.write(0, b"a" * BLOCK)
    assert rig.path("disk").read_bytes()[:BLOCK] == b"a" * BLOCK, "it is beside the volume"
    rig.wait(rig.plane.attach_log(volume))
    with pytest.raises(PlaneError, match="is before it"):
        rig.wait(rig.plane.attach_log(volume))
    rig.call(rig.plane.allow_log, volume)
    eventually("it serves", lambda: rig.call(rig.plane.log_stats, volume).state is LogState.SERVING)
    client.write(0, b"b" * BLOCK)
    with pytest.raises(PlaneError) as busy:
        rig.wait(rig.plane.detach_log(volume))
    assert busy.value.errno == errno.EBUSY
    assert client.read(0, BLOCK) == b"b" * BLOCK
    log.take_out()
    rig.path("log").write_bytes(b"somebody's" * (LOG // 10 + 1))
    assert log.opened() is LogVerdict.FOREIGN
    assert client.read(0, BLOCK) == b"b" * BLOCK
    with pytest.raises(PlaneError) as refused:
        rig.wait(rig.plane.attach_log(volume))
    assert refused.value.errno == errno.EINVAL
    rig.wait(rig.plane.detach_log(volume))
    rig.wait(rig.plane.close_object(log.object))
    with pytest.raises(PlaneError, match="before its first connection"):
        log.opened(held=b"0123456789abcdef")
    with pytest.raises(PlaneError, match="or beside it"):
        log.opened(beside=False)
    client.write(BLOCK, b"c" * BLOCK)
    assert rig.path("disk").read_bytes()[: 2 * BLOCK] == b"b" * BLOCK + b"c" * BLOCK
