"""Write-back logs on control's side: what the registry says of them, what pins a VVol, drains, force, what is told."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from nbdvvol.control.logview import log_problems
from nbdvvol.control.registry import bindings, caches, logs, mirrors, tasks, vvols
from nbdvvol.model import link
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.log import LogChange, LogNote, LogRecord, LogReport, LogWanted, LostRange
from nbdvvol.model.resources import AddLeg, BindVVol, ResizeVVol, TaskState
from tests.unit.control_farm import PLAIN, TestFarm, running_farm
from tests.unit.fake_filter import FakeFilter

__all__ = ["running_farm"]
LOG, OTHER = "ab" * 16, "cd" * 16
KIB = 1024


def spec(mode: str = "writeback", **vvol: Any) -> dict[str, Any]:
    """vm1/root on host a, under a profile with a log of 1 MiB; host b sees the datastore, too."""
    whole = copy.deepcopy(PLAIN)
    whole["hosts"] = {"a": {"logs": "/logs"}, "b": {"logs": "/logs"}}
    cache: dict[str, Any] = {"mode": mode} | ({"log": {"size": "1MiB"}} if mode == "writeback" else {})
    whole["profiles"] = {"gold": {"cache": cache}}
    whole["vms"] = {"vm1": {"host": "a", "vvols": {"root": {"size": "4MiB", "profile": "gold"} | vvol}}}
    return whole


class Logged:
    """A farm whose vm1/root is served by host a."""

    def __init__(self, farm: TestFarm, a: FakeFilter, b: FakeFilter, uuid: str) -> None:
        self.farm, self.a, self.b, self.uuid = farm, a, b, uuid

    async def change(self, wanted: LogWanted, log: str = LOG, host: str = "a") -> LogRecord:
        """What host a's filter asks."""
        vvol = await self.farm.vvol()
        change = LogChange(
            id=1, vvol=self.uuid, epoch=vvol.epoch, generation=vvol.generation, log=log, wanted=wanted, file="/logs/r"
        )
        return await self.farm.control.registry.run(logs.log_change, host, change)

    async def says(self, dirty_bytes: int, **more: Any) -> None:
        """What it reports, until control has it."""
        epoch = (await self.farm.vvol()).epoch
        words = {"state": "serving", "file": "/logs/r", "ring_bytes": 1 << 20} | more
        await self.a.say(LogReport(uuid=self.uuid, epoch=epoch, dirty_bytes=dirty_bytes, **words))
        links = self.farm.control.links

        async def heard() -> bool:
            report = links.log("a", self.uuid)
            return report is not None and report.dirty_bytes == dirty_bytes

        await self.farm.until(heard)

    async def waiting(self, number: int, words: str) -> None:
        """A task waits for this."""

        async def waits() -> bool:
            return words in (await self.farm.control.watch_task(number, 0)).detail

        await self.farm.until(waits)

    async def codes(self) -> list[str]:
        return [problem.code for problem in (await self.farm.control.status()).problems]


@pytest.fixture(name="logged")
async def _logged(farm: TestFarm) -> Logged:
    result = await farm.apply(spec())
    a, b = await farm.filter("a"), await farm.filter("b")
    await farm.settle(result)
    return Logged(farm, a, b, (await farm.vvol()).uuid)


async def test_a_profile_gives_its_vvols_logs(logged: Logged) -> None:
    found = logged.a.serving[logged.uuid].log
    assert found is not None and found.log is not None
    assert (found.on, found.folder, found.held, found.discard, found.given_up) == (True, "/logs", "", False, 0)
    assert (found.log.size, found.log.bypass, found.log.age) == (1 << 20, 128 * KIB, 5.0)
    other = spec()
    other["hosts"]["a"]["logs"] = "/fast"
    await logged.farm.apply(other)
    await logged.farm.until_sent(logged.a, logged.uuid, "log", found.model_copy(update={"folder": "/fast"}))
    await logged.farm.apply(spec(read_only=True))
    await logged.farm.until_sent(logged.a, logged.uuid, "log", None)


