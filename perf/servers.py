"""Starting a server, knowing when it answers, and stopping exactly it."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from perf.model import Backend, Transport

START_LIMIT_S = 60.0
STOP_LIMIT_S = 10.0
_GO, _ACK = 7, 1
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
    spin_us: int = 50
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
    listen_fd: bool = False
    """Hand it a listening socket as descriptor 3 (sd_listen_fds)."""
    pid_file: Path | None = None
    """It leaves the foreground and writes its process id here."""
    hold: bool = False
    """It ends with its last client, so one connection enters its export and stays until the end."""
    find_pid: Callable[[int], int] | None = None
    """Given the started process, the one that serves; stopping is the started one's business."""
    start_limit_s: float = START_LIMIT_S


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    pid: int
    place: Place
    export: str

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


def _enter(place: Place, export: str) -> socket.socket | None:
    """A connection in the transmission phase, which may stay silent as long as it likes."""
    name = export.encode()
    client = None
    try:
        client = _connect(place)
        client.settimeout(START_LIMIT_S)
        hello = client.recv(18, socket.MSG_WAITALL)
        if hello[:8] != b"NBDMAGIC":
            raise ServerError(f"no NBD server: it greets with {hello!r}")
        body = struct.pack(">I", len(name)) + name + b"\0\0"
        client.sendall(struct.pack(">I", 1) + b"IHAVEOPT" + struct.pack(">II", _GO, len(body)) + body)
        while True:
            kind, size = struct.unpack(">12xII", client.recv(20, socket.MSG_WAITALL))
            text = client.recv(size, socket.MSG_WAITALL) if size else b""
            if kind == _ACK:
                return client
            if kind & 1 << 31:
                raise ServerError(f"export {export!r} refused: {text.decode(errors='replace')}")
    except (OSError, struct.error):
        if client is not None:
            client.close()
        return None


def _listener(place: Place) -> socket.socket:
    if place.transport == "unix":
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(place.socket))
    else:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", place.port))
    listener.listen(1024)
    return listener


def _spawn(plan: Plan, place: Place, log: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **plan.environment}
    if not plan.listen_fd:
        return subprocess.Popen(plan.command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    # LISTEN_PID must be the server's own pid, so a shell sets it and becomes the server.
    with _listener(place) as listener:
        fd = listener.fileno()
        script = f'exec 3<&{fd}; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'
        command = ["/bin/bash", "-c", script, "sh", *plan.command]
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[fd]
        )


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


def _ready(plan: Plan, place: Place, process: subprocess.Popen[bytes], stack: ExitStack) -> int | None:
    """The serving process's id once it answers."""
    if plan.hold:
        held = _enter(place, plan.export)
        if held is None:
            return None
        stack.enter_context(held)
    elif not _greets(place):
        return None
    if plan.pid_file is not None:
        text = plan.pid_file.read_text().strip() if plan.pid_file.is_file() else ""
        return int(text) if text else None
    return plan.find_pid(process.pid) if plan.find_pid else process.pid


def _wait(plan: Plan, place: Place, process: subprocess.Popen[bytes], log: Path, stack: ExitStack) -> int:
    deadline = time.monotonic() + plan.start_limit_s
    while time.monotonic() < deadline:
        if process.poll() is not None and (plan.pid_file is None or process.returncode != 0):
            break
        pid = _ready(plan, place, process, stack)
        if pid is not None:
            return pid
        time.sleep(0.02)
    code = process.poll()
    what = f"did not answer within {plan.start_limit_s:.0f} s" if code is None else f"ended with status {code}"
    _stop(process, process.pid)
    raise ServerError(f"{plan.command[0]} {what}: {log.read_text(errors='replace')[-400:].strip()}")


@contextmanager
def running(plan: Plan, place: Place) -> Iterator[Running]:
    """Run a server for the length of the block. Raises ServerError with the end of its output."""
    log = place.folder / "log"
    with log.open("ab") as out:
        try:
            process = _spawn(plan, place, out.fileno())
        except OSError as error:
            raise ServerError(f"cannot run {plan.command[0]}: {error}") from error
    with ExitStack() as held:
        pid = _wait(plan, place, process, log, held)
        try:
            yield Running(pid, place, plan.export)
        finally:
            _stop(process, process.pid if plan.find_pid else pid)
