"""`nbdvvol up`: a whole farm on one machine, in the foreground.

Starts control, applies the farm file through its API, starts a filter for every host that is not remote, waits
until every export answers a client (a VVol that could not be created has none: that is told), and keeps all that
running until SIGTERM or SIGINT; then ends the filters first (clients are told, in-flight requests finish), control
last. Moves no data and decides nothing itself.

The first host's filter uses the run directory itself, further ones RUN/hosts/NAME: a host that is appended to
the file moves nobody's sockets.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shlex
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from nbdvvol import farmfile
from nbdvvol.cli.client import Client
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.farm import Farm
from nbdvvol.model.resources import ExportUri, Problem, Status, Task, TaskState, VVol, VVolState
from nbdvvol.model.units import format_size
from nbdvvol.probe import answers
from nbdvvol.supervisor import Child

LOCK_WAIT_S = 15.0
"""How long the processes of an `up` that was killed may take to vanish (one may sit in a slow disk's sync)."""
CONTROL_START_S = 60.0
TELL_FIRST_S = 5.0
TELL_EVERY_S = 60.0
"""What is still missing is told when it changes, and this often."""
POLL_S = 0.1
SOCKET_PATH_MAX = 107

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What `up` was asked for."""

    file: Path
    state: Path
    run: Path


@dataclass(slots=True)
class _Farm:
    """A farm while it runs."""

    farm: Farm
    state: Path
    run: Path
    lock_fd: int
    client: Client
    control: Child
    filters: list[Child] = field(default_factory=list)


def say(text: str) -> None:
    """A line for people, on stderr."""
    print(f"up: {text}", file=sys.stderr, flush=True)


async def run_up(options: UpOptions) -> int:
    """Run the farm until a signal; 0 when everything ended cleanly. Raises NvError when it cannot run."""
    farm = farmfile.load(options.file)
    state, run = options.state.absolute(), options.run.absolute()
    _check_paths(farm, run)
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    run.mkdir(mode=0o755, parents=True, exist_ok=True)
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    lock_fd = await _lock(run / "up.lock", stopped)
    client = Client.unix(run / "control.sock", retry_s=0.0)
    words = ["control", "--state", str(state), "--run", str(run)]
    control = Child("control", words, keep_fd=lock_fd, say=say)
    running = _Farm(farm, state, run, lock_fd, client, control)
    try:
        async with asyncio.TaskGroup() as group:
            children = group.create_task(_serve(running, group))
            await stopped.wait()
            clean = await _stop(running, children)
        return 0 if clean else 1
    except BaseExceptionGroup as failures:
        # Not `except*`: what is raised in there is wrapped in a group again, by Python 3.11.2 of Debian 12 for one.
        known, others = failures.split(NvError)
        if known is not None:
            await _stop(running, None)
        if known is None or others is not None:
            raise
        raise _first(known) from None
    finally:
        os.close(lock_fd)


def _first(failures: BaseExceptionGroup[Any]) -> BaseException:
    first: BaseException = failures
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first


def local_hosts(farm: Farm, run: Path) -> dict[str, Path]:
    """Hosts whose filters run here, each with its run directory."""
    local = [name for name, host in farm.hosts.items() if not host.remote]
    return {name: run if index == 0 else run / "hosts" / name for index, name in enumerate(local)}


def _check_paths(farm: Farm, run: Path) -> None:
    """Unix socket paths have a small limit; better said now than by a failing bind."""
    hosts = local_hosts(farm, run)
    longest = max(((hosts.get(vm.host or next(iter(farm.hosts))) or run, name) for name, vm in farm.vms.items()),
                  key=lambda pair: len(str(pair[0])) + len(pair[1]), default=(run, "control"))  # fmt: skip
    path = str(longest[0] / "vms" / f"{longest[1]}.sock")
    if len(os.fsencode(path)) > SOCKET_PATH_MAX:
        size = len(os.fsencode(path))
        message = f"the socket path {path} has {size} bytes, the limit of unix sockets is {SOCKET_PATH_MAX}"
        raise NvError(Code.TOO_LARGE, message, "choose a shorter directory: --run DIR")


async def _lock(path: Path, stopped: asyncio.Event) -> int:
    """Be the only `up` of a run directory; waits for the processes of one that was killed."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            owner = os.pread(fd, 20, 0).decode(errors="replace").strip()
            alive = owner.isdecimal() and _exists(int(owner))
            if alive or stopped.is_set() or time.monotonic() > deadline:
                os.close(fd)
                who = f"process {owner}" if owner else "another process"
                message = f"{who} runs a farm in {path.parent} already"
                raise NvError(Code.BUSY, message, "stop it, or choose another directory: --run DIR") from None
            await asyncio.sleep(POLL_S)
    os.ftruncate(fd, 0)
    os.pwrite(fd, str(os.getpid()).encode(), 0)
    return fd


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


async def _serve(farm: _Farm, group: asyncio.TaskGroup) -> None:
    """Start everything in order and say `ready`; the children go on in the group."""
    group.create_task(farm.control.run())
    await _until_control_answers(farm.client)
    farm.control.proven = True
    applied = await asyncio.to_thread(farm.client.apply, farm.farm)
    for host, run in local_hosts(farm.farm, farm.run).items():
        child = _filter(farm, host, run)
        farm.filters.append(child)
        group.create_task(child.run())
    await _until_connected(farm)
    await _until_exports_answer(farm, applied.tasks)
    print("ready", flush=True)


def _filter(farm: _Farm, host: str, run: Path) -> Child:
    config = farm.farm.hosts[host]
    token = config.token_file or str(farm.state / "hosts" / f"{host}.token")
    words = ["filter", "--host", host, "--control", f"unix:{farm.run / 'control.sock'}", "--token-file", token]
    words += [
        "--run",
        str(run),
        "--state",
        str(farm.state),
        "--reactors",
        str(config.reactors),
        "--spin-us",
        str(config.spin_us),
    ]
    words += ["--cache", str(config.cache)]
    if config.first_cpu is not None:
        words += ["--first-cpu", str(config.first_cpu)]
    return Child(f"filter {host}", words, keep_fd=farm.lock_fd, say=say)


async def _patiently(call: Callable[[], Awaitable[T]]) -> T:
    """Repeat a call while control is away: its supervisor starts it again, or gives up for all of us."""
    while True:
        try:
            return await call()
        except NvError as error:
            if error.code not in (Code.NOT_RUNNING, Code.TIMEOUT):
                raise
            await asyncio.sleep(POLL_S)


async def _until_control_answers(client: Client) -> None:
    try:
        async with asyncio.timeout(CONTROL_START_S):
            await _patiently(lambda: asyncio.to_thread(client.status))
    except TimeoutError:
        message = f"control did not answer within {CONTROL_START_S:g} s"
        raise NvError(Code.TIMEOUT, message, "its log above says what it waits for") from None


async def _until_connected(farm: _Farm) -> None:
    """Wait until each local filter is at work; from then on its end is survived."""
    waiting = {child.name.removeprefix("filter "): child for child in farm.filters}
    while waiting:
        status = await _patiently(lambda: asyncio.to_thread(farm.client.status))
        for host in status.hosts:
            if host.connected and host.name in waiting:
                waiting.pop(host.name).proven = True
        await asyncio.sleep(POLL_S)


async def _until_exports_answer(farm: _Farm, tasks: list[int]) -> None:
    """Print the exports, in the file's order, once clients can open them; tell what is still missing.

    What answers is held back for a moment, for the order's sake, but not by one that never comes."""
    exports = _Exports(farm)
    quiet_until, before = time.monotonic() + TELL_FIRST_S, ""
    while True:
        # Tasks first: a status taken before the last one ended would not show what it made.
        tasks = await _unfinished(farm, tasks)
        missing = await exports.look()
        now = time.monotonic()
        if not missing and not tasks:
            await exports.show()
            return exports.tell_failed()
        text = "; ".join(missing) or f"tasks {', '.join(map(str, tasks))}"
        if now >= quiet_until:
            await exports.show()
            if text != before or now >= quiet_until + TELL_EVERY_S:
                quiet_until, before = now, text
                say(f"waiting: {text}")
        await asyncio.sleep(POLL_S)


async def _unfinished(farm: _Farm, tasks: list[int]) -> list[int]:
    """Those tasks of the apply that go on; tells the failed ones."""
    left = []
    for number in tasks:
        task: Task = await _patiently(lambda number=number: asyncio.to_thread(farm.client.task, number))  # type: ignore[misc]
        if task.state in (TaskState.QUEUED, TaskState.RUNNING):
            left.append(number)
        elif task.state is not TaskState.SUCCESS:
            say(f"error: {task.kind} {task.subject}: {task.error or task.state}")
    return left


class _Exports:
    """Which exports answer, and which of those were printed."""

    def __init__(self, farm: _Farm) -> None:
        self._farm = farm
        self._hosts = local_hosts(farm.farm, farm.run)
        self._answering: dict[str, VVol] = {}
        self._shown: set[str] = set()
        self._failed: list[Problem] = []

    async def look(self) -> list[str]:
        """Ask everything that did not answer yet; what still does not, with the reason."""
        status = await _patiently(lambda: asyncio.to_thread(self._farm.client.status))
        missing = []
        self._failed = [problem for problem in status.problems if problem.code == "VVOL_FAILED"]
        for vvol in status.vvols:
            why = "" if vvol.full_name in self._answering else await self._why_not(vvol, status)
            if why:
                missing.append(f"{vvol.full_name} {why}")
        return missing

    async def show(self) -> None:
        """Print what answers and was not printed yet."""
        order = [f"{vm}/{name}" for vm, config in self._farm.farm.vms.items() for name in config.vvols]
        fresh = self._answering.keys() - self._shown
        for name in sorted(fresh, key=lambda name: order.index(name) if name in order else len(order)):
            uri = await _patiently(lambda name=name: asyncio.to_thread(self._farm.client.uri, name))  # type: ignore[misc]
            _print_export(self._answering[name], uri, self._farm.run)
            self._shown.add(name)

    def tell_failed(self) -> None:
        """VVols that could not be created have no export to wait for; what to do about each."""
        for problem in self._failed:
            say(f"error: {problem.subject} is not served: {problem.message}; {problem.action}")

    async def _why_not(self, vvol: VVol, status: Status) -> str:
        """Why a VVol does not answer; empty when it does, or when nobody here has to serve it."""
        if vvol.state in (VVolState.DELETING, VVolState.FAILED):
            return ""
        if vvol.binding is None or vvol.binding.host not in self._hosts:
            # Unbound by the operator, or served by another machine: not ours to wait for.
            return "is being created" if vvol.state is VVolState.CREATING else ""
        socket = self._hosts[vvol.binding.host] / "vms" / f"{vvol.vm}.sock"
        if vvol.binding.state == "bound" and await answers(socket, vvol.name):
            self._answering[vvol.full_name] = vvol
            return ""
        reason = next((problem.message for problem in status.problems if problem.subject == vvol.full_name), "")
        return f"is {vvol.binding.state}" + (f": {reason}" if reason else "")


def _print_export(vvol: VVol, uri: ExportUri, run: Path) -> None:
    print(f"{vvol.full_name}  {format_size(vvol.size)}  {uri.uri}")
    if Path("/sys/module/nbd").exists():
        command = Path(sys.executable).with_name("nbdvvol")
        print(f"    {shlex.quote(str(command))} attach {vvol.full_name} --run {shlex.quote(str(run))}", flush=True)
    else:
        print(f"    qemu-system-x86_64 -m 1G {uri.lines['qemu']}", flush=True)


async def _stop(farm: _Farm, serving: asyncio.Task[None] | None) -> bool:
    """End the filters, then control; whether all ended cleanly."""
    if serving is not None:
        serving.cancel()
    clean = await asyncio.gather(*(child.stop() for child in farm.filters))
    return await farm.control.stop() and all(clean)
