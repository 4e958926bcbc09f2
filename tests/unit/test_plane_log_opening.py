"""A write-back log whose device hangs while it is opened (tests/lib/faultfs.py), on the real plane.

It is refused at the deadline as one that cannot be read is; nobody else waits, and nothing of it is used again before
the device has answered. Then it is opened, with all that it held.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from nbdvvol.dataplane.errors import PlaneError
from nbdvvol.dataplane.log import LogFound, LogPolicy, LogVerdict
from nbdvvol.dataplane.types import Run
from tests.lib import nbdwords as w
from tests.lib.faultfs import FaultFs
from tests.unit.mirror_rig import MirrorRig
from tests.unit.plane_rig import Rig, describe, eventually, running

SIZE = LOG = 4 << 20
BLOCK = 4096
SOON_MS = 300
LAZY = 3_600_000


@pytest.fixture
def rig(fs: FaultFs) -> Iterator[Rig]:
    """One reactor: who hangs there could hold up all others."""
    with running(reactors=1) as one:
        yield one
        fs.release()


def log_object(rig: Rig, fs: FaultFs) -> int:
    """The log's file as an object, made where there is none."""
    fd = os.open(fs.folder / "log", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    try:
        os.posix_fallocate(fd, 0, LOG)
        return rig.fd_object(fd, LOG, direct=True, align=BLOCK)
    finally:
        os.close(fd)


def volume_of(rig: Rig, name: str) -> int:
    return rig.call(rig.plane.open_volume, describe(SIZE, [Run(0, SIZE, rig.file_object(SIZE, name), 0)]))


def opens(rig: Rig, volume: int, log: int, held: bytes | None = None, *, beside: bool = False) -> Future[LogFound]:
    policy = LogPolicy(age_ms=LAZY, deadline_ms=SOON_MS, held=held, beside=beside)
    return rig.start(rig.plane.open_log(volume, log, 0, LOG, policy))


def is_refused(found: LogFound) -> None:
    assert (found.verdict, found.errno) == (LogVerdict.HANGS, errno.ETIMEDOUT)


def still_in_use(rig: Rig, log: int) -> None:
    with pytest.raises(PlaneError) as refused:
        rig.wait(rig.plane.close_object(log))
    assert refused.value.errno == errno.EBUSY


def comes_free(rig: Rig, log: int) -> None:
    def closed() -> bool:
        try:
            rig.wait(rig.plane.close_object(log))
        except PlaneError:
            return False
        return True

    eventually("what was asked of the device has ended", closed)


@pytest.mark.parametrize("kind", ["read", "sync", "write"])
def test_it_is_refused_at_the_deadline_and_opened_when_the_device_answers(rig: Rig, fs: FaultFs, kind: str) -> None:
    """Its superblocks are read, it is made durable, its first record is written: whichever hangs, nothing is lost."""
    log, volume = log_object(rig, fs), volume_of(rig, "disk")
    found = opens(rig, volume, log).result(20)
    rig.call(rig.plane.allow_log, volume)
    client, data = rig.connect(volume, SIZE), os.urandom(BLOCK)
    client.write(5 * BLOCK, data)
    client.disconnect()
    rig.wait(rig.plane.close_volume(volume))
    rig.wait(rig.plane.close_object(log))

    log, volume, other = log_object(rig, fs), volume_of(rig, "disk"), volume_of(rig, "other")
    fs.hold(kind)
    opening = opens(rig, volume, log, found.id)
    client, theirs = rig.connect(volume, SIZE), rig.connect(other, SIZE)
    early = [client.send(w.CMD_READ, 5 * BLOCK, BLOCK), client.send(w.CMD_WRITE, 0, BLOCK, payload=data)]
    theirs.write(0, data)
    is_refused(opening.result(20))
    assert [client.wait(cookie).error for cookie in early] == [errno.EIO] * 2, "never what is older"
    assert theirs.read(0, BLOCK) == data
    rig.wait(rig.plane.close_volume(volume))
    still_in_use(rig, log)
    assert rig.path("disk").read_bytes() == bytes(SIZE)
    fs.release()
    comes_free(rig, log)

    log, volume = log_object(rig, fs), volume_of(rig, "disk")
    again = opens(rig, volume, log, found.id).result(20)
    assert (again.verdict, again.dirty_bytes) == (LogVerdict.USABLE, BLOCK)
    assert rig.connect(volume, SIZE).read(5 * BLOCK, BLOCK) == data


def test_a_plane_that_stops_waits_for_what_hangs(rig: Rig, fs: FaultFs) -> None:
    """Its memory is the kernel's until then; the volume has been closed long before."""
    log, volume = log_object(rig, fs), volume_of(rig, "disk")
    fs.hold("read")
    is_refused(opens(rig, volume, log).result(20))
    rig.wait(rig.plane.close_volume(volume))
    stopping = rig.start(rig.plane.close())
    assert not stopping.done()
    fs.release()
    stopping.result(20)


@pytest.mark.parametrize("kind", ["plain", "mirror"])
def test_beside_a_volume_it_leaves_without_anybody_noticing(fs: FaultFs, tmp_path: Path, kind: str) -> None:
    mirror = MirrorRig(tmp_path) if kind == "mirror" else None
    rig = mirror or Rig(reactors=1)
    try:
        volume = mirror.serve() if mirror is not None else volume_of(rig, "disk")
        client, data = rig.connect(volume, SIZE), os.urandom(BLOCK)
        for held in ("read", "write"):
            log = log_object(rig, fs)
            fs.hold(held)
            opening = opens(rig, volume, log, beside=True)
            client.write(0, data)
            is_refused(opening.result(20))
            rig.wait(rig.plane.detach_log(volume))
            client.write(BLOCK, data)
            assert client.read(0, 2 * BLOCK) == data + data
            still_in_use(rig, log)
            fs.release()
            comes_free(rig, log)
        log = log_object(rig, fs)
        assert opens(rig, volume, log, beside=True).result(20).verdict is LogVerdict.USABLE
        rig.wait(rig.plane.attach_log(volume))
        rig.call(rig.plane.allow_log, volume)
        client.write(2 * BLOCK, data)
        assert client.read(0, 3 * BLOCK) == 3 * data
        client.disconnect()
    finally:
        fs.release()
        rig.close()
