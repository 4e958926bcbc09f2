"""What a host notes of its write-back logs, and what it serves not because of that, whatever a registry remembers."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

import nbdvvol.filter.logdisks as logdisks_module
import nbdvvol.filter.lognotes as lognotes_module
from nbdvvol.dataplane.log import LogFound, LogState, LogVerdict
from nbdvvol.filter.logfile import look_at_log
from nbdvvol.filter.lognotes import LogBook
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.log import LogSpec
from tests.unit.filter_words import MIB, until, uuid_of, vvol
from tests.unit.log_words import log_head, write_head
from tests.unit.test_filter_log import Bench, _bench

__all__ = ["_bench"]
LOG = bytes(range(1, 17))
VVOL = bytes.fromhex(uuid_of(1).replace("-", ""))


def make_log(path: Path, blocks: int, **more: Any) -> Path:
    """A log of VVol 1 that holds so many blocks."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(log_head(**({"vvol": VVOL, "log": LOG, "blocks": blocks, "length": MIB} | more)).ljust(MIB, b"\0"))
    return path


# ---- the book ----


async def test_notes_outlive_their_process(tmp_path: Path) -> None:
    book = LogBook(tmp_path, "h1")
    await asyncio.gather(*(book.keep(vvol(n), LOG.hex(), f"/logs/{n}") for n in (1, 2, 3)))
    await book.keep(vvol(1, epoch=2), LOG.hex(), "/logs/1")
    assert [(note.vvol[-1], note.epoch) for note in LogBook(tmp_path, "h1").all()] == [("1", 2), ("2", 1), ("3", 1)]
    assert LogBook(tmp_path, "h2").all() == [], "each host has its own"
    found = book.under(uuid_of(1), 2)
    assert found is not None and book.under(uuid_of(1), 1) is None
    (tmp_path / "2").write_bytes(bytes(MIB))
    await book.forget(uuid_of(2), str(tmp_path / "2"))
    await book.drop(uuid_of(1), LOG.hex())
    assert [note.vvol for note in LogBook(tmp_path, "h1").all()] == [uuid_of(3)]
    await book.drop(uuid_of(3), LOG.hex())
    assert list(tmp_path.iterdir()) == [], "nothing to say leaves nothing behind"
    book.close()


async def test_what_cannot_be_written_down_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = LogBook(tmp_path)
    await book.keep(vvol(1), LOG.hex(), "/logs/1")
    real = lognotes_module.replace_file

    def broken(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lognotes_module, "replace_file", broken)
    with pytest.raises(OSError, match="No space"):
        await book.keep(vvol(2), LOG.hex(), "/logs/2")
    assert not await book.strike(uuid_of(1), LOG.hex())
    assert [note.vvol for note in LogBook(tmp_path).all()] == [uuid_of(1)], "its file has to stay"
    monkeypatch.setattr(lognotes_module, "replace_file", real)
    assert await book.strike(uuid_of(1), LOG.hex()), "tried again"
    assert LogBook(tmp_path).all() == []
    book.close()


def test_a_damaged_book_serves_nobody(tmp_path: Path) -> None:
    (tmp_path / "logs-h1.json").write_text('{"logs": [{"vvol"')
    with pytest.raises(NvError, match="which write-back logs may hold data") as refused:
        LogBook(tmp_path, "h1")
    assert refused.value.code is Code.INVALID