async def test_what_may_be_logged_stands_in_the_registry_first_and_last(logged: Logged) -> None:
    assert (await logged.farm.vvol()).log is None
    assert (await logged.change("dirty", host="b")).refused == "epoch"
    assert not (await logged.change("dirty")).refused
    kept = (await logged.farm.vvol()).log
    assert kept is not None and (kept.host, kept.log, kept.file, kept.told) == ("a", LOG, "/logs/r", None)
    assert (await logged.change("clean", OTHER)).refused == "other"
    assert not (await logged.change("clean")).refused
    assert (await logged.farm.vvol()).log is None
    change = LogChange(id=1, vvol="none", epoch=1, generation=1, log=LOG, wanted="dirty")
    assert (await logged.farm.control.registry.run(logs.log_change, "a", change)).refused == "unknown"


async def test_a_filter_that_starts_again_is_told_of_its_log(logged: Logged) -> None:
    await logged.change("dirty")
    await logged.a.die()
    a = await logged.farm.filter("a")
    found = a.serving[logged.uuid].log
    assert found is not None and (found.held, found.file, found.on) == (LOG, "/logs/r", True)


async def test_unbinding_drains_first(logged: Logged) -> None:
    await logged.change("dirty")
    await logged.says(64 * KIB)
    run = logged.farm.control.registry.run
    task = (await run(vvols.begin_unbind, "vm1", "root", BindVVol())).task
    await logged.waiting(task.id, "host a to carry what its log holds to the storage")
    await logged.farm.until_sent(logged.a, logged.uuid, "log", _drained(logged))
    assert (await logged.change("dirty")).refused == "draining"
    assert (await logged.farm.vvol()).binding is not None, "it stays bound until its log is empty"
    await logged.change("clean")
    assert (await logged.farm.over(task.id)).state is TaskState.SUCCESS
    found = await logged.farm.vvol()
    assert found.binding is None and found.log is None
    task = (await run(vvols.begin_bind, "vm1", "root", BindVVol(host="b"))).task
    assert (await logged.farm.over(task.id)).state is TaskState.SUCCESS
    log = logged.b.serving[logged.uuid].log
    assert log is not None and log.on and not log.held


def _drained(logged: Logged) -> object:
    log = logged.a.serving[logged.uuid].log
    assert log is not None
    return log.model_copy(update={"on": False, "held": LOG, "file": "/logs/r"})


async def test_a_move_that_is_cancelled_goes_on_logging(logged: Logged) -> None:
    await logged.change("dirty")
    run = logged.farm.control.registry.run
    task = (await run(vvols.begin_bind, "vm1", "root", BindVVol(host="b"))).task
    await logged.waiting(task.id, "host a to carry what its log holds")
    await run(tasks.cancel, task.id)
    assert (await logged.farm.over(task.id)).state is TaskState.CANCELLED

    async def on() -> bool:
        log = logged.a.serving[logged.uuid].log
        return log is not None and log.on

    await logged.farm.until(on)
    assert (await logged.farm.vvol()).binding is not None


async def test_a_host_that_is_away_keeps_what_its_log_holds(logged: Logged) -> None:
    farm, run = logged.farm, logged.farm.control.registry.run
    await logged.change("dirty")
    await logged.says(8 * KIB)
    await logged.says(64 * KIB, oldest_age_ms=3000)
    await farm.control.may_move("vm1", "root", "b")  # it would drain first
    await logged.a.die()
    kept = (await farm.vvol()).log
    assert kept is not None and (kept.dirty_bytes, kept.size) == (64 * KIB, 1 << 20), "its last word is written down"
    assert "LOG_PINNED" in await logged.codes()
    await farm.control.may_move("vm1", "root", "a")
    with pytest.raises(NvError, match="held 64KiB, the oldest logged 3s ago") as refused:
        await farm.control.may_move("vm1", "root", "b")
    assert refused.value.code is Code.CONFLICT and "--force" in refused.value.hint
    risks = await farm.control.risks("vm1", "root")
    assert risks.log == kept and any("held 64KiB" in risk for risk in risks.risks)
    answer = await run(vvols.begin_bind, "vm1", "root", BindVVol(host="b", force=True))
    assert any("held 64KiB" in risk for risk in answer.risks)
    assert (await farm.over(answer.task.id)).state is TaskState.SUCCESS
    log = logged.b.serving[logged.uuid].log
    assert log is not None and (log.held, log.given_up) == ("", 1), "what epoch 1 logged is never replayed"
    assert any(
        e.kind == "log.given_up" and "held 64KiB" in e.message for e in await farm.control.watch_events(0, 99, 0)
    )
    a = await farm.filter("a")
    assert logged.uuid not in a.serving
    assert (await logged.change("dirty")).refused == "epoch"


