"""Children of `up`: restarted with pauses, given up on, ended in time; and they die with their parent."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nbdvvol import supervisor
from nbdvvol.model.errors import Code, NvError
from nbdvvol.supervisor import DEATHS_MAX, DEATHS_WITHIN_S, PAUSE_MAX_S, Backoff, Child

ROOT = Path(__file__).parents[2]


def test_pauses_grow_and_end() -> None:
    backoff = Backoff()
    pauses = [backoff.died(float(second)) for second in range(DEATHS_MAX)]
    assert pauses[-1] is None
    growing = [pause for pause in pauses[:-1] if pause is not None]
    assert growing == sorted(growing) and len(growing) == DEATHS_MAX - 1
    assert growing[0] == supervisor.PAUSE_FIRST_S and growing[-1] <= PAUSE_MAX_S


def test_rare_deaths_are_forgiven_for_ever() -> None:
    backoff = Backoff()
    assert {backoff.died(day * DEATHS_WITHIN_S) for day in range(1, 100)} == {supervisor.PAUSE_FIRST_S}


def child(script: str, said: list[str]) -> Child:
    made = Child("worker", [], keep_fd=2, say=said.append)
    made._argv = [sys.executable, "-c", script]
    return made


async def until(found: list[str], count: int) -> None:
    async with asyncio.timeout(20):
        while len(found) < count:
            await asyncio.sleep(0.02)


async def test_a_proven_child_is_started_again() -> None:
    said: list[str] = []
    worker = child("import os, time; time.sleep(0.05); os.kill(os.getpid(), 9)", said)
    worker.proven = True
    running = asyncio.create_task(worker.run())
    await until(said, 2)
    await worker.stop()
    await running
    assert said[0] == "worker ended by SIGKILL; starting it again in 0.1 s"
    assert said[1] == "worker ended by SIGKILL; starting it again in 0.4 s"


async def test_a_child_that_never_worked_ends_it_all() -> None:
    with pytest.raises(NvError, match="worker ended with status 3") as caught:
        await child("raise SystemExit(3)", []).run()
    assert caught.value.code is Code.UNAVAILABLE


async def test_a_child_that_keeps_ending_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "PAUSE_FIRST_S", 0.001)
    said: list[str] = []
    worker = child("raise SystemExit(1)", said)
    worker.proven = True
    with pytest.raises(NvError, match="worker ended with status 1"):
        await worker.run()
    assert len(said) == DEATHS_MAX - 1


async def test_a_stop_during_the_pause_starts_nothing() -> None:
    said: list[str] = []
    worker = child("raise SystemExit(1)", said)
    worker.proven = True
    running = asyncio.create_task(worker.run())
    await until(said, 2)
    assert await worker.stop()
    await running


async def test_a_deaf_child_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "STOP_S", 0.3)
    said: list[str] = []
    script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    worker = child(script, said)
    running = asyncio.create_task(worker.run())
    await asyncio.sleep(0.3)
    assert not await worker.stop()
    await running
    assert "killing it" in said[0]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_daemon_dies_with_its_parent() -> None:
    inner = "import os, sys, time\nfrom nbdvvol.lifeline import end_with_parent\nend_with_parent(int(sys.argv[1]))\n"
    inner += "print(os.getpid(), flush=True)\ntime.sleep(60)"
    outer = (
        "import os, subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid())])\n"
    )
    outer += "time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", outer, inner], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert not gone(pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    end = time.monotonic() + 5
    while not gone(pid):
        assert time.monotonic() < end
        time.sleep(0.01)
    parent.stdout.close()


def test_a_daemon_whose_parent_is_gone_already_ends() -> None:
    script = "from nbdvvol.lifeline import end_with_parent; end_with_parent(1 << 22); print('alive')"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (result.returncode, result.stdout) == (1, "")
    assert os.getpid()
