"""A real guest for tests: a Debian cloud kernel under QEMU's software emulation, driven command by command.

Its tree is the host's, read-only over virtio-fs with a copy-on-write layer on top, so that every program of the
host (and the project's own Python) runs in it; or a disk's. It reaches the host's loopback as 10.0.2.2.
Everything a guest starts on the host is ended, by its pid, when `stop` returns.
"""

from __future__ import annotations

import base64
import json
import shlex
import shutil
import socket
import subprocess
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.lib.procs import Process, short_dir
from tests.vm.kernel import Kernel, find_kernel, module_files, program, virtiofsd

HOST = "10.0.2.2"
"""The host's loopback, as the guest sees it."""
BOOT_LIMIT_S = 60.0
LOG_TAIL_CHARS = 4000
ACTIVE: weakref.WeakSet[Guest] = weakref.WeakSet()
"""Guests whose logs a failing test shows."""


class GuestError(AssertionError):
    """The guest did not do what it was told; the text holds the command, its output and the console's end."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended. Status 124 or 137: it was stopped at its time limit."""

    status: int
    output: str


class LineSocket:
    """A unix stream socket read line by line, each read with a deadline."""

    def __init__(self, path: Path, connect_limit_s: float = 10.0) -> None:
        deadline = time.monotonic() + connect_limit_s
        while True:
            self._sock = socket.socket(socket.AF_UNIX)
            try:
                self._sock.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                self._sock.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        self._buffer = b""

    def send(self, data: bytes) -> None:
        """Send everything."""
        self._sock.settimeout(10.0)
        self._sock.sendall(data)

    def line(self, deadline: float) -> str:
        """Return the next line; raises TimeoutError, or ConnectionError at the end of the stream."""
        while b"\n" not in self._buffer:
            self._sock.settimeout(max(deadline - time.monotonic(), 0.001))
            data = self._sock.recv(65536)
            if not data:
                raise ConnectionError("the peer closed the channel")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode(errors="replace")

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()


def build_initramfs(kernel: Kernel, target: Path) -> None:
    """Write a compression-free initramfs with busybox, the guest's modules and init.sh to `target`."""
    root = short_dir()
    try:
        (root / "bin").mkdir()
        (root / "modules").mkdir()
        shutil.copy(program("busybox"), root / "bin/busybox")
        shutil.copy(Path(__file__).with_name("init.sh"), root / "init")
        (root / "init").chmod(0o755)
        files = module_files(kernel)
        for file in files:
            shutil.copy(file, root / "modules" / file.name)
        (root / "modules/order").write_text("".join(f"{file.name}\n" for file in files))
        names = "\n".join(str(path.relative_to(root)) for path in [root, *sorted(root.rglob("*"))])
        with target.open("wb") as out:
            subprocess.run(
                [program("cpio"), "-o", "-H", "newc", "--quiet"],
                cwd=root, input=names.encode(), stdout=out, check=True, timeout=30,
            )  # fmt: skip
    finally:
        shutil.rmtree(root)


