"""A write-back log whose device fails under it, before a plain volume and before a mirror, on the real plane.

Nothing that was acknowledged is lost, and all of it stays readable: it is carried below, then the log is used no more.
What happens at every other moment, and with devices that lose what they had, is judged in the simulator (tests/sim).
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdvvol.dataplane.log import LogEvent, LogEventKind, LogPolicy, LogState
from nbdvvol.dataplane.types import Run
from tests.lib import nbdwords as w
from tests.unit.mirror_rig import META, MirrorRig
from tests.unit.plane_rig import Client, Rig, describe, eventually, running

SIZE = 4 << 20
LOG = 8 << 20
BLOCK = 4096
LAZY = 3_600_000
"""An age at which nothing is carried below while a test runs, milliseconds."""


class Device:
    """A log in memory that can be made to fail: from then on every write to it does."""

    def __init__(self, rig: Rig, volume: int) -> None:
        self.rig = rig
        self.volume = volume
        self.events: list[LogEvent] = []
        self.fd = os.memfd_create("log", os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, LOG)
        rig.plane.on_log = self.events.append
        self.object = rig.fd_object(self.fd, LOG, direct=True, align=512)  # as a log is; it is not mapped then
        found = rig.wait(rig.plane.open_log(volume, self.object, 0, LOG, LogPolicy(age_ms=LAZY)))
        assert found.verdict == "usable"
        rig.call(rig.plane.allow_log, volume)

    def state(self) -> LogState:
        return self.rig.call(self.rig.plane.log_stats, self.volume).state

    def dirty(self) -> int:
        return self.rig.call(self.rig.plane.log_stats, self.volume).dirty_bytes

    def fails(self) -> None:
        """No write succeeds any more."""
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)

    def is_said_to_have_failed(self) -> None:
        """It needs control's word: not even the superblock can be written that would say that it is void."""
        eventually("it is told", lambda: [one.kind for one in self.events][-1:] == [LogEventKind.NEEDS_WORD])
        assert (self.events[0].kind, self.events[0].errno) == (LogEventKind.FAILED, errno.EPERM)

    def forget(self) -> None:
        """Control has committed that it is never replayed."""
        self.rig.call(self.rig.plane.forget_log, self.volume)
        eventually("it is void", lambda: self.state() is LogState.VOID)
        assert self.events[-1].kind is LogEventKind.DRAINED


@pytest.fixture
def rig() -> Iterator[Rig]:
    with running(reactors=1) as one:
        yield one


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[MirrorRig]:
    one = MirrorRig(tmp_path)
    yield one
    one.close()


def what_was_acknowledged_is_kept(device: Device, client: Client, below: list[Path], at: int) -> None:
    """Writes before, while and after it fails."""
    first, second, third = (os.urandom(BLOCK) for _ in range(3))
    client.write(BLOCK, first)
    client.flush()
    assert device.dirty() == BLOCK
    device.fails()
    cookie = client.send(w.CMD_WRITE, 2 * BLOCK, BLOCK, payload=second)
    device.is_said_to_have_failed()
    assert client.read(BLOCK, BLOCK) == first
    eventually("it is below", lambda: all(one.read_bytes()[at + BLOCK :][:BLOCK] == first for one in below))
    device.forget()
    assert client.wait(cookie).error == 0, "what was under way goes below"
    client.write(3 * BLOCK, third)
    client.flush()
    assert client.read(BLOCK, 3 * BLOCK) == first + second + third
    assert all(one.read_bytes()[at + BLOCK :][: 3 * BLOCK] == first + second + third for one in below)
    assert device.dirty() == 0


def test_a_log_of_a_plain_volume_fails(rig: Rig) -> None:
    volume = rig.call(rig.plane.open_volume, describe(SIZE, [Run(0, SIZE, rig.file_object(SIZE), 0)]))
    device = Device(rig, volume)
    what_was_acknowledged_is_kept(device, rig.connect(volume, SIZE), [rig.path("disk")], 0)
    os.close(device.fd)


def test_a_log_of_a_mirror_fails(mirror: MirrorRig) -> None:
    device = Device(mirror, mirror.serve())
    what_was_acknowledged_is_kept(device, mirror.client(), mirror.files, META)
    os.close(device.fd)


def test_both_legs_get_what_is_carried(mirror: MirrorRig) -> None:
    volume = mirror.serve()
    device, client, data = Device(mirror, volume), mirror.client(), os.urandom(64 * BLOCK)
    for at in range(0, len(data), 4 * BLOCK):
        client.write(at, data[at : at + 4 * BLOCK])
    client.write(len(data) + 100, b"part" * 100)
    client.flush()
    assert mirror.bytes_of(1)[: len(data)] == bytes(len(data))
    assert client.read(0, len(data)) == data
    mirror.wait(mirror.plane.drain_log(volume))
    assert mirror.bytes_of(1) == mirror.bytes_of(2)
    assert mirror.bytes_of(1)[: len(data)] == data
    assert mirror.bytes_of(2)[len(data) :][:BLOCK] == bytes(100) + b"part" * 100 + bytes(BLOCK - 500)
    assert device.dirty() == 0


def test_a_lost_leg_holds_up_what_is_carried_and_nobody_who_writes(mirror: MirrorRig) -> None:
    volume = mirror.serve()
    device, client, data = Device(mirror, volume), mirror.client(), os.urandom(8 * BLOCK)
    client.flush()  # the first one of a life is one of the legs, too
    mirror.away(True)
    mirror.fail(2)
    client.write(0, data)
    client.flush()
    drained = mirror.start(mirror.plane.drain_log(volume))
    assert client.read(0, len(data)) == data
    assert not drained.done() and device.dirty() == len(data), "control does not know that the leg is lost"
    mirror.away(False)
    drained.result(20)
    assert "stale 2" in mirror.registry.asked and mirror.bytes_of(1)[: len(data)] == data
    assert device.dirty() == 0


def test_a_fence_ends_what_is_acknowledged_and_what_is_carried(mirror: MirrorRig) -> None:
    volume = mirror.serve()
    device, client = Device(mirror, volume), mirror.client()
    client.write(0, b"before.." * 512)
    mirror.call(mirror.plane.fence_volume, volume)
    eventually("it is fenced", lambda: client.call(w.CMD_READ, 0, BLOCK).error == errno.EIO)
    assert client.call(w.CMD_WRITE, BLOCK, BLOCK, payload=b"after..." * 512).error == errno.EIO
    assert client.call(w.CMD_FLUSH).error == errno.EIO
    assert device.dirty() == BLOCK, "it is kept, and carried by nobody"
    assert mirror.bytes_of(1)[:BLOCK] == bytes(BLOCK)