async def test_force_reaches_a_move_that_waits(logged: Logged) -> None:
    run = logged.farm.control.registry.run
    await logged.change("dirty")
    task = (await run(vvols.begin_bind, "vm1", "root", BindVVol(host="b"))).task
    await logged.waiting(task.id, "host a to carry")
    await logged.a.die()
    again = await run(vvols.begin_bind, "vm1", "root", BindVVol(host="b", force=True))
    assert again.task.id == task.id and any("/logs/r on host a" in risk for risk in again.risks)
    assert (await logged.farm.over(task.id)).state is TaskState.SUCCESS
    assert (await logged.farm.vvol()).log is None


async def test_taken_by_force_it_stays_pinned_until_it_is_bound_by_force(logged: Logged) -> None:
    run = logged.farm.control.registry.run
    await logged.change("dirty")
    await logged.a.die()
    task = (await run(vvols.begin_unbind, "vm1", "root", BindVVol(force=True))).task
    assert (await logged.farm.over(task.id)).state is TaskState.SUCCESS
    assert (await logged.farm.vvol()).log is not None
    task = (await run(vvols.begin_bind, "vm1", "root", BindVVol(host="b"))).task
    done = await logged.farm.over(task.id)
    assert done.state is TaskState.ERROR and "start the filter of host a and bind it there" in done.error
    a = await logged.farm.filter("a")
    task = (await run(vvols.begin_bind, "vm1", "root", BindVVol(host="a"))).task
    assert (await logged.farm.over(task.id)).state is TaskState.SUCCESS
    log = a.serving[logged.uuid].log
    assert log is not None and log.held == LOG, "its own host gets it back"


async def test_a_stopped_filter_does_not_free_what_its_log_holds(logged: Logged) -> None:
    run = logged.farm.control.registry.run
    await logged.change("dirty")
    await logged.a.stop()
    assert (await run(bindings.state, logged.uuid, "a"))[0] == "assigned"
    waits = await run(bindings.bind, logged.uuid, "b")
    assert waits.startswith("host a to carry what its log holds")
    a = await logged.farm.filter("a")
    log = a.serving[logged.uuid].log
    assert log is not None and (log.on, log.held) == (False, LOG), "it is drained as soon as it runs"
    await logged.change("clean")
    assert await run(bindings.bind, logged.uuid, "b") == "host a to release it"
    await logged.farm.until(lambda: _free(logged))
    assert await run(bindings.bind, logged.uuid, "b") == ""


async def _free(logged: Logged) -> bool:
    return not await logged.farm.control.registry.run(bindings.unreleased, logged.uuid)


async def test_a_drain_shows_how_far_it_is_and_ends(logged: Logged) -> None:
    run = logged.farm.control.registry.run
    await logged.change("dirty")
    await logged.says(64 * KIB)
    task = (await run(caches.begin_drain, "vm1", "root")).task
    await logged.waiting(task.id, "host a to carry 64KiB to the storage")
    await logged.says(16 * KIB, destage_rate=8 * KIB)
    await logged.waiting(task.id, "16KiB to the storage, 8KiB/s")
    assert (await logged.farm.control.watch_task(task.id, 0)).progress == pytest.approx(0.75)
    await logged.change("clean")
    done = await logged.farm.over(task.id)
    assert (done.state, done.detail) == ("success", "drained: 64KiB carried from /logs/r on host a to the storage")
    assert not (await logged.change("dirty")).refused, "then it is logged again"


