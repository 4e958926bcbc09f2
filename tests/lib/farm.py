"""A running farm for tests: `nbdvvol up` as an operator starts it, or control and filters one by one.

Everything of a farm lives in one short directory under /tmp. Nothing waits without a limit; only processes that the
farm itself started are signalled, each by its pid.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import yaml

from nbdvvol import farmfile
from tests.lib.procs import Process, children, command_line, run, running, short_dir, wait_until
from tests.lib.rawio import Style, Transmission, open_export
from tests.lib.rawnbd import Closed, Haggle, OptionRefused

START_S = 40.0
STOP_S = 30.0
SANITIZER = os.environ.get("NBDVVOL_TEST_SANITIZER", "")
"""`asan` or `tsan`: filters run on that build of the data plane, started one by one instead of by `up`."""
ACTIVE: weakref.WeakSet[Farm] = weakref.WeakSet()
"""Farms whose logs a failing test shows."""
JsonDict = dict[str, Any]


class ApiError(Exception):
    """The API answered with an error."""

    def __init__(self, status: int, body: JsonDict) -> None:
        error = body.get("error", {})
        super().__init__(f"HTTP {status}: {error}")
        self.status = status
        self.code = str(error.get("code", ""))
        self.message = str(error.get("message", ""))


class Farm:
    """One farm: its file, its state and run directories, its processes."""

    def __init__(self, spec: JsonDict, folder: Path | None = None) -> None:
        self.folder = folder or short_dir()
        self.spec = spec
        self.state = self.folder / "state"
        self.run = self.folder / "run"
        self.file = self.folder / "farm.yaml"
        self.inside: dict[str, list[str]] = {}
        """What the command lines of `control`, `filter-HOST` begin with (a network namespace)."""
        self.link = [f"unix:{self.run / 'control.sock'}"]
        """How filters reach control: its address, and more words for their command line."""
        self.up: Process | None = None
        self.control: Process | None = None
        self.filters: dict[str, Process] = {}
        self._logs = 0
        self._seen: set[int] = set()
        self.write_file()
        ACTIVE.add(self)

    def write_file(self, spec: JsonDict | None = None) -> Path:
        """(Re)write the farm file."""
        if spec is not None:
            self.spec = spec
        self.file.write_text(yaml.safe_dump(self.spec, sort_keys=False))
        return self.file

    # ---- processes ----

    def _process(self, name: str, *args: str | Path) -> Process:
        self._logs += 1
        argv = [*self.inside.get(name, []), sys.executable, "-m", "nbdvvol", *args]
        env = {"PYTHONUNBUFFERED": "1", **(sanitizer_env(SANITIZER) if "filter" in args else {})}
        process = Process(argv, self.folder / f"{name}-{self._logs}.log", env=env)
        self._seen.add(process.pid)
        return process

    def start(self, timeout_s: float = START_S) -> Farm:
        """Start `up` and wait for `ready`."""
        if SANITIZER:
            self.start_split()
            return self
        self.begin()
        self.wait_ready(timeout_s)
        return self

    def begin(self) -> Process:
        """Start `up` without waiting."""
        assert self.up is None or not self.up.alive(), "up runs already"
        self.up = self._process("up", "up", "-f", self.file, "--state", self.state, "--run", self.run)
        return self.up

    def wait_ready(self, timeout_s: float = START_S) -> None:
        """Wait until `up` printed `ready`. Raises AssertionError with its output when it does not."""
        assert self.up is not None
        end = time.monotonic() + timeout_s
        while not re.search(r"^ready\b", self.up.text(), re.MULTILINE):
            assert self.up.alive(), f"up ended with {self.up.popen.returncode}:\n{self.up.text()}"
            assert time.monotonic() < end, f"up is not ready within {timeout_s} s:\n{self.up.text()}"
            time.sleep(0.02)
        self._seen.update(children(self.up.pid))

    def start_split(self) -> None:
        """Control and the filter as processes of their own, the farm applied, every VVol served."""
        self.start_control()
        self.apply()
        self.start_filter()
        self.wait_served()

    def wait_served(self) -> None:
        """Wait until every VVol of the farm file is bound and can be entered."""
        for vm, config in self.spec["vms"].items():
            for name in config["vvols"]:
                self.wait_bound(f"{vm}/{name}", START_S)
                self.open(name, vm=vm, wait_s=START_S).disconnect()

    def begin_control(self) -> Process:
        """Start `nbdvvol control` alone, without waiting for anything."""
        self.control = self._process("control", "control", "--state", self.state, "--run", self.run)
        return self.control

    def start_control(self, timeout_s: float = START_S) -> Process:
        """Start `nbdvvol control` alone and wait until its API answers."""
        self.begin_control()
        self.wait_control(timeout_s)
        assert self.control is not None
        return self.control

    def wait_control(self, timeout_s: float = START_S) -> None:
        """Wait until control's API answers."""
        wait_until("control answers", lambda: self.api_answers() or not self._alive(self.control), timeout_s, 0.1)
        assert self.control is not None and self.control.alive(), f"control ended:\n{self.log_text()}"

    def start_filter(self, host: str = "local", run: Path | None = None, *, control: str | None = None) -> Process:
        """Start `nbdvvol filter` alone, without waiting for anything."""
        run = run or self.run
        address, *more = [control] if control else self.link
        token = self.state / "hosts" / f"{host}.token"
        config = self.spec.get("hosts", {}).get(host, {})
        words = ["filter", "--host", host, "--control", address, *more, "--token-file", token, "--run", run]
        words += ["--reactors", str(config.get("reactors", 1))]
        words += ["--cache", str(config["cache"])] if "cache" in config else []
        self.filters[host] = self._process(f"filter-{host}", *words)
        return self.filters[host]

    @staticmethod
    def _alive(process: Process | None) -> bool:
        return process is not None and process.alive()

    def _child(self, role: str) -> int:
        assert self.up is not None
        found = [pid for pid in children(self.up.pid) if role in command_line(pid) or _module(pid, role)]
        assert found, f"up has no {role} process: {[command_line(pid) for pid in children(self.up.pid)]}"
        self._seen.update(found)
        return found[0]

    @property
    def control_pid(self) -> int:
        """Process id of control."""
        if self.control is not None and self.control.alive():
            return self.control.pid
        return self._child("control")

    def filter_pid(self, host: str = "local") -> int:
        """Process id of a host's filter."""
        if host in self.filters and self.filters[host].alive():
            return self.filters[host].pid
        return self._child("filter")

    def kill_everything(self) -> None:
        """SIGKILL all processes of this farm at once, as a power cut of the machine's processes."""
        if self.up is not None:
            self._seen.update(children(self.up.pid))
        for process in self._own():
            process.kill_group()
        for pid in list(self._seen):
            if running(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        wait_until("killed processes are gone", lambda: not self.strays())

    def _own(self) -> list[Process]:
        return [process for process in (self.up, self.control, *self.filters.values()) if process is not None]

    def strays(self) -> list[list[str]]:
        """Command lines of processes of this farm that still run."""
        return [command_line(pid) for pid in self._seen if running(pid) and self._is_ours(pid)]

    def _is_ours(self, pid: int) -> bool:
        return any(str(self.folder) in word for word in command_line(pid))

    def stop(self) -> None:
        """Stop cleanly: exit code 0 everywhere, no process left behind, no socket left."""
        if self.up is not None:
            self._seen.update(children(self.up.pid))
        for process in (self.up, *self.filters.values(), self.control):
            if process is not None:
                was_alive = process.alive()
                code = process.stop(STOP_S)
                assert not was_alive or code == 0, f"{process.argv} ended with {code}:\n{process.text()[-6000:]}"
        self.up = self.control = None
        self.filters.clear()
        wait_until("no stray process", lambda: not self.strays(), 5.0)

    def remove(self) -> None:
        """End whatever still runs and delete the farm's directory."""
        self.kill_everything()
        ACTIVE.discard(self)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Farm:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self.stop()
            elif error is not None:
                error.add_note(self.log_text())
        finally:
            self.remove()

    def log_text(self, lines: int = 60) -> str:
        """The last lines of each log."""
        parts = []
        for path in sorted(self.folder.glob("*.log")):
            tail = path.read_text(errors="replace").splitlines()[-lines:]
            parts.append("\n".join([f"--- {path.name}", *tail]))
        return "\n".join(parts[-6:])

    # ---- addresses ----

    def socket(self, vm: str = "vm1", run: Path | None = None) -> Path:
        """A VM's unix socket."""
        return (run or self.run) / "vms" / f"{vm}.sock"

    def uri(self, name: str, vm: str = "vm1") -> str:
        """A VVol's unix URI."""
        return f"nbd+unix:///{name}?socket={self.socket(vm)}"

    def open(self, name: str, style: Style = "structured", vm: str = "vm1", wait_s: float = 0.0) -> Transmission:
        """Enter an export on its VM's socket by the raw client; keep trying for `wait_s`."""
        end = time.monotonic() + wait_s
        while True:
            try:
                return open_export(self.socket(vm), name, style)
            except (OSError, Closed, OptionRefused):
                if time.monotonic() >= end:
                    raise
                time.sleep(0.05)

    # ---- the API ----

    def client(self) -> httpx.Client:
        """An HTTP client on control's unix socket."""
        transport = httpx.HTTPTransport(uds=str(self.run / "control.sock"), verify=False)  # no TLS on a unix socket
        return httpx.Client(transport=transport, base_url="http://nbdvvol", timeout=30.0)

    def api_answers(self) -> bool:
        """Whether GET /v1/status works now."""
        try:
            with self.client() as client:
                return client.get("/v1/status").status_code == 200
        except httpx.HTTPError:
            return False

    def api(self, method: str, path: str, body: JsonDict | None = None, headers: dict[str, str] | None = None) -> Any:
        """Call the API. Raises ApiError."""
        with self.client() as client:
            answer = client.request(method, path, json=body, headers=headers)
        content = answer.json() if answer.content else {}
        if answer.is_error:
            raise ApiError(answer.status_code, content)
        return content

    def apply(self, spec: JsonDict | None = None) -> JsonDict:
        """Apply the farm file, rewritten first if a spec is given; return what that changes and begins."""
        if spec is not None:
            self.write_file(spec)
        farm = farmfile.load(self.file).model_dump(mode="json", by_alias=True)
        return dict(self.api("POST", "/v1/apply", {"farm": farm}))

    def events(self) -> list[str]:
        """Kinds of the events so far, the newest last, as the command tells them."""
        return [one["kind"] for one in json.loads(self.cli("get", "events", "-o", "json").stdout)]

    def task(self, answer: JsonDict, timeout_s: float = 30.0) -> JsonDict:
        """Wait for a task (a TaskRef or a Task) to end well; return it."""
        task: JsonDict = answer.get("task", answer)
        end = time.monotonic() + timeout_s
        while task["state"] in ("queued", "running"):
            assert time.monotonic() < end, f"task not done within {timeout_s} s: {task}"
            time.sleep(0.03)
            task = self.api("GET", f"/v1/tasks/{task['id']}")
        assert task["state"] == "success", f"task failed: {task}"
        return task

    def vvol(self, name: str) -> JsonDict:
        """A VVol by its full name."""
        found: JsonDict = self.api("GET", f"/v1/vvols/{name}")
        return found

    def create(self, vm: str, name: str, **spec: Any) -> JsonDict:
        """Create a VVol and wait until it is served; return it."""
        self.task(self.api("POST", "/v1/vvols", {"vm": vm, "name": name, **spec}))
        self.wait_bound(f"{vm}/{name}")
        return self.vvol(f"{vm}/{name}")

    def delete(self, name: str) -> None:
        """Delete a VVol and wait until it is gone."""
        self.task(self.api("DELETE", f"/v1/vvols/{name}"))

    def wait_bound(self, name: str, timeout_s: float = 20.0) -> JsonDict:
        """Wait until a VVol's host confirmed its epoch; return the VVol."""
        wait_until(f"{name} is bound", lambda: (self.vvol(name)["binding"] or {}).get("state") == "bound", timeout_s)
        return self.vvol(name)

    def cli(self, *args: str, check: bool = True, timeout_s: float = 60.0) -> Any:
        """Run the nbdvvol command against this farm; see procs.run."""
        return run([sys.executable, "-m", "nbdvvol", *args, "--run", self.run], timeout_s=timeout_s, check=check)


def sanitizer_env(kind: str) -> dict[str, str]:
    """What makes a daemon run on the data plane's asan or tsan build, its reports fatal; "" is the release build."""
    if not kind:
        return {}
    build = Path(__file__).parents[2] / "build" / kind / "_native.abi3.so"
    assert build.exists(), f"{build} is missing: scripts/build-native {kind}"
    library = run(["gcc", f"-print-file-name=lib{kind}.so"]).stdout.strip()
    options = "abort_on_error=1:halt_on_error=1:detect_leaks=0"
    return {
        "NBDVVOL_NATIVE": str(build),
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": options,
        "TSAN_OPTIONS": "halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }


def _module(pid: int, role: str) -> bool:
    return any(word.startswith(f"nbdvvol.{role}") for word in command_line(pid))


def serves(socket_path: Path, name: str) -> bool:
    """Whether an export can be entered now."""
    try:
        with open_export(socket_path, name):
            return True
    except (OSError, Closed, OptionRefused):
        return False


def listed(socket_path: Path) -> dict[str, str]:
    """LIST on a socket."""
    with Haggle(socket_path) as haggle:
        return haggle.begin().list_exports()


def free_port() -> int:
    """A TCP port of the loopback that is free now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def tls_spec(pki: Path, port: int, tls: str = "required") -> JsonDict:
    """Two VMs behind a TCP listener with x509 and PSK."""
    spec = plain_spec("96MiB", {"root": {"size": "48MiB", "profile": "plain"}})
    spec["vms"]["vm2"] = {"vvols": {"root": {"size": "8MiB", "profile": "plain"}}}
    spec["hosts"] = {"local": {"listen": {"address": f"127.0.0.1:{port}", "tls": tls}}}
    spec["tls"] = {"certs": str(pki), "psk": str(pki / "psk.keys")}
    return spec


def plain_spec(size: str = "64MiB", vvols: JsonDict | None = None, **more: Any) -> JsonDict:
    """A small farm: one file datastore, one profile, vm1."""
    return {
        "datastores": {"main": {"kind": "file", "path": "main.img", "size": size}},
        "profiles": {"plain": {"datastore": "main"}},
        "vms": {"vm1": {"vvols": vvols or {"root": {"size": "16MiB", "profile": "plain"}}}},
        **more,
    }
