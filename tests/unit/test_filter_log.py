"""Write-back logs on a host: their files, what is opened and refused, control's word before the data plane's."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import nbdvvol.filter.exports as exports_module
import nbdvvol.filter.logdisks as logdisks_module
import nbdvvol.filter.logfile as logfile_module
import nbdvvol.filter.logkeeper as keeper_module
import nbdvvol.filter.writelog as writelog_module
from nbdvvol.dataplane.log import LogEvent, LogEventKind, LogFound, LogState, LogVerdict, LostSpan
from nbdvvol.filter.claims import ClaimBook
from nbdvvol.filter.exports import ExportTable
from nbdvvol.filter.logfile import file_name, is_there, open_log_file, remove_log_file
from nbdvvol.filter.logkeeper import LogKeeper
from nbdvvol.filter.lognotes import LogBook
from nbdvvol.filter.objects import ObjectTable
from nbdvvol.filter.syncfaults import FaultBook
from nbdvvol.filter.writelog import WriteLog
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.farm import CacheLog
from nbdvvol.model.link import VVolSpec
from nbdvvol.model.log import LogSpec, range_words
from tests.lib.faultfs import FaultFs, fault_fs
from tests.unit.fake_plane import FakeLog, FakePlane
from tests.unit.filter_words import MIB, Reports, file_store, host_state, until, uuid_of, vvol

HELD = bytes(range(16))


# ---- files ----


def test_a_log_gets_all_its_space_in_a_folder_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    found = open_log_file(str(folder), "a.log", MIB)
    try:
        assert (found.path, found.length, found.block) == (str(folder / "a.log"), MIB, False)
        assert os.fstat(found.fd).st_blocks * 512 >= MIB and found.align in (1, 512, 4096)
        with pytest.raises(NvError, match="in use by another process"):
            open_log_file(str(folder), "a.log", MIB)
    finally:
        os.close(found.fd)
    again = open_log_file(str(folder), "a.log", 2 * MIB)
    assert again.length == MIB, "a file that is there keeps its size"
    os.close(again.fd)
    os.close(open_log_file("", "", 0, held=str(folder / "a.log")).fd)


def test_a_place_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for folder, name, held, words, code in (
        (tmp_path / "no" / "logs", "a", "", "is missing", Code.UNAVAILABLE),
        (tmp_path / "file", "a", "", "neither a folder nor a block device", Code.INVALID),
        (tmp_path, "link", "", "is a symbolic link", Code.INVALID),
        (tmp_path, "a", str(tmp_path / "gone"), "gone is missing", Code.UNAVAILABLE),
    ):
        with pytest.raises(NvError, match=words) as refused:
            open_log_file(str(folder), name, MIB, held)
        assert refused.value.code is code
    assert not (tmp_path / "gone").exists(), "a log that holds data is never made anew"


def test_a_log_that_does_not_fit_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        os.ftruncate(fd, 4096)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(NvError, match="of 1MiB does not fit: No space left") as refused:
        open_log_file(str(tmp_path), "a", MIB)
    assert refused.value.code is Code.NO_SPACE and not list(tmp_path.iterdir())


def test_only_a_log_is_removed(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"something else" * 1000)
    (tmp_path / "blank").write_bytes(bytes(MIB))
    for name in ("other", "blank", "none"):
        remove_log_file(str(tmp_path / name), uuid_of(1))
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    assert file_name("vm 1/a:b", "u") == "vm_1-a_b-u.log"


# ---- exports ----


class Bench:
    """A table over a fake plane."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "logs"
        path = folder / "local.img"
        path.write_bytes(bytes(8 * MIB))
        self.store = file_store(path)
        self.plane, self.reports = FakePlane(), Reports()
        self.objects = ObjectTable(self.plane, FaultBook(folder))
        self.objects.farm = "farm"
        self.notes = LogBook(folder)
        self.table = ExportTable(self.plane, self.objects, self.reports, ClaimBook(folder), self.notes)
        self.plane.on_log = self.table.log_event

    def spec(self, log: dict[str, Any] | None = None, **more: Any) -> VVolSpec:
        """VVol 1 with a log of 1 MiB, but for what is said."""
        wanted = LogSpec(folder=str(self.folder), log=CacheLog(size=MIB)).model_copy(update=log or {})
        return vvol(1, **{"log": wanted, **more})

    async def take(self, *parts: object) -> None:
        for export in self.table.take(host_state(self.store, *parts)):  # type: ignore[arg-type]
            await asyncio.wait_for(export.settled.wait(), 5)

    @property
    def log(self) -> FakeLog:
        [log] = self.plane.logs.values()
        return log

    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def error(self) -> tuple[str, str]:
        report = self.reports.exports[uuid_of(1)]
        return report.why, report.error

    async def logging(self, **log: Any) -> None:
        """Have it logged."""
        await self.take(self.spec(log))
        self.reports.answer("dirty")
        assert self.log.state is LogState.SERVING