async def test_a_start_looks_at_what_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty log is noted no more, how much the others hold is known; one that hangs holds up nothing for long."""
    book = LogBook(tmp_path)
    hangs, real = threading.Event(), look_at_log
    for number, blocks in ((1, 0), (2, 3), (3, 0)):
        path = make_log(tmp_path / str(number), blocks, vvol=bytes.fromhex(uuid_of(number).replace("-", "")))
        await book.keep(vvol(number), LOG.hex(), str(path))
    await book.keep(vvol(4), LOG.hex(), str(tmp_path / "gone"))

    def slow(path: str, uuid: str, log: str) -> LogFound:
        if path.endswith("3"):
            hangs.wait()
        return real(path, uuid, log)

    monkeypatch.setattr(lognotes_module, "LOOK_S", 0.2)
    monkeypatch.setattr(logdisks_module, "look_at_log", slow)
    await book.look_over()
    hangs.set()
    found = {note.vvol[-1]: note.dirty_bytes for note in book.all()}
    assert found == {"2": 3 * 4096, "3": None, "4": None}
    book.close()


# ---- what a log holds ----


def test_a_log_is_looked_at_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "log"
    other = bytes(reversed(LOG))
    cases: list[tuple[dict[str, Any], LogVerdict, int]] = [
        ({"blocks": 0}, LogVerdict.USABLE, 0),
        ({"blocks": 5}, LogVerdict.UNKNOWN_DATA, 5),
        ({"blocks": 5, "log": other}, LogVerdict.OTHER_LOG, 0),
        ({"blocks": 5, "vvol": LOG}, LogVerdict.OTHER_VVOL, 0),
        ({"blocks": 5, "length": 2 * MIB}, LogVerdict.CUT, 0),
    ]
    for words, verdict, blocks in cases:
        before = make_log(path, **words).read_bytes()
        found = look_at_log(str(path), uuid_of(1), LOG.hex())
        assert (found.verdict, found.dirty_bytes) == (verdict, blocks * 4096)
        assert path.read_bytes() == before
    for image, verdict in ((bytes(MIB), LogVerdict.MISSING), (b"x" * MIB, LogVerdict.FOREIGN)):
        path.write_bytes(image)
        assert look_at_log(str(path), uuid_of(1), LOG.hex()).verdict is verdict
    path.unlink()
    with pytest.raises(NvError, match="is missing"):
        look_at_log(str(path), uuid_of(1), LOG.hex())


def test_what_cannot_be_read_whole_is_not_taken_for_a_logs_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read may bring what lies before a bad place, and no error: it would look as if nothing was logged."""
    path, real, bad_from = make_log(tmp_path / "log", 5), os.preadv, 8192 + 64

    def bad(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset >= bad_from:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return min(real(fd, buffers, offset), bad_from - offset)

    monkeypatch.setattr(os, "preadv", bad)
    with pytest.raises(NvError, match="Input/output error"):
        look_at_log(str(path), uuid_of(1), LOG.hex())


# ---- what is served ----


async def left(bench: Bench, blocks: int, *, epoch: int = 1) -> Path:
    """A process before this one has left a log that holds so many blocks, and noted it under this epoch."""
    path = make_log(bench.folder / "old.log", blocks)
    await bench.notes.keep(vvol(1, epoch=epoch), LOG.hex(), str(path))
    return path


def noted(bench: Bench) -> list[str]:
    """As the next process would read it."""
    return [note.log for note in LogBook(bench.folder.parent).of(uuid_of(1))]


@pytest.mark.parametrize("wanted", ["none", "read", "elsewhere"])
async def test_no_log_with_data_is_passed_over(bench: Bench, wanted: str) -> None:
    """The registry knows nothing of it, and wants no log, or one elsewhere: the operator says what becomes of it."""
    path = await left(bench, 16)
    elsewhere = bench.spec({"folder": str(bench.folder.parent / "other")}, epoch=7)
    spec = {"none": vvol(1, epoch=7), "read": vvol(1, epoch=7, log=LogSpec(on=False)), "elsewhere": elsewhere}[wanted]
    await bench.take(spec)
    why, error = bench.error()
    assert why == "log-unknown" and str(path) in error and "64KiB, logged under epoch 1" in error
    told = bench.reports.logs[-1]
    assert (told.state, told.found, told.file, told.dirty_bytes) == ("refused", LOG.hex(), str(path), 65536)
    assert not bench.plane.volumes
    held = LogSpec(on=False, held=LOG.hex(), file=str(path))  # `cache recover`
    bench.plane.verdicts = [LogFound(LogVerdict.USABLE, 0, 65536, 1, LOG)]
    await bench.take(vvol(1, epoch=7, log=held))
    assert bench.error() == ("", "") and bench.log.policy.held == LOG
    bench.log.drained.set()
    await until(lambda: bench.reports.asked)
    assert noted(bench) == [LOG.hex()], "until the registry knows that it is empty"
    bench.reports.answer("clean")
    await until(lambda: not path.exists())
    assert noted(bench) == []


async def test_a_log_that_was_given_up_is_missed_by_nobody(bench: Bench) -> None:
    path = await left(bench, 16)
    await bench.take(vvol(1, epoch=7))
    assert bench.error()[0] == "log-unknown"
    await bench.take(vvol(1, epoch=7, log=LogSpec(on=False, given_up=7, discard=True)))
    assert bench.error() == ("", "") and len(bench.plane.volumes) == 1
    assert noted(bench) == [] and path.exists(), "what was given up is not destroyed"


async def test_a_log_that_is_gone_is_missed_until_it_is_given_up(bench: Bench) -> None:
    """Also where a new one would be made in its place."""
    path = await left(bench, 16)
    moved = path.rename(path.with_name("moved"))
    await bench.take(bench.spec(epoch=7))
    why, error = bench.error()
    assert why == "log-missing" and f"{path} is missing" in error and LOG.hex() in error
    assert bench.files() == ["moved"], "nothing was made in its place"
    path.write_bytes(b"something else" * 8192)
    await until(lambda: "no log, or a damaged one" in bench.error()[1])
    moved.rename(path)
    await until(lambda: bench.error()[0] == "log-unknown")
    await bench.take(bench.spec({"given_up": 7}, epoch=7))
    await until(lambda: bench.error() == ("", ""))
    assert bench.reports.answer("dirty").log != LOG.hex()


async def test_an_empty_log_is_no_reason(bench: Bench) -> None:
    path = await left(bench, 0)
    await bench.take(vvol(1, epoch=7))
    assert bench.error() == ("", "") and noted(bench) == [] and not path.exists()


async def test_a_log_of_a_later_epoch_tells_that_the_registry_is_old(bench: Bench) -> None:
    await left(bench, 16, epoch=9)
    await bench.take(vvol(1, epoch=7))
    assert bench.error()[0] == "old-registry" and "under epoch 9" in bench.error()[1]


async def test_it_is_noted_before_anything_is_logged_and_until_nothing_is(bench: Bench) -> None:
    await bench.take(bench.spec())
    assert noted(bench) == [bench.log.id.hex()], "before control is asked"
    bench.reports.answer("dirty")
    await bench.take()
    [note] = LogBook(bench.folder.parent).all()
    assert note.epoch == 1 and [Path(note.file).name] == bench.files()
    await bench.take(vvol(1, epoch=2, log=LogSpec(on=False, held=note.log, file=note.file)))
    assert [one.epoch for one in LogBook(bench.folder.parent).all()] == [2]
    bench.log.drained.set()
    await until(lambda: bench.reports.asked)
    bench.reports.answer("clean")
    await until(lambda: bench.files() == [])
    assert noted(bench) == []


async def test_what_cannot_be_noted_is_not_logged(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = lognotes_module.replace_file

    def broken(path: Path, text: str) -> None:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(lognotes_module, "replace_file", broken)
    await bench.take(bench.spec())
    assert bench.error() == ("", "") and not bench.plane.logs and not bench.reports.asked
    told = bench.reports.logs[-1]
    assert told.state == "refused" and "cannot be noted" in told.why and not told.found
    monkeypatch.setattr(lognotes_module, "replace_file", real)
    await until(lambda: bench.reports.asked)  # it goes in by itself
    bench.reports.answer("dirty")
    assert bench.log.state is LogState.SERVING and noted(bench) == [bench.log.id.hex()]


async def test_an_empty_log_keeps_its_file_as_long_as_its_note(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else who starts next would miss it."""
    await bench.logging()
    real = lognotes_module.replace_file

    def broken(path: Path, text: str) -> None:
        raise OSError(30, os.strerror(30))

    bench.log.drained.set()
    await bench.take(vvol(1))
    await until(lambda: bench.reports.asked)
    monkeypatch.setattr(lognotes_module, "replace_file", broken)
    bench.reports.answer("clean")
    await until(lambda: not bench.plane.logs)
    await bench.take()
    assert len(bench.files()) == 1 and len(noted(bench)) == 1
    monkeypatch.setattr(lognotes_module, "replace_file", real)
    text = json.loads((bench.folder.parent / "logs-local.json").read_text())
    assert text["logs"][0]["file"] == str(bench.folder / bench.files()[0])


async def test_the_file_is_written_as_it_is_read(bench: Bench) -> None:
    """What the fake plane writes is what the real one would: the reader of the format says so."""
    await bench.logging()
    [note] = bench.notes.all()
    assert look_at_log(note.file, uuid_of(1), note.log).dirty_bytes == 4096
    fd = os.open(note.file, os.O_RDWR)
    write_head(fd, log_head(VVOL, bytes.fromhex(note.log), length=MIB))
    os.close(fd)
    assert look_at_log(note.file, uuid_of(1), note.log).verdict is LogVerdict.USABLE