class Guest:
    """One guest. Use it as a context manager; `run` and `check` execute shell scripts inside it as root."""

    def __init__(
        self, initramfs: Path, *, drives: Sequence[str] = (), root: str = "", memory_mib: int = 512, cpus: int = 1
    ) -> None:
        """`drives`: values of QEMU's -drive option; the first is /dev/vda. `root`: the disk that is the guest's tree,
        instead of the host's; it has busybox, or better, and empty proc, sys, dev, tmp, run and mnt. `cpus`: one is
        fastest for a single process, as measured (a quarter less of the host's time than two)."""
        self.dir = short_dir()
        self._initramfs = initramfs
        self._drives = tuple(drives)
        self._root = root
        self._memory_mib = memory_mib
        self._cpus = cpus
        self._children: list[Process] = []
        self._command: LineSocket | None = None
        self._qmp: LineSocket | None = None
        self._serial = 0
        ACTIVE.add(self)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Boot, and return once the guest takes commands; raises GuestError with the console's end."""
        if not self._root:
            share = [
                str(virtiofsd()),
                f"--socket-path={self.dir}/fs.sock",
                "-o",
                "source=/,sandbox=chroot,cache=always",
            ]
            self._spawn("virtiofsd", share)
            self._wait_for(self.dir / "fs.sock")
        self._spawn("qemu", self._qemu_command())
        deadline = time.monotonic() + BOOT_LIMIT_S
        try:
            self._command = LineSocket(self.dir / "command.sock")
            self._qmp = LineSocket(self.dir / "qmp.sock")
            self._qmp.line(deadline)
            self.qmp("qmp_capabilities")
            self._answer("0", deadline)
        except OSError as error:
            raise self._failure(f"the guest did not boot within {BOOT_LIMIT_S:.0f} s: {error}") from error

    def stop(self) -> None:
        """End the guest and everything it started; its directory goes too."""
        for channel in (self._command, self._qmp):
            if channel is not None:
                channel.close()
        for child in reversed(self._children):
            child.kill_group()
        self._children.clear()
        ACTIVE.discard(self)
        shutil.rmtree(self.dir, ignore_errors=True)

    def run(self, script: str, timeout_s: float = 30.0) -> Result:
        """Run a shell script and return its status and output, stdout and stderr together.

        The guest stops it at `timeout_s`; raises GuestError when the guest itself no longer answers."""
        assert self._command is not None, "the guest is not running"
        self._serial += 1
        ident = str(self._serial)
        encoded = base64.b64encode(script.encode()).decode()
        try:
            start = time.monotonic()
            self._command.send(f"{ident} {timeout_s:.0f} {encoded}\n".encode())
            result = self._answer(ident, start + timeout_s + 10)
            self._note(f"{time.monotonic() - start:6.1f} s  status {result.status}  {script[:100]!r}")
            return result
        except OSError as error:
            raise self._failure(f"no answer within {timeout_s + 10:.0f} s to: {script}: {error}") from error

    def check(self, script: str, timeout_s: float = 30.0) -> str:
        """Run a shell script under `set -e` and return its output; raises GuestError unless it ends with 0."""
        result = self.run(f"set -e\n{script}", timeout_s)
        if result.status != 0:
            raise self._failure(f"status {result.status} from: {script}\n{result.output}")
        return result.output

    def background(self, script: str, log: str) -> int:
        """Start a shell script in a session of its own, output to the guest's file `log`; return its pid."""
        line = f"setsid sh -c {shlex.quote(script)} </dev/null >{shlex.quote(log)} 2>&1 &\necho $!"
        return int(self.check(line))

    def wait(self, script: str, timeout_s: float = 30.0) -> None:
        """Wait until a shell script ends with 0, tried five times a second; raises GuestError."""
        self.check(f"until {{ {script}\n}} >/dev/null 2>&1; do sleep 0.2; done", timeout_s)

    def power_off(self) -> None:
        """Flush everything and switch the guest off, as its own administrator would; then `stop`."""
        self.check("sync")
        self._children[-1].popen.terminate()  # QEMU ends in order: its disks are flushed and closed
        self._children[-1].popen.wait(20)
        self.stop()

    def qmp(self, execute: str, **arguments: Any) -> Any:
        """Run a QEMU monitor command and return its value; raises GuestError when QEMU refuses."""
        assert self._qmp is not None, "the guest is not running"
        self._qmp.send(json.dumps({"execute": execute, "arguments": arguments}).encode() + b"\n")
        deadline = time.monotonic() + 10
        while True:
            answer = json.loads(self._qmp.line(deadline))
            if "error" in answer:
                raise GuestError(f"QEMU refused {execute}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def _qemu_command(self) -> list[str]:
        kernel = find_kernel()
        command = [
            program("qemu-system-x86_64"), "-machine", "q35,memory-backend=ram", "-accel", "tcg,thread=multi",
            "-cpu", "Nehalem", "-smp", str(self._cpus), "-m", f"{self._memory_mib}M",
            "-object", f"memory-backend-memfd,id=ram,size={self._memory_mib}M,share=on",
            "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
            "-kernel", str(kernel.image), "-initrd", str(self._initramfs),
            "-append", f"console=ttyS0 quiet loglevel=4 panic=-1 tsc=reliable mitigations=off nv.root={self._root}",
            "-serial", f"file:{self.dir}/console.log",
            "-qmp", f"unix:{self.dir}/qmp.sock,server=on,wait=off",
            "-chardev", f"socket,id=command,path={self.dir}/command.sock,server=on,wait=off",
            "-device", "virtio-serial", "-device", "virtserialport,chardev=command,name=nv.command",
            "-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile=",
        ]  # fmt: skip
        if not self._root:
            command += ["-chardev", f"socket,id=fs,path={self.dir}/fs.sock"]
            command += ["-device", "vhost-user-fs-pci,chardev=fs,tag=host"]
        for drive in self._drives:
            command += ["-drive", drive]
        return command

    def _spawn(self, name: str, command: Sequence[str]) -> None:
        self._children.append(Process(command, self.dir / f"{name}.log"))

    def _wait_for(self, path: Path, limit_s: float = 10.0) -> None:
        deadline = time.monotonic() + limit_s
        while not path.exists():
            if time.monotonic() > deadline or not self._children[-1].alive():
                raise self._failure(f"{path.name} did not appear within {limit_s:.0f} s")
            time.sleep(0.02)

    def _answer(self, ident: str, deadline: float) -> Result:
        assert self._command is not None
        while True:  # an answer that came after its deadline is passed over
            found, _, status = self._command.line(deadline).strip().partition(" ")
            body = []
            while (line := self._command.line(deadline).strip()) != ".":
                body.append(line)
            if found == ident:
                return Result(int(status), base64.b64decode("".join(body)).decode(errors="replace"))

    def _note(self, line: str) -> None:
        with (self.dir / "commands.log").open("a") as log:
            log.write(line + "\n")

    def logs(self) -> str:
        """The ends of the console, of QEMU's and virtiofsd's words, and of the list of commands with their times."""
        return "\n".join(
            f"--- {log.name}\n{log.read_text(errors='replace')[-LOG_TAIL_CHARS:]}"
            for log in sorted(self.dir.glob("*.log"))
            if log.stat().st_size
        )

    def _failure(self, text: str) -> GuestError:
        return GuestError(f"{text}\n{self.logs()}")