@pytest.fixture(name="bench")
async def _bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Bench]:
    monkeypatch.setattr(exports_module, "RETRY_MIN_S", 0.02)
    monkeypatch.setattr(exports_module, "SETTLE_S", 0.1)
    monkeypatch.setattr(writelog_module, "REPORT_S", 0.02)
    monkeypatch.setattr(keeper_module, "LATER_MIN_S", 0.02)
    monkeypatch.setattr(keeper_module, "AGAIN_S", 0.02)
    bench = Bench(tmp_path)
    yield bench
    await bench.table.stop()
    await bench.table.close_all()
    bench.notes.close()
    assert bench.plane.volumes == {} and bench.plane.objects == {}
    bench.objects.shutdown()


async def test_it_is_opened_before_anybody_enters_and_logs_after_controls_word(bench: Bench) -> None:
    await bench.take(bench.spec({"log": CacheLog(size=MIB, bypass=0, age=1.5, stream=7, deadline=2)}))
    policy = bench.log.policy
    assert policy.destage_rate == 0
    assert (policy.age_ms, policy.bypass_bytes, policy.stream_bytes, policy.deadline_ms) == (1500, 0, 7, 2000)
    assert policy.held is None and not policy.discard
    assert [line.split()[0] for line in bench.plane.log] == ["open", "log"], "not allowed yet"
    change = bench.reports.answer("dirty")
    assert (change.epoch, change.log) == (1, bench.log.id.hex())
    assert bench.files() == [Path(change.file).name] == [file_name("vm1/disk1", uuid_of(1))]
    assert bench.plane.log[-1].startswith("allow")
    assert bench.reports.logs[-1].state == "serving"
    with pytest.raises(NvError, match="in use by another process"):
        open_log_file(str(bench.folder), bench.files()[0], MIB)


async def test_it_is_drained_off_and_on_again_while_it_serves(bench: Bench) -> None:
    await bench.logging()
    await bench.take(bench.spec({"on": False}))
    await until(lambda: bench.plane.log[-1].startswith("drain"))
    assert bench.reports.logs[-1].state == "draining" and not bench.reports.asked
    await bench.take(bench.spec())
    assert not bench.reports.asked, "what is being drained ends first"
    bench.log.drained.set()
    await until(lambda: bench.log.state is LogState.SERVING)
    assert not bench.reports.asked, "the registry still has it"
    await bench.take(vvol(1))
    await until(lambda: bench.reports.asked)
    bench.reports.answer("clean")
    await bench.take()
    assert bench.files() == [], "an empty log leaves nothing behind"


