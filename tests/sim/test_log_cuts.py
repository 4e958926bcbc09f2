"""Runs of the write-back log on io_uring and real files, cut at the boundaries of their records and inside of them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.lib.procs import need, unix_listens, wait_until
from tests.sim.test_log import run

pytestmark = pytest.mark.timeout(500)  # the first test builds the simulators


FIO = """
[global]
ioengine=nbd
uri=nbd+unix:///?socket={socket}
thread=1
size=192k
norandommap=1
refill_buffers=1
randseed=11
group_reporting=1
[random]
rw=randrw
rwmixread=20
bsrange=4k-28k
iodepth=10
io_size=20m
fsync=8
[sequential]
rw=write
bs=8k
iodepth=3
io_size=4m
fsync=32
[trims]
rw=randtrim
bsrange=4k-16k
iodepth=2
io_size=2m
"""
"""Three clients of 192 KiB: what is long and what comes in sequence goes past the log, over what others had logged."""


def cut(folder: Path, files: Path, cuts: int, mutant: int = 0) -> subprocess.CompletedProcess[str]:
    return run(folder / ("nvlogcut_mutants" if mutant else "nvlogcut"), str(files), "1", str(cuts), mutant=mutant)


def under_fio(folder: Path, files: Path, cuts: int, mutant: int = 0) -> subprocess.CompletedProcess[str]:
    """fio writes through the log by its nbd engine; then as many moments of that are judged."""
    socket, job = files / "nbd.sock", files / "job.fio"
    job.write_text(FIO.format(socket=socket))
    program = folder / ("nvlogcut_mutants" if mutant else "nvlogcut")
    command = [program, files, "1", str(cuts), socket]
    environment = {**os.environ, "NVSIM_MUTANT": str(mutant)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        wait_until("it listens", lambda: unix_listens(socket))
        run_fio = [need("fio", "fio"), f"--aux-path={files}", "--output", files / "fio.txt", job]
        assert subprocess.run(run_fio, timeout=100, check=False).returncode == 0
        out, errors = server.communicate(timeout=110)
    return subprocess.CompletedProcess(command, server.returncode, out, errors)


def test_every_cut_of_a_run_under_fio_is_recovered_with_what_was_promised(folder: Path, tmp_path: Path) -> None:
    result = under_fio(folder, tmp_path, 600)
    assert result.returncode == 0, result.stderr
    words = result.stdout.split()
    assert int(words[2]) >= 600, "boundaries of records"
    assert int(words[6]) >= 500, "cuts"


def test_a_deliberate_bug_is_seen_under_fio_too(folder: Path, tmp_path: Path) -> None:
    """Bytes of fio's that do not belong there are told from those that do."""
    result = under_fio(folder, tmp_path, 600, mutant=7)
    assert result.returncode != 0 and "VIOLATION" in result.stderr


def test_every_cut_is_recovered_with_what_was_promised(folder: Path, tmp_path: Path) -> None:
    """Each time what was durable, and all, none, some or torn parts of the rest; then recovery from real files."""
    result = cut(folder, tmp_path, 300)
    assert result.returncode == 0, result.stderr
    words = result.stdout.split()
    assert int(words[2]) >= 700, "records whose boundaries there are to be cut at"
    assert int(words[6]) >= 300, "cuts"


@pytest.mark.parametrize(
    "mutant", [1, 2, 3, 7], ids=["FUA too early", "tail too early", "damaged data", "no tombstone"]
)
def test_a_deliberate_bug_is_seen_in_the_real_run_too(folder: Path, tmp_path: Path, mutant: int) -> None:
    result = cut(folder, tmp_path, 700, mutant)
    assert result.returncode != 0 and "VIOLATION" in result.stderr