async def test_a_drain_that_is_cancelled_goes_on_logging(logged: Logged) -> None:
    run = logged.farm.control.registry.run
    await logged.change("dirty")
    task = (await run(caches.begin_drain, "vm1", "root")).task
    await logged.waiting(task.id, "host a to carry")
    assert (await logged.change("dirty")).refused == "draining"
    await run(tasks.cancel, task.id)
    assert (await logged.farm.over(task.id)).state is TaskState.CANCELLED
    assert not (await logged.change("dirty")).refused


async def test_a_profile_that_leaves_writeback_drains(logged: Logged) -> None:
    await logged.change("dirty")
    await logged.farm.apply(spec("read"))
    log = link.LogSpec(on=False, held=LOG, file="/logs/r")
    await logged.farm.until_sent(logged.a, logged.uuid, "log", log)
    await logged.change("clean")
    await logged.farm.until_sent(logged.a, logged.uuid, "log", None)


async def test_what_a_log_held_is_given_up_or_taken_by_the_operators_word(logged: Logged) -> None:
    farm, a, run = logged.farm, logged.a, logged.farm.control.registry.run
    await logged.change("dirty")
    with pytest.raises(NvError, match="its log on host a is in use"):
        await run(logs.discard, "vm1", "root")
    await a.die()
    a = logged.a = await farm.filter("a")
    epoch = (await farm.vvol()).epoch
    words: dict[str, Any] = {"uuid": logged.uuid, "epoch": epoch, "size": 4 << 20, "flags": 0, "block_min": 1}
    words |= {"block_preferred": 4096, "block_max": 4096, "error": "gone", "why": "log-missing"}
    await a.say(link.Exports(exports=[link.ExportReport(**words)]))

    async def missed() -> bool:
        return "LOG_MISSING" in await logged.codes()

    await farm.until(missed)
    with pytest.raises(NvError, match="no host tells of a log"):
        await run(logs.recover, "vm1", "root", await farm.control.found_log("vm1", "root"))
    assert (await run(logs.discard, "vm1", "root")).log is None

    async def told() -> bool:
        log = a.serving[logged.uuid].log
        return log is not None and (log.discard, log.held, log.given_up) == (True, "", epoch)

    await farm.until(told)
    assert not (await logged.change("dirty", OTHER)).refused

    async def used() -> bool:
        log = a.serving[logged.uuid].log
        return log is not None and (log.held, log.discard) == (OTHER, False)

    await farm.until(used)  # what was taken into use is not overwritten again
    await logged.change("clean", OTHER)
    await logged.says(32 * KIB, state="refused", found=LOG, verdict="unknown-data")
    taken = (await run(logs.recover, "vm1", "root", await farm.control.found_log("vm1", "root"))).log
    assert taken is not None and (taken.host, taken.log, taken.file) == ("a", LOG, "/logs/r")
    with pytest.raises(NvError, match="may hold data of it") as refused:
        await run(logs.recover, "vm1", "root", await farm.control.found_log("vm1", "root"))
    assert "cache discard" in refused.value.hint


@pytest.mark.parametrize("clean", [False, True])
async def test_a_deleted_vvols_log_is_removed(logged: Logged, clean: bool) -> None:
    await logged.change("dirty")
    if clean:
        await logged.change("clean")
    task = (await logged.farm.control.registry.run(vvols.begin_delete, "vm1", "root")).task
    assert (await logged.farm.over(task.id)).state is TaskState.SUCCESS
    assert logged.farm.begun("log_remove") == [{"vvol": logged.uuid, "file": "/logs/r"}]


async def test_a_vvol_does_not_grow_from_the_middle_of_a_block(farm: TestFarm) -> None:
    whole = spec(size=(4 << 20) + 512)
    result = await farm.apply(whole)
    await farm.filter("a")
    await farm.settle(result)
    run = farm.control.registry.run
    with pytest.raises(NvError, match="no multiple of 4096, and a write-back log"):
        await run(vvols.begin_resize, "vm1", "root", ResizeVVol(size=5 << 20))
    await farm.over((await run(vvols.begin_unbind, "vm1", "root", BindVVol())).task.id)
    task = (await run(vvols.begin_resize, "vm1", "root", ResizeVVol(size=5 << 20))).task
    assert (await farm.over(task.id)).state is TaskState.SUCCESS