async def test_a_file_that_could_not_be_removed_and_is_used_again_stays(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stuck(path: str, uuid: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    await bench.logging()
    bench.log.drained.set()
    with monkeypatch.context() as context:
        context.setattr(logdisks_module, "remove_log_file", stuck)
        await bench.take(vvol(1))
        await until(lambda: bench.reports.asked)
        bench.reports.answer("clean")
        await until(lambda: not bench.plane.logs and not bench.notes.all())
        await bench.take(bench.spec())
        await until(lambda: bench.reports.asked)
    bench.reports.answer("dirty")
    await bench.take()
    assert len(bench.files()) == len(bench.notes.all()) == 1, "it holds data now"


async def test_limits_change_while_it_serves(bench: Bench) -> None:
    await bench.logging()
    await bench.take(bench.spec({"log": CacheLog(size=MIB, bypass=4096, age=1, destage_rate=MIB)}))
    policy = bench.log.policy
    assert (policy.bypass_bytes, policy.age_ms, policy.destage_rate) == (4096, 1000, MIB)
    assert bench.log.state is LogState.SERVING and not bench.reports.asked
    await bench.take(bench.spec({"log": CacheLog(size=MIB, bypass=4096, age=1, destage_rate=MIB), "given_up": 1}))
    assert sum(line.startswith("limit_log") for line in bench.plane.log) == 1


async def test_what_is_taken_away_keeps_what_it_has_logged(bench: Bench) -> None:
    """Control drains first; where it does not, another host may have the VVol, and nothing is carried any more."""
    await bench.logging()
    await bench.take()
    assert bench.reports.lines[-1] == "released 1 epoch 1" and len(bench.files()) == 1
    assert not any(line.startswith("drain") for line in bench.plane.log)


async def test_a_clean_stop_drains_as_far_as_it_gets(bench: Bench) -> None:
    await bench.logging()
    bench.log.drained.set()
    stopping = asyncio.create_task(bench.table.close_all())
    await until(lambda: bench.reports.asked)
    bench.reports.answer("clean")
    assert await stopping
    assert len(bench.files()) == 1


async def test_what_a_log_holds_is_recovered_first(bench: Bench) -> None:
    await bench.logging()
    path = bench.folder / bench.files()[0]
    await bench.take()
    [note] = bench.notes.all()
    held = bytes.fromhex(note.log)
    bench.plane.verdicts = [LogFound(LogVerdict.USABLE, 0, 8192, 2, held)]
    await bench.take(bench.spec({"held": note.log, "file": str(path)}, epoch=2))
    assert bench.log.policy.held == held
    assert "notice log_recovered vm1/disk1" in bench.reports.lines
    assert bench.reports.answer("dirty").log == note.log


def test_every_log_that_is_not_the_right_one_is_called_by_what_it_is() -> None:
    words = logfile_module.VERDICTS
    assert set(words) == set(LogVerdict) - {LogVerdict.USABLE}
    assert len(set(words.values())) == len(words)


async def test_it_is_not_served_without_a_log_that_holds_data(bench: Bench) -> None:
    gone = {"held": HELD.hex(), "file": str(bench.folder / "gone")}
    await bench.take(bench.spec(gone))
    why, error = bench.error()
    assert why == "log-missing" and "gone is missing" in error and HELD.hex() in error
    bench.folder.mkdir()
    (bench.folder / "gone").write_bytes(bytes(MIB))
    bench.plane.verdicts = [LogFound(LogVerdict.OTHER_LOG, 0, 0, 0, bytes(16))] * 2
    await until(lambda: "not the one that holds data" in bench.error()[1])
    assert bench.error()[0] == "log-missing"
    await until(lambda: not bench.error()[1])  # it is tried again, and right at last
    assert bench.log.policy.held == HELD


@pytest.mark.parametrize(
    ("verdict", "why"),
    [(LogVerdict.UNKNOWN_DATA, "log-unknown"), (LogVerdict.REGISTRY_OLD, "old-registry")],
)
async def test_data_of_which_the_registry_knows_nothing_is_neither_replayed_nor_passed_over(
    bench: Bench, verdict: LogVerdict, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def epoch(_self: object) -> int:
        return 3

    monkeypatch.setattr(writelog_module.WriteLog, "_epoch", epoch)
    bench.plane.verdicts = [LogFound(verdict, 0, 8192, 2, HELD)] * 100
    await bench.take(bench.spec(epoch=5))
    assert bench.error()[0] == why
    told = bench.reports.logs[-1]
    assert (told.state, told.found, told.dirty_bytes) == ("refused", HELD.hex(), 8192)
    if verdict is LogVerdict.UNKNOWN_DATA:
        await bench.take(bench.spec({"given_up": 3}, epoch=5))
        assert bench.error() == ("", "") and not bench.plane.logs, "it was given up: served without"
        assert bench.reports.logs[-1].state == "refused"
        bench.plane.verdicts.clear()
        await bench.take(bench.spec({"given_up": 5, "discard": True}, epoch=5))
        await until(lambda: bench.plane.logs)
        assert bench.log.policy.discard


@pytest.mark.parametrize("verdict", [LogVerdict.FOREIGN, LogVerdict.OTHER_VVOL, LogVerdict.UNREADABLE])
async def test_something_else_in_its_place_makes_it_only_slower(bench: Bench, verdict: LogVerdict) -> None:
    bench.plane.verdicts = [LogFound(verdict, errno.EIO, 0, 0, bytes(16))]
    await bench.take(bench.spec())
    assert bench.error() == ("", "") and len(bench.plane.volumes) == 1 and not bench.plane.logs
    assert bench.reports.logs[-1].state == "refused" and not bench.reports.asked
    assert "notice log_refused vm1/disk1" in bench.reports.lines


async def test_a_log_that_the_data_plane_does_not_take_makes_it_only_slower(bench: Bench) -> None:
    bench.plane.fail_log = errno.EINVAL
    await bench.take(bench.spec())
    assert bench.error() == ("", "") and bench.reports.logs[-1].state == "refused"
    await bench.take()
    assert bench.plane.objects == {}


async def test_an_empty_log_of_another_size_is_made_anew(bench: Bench) -> None:
    await bench.take(bench.spec())
    await bench.take()
    await bench.take(bench.spec({"log": CacheLog(size=2 * MIB)}, epoch=2))
    assert bench.log.length == 2 * MIB and len(bench.files()) == 1
    [file] = bench.folder.iterdir()
    assert file.stat().st_size == 2 * MIB


async def test_one_of_another_size_that_cannot_be_removed_makes_it_only_slower(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stuck(path: str, uuid: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    await bench.take(bench.spec())
    await bench.take()
    bench.reports.asked.clear()
    with monkeypatch.context() as context:
        context.setattr(logdisks_module, "remove_log_file", stuck)
        await bench.take(bench.spec({"log": CacheLog(size=2 * MIB)}, epoch=2))
        assert bench.error() == ("", "") and len(bench.plane.volumes) == 1
        assert bench.reports.logs[-1].state == "refused" and "Input/output" in bench.reports.logs[-1].why
    await until(lambda: bench.reports.asked)  # it begins anew by itself
    assert bench.log.length == 2 * MIB


async def test_nothing_is_written_into_a_log_that_is_wanted_off_meanwhile(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data plane was told so twice in a moment, and is told later: no longer, if the log is to be empty by then."""
    monkeypatch.setattr(writelog_module, "CALL_AGAIN_S", 0.2)
    allow, refusals = bench.plane.allow_log, [errno.EALREADY]

    def not_yet(volume: int) -> None:
        if refusals:
            raise OSError(refusals.pop(), "it has not heard the last one yet")
        allow(volume)

    monkeypatch.setattr(bench.plane, "allow_log", not_yet)
    await bench.take(bench.spec())
    bench.reports.answer("dirty")
    bench.log.drained.set()
    await bench.take(bench.spec({"on": False}))
    await until(lambda: bench.reports.asked)
    await asyncio.sleep(0.3)
    assert bench.log.state is LogState.THROUGH and not refusals, "the registry is about to say that it holds nothing"
    bench.reports.answer("clean")


async def test_a_log_goes_in_under_clients_and_out_again(bench: Bench) -> None:
    await bench.take(vvol(1))
    [volume] = bench.plane.volumes
    bench.plane.fail_attach = errno.ETIMEDOUT
    await bench.take(bench.spec())
    await until(lambda: bench.reports.logs and bench.reports.logs[-1].state == "waits")
    await until(lambda: not bench.plane.logs)  # what cannot go in yet is let go, each time that it is tried
    bench.plane.fail_attach = 0
    await until(lambda: bench.reports.asked)
    bench.reports.answer("dirty")
    assert bench.log.policy.beside and bench.log.state is LogState.SERVING
    bench.log.drained.set()
    await bench.take(vvol(1))
    await until(lambda: bench.reports.asked)
    bench.reports.answer("clean")
    await until(lambda: not bench.plane.logs and not bench.files())
    assert list(bench.plane.volumes) == [volume], "the volume is the same all the time"


async def test_another_size_and_place_hold_at_once(bench: Bench) -> None:
    await bench.logging()
    bench.log.drained.set()
    for size, folder in ((2 * MIB, bench.folder), (2 * MIB, bench.folder.parent / "other")):
        await bench.take(bench.spec({"log": CacheLog(size=size), "folder": str(folder)}))
        await until(lambda: bench.reports.asked)
        bench.reports.answer("clean")
        await until(lambda: bench.reports.asked)
        change = bench.reports.answer("dirty")
        assert bench.log.length == size and Path(change.file).parent == folder
        assert bench.log.state is LogState.SERVING
        bench.log.drained.set()
    assert bench.files() == [], "the old place is empty"
    (bench.folder / "is a file").touch()
    await bench.take(bench.spec({"folder": str(bench.folder / "is a file")}))
    await until(lambda: bench.reports.asked)
    bench.reports.answer("clean")
    await until(lambda: bench.reports.logs[-1].state == "refused")
    assert "neither a folder nor a block device" in bench.reports.logs[-1].why and not bench.plane.logs
    await bench.take(bench.spec())
    await until(lambda: bench.reports.asked)
    bench.reports.answer("dirty")
    assert bench.log.state is LogState.SERVING, "what people ask for is tried at once"


async def _fails(bench: Bench, *, void: bool = True) -> None:
    [volume] = bench.plane.volumes
    bench.plane.on_log(LogEvent(LogEventKind.FAILED, volume, errno.EIO))  # type: ignore[misc]
    if not void:
        bench.plane.on_log(LogEvent(LogEventKind.NEEDS_WORD, volume))  # type: ignore[misc]
        bench.reports.answer("forget")
    bench.log.state = LogState.VOID
    bench.plane.on_log(LogEvent(LogEventKind.DRAINED, volume))  # type: ignore[misc]
    if void:
        bench.reports.answer("clean")


async def test_a_log_that_has_failed_begins_anew_once_its_device_works(bench: Bench) -> None:
    await bench.logging()
    bench.plane.fail_log = errno.EIO
    await _fails(bench)
    await until(lambda: "cannot begin anew yet" in bench.reports.logs[-1].why)
    assert bench.reports.logs[-1].state == "void" and not bench.plane.logs
    bench.plane.fail_log = 0
    await until(lambda: bench.reports.asked)
    bench.reports.answer("dirty")
    assert (bench.log.state, bench.reports.logs[-1].state) == (LogState.SERVING, "serving")
    assert len(bench.plane.volumes) == 1 and bench.reports.logs[-1].why == ""


async def test_what_was_given_up_after_all_of_it_was_carried_may_be_overwritten(bench: Bench) -> None:
    """The device was dead when the log was to be made void; it lives again, with all that the log held."""
    await bench.logging()
    held = bench.log.id
    bench.plane.verdicts = [LogFound(LogVerdict.UNKNOWN_DATA, 0, 8192, 2, held)]
    await _fails(bench, void=False)
    await until(lambda: bench.reports.asked)
    assert bench.log.policy.discard and bench.log.id != held
    bench.reports.answer("dirty")
    bench.log.drained.set()
    await _fails(bench)
    bench.plane.verdicts = [LogFound(LogVerdict.UNKNOWN_DATA, 0, 8192, 2, HELD)]
    await until(lambda: bench.reports.logs[-1].why.endswith("of which the registry knows nothing"))
    assert not bench.plane.logs, "another log is nobody's to overwrite"


async def test_a_log_that_fails_again_and_again_is_left_alone_for_longer(bench: Bench) -> None:
    log = WriteLog(bench.plane, bench.reports, bench.spec(), lambda: None, LogBook(bench.folder.parent))
    keeper = LogKeeper(log)
    now = asyncio.get_running_loop().time()
    due = []
    for _ in range(8):
        keeper.began()
        keeper.failed()
        assert keeper._due_s is not None
        due.append(keeper._due_s - now)
    assert due == sorted(due) and due[-1] > 30 * due[0] and due[-1] <= keeper_module.LATER_MAX_S + 5
    keeper.at_once()
    assert keeper._due_s == 0


async def test_a_log_that_fails_is_told_and_used_no_more(bench: Bench) -> None:
    await bench.logging()
    [volume] = bench.plane.volumes
    bench.plane.on_log(LogEvent(LogEventKind.FAILED, volume, errno.ENOSPC))  # type: ignore[misc]
    assert (bench.reports.logs[-1].state, bench.reports.logs[-1].why) == ("failed", os.strerror(errno.ENOSPC))
    bench.log.lost = [LostSpan(4096, 4096), LostSpan(65536, 12288)]
    bench.plane.on_log(LogEvent(LogEventKind.LOST, volume, offset=4096, count=1))  # type: ignore[misc]
    assert range_words(bench.reports.logs[-1].lost, 20480) == "bytes 4096+4096, 65536+12288 and 4096 more"
    bench.plane.on_log(LogEvent(LogEventKind.NEEDS_WORD, volume))  # type: ignore[misc]
    bench.reports.answer("forget")
    assert bench.plane.log[-1].startswith("forget")
    bench.log.state = LogState.VOID
    bench.plane.on_log(LogEvent(LogEventKind.DRAINED, volume))  # type: ignore[misc]
    assert bench.reports.logs[-1].state == "void" and not bench.reports.asked
    kinds = [line for line in bench.reports.lines if "log_" in line]
    assert kinds == ["notice log_failed vm1/disk1", "notice log_lost vm1/disk1"]


async def test_a_question_that_was_lost_is_asked_again(bench: Bench) -> None:
    await bench.take(bench.spec())
    bench.reports.asked.clear()
    bench.table.linked()
    bench.reports.answer("dirty")
    assert bench.log.state is LogState.SERVING


async def test_a_vvol_becomes_read_only_once_its_log_is_drained(bench: Bench) -> None:
    await bench.logging()
    await bench.take(vvol(1, read_only=True, log=LogSpec(on=False)))
    export = bench.table.get(uuid_of(1))
    assert export is not None and "once its write-back log is drained" in export.error
    bench.log.drained.set()
    await until(lambda: bench.reports.asked)
    bench.reports.answer("clean")
    await until(lambda: [desc.read_only for desc in bench.plane.volumes.values()] == [True])
    assert not bench.plane.logs
    await until(lambda: not export.error)


async def test_a_log_whose_file_is_gone_is_drained_and_left(bench: Bench) -> None:
    """It works on where it is, but who starts next would not find it."""
    await bench.logging()
    [name] = bench.files()
    (bench.folder / name).rename(bench.folder / "elsewhere")
    await until(lambda: bench.plane.log[-1].startswith("drain"))
    assert (bench.reports.logs[-1].state, "is gone" in bench.reports.logs[-1].why) == ("failed", True)
    await bench.take(bench.spec())
    bench.log.drained.set()
    await until(lambda: bench.reports.asked)
    bench.reports.answer("clean")
    assert bench.reports.logs[-1].state == "void" and not bench.reports.asked, "it is not asked for again"
    assert "notice log_failed vm1/disk1" in bench.reports.lines


@pytest.fixture
def fs() -> Iterator[FaultFs]:
    with fault_fs(2 * MIB) as one:
        yield one


def test_all_of_a_logs_space_is_taken_or_none(fs: FaultFs) -> None:
    """Also on a file system that cannot take it at once; what cannot be had leaves nothing behind."""
    for number in (errno.EOPNOTSUPP, errno.EIO):
        fs.fail("allocate", number)
        if number == errno.EIO:
            with pytest.raises(NvError, match="Input/output error"):
                open_log_file(str(fs.folder), "a.log", MIB)
        else:
            found = open_log_file(str(fs.folder), "a.log", MIB)
            os.close(found.fd)
            assert fs.files["a.log"] == bytes(MIB) and found.length == MIB
            assert is_there(found.path, found.identity)
            Path(found.path).unlink()
            assert not is_there(found.path, found.identity)
        assert fs.files == {}
    for number, size in ((0, 4 * MIB), (errno.EOPNOTSUPP, 4 * MIB)):
        fs.mend()
        if number:
            fs.fail("allocate", number)
        with pytest.raises(NvError, match="of 4MiB does not fit") as refused:
            open_log_file(str(fs.folder), "a.log", size)
        assert refused.value.code is Code.NO_SPACE and fs.files == {}
    fs.mend()
    fs.fail("sync", errno.EIO)
    with pytest.raises(NvError, match="Input/output error"):
        open_log_file(str(fs.folder), "a.log", MIB)
    assert fs.files == {}, "what is not durable is not used"
