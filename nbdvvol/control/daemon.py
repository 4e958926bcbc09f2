"""The control daemon: one a state directory, stopped cleanly by SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog
import uvloop

from nbdvvol.control.api.app import make_app
from nbdvvol.control.api.server import ApiServer, may_connect
from nbdvvol.control.registry import Registry
from nbdvvol.control.registry.store import REGISTRY_NAME
from nbdvvol.control.service import Control
from nbdvvol.control.sockets import bind_tcp, bind_unix
from nbdvvol.control.target import Target
from nbdvvol.logs import log_to_stderr
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.farm import ControlConfig

log = structlog.get_logger()
SOCKET_NAME = "control.sock"
TARGET_NAME = "target.sock"


@dataclass(frozen=True, slots=True)
class ControlOptions:
    """How to run control."""

    state_dir: Path
    run_dir: Path
    listen: str | None = None
    """`https://ADDRESS:PORT`, instead of the farm file's word."""
    on_ready: Callable[[], None] | None = None
    """Called once the API answers."""


@contextlib.contextmanager
def only_one(state_dir: Path) -> Iterator[None]:
    """Hold the state directory's lock. Raises BUSY when another control has it."""
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = state_dir / "control.lock"
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise NvError(
                Code.BUSY,
                f"another control (pid {holder}) runs on state directory {state_dir}",
                "stop it first, or give this one another --state",
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


class Listeners:
    """The unix socket, which is always there, and the https one, where the farm file says so."""

    def __init__(self, control: Control, options: ControlOptions) -> None:
        self._control = control
        self._options = options
        self._app = make_app(control)
        self._allowed = may_connect(lambda: control.config.group)
        self._unix: ApiServer | None = None
        self._target = Target(control.registry)
        self._https: ApiServer | None = None
        self._https_config: tuple[str, object] | None = None

    async def open(self) -> None:
        """Open what is configured."""
        path = self._options.run_dir / SOCKET_NAME
        sock = bind_unix(path, self._control.config.group)
        self._unix = ApiServer(self._app, sock, self._allowed, None)
        await self._unix.start()
        self._target.start(bind_unix(self._options.run_dir / TARGET_NAME, self._control.config.group))
        try:
            await self.configure(self._control.config)
        except NvError as error:
            if self._options.listen is not None:
                raise
            log.error("https is not served; the unix socket is", error=str(error))
        self._control.on_settings = self.configure

    async def configure(self, config: ControlConfig) -> None:
        """Follow the farm file's `control.listen`, live. A bad one is logged and refused, the old one ends."""
        listen = self._options.listen or config.listen
        wanted = (listen, config.tls) if listen.startswith("https://") else None
        if wanted == self._https_config:
            return
        if self._https is not None:
            await self._https.stop()
            self._https, self._https_config = None, None
        if wanted is None:
            return
        if config.tls is None or config.tokens is None:
            raise NvError(
                Code.CONFIG,
                f"control.listen {listen} needs control.tls and control.tokens",
                "add both to the farm file",
            )
        self._https = ApiServer(self._app, bind_tcp(listen.removeprefix("https://")), self._allowed, config.tls)
        await self._https.start()
        self._https_config = wanted
        log.info("control listens", address=listen)

    async def close(self) -> None:
        """Stop answering."""
        await self._target.stop()
        for server in (self._https, self._unix):
            if server is not None:
                await server.stop()
        for name in (SOCKET_NAME, TARGET_NAME):
            (self._options.run_dir / name).unlink(missing_ok=True)


async def run_control(options: ControlOptions) -> None:
    """Run control until SIGTERM or SIGINT. Raises NvError when it cannot start."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    with only_one(options.state_dir):
        options.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        registry = await Registry.open(options.state_dir / REGISTRY_NAME)
        control = Control(registry, options.state_dir)
        listeners = Listeners(control, options)
        try:
            await control.start()
            await listeners.open()
            log.info("control is ready", socket=str(options.run_dir / SOCKET_NAME), instance=registry.identity)
            if options.on_ready is not None:
                options.on_ready()
            await stop.wait()
        finally:
            log.info("control stops")
            await control.links.close()
            await listeners.close()
            await control.stop()


def main(arguments: list[str] | None = None) -> int:
    """`python -m nbdvvol.control --state DIR --run DIR [--listen https://ADDRESS:PORT]`."""
    parser = argparse.ArgumentParser(prog="nbdvvol.control")
    parser.add_argument("--state", type=Path, default=Path("state"))
    parser.add_argument("--run", type=Path, default=Path("run"))
    parser.add_argument("--listen")
    chosen = parser.parse_args(arguments)
    log_to_stderr()
    try:
        uvloop.run(run_control(ControlOptions(chosen.state.absolute(), chosen.run.absolute(), chosen.listen)))
    except NvError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