@pytest.mark.parametrize(
    ("says", "code", "words"),
    [
        ({"state": "failed", "why": "No space left"}, "LOG_FAILED", "has failed: No space left"),
        ({"state": "void"}, "LOG_FAILED", "nothing was lost"),
        ({"state": "refused", "why": "it is another's"}, "LOG_REFUSED", "it is another's"),
        ({"state": "waits", "why": "clients"}, "LOG_WAITS", "clients"),
        ({"state": "serving", "oldest_age_ms": 60_000}, "LOG_LATE", "1m ago"),
        (
            {"state": "failed", "lost_bytes": 16384, "lost": [LostRange(offset=4096, length=8192)]},
            "LOG_DATA_LOST",
            "bytes 4096+8192 and 8192 more of it",
        ),
    ],
)
async def test_what_is_wrong_with_a_log_is_told(logged: Logged, says: dict[str, Any], code: str, words: str) -> None:
    await logged.says(4096, **says)
    found = log_problems(await logged.farm.control.vvols(), frozenset({"a"}))
    assert [problem.message for problem in found if problem.code == code and words in problem.message]
    assert all(problem.action for problem in found)


async def test_a_vvol_becomes_no_mirror_while_a_log_holds_data_of_it(logged: Logged) -> None:
    more = spec()
    more["datastores"]["second"] = {"kind": "file", "path": "/fake/second.img", "size": "16MiB"}
    more["profiles"]["gold"]["datastore"] = "local"
    await logged.change("dirty")
    await logged.farm.settle(await logged.farm.apply(more))
    await logged.a.stop()
    with pytest.raises(NvError, match="may hold data of it") as refused:
        await logged.farm.control.registry.run(mirrors.begin_add_leg, "vm1", "root", AddLeg(datastore="second"))
    assert refused.value.code is Code.CONFLICT


async def test_a_folder_for_logs_is_a_whole_path(farm: TestFarm) -> None:
    other = spec()
    other["hosts"]["a"]["logs"] = "logs"
    with pytest.raises(NvError, match="host a: the folder for logs 'logs' is not absolute"):
        await farm.apply(other)


# ---- what hosts have noted of their logs ----


async def noting(
    logged: Logged, host: str, epoch: int, log: str = LOG, dirty_bytes: int | None = 64 * KIB
) -> FakeFilter:
    """A new filter of a host, which has noted a log; the one before has died."""
    await getattr(logged, host).die()
    fake = FakeFilter(host, logged.farm.disks)
    words = {"vvol": logged.uuid, "log": log, "file": f"/logs/{host}", "epoch": epoch, "dirty_bytes": dirty_bytes}
    fake.logs = [LogNote.model_validate(words)]
    fake.on_serve = refuses
    await fake.connect(logged.farm.control.links)
    logged.farm.filters.append(fake)
    setattr(logged, host, fake)
    return fake


def refuses(fake: FakeFilter, spec: link.VVolSpec) -> None:
    """As a filter that finds data in the log it has noted: until it is told what becomes of it."""
    word = spec.log is not None and (spec.log.held == fake.logs[0].log or spec.log.given_up >= fake.logs[0].epoch)
    fake.refuses = {} if word else {spec.uuid: "log-unknown"}


