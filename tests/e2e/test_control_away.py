"""Control is dead, or stopped: the data path goes on, and nothing new starts that control has not confirmed."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator

import pytest

from tests.e2e.test_kills import connected
from tests.lib import nbdwords as w
from tests.lib.farm import Farm, listed, plain_spec, serves
from tests.lib.ledger import Ledger, Writer
from tests.lib.pattern import pattern
from tests.lib.procs import Process, wait_until
from tests.lib.rawnbd import Closed, Haggle, OptionRefused

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def whole() -> Iterator[Farm]:
    with Farm(plain_spec()) as farm:
        farm.start_split()
        yield farm


@pytest.fixture
def farm(whole: Farm) -> Farm:
    """A farm with control and filter at work; tests may kill either."""
    if whole.control is None or not whole.control.alive():
        whole.start_control()
    if not whole.filters["local"].alive():
        whole.start_filter()
    wait_until("the filter is connected", lambda: connected(whole))
    whole.wait_bound("vm1/root")
    return whole


def kill_control(farm: Farm) -> None:
    assert farm.control is not None
    farm.control.popen.send_signal(signal.SIGKILL)
    farm.control.popen.wait(10)


def test_bound_exports_still_open_and_serve(farm: Farm) -> None:
    ledger = Ledger(5)
    writer = Writer(ledger, farm.open("root"))
    writer.progress()
    kill_control(farm)
    writer.progress(200)
    with farm.open("root", "extended") as nbd:
        nbd.write(15 << 20, pattern(1, 0, 4096))
        nbd.flush()
        assert nbd.read(15 << 20, 4096) == pattern(1, 0, 4096)
    writer.join()
    with farm.open("root", "simple") as nbd:
        ledger.verify(nbd)


def test_discovery_comes_from_the_last_snapshot(farm: Farm) -> None:
    with Haggle(farm.socket()) as haggle:
        haggle.begin()
        with_control = haggle.list_exports(), haggle.facts(w.OPT_INFO, "root")
    kill_control(farm)
    with Haggle(farm.socket()) as haggle:
        haggle.begin().structured()
        assert haggle.list_exports() == with_control[0]
        facts = haggle.facts(w.OPT_INFO, "root")
        assert (facts.size, facts.block_sizes) == (with_control[1].size, with_control[1].block_sizes)
        assert list(haggle.meta(w.OPT_LIST_META_CONTEXT, "root", [])) == ["base:allocation"]
        with pytest.raises(OptionRefused) as caught:
            haggle.facts(w.OPT_INFO, "nobody")
        assert caught.value.reply.type == w.REP_ERR_UNKNOWN


def test_a_stopped_control_delays_discovery_only_by_its_deadline(farm: Farm) -> None:
    assert farm.control is not None
    with stopped(farm.control.pid):
        begun = time.monotonic()
        assert list(listed(farm.socket())) == ["root"]
        assert time.monotonic() - begun < 5
        begun = time.monotonic()
        with farm.open("root") as nbd:  # GO asks nobody
            nbd.read(0, 4096)
        assert time.monotonic() - begun < 2


def test_a_restarted_filter_serves_nothing_until_control_is_back(farm: Farm) -> None:
    with farm.open("root") as nbd:
        nbd.write(0, b"before")
        nbd.flush()
    epoch = farm.vvol("vm1/root")["epoch"]
    kill_control(farm)
    farm.filters["local"].popen.send_signal(signal.SIGKILL)
    farm.filters["local"].popen.wait(10)
    farm.start_filter()
    end = time.monotonic() + 4
    while time.monotonic() < end:
        assert not serves(farm.socket(), "root"), "an unconfirmed epoch was served"
        time.sleep(0.1)
    farm.start_control()
    with farm.open("root", wait_s=20) as nbd:
        assert nbd.read(0, 6) == b"before"
    assert farm.vvol("vm1/root")["epoch"] > epoch


class stopped:  # noqa: N801
    """A process that does not run inside the `with`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def __enter__(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def __exit__(self, *_: object) -> None:
        os.kill(self.pid, signal.SIGCONT)


def io_bytes(pid: int) -> int:
    """All bytes that a process read and wrote, files and sockets alike."""
    with open(f"/proc/{pid}/io") as file:  # noqa: PTH123
        facts = dict(line.split(": ") for line in file.read().splitlines())
    return int(facts["rchar"]) + int(facts["wchar"])


def test_no_data_byte_goes_through_control(farm: Farm) -> None:
    pid = farm.control_pid
    with farm.open("root") as nbd:
        before = io_bytes(pid)
        for round_number in range(8):
            nbd.write(0, pattern(round_number, 0, 1 << 20) * 8)
            assert len(nbd.read(0, 8 << 20)) == 8 << 20
        moved = io_bytes(pid) - before
        assert moved < 1 << 20, f"control moved {moved} bytes while 128 MiB of data moved"
        with stopped(pid):
            for round_number in range(4):
                nbd.write(0, pattern(100 + round_number, 0, 1 << 20) * 8)
                nbd.flush()
                assert nbd.read(1 << 20, 1 << 20) == pattern(100 + round_number, 0, 1 << 20)


def test_control_comes_back_to_the_same_filter(farm: Farm) -> None:
    writer = Writer(Ledger(8), farm.open("root"))
    epoch = farm.vvol("vm1/root")["epoch"]
    kill_control(farm)
    farm.start_control()
    wait_until("the filter is connected again", lambda: connected(farm), 20)
    writer.progress(100)
    writer.join()
    assert farm.wait_bound("vm1/root")["epoch"] == epoch, "the same filter process keeps its epoch"


def test_work_waits_for_control_and_is_done_once_it_is_back(farm: Farm) -> None:
    farm.filters["local"].stop()
    answer = farm.api("POST", "/v1/vvols", {"vm": "vm1", "name": "late", "size": "4MiB", "profile": "plain"})
    task = answer["task"]["id"]
    assert farm.api("GET", f"/v1/tasks/{task}")["state"] in ("queued", "running")
    kill_control(farm)
    farm.start_control()
    assert farm.api("GET", f"/v1/tasks/{task}")["state"] in ("queued", "running"), "a task survives control"
    farm.start_filter()
    farm.task(farm.api("GET", f"/v1/tasks/{task}"))
    with farm.open("late", wait_s=10) as nbd:
        assert not any(nbd.read(0, 4 << 20))
    farm.delete("vm1/late")


def test_work_that_waits_can_be_watched_and_taken_back(farm: Farm) -> None:
    farm.filters["local"].stop()
    created = farm.cli("create", "vvol", "vm1/never", "--size", "4MiB", "--profile", "plain", "--no-wait").stdout
    number = created.split()[1]
    argv = [sys.executable, "-u", "-m", "nbdvvol", "task", "watch", number, "--run", farm.run]
    watch = Process(argv, farm.folder / "watch.log")
    try:
        wait_until("it says what it waits for", lambda: "waits for a filter that sees datastore main" in watch.text())
        farm.cli("task", "cancel", number)
        assert watch.popen.wait(20) == 1
        assert "cancelled" in watch.text().splitlines()[-1]
    finally:
        watch.kill_group()
    assert farm.vvol("vm1/never")["state"] == "failed"
    farm.start_filter()
    farm.delete("vm1/never")


@pytest.fixture
def target(farm: Farm) -> Iterator[Haggle]:
    with Haggle(farm.run / "target.sock") as haggle:
        yield haggle.begin()


def test_controls_own_target_describes_and_never_serves(farm: Farm, target: Haggle) -> None:
    assert list(target.list_exports()) == ["vm1/root"]
    facts = target.facts(w.OPT_INFO, "vm1/root")
    with Haggle(farm.socket()) as direct:
        direct.begin()
        served = direct.facts(w.OPT_INFO, "root")
    assert (facts.size, facts.flags, facts.block_sizes) == (served.size, served.flags, served.block_sizes)
    with pytest.raises(OptionRefused) as caught:
        target.facts(w.OPT_GO, "vm1/root")
    assert caught.value.reply.type == w.REP_ERR_POLICY
    assert "local" in caught.value.reply.text, "the text names the host"
    assert farm.uri("root") in caught.value.reply.text, "the text names the URI"
    with Haggle(farm.run / "target.sock") as other, pytest.raises(Closed):
        other.begin().export_name("vm1/root")
