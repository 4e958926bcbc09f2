"""Processes that tests start: own session, output to a file, ended by pid, never waited for without a limit."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

TOOL_TIMEOUT_S = 60.0


def short_dir() -> Path:
    """A new directory with a path short enough for unix sockets (sun_path holds 108 bytes)."""
    return Path(tempfile.mkdtemp(dir="/tmp", prefix="nv"))


def need(tool: str, package: str) -> str:
    """Path of a tool. Fails, naming the package, when it is missing."""
    found = shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/usr/bin")
    assert found, f"{tool} is missing: apt-get install {package}"
    return found


def run(
    argv: Sequence[str | Path], *, timeout_s: float = TOOL_TIMEOUT_S, check: bool = True, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a tool to its end; fail with its whole output when it fails."""
    done = subprocess.run(
        [os.fspath(arg) for arg in argv],
        input=stdin if stdin is not None else "",
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert not check or done.returncode == 0, (
        f"{' '.join(map(str, argv))}\nended with {done.returncode}\nstdout: {done.stdout}\nstderr: {done.stderr}"
    )
    return done


def wait_until(what: str, condition: Callable[[], object], timeout_s: float = 20.0, pause_s: float = 0.02) -> None:
    """Poll until `condition` holds. Raises TimeoutError that says what did not happen."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {timeout_s} s")
        time.sleep(pause_s)


class Process:
    """A long-running child in a session of its own, its output kept in `log`.

    It dies with the test run (setpriv), so that an interrupted run leaves nothing behind."""

    def __init__(self, argv: Sequence[str | Path], log: Path, env: dict[str, str] | None = None) -> None:
        self.argv = [os.fspath(arg) for arg in argv]
        self.log = log
        with log.open("ab") as out:
            self.popen = subprocess.Popen(
                [need("setpriv", "util-linux"), "--pdeathsig", "KILL", "--", *self.argv],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=None if env is None else {**os.environ, **env},
            )

    @property
    def pid(self) -> int:
        """Its process id (and its group's)."""
        return int(self.popen.pid)

    def alive(self) -> bool:
        """Whether it runs."""
        return self.popen.poll() is None

    def text(self) -> str:
        """What it printed."""
        return self.log.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        """Signal this process alone."""
        self.popen.send_signal(number)

    def kill_group(self) -> None:
        """SIGKILL it and all of its children that stayed in its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.popen.wait(20)

    def stop(self, timeout_s: float = 20.0) -> int:
        """SIGTERM, wait; return the exit code. Raises TimeoutError (after SIGKILL) when it does not end."""
        if self.alive():
            self.popen.terminate()
        try:
            return int(self.popen.wait(timeout_s))
        except subprocess.TimeoutExpired:
            self.kill_group()
            raise TimeoutError(f"{self.argv} did not stop within {timeout_s} s:\n{self.text()[-4000:]}") from None


def children(pid: int) -> list[int]:
    """All living descendants of a process."""
    found: list[int] = []
    queue = [pid]
    while queue:
        parent = queue.pop()
        for path in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                direct = [int(child) for child in path.read_text().split()]
                found += direct
                queue += direct
    return found


def command_line(pid: int) -> list[str]:
    """Arguments of a process; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
    except OSError:
        return []


def running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def unix_listens(socket: Path) -> bool:
    """Whether a process listens there, seen without connecting: a socket's file is there before it listens."""
    accepts = 0x10000  # __SO_ACCEPTCON of net/unix/af_unix.c
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[-1] == str(socket) and int(fields[3], 16) & accepts:
            return True
    return False


@contextlib.contextmanager
def nbdkit(*args: str | Path) -> Iterator[Path]:
    """An nbdkit on a unix socket: the oracle that the raw client is checked with."""
    with _server([need("nbdkit", "nbdkit"), "-f", "--exit-with-parent"], ["-U"], args) as socket:
        yield socket


@contextlib.contextmanager
def qemu_nbd(*args: str | Path) -> Iterator[Path]:
    """A qemu-nbd on a unix socket, for many clients."""
    with _server([need("qemu-nbd", "qemu-utils"), "--persistent", "--shared=8"], ["-k"], args) as socket:
        yield socket


@contextlib.contextmanager
def _server(start: list[str], socket_option: list[str], args: Sequence[str | Path]) -> Iterator[Path]:
    folder = short_dir()
    socket = folder / "s"
    process = Process([*start, *socket_option, socket, *args], folder / "log")
    try:
        wait_until(f"{start[0]} listens", lambda: unix_listens(socket) or not process.alive())
        assert process.alive(), process.text()
        yield socket
    finally:
        process.popen.terminate()
        try:
            process.popen.wait(10)
        except subprocess.TimeoutExpired:
            process.kill_group()
        shutil.rmtree(folder, ignore_errors=True)