async def test_a_log_that_only_its_host_remembers_keeps_its_vvol_there(logged: Logged) -> None:
    """The registry says nothing of it: it was rebuilt, or put back from a backup. No other host gets the VVol."""
    run, control = logged.farm.control.registry.run, logged.farm.control
    epoch = (await logged.farm.vvol()).epoch
    await noting(logged, "a", epoch)
    kept = (await logged.farm.vvol()).log
    assert kept is not None and (kept.host, kept.log, kept.known, kept.dirty_bytes) == ("a", LOG, False, 64 * KIB)
    with pytest.raises(NvError, match="/logs/a on host a holds 64KiB of it of which the registry knows nothing") as no:
        await control.may_move("vm1", "root", "b")
    assert no.value.code is Code.CONFLICT and "start the filter of host a" in no.value.hint
    await control.may_move("vm1", "root", "a")

    async def told() -> bool:
        return "LOG_UNKNOWN" in await logged.codes()

    await logged.farm.until(told)
    task = (await run(caches.begin_drain, "vm1", "root")).task
    done = await logged.farm.over(task.id)
    assert done.state is TaskState.ERROR and "decide first" in done.error
    await logged.says(64 * KIB, state="refused", found=LOG, verdict="unknown-data", file="/logs/a")
    taken = (await run(logs.recover, "vm1", "root", await control.found_log("vm1", "root"))).log
    assert taken is not None and (taken.known, taken.host, taken.log, taken.file) == (True, "a", LOG, "/logs/a")

    async def held() -> bool:
        found = logged.a.serving[logged.uuid].log
        return found is not None and found.held == LOG

    await logged.farm.until(held)
    await logged.change("clean")
    assert (await logged.farm.vvol()).log is None


async def test_another_host_gets_it_by_force_alone_and_what_was_given_up_stays_so(logged: Logged) -> None:
    run, control = logged.farm.control.registry.run, logged.farm.control
    await noting(logged, "a", (await logged.farm.vvol()).epoch)
    await logged.a.stop()
    assert "LOG_PINNED" in await logged.codes()
    answer = await run(vvols.begin_bind, "vm1", "root", BindVVol(host="b", force=True))
    assert any("holds 64KiB of it of which the registry knows nothing" in risk for risk in answer.risks)
    assert (await logged.farm.over(answer.task.id)).state is TaskState.SUCCESS
    after = await logged.farm.vvol()
    assert after.log is None and after.binding is not None and after.binding.host == "b"
    log = logged.b.serving[logged.uuid].log
    assert log is not None and log.given_up >= 1 and not log.held
    await noting(logged, "a", 1)
    assert (await logged.farm.vvol()).log is None, "it is given up, whatever its host has noted"
    assert any(event.kind == "log.noted" for event in await control.watch_events(0, 99, 0))


async def test_a_note_of_what_the_registry_knows_is_no_news(logged: Logged) -> None:
    epoch = (await logged.farm.vvol()).epoch
    await logged.change("dirty")
    await noting(logged, "a", epoch)
    kept = (await logged.farm.vvol()).log
    assert kept is not None and kept.known
    await noting(logged, "b", epoch, OTHER)
    assert (await logged.farm.vvol()).log == kept, "who had it before, in order, has left nothing behind"
    await noting(logged, "b", epoch + 50, OTHER)
    kept = (await logged.farm.vvol()).log
    assert kept is not None and (kept.host, kept.known) == ("b", False), "an epoch that this registry never gave out"


async def test_a_log_in_use_is_written_down_again_at_once(logged: Logged) -> None:
    """Control was away, and its registry has lost that alone: the process that has the VVol is the same."""
    a, epoch = logged.a, (await logged.farm.vvol()).epoch
    await a.disconnect()
    a.logs = [LogNote(vvol=logged.uuid, log=LOG, file="/logs/a", epoch=epoch)]
    await a.connect(logged.farm.control.links)
    kept = (await logged.farm.vvol()).log
    assert kept is not None and (kept.host, kept.log, kept.known, kept.told) == ("a", LOG, True, None)


async def test_a_host_that_serves_again_has_settled_what_it_noted(logged: Logged) -> None:
    """It could not look at its log when it connected; when it serves, it has."""
    await logged.a.die()
    fake = logged.a = FakeFilter("a", logged.farm.disks)
    fake.logs = [LogNote(vvol=logged.uuid, log=LOG, file="/logs/a", epoch=(await logged.farm.vvol()).epoch)]
    logged.farm.filters.append(fake)
    await fake.connect(logged.farm.control.links)

    async def settled() -> bool:
        vvol = await logged.farm.vvol()
        return vvol.log is None and vvol.binding is not None and vvol.binding.state == "bound"

    await logged.farm.until(settled)
    assert (await logged.change("dirty", OTHER)).refused == ""
