"""Write-back logs whose device hangs as they are opened: what is told, what is served, and how they are had at last."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

import nbdvvol.filter.exports as exports_module
import nbdvvol.filter.logdisks as logdisks_module
from nbdvvol.dataplane.log import LogFound, LogState, LogVerdict
from nbdvvol.filter.logdisks import LogDisks
from nbdvvol.filter.logfile import open_log_file
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.farm import CacheLog
from nbdvvol.model.log import LogSpec
from tests.lib.faultfs import FaultFs
from tests.unit.filter_words import MIB, until, uuid_of, vvol
from tests.unit.mirror_rig import MirrorRig
from tests.unit.plane_rig import eventually
from tests.unit.test_filter_lease_log import answer
from tests.unit.test_filter_log import HELD, Bench, _bench

__all__ = ["_bench"]
HANGS = LogFound(LogVerdict.HANGS, 110, 0, 0, bytes(16))
BLOCK = 4096


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logdisks_module, "AGAIN_S", 0.02)


async def test_a_vvol_whose_log_holds_data_is_not_served_without_it(bench: Bench) -> None:
    """Nor is it asked twice at once: what hangs may still write there. Others are served meanwhile."""
    bench.folder.mkdir()
    (bench.folder / "log").write_bytes(bytes(MIB))
    spec = bench.spec({"held": HELD.hex(), "file": str(bench.folder / "log")})
    bench.plane.verdicts = [HANGS]
    await bench.take(spec)
    why, error = bench.error()
    assert why == "log-missing" and HELD.hex() in error and f"{bench.folder}/log" in error
    assert "has not answered within the log's deadline; look at that device" in error
    assert bench.reports.logs[-1].verdict == "hangs" and not bench.plane.volumes
    await until(lambda: "an earlier opening of it hangs" in bench.error()[1])
    assert bench.error()[0] == "log-missing"
    await bench.take(spec, vvol(2))
    assert len(bench.plane.volumes) == 1, "of another VVol"
    bench.plane.hung.clear()
    await until(lambda: bench.error() == ("", ""))
    assert bench.log.policy.held == HELD


async def test_one_that_is_not_missed_makes_it_slower_until_its_device_answers(bench: Bench) -> None:
    bench.plane.verdicts = [HANGS, HANGS]
    await bench.take(bench.spec())
    assert bench.error() == ("", "") and len(bench.plane.volumes) == 1 and not bench.plane.logs
    assert "notice log_refused vm1/disk1" in bench.reports.lines
    told = bench.reports.logs[-1]
    assert told.state == "refused" and "has not answered within the log's deadline" in told.why
    [volume] = bench.plane.volumes
    await bench.take(bench.spec({"log": CacheLog(size=MIB, age=1)}))  # people ask for something: it is tried at once
    await until(lambda: "an earlier opening of it hangs" in bench.reports.logs[-1].why)
    bench.plane.hung.clear()
    await bench.take(bench.spec({"log": CacheLog(size=MIB, age=2)}))
    await until(lambda: bench.plane.hung)  # the second one, beside the volume
    assert list(bench.plane.volumes) == [volume] and not bench.plane.logs
    bench.plane.hung.clear()
    await bench.take(bench.spec({"log": CacheLog(size=MIB, age=3)}))
    await until(lambda: bench.reports.asked)
    bench.reports.answer("dirty")
    assert bench.log.state is LogState.SERVING and list(bench.plane.volumes) == [volume]


class Hanging:
    """Calls that block until they are released."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call
        self.begun, self.released = threading.Event(), threading.Event()
        self.count = 0

    def __call__(self, *args: Any) -> Any:
        self.count += 1
        self.begun.set()
        assert self.released.wait(20)
        return self.call(*args)


@pytest.fixture
async def disks() -> AsyncIterator[LogDisks]:
    one = LogDisks()
    yield one
    one.close()


