"""Starting a server, knowing when it answers, and stopping exactly it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from perf.model import Backend, Transport

START_LIMIT_S = 180.0
STOP_LIMIT_S = 10.0
PSK_IDENTITY = "bench"
PSK_HEX = "6f1d9a3c5b7e8f00112233445566778899aabbccddeeff00a1b2c3d4e5f60718"


class ServerError(Exception):
    """A server that did not start, or died."""


@dataclass(frozen=True)
class Place:
    """What a server is asked to serve, and where it may put things."""

    folder: Path
    """Short: a unix socket's path has 107 bytes."""
    backend: Backend
    transport: Transport
    file: Path
    """The backing file, filled, `size` bytes long; with the backend null there is none."""
    size: int
    port: int
    build: Path
    """Where perf/native was built."""
    spin_us: int = 200
    """How long a server that can spin does so before it sleeps; 0 where system calls are counted."""
    reactors: int = 1

    @property
    def socket(self) -> Path:
        """The unix socket to listen on."""
        return self.folder / "s"

    @property
    def direct(self) -> bool:
        """Past the page cache, where the server can."""
        return self.backend == "disk"

    def write_psk(self) -> Path:
        """The key file that nbdkit (a file), and qemu and we (a folder with keys.psk in it) read."""
        path = self.folder / "keys.psk"
        path.write_text(f"{PSK_IDENTITY}:{PSK_HEX}\n")
        path.chmod(0o600)
        return path


@dataclass(frozen=True)
class Plan:
    """How to run one server at one place."""

    command: Sequence[str]
    export: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    pid_file: Path | None = None
    """It leaves the foreground and writes its process id here."""
    ready: str = ""
    """It answers once its output holds this."""
    find_pid: Callable[[int], int] | None = None
    """Given the started process, the one that serves; stopping is the started one's business."""
    limit_s: float = START_LIMIT_S
    """How long it may take to answer."""
    warm: bool = False
    """It keeps what it has read: read all of it first."""
    prefill: bool = False
    """It starts empty, and memory that was never written reads faster than memory that was: write all of it first."""
    legs: Sequence[Path] = ()
    """The files of a mirror."""
    resyncs: Path | None = None
    """It copies its first leg to its second one at SIGUSR1, and writes here what became of it (perf/mirrored.py)."""


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    pid: int
    place: Place
    export: str
    legs: Sequence[Path] = ()
    resyncs: Path | None = None

    def loadgen_arguments(self) -> list[str]:
        """Where the load generator finds it."""
        out = ["--export", self.export, "--pid", str(self.pid)]
        if self.place.transport == "unix":
            return [*out, "--unix", str(self.place.socket)]
        out += ["--tcp", f"127.0.0.1:{self.place.port}"]
        return [*out, "--tls-psk", f"{PSK_IDENTITY}:{PSK_HEX}"] if self.place.transport == "tls" else out

    def uri(self) -> str:
        """For libnbd's clients."""
        if self.place.transport == "unix":
            return f"nbd+unix:///{self.export}?socket={self.place.socket}"
        scheme = "nbds" if self.place.transport == "tls" else "nbd"
        return f"{scheme}://127.0.0.1:{self.place.port}/{self.export}"


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _connect(place: Place) -> socket.socket:
    if place.transport == "unix":
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(2)
        client.connect(str(place.socket))
        return client
    return socket.create_connection(("127.0.0.1", place.port), timeout=2)


def _greets(place: Place) -> bool:
    try:
        with _connect(place) as client:
            return client.recv(8, socket.MSG_WAITALL) == b"NBDMAGIC"
    except OSError:
        return False


def _spawn(plan: Plan, log: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **plan.environment}
    return subprocess.Popen(plan.command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def _stop(process: subprocess.Popen[bytes], pid: int) -> None:
    for what in (signal.SIGTERM, signal.SIGKILL):
        for target in {pid, process.pid}:
            if target != process.pid or process.poll() is None:
                try:
                    os.kill(target, what)
                except ProcessLookupError:
                    continue
        deadline = time.monotonic() + STOP_LIMIT_S
        while time.monotonic() < deadline:
            if process.poll() is not None and (pid == process.pid or _gone(pid)):
                return
            time.sleep(0.02)


def _ready(plan: Plan, place: Place, process: subprocess.Popen[bytes], log: Path) -> int | None:
    """The serving process's id once it answers."""
    if plan.ready not in log.read_text(errors="replace") or not _greets(place):
        return None
    if plan.pid_file is not None:
        text = plan.pid_file.read_text().strip() if plan.pid_file.is_file() else ""
        return int(text) if text else None
    return plan.find_pid(process.pid) if plan.find_pid else process.pid


def _wait(plan: Plan, place: Place, process: subprocess.Popen[bytes], log: Path) -> int:
    deadline = time.monotonic() + plan.limit_s
    while time.monotonic() < deadline:
        if process.poll() is not None and (plan.pid_file is None or process.returncode != 0):
            break
        pid = _ready(plan, place, process, log)
        if pid is not None:
            return pid
        time.sleep(0.02)
    code = process.poll()
    what = f"did not answer within {plan.limit_s:.0f} s" if code is None else f"ended with status {code}"
    _stop(process, process.pid)
    raise ServerError(f"{Path(plan.command[0]).name} {what}: {log.read_text(errors='replace')[-400:].strip()}")


@contextmanager
def running(plan: Plan, place: Place) -> Iterator[Running]:
    """Run a server for the length of the block. Raises ServerError with the end of its output."""
    log = place.folder / "log"
    with log.open("ab") as out:
        try:
            process = _spawn(plan, out.fileno())
        except OSError as error:
            raise ServerError(f"cannot run {plan.command[0]}: {error}") from error
    pid = _wait(plan, place, process, log)
    try:
        yield Running(pid, place, plan.export, plan.legs, plan.resyncs)
    finally:
        _stop(process, process.pid if plan.find_pid else pid)