async def test_a_file_that_opens_too_late_is_closed_again(
    disks: LogDisks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = Hanging(open_log_file)
    monkeypatch.setattr(logdisks_module, "open_log_file", hanging)

    async def opened(name: str, limit_s: float | None) -> None:
        os.close((await disks.open(str(tmp_path), name, MIB, "", limit_s)).fd)

    with pytest.raises(NvError, match="b.log: its device has not answered within 0.1 s") as refused:
        await opened("b.log", 0.1)
    assert refused.value.code is Code.TIMEOUT
    with pytest.raises(NvError, match="an earlier opening of it hangs"):
        await opened("b.log", 0.1)
    assert hanging.count == 1, "while one has not ended, there is no other"
    other = asyncio.create_task(opened("c.log", None))
    await until(lambda: hanging.count == 2)
    other.cancel()  # nobody wants it any more
    hanging.released.set()

    async def opens(name: str) -> bool:
        try:
            await opened(name, 5)
        except NvError:
            return False
        return True

    for name in ("b.log", "c.log"):
        async with asyncio.timeout(20):
            while not await opens(name):
                await asyncio.sleep(0.01)


async def test_a_removal_that_hangs_cannot_take_a_new_log_away(
    disks: LogDisks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.log"
    path.write_bytes(bytes(MIB))
    hanging = Hanging(logdisks_module.remove_log_file)
    monkeypatch.setattr(logdisks_module, "remove_log_file", hanging)
    monkeypatch.setattr(logdisks_module, "LOG_DEADLINE_S", 0.1)
    with pytest.raises(NvError, match="has not answered"):
        await disks.remove(str(path), uuid_of(1))
    with pytest.raises(NvError, match="has not ended"):
        await disks.open(str(tmp_path), "a.log", MIB, "", 5)
    hanging.released.set()
    await until(lambda: not path.exists())
    async with asyncio.timeout(20):
        while True:
            try:
                file = await disks.open(str(tmp_path), "a.log", MIB, "", 5)
            except NvError:
                await asyncio.sleep(0.01)
            else:
                break
    os.close(file.fd)
    assert path.stat().st_size == MIB


async def test_a_long_look_goes_on_and_a_glance_that_hangs_says_nothing(
    disks: LogDisks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = Hanging(lambda *_: LogFound(LogVerdict.UNKNOWN_DATA, 0, 4096, 1, HELD))
    glance = Hanging(lambda *_: False)
    monkeypatch.setattr(logdisks_module, "look_at_log", look)
    monkeypatch.setattr(logdisks_module, "is_there", glance)
    monkeypatch.setattr(logdisks_module, "LOG_DEADLINE_S", 0.1)
    monkeypatch.setattr(logdisks_module, "GLANCE_S", 0.1)
    path = str(tmp_path / "a.log")
    for _ in range(2):
        with pytest.raises(NvError, match="has not answered"):
            await disks.look(path, uuid_of(1), HELD.hex())
    look.released.set()
    assert (await disks.look(path, uuid_of(1), HELD.hex())).dirty_bytes == 4096 and look.count == 1
    assert await disks.is_there(path, (0, 0)), "its own I/O will tell"
    glance.released.set()
    assert not await disks.is_there(path, (0, 0))


async def test_a_look_that_hangs_keeps_its_vvol_from_being_served(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log that is noted, and of which the registry knows nothing, may hold data."""
    look = Hanging(logdisks_module.look_at_log)
    monkeypatch.setattr(logdisks_module, "look_at_log", look)
    monkeypatch.setattr(logdisks_module, "LOG_DEADLINE_S", 0.1)
    await bench.notes.keep(vvol(1), HELD.hex(), str(bench.folder / "gone"))
    await bench.take(vvol(1, epoch=7))
    why, error = bench.error()
    assert why == "log-missing" and "has not answered within 0.1 s" in error and not bench.plane.volumes
    look.released.set()
    await until(lambda: "gone is missing" in bench.error()[1])


@pytest.mark.parametrize("kind", ["read", "write"])
def test_a_mirror_whose_log_hangs_at_its_bind_is_served_once_it_answers(
    fs: FaultFs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """On the real plane: refused at the deadline, its legs let go, and all that was logged is there in the end. Reads
    hang as its file is opened, writes as its first record is."""
    monkeypatch.setattr(exports_module, "RETRY_MIN_S", 0.05)
    monkeypatch.setattr(exports_module, "SETTLE_S", 0.1)
    rig = MirrorRig(tmp_path)
    try:
        log = LogSpec(folder=str(fs.folder), log=CacheLog(size=MIB, age=3600, deadline=0.3))
        rig.serve(log=log)
        answer(rig)
        client, data = rig.client(), os.urandom(BLOCK)
        client.write(BLOCK, data)
        client.disconnect()
        rig.want(None)
        eventually("it is released", lambda: rig.registry.lines[-1] == "released 1 epoch 2")
        [name] = fs.files
        rig.registry.record.epoch = rig.epoch = 3
        held = bytes(fs.files[name][4096 + 32 : 4096 + 48]).hex()
        fs.hold(kind)
        rig.want(rig.spec(log=log.model_copy(update={"held": held, "file": str(fs.folder / name)})))
        eventually("it is refused, also when it is tried again", lambda: "opening of it hangs" in rig.error())
        assert any(report.verdict == "hangs" for report in rig.registry.logs) == (kind == "write")
        assert rig._volume() is None and rig.bytes_of(1)[BLOCK : 2 * BLOCK] == bytes(BLOCK)
        fs.release()
        eventually("it serves", lambda: rig._volume() is not None)
        assert rig.client().read(BLOCK, BLOCK) == data
    finally:
        fs.release()
        rig.close()
