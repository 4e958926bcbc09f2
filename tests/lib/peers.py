"""NBD servers of others, and ours, each on a file that the test can look into: started, killed and started again."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.lib.farm import Farm, free_port
from tests.lib.procs import Process, need, run, short_dir, wait_until
from tests.lib.rawnbd import Address
from tests.lib.rawnbd import Stream as RawStream


@dataclass
class Peer:
    """A server of one export over a file. `uri` leads to it whether it runs or not."""

    argv: Sequence[str | Path]
    uri: str
    address: Address
    file: Path
    folder: Path
    process: Process | None = None
    starts: int = field(default=0)

    def start(self) -> Peer:
        """Start it and wait until it listens."""
        if isinstance(self.address, Path):
            self.address.unlink(missing_ok=True)
        self.starts += 1
        self.process = Process(self.argv, self.folder / f"log{self.starts}")
        wait_until(f"{self.argv[0]} listens", lambda: self.listens() or not self._alive())
        assert self._alive(), self.process.text()
        return self

    def kill(self) -> None:
        """SIGKILL: it has no chance to finish anything."""
        assert self.process is not None
        self.process.kill_group()

    def freeze(self, on: bool) -> None:
        """SIGSTOP or SIGCONT: it is there and says nothing."""
        assert self.process is not None
        self.process.signal(signal.SIGSTOP if on else signal.SIGCONT)

    def listens(self) -> bool:
        """Whether a connection is taken."""
        try:
            RawStream.connect(self.address, 5).close()
        except OSError:
            return False
        return True

    def close(self) -> None:
        """End it, and remove its files."""
        if self._alive():
            self.freeze(False)
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _alive(self) -> bool:
        return self.process is not None and self.process.alive()


def _folder(size: int) -> tuple[Path, Path]:
    folder = short_dir()
    file = folder / "export.img"
    with file.open("wb") as out:
        out.truncate(size)
    return folder, file


def nbdkit(size: int, *options: str | Path) -> Peer:
    """nbdkit's file plugin on a unix socket."""
    folder, file = _folder(size)
    flags = [option for option in options if str(option).startswith("-")]
    rest = [option for option in options if option not in flags]
    argv = [need("nbdkit", "nbdkit"), "-f", "-U", folder / "s", *flags, "file", file, *rest]
    return Peer(argv, f"nbd+unix:///?socket={folder / 's'}", folder / "s", file, folder)


def qemu_nbd(size: int, *options: str | Path) -> Peer:
    """qemu-nbd on a unix socket."""
    folder, file = _folder(size)
    argv = [need("qemu-nbd", "qemu-utils"), "--persistent", "--shared=16", "-f", "raw", "-x", "e", "-k", folder / "s"]
    return Peer([*argv, *options, file], f"nbd+unix:///e?socket={folder / 's'}", folder / "s", file, folder)


class NbdServerPeer(Peer):
    """nbd-server: it leaves for the background, in a group of its own, with a child for each client."""

    group = 0

    def start(self) -> Peer:
        pid_file = self.folder / "pid"
        pid_file.unlink(missing_ok=True)
        run(self.argv)
        wait_until("nbd-server listens", lambda: pid_file.exists() and pid_file.read_text().strip() and self.listens())
        self.group = os.getpgid(int(pid_file.read_text()))
        assert self.group != os.getpgid(0)
        return self

    def kill(self) -> None:
        os.killpg(self.group, signal.SIGKILL)
        wait_until("nbd-server is gone", lambda: not self.listens())

    def freeze(self, on: bool) -> None:
        os.killpg(self.group, signal.SIGSTOP if on else signal.SIGCONT)

    def close(self) -> None:
        if self.group:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.group, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)


def nbd_server(size: int, *options: str) -> Peer:
    """nbd-server on a TCP port of this machine, with FLUSH unless `options` say otherwise."""
    folder, file = _folder(size)
    port = free_port()
    lines = ["[generic]", "listenaddr = 127.0.0.1", f"port = {port}", "[e]", f"exportname = {file}"]
    (folder / "conf").write_text("\n".join([*lines, *(options or ("flush = true", "fua = true")), ""]))
    argv = [need("nbd-server", "nbd-server"), "-C", folder / "conf", "-p", folder / "pid"]
    return NbdServerPeer(argv, f"nbd://127.0.0.1:{port}/e", ("127.0.0.1", port), file, folder)


class FarmPeer(Peer):
    """Another farm of ours: one VVol that adopts the file."""

    def __init__(self, size: int) -> None:
        folder, file = _folder(size)
        spec = {
            "datastores": {"local": {"kind": "file", "path": str(file)}},
            "vms": {"far": {"vvols": {"e": {"adopt": {"datastore": "local"}}}}},
        }
        self.farm = Farm(spec, folder)
        socket = self.farm.socket("far")
        super().__init__([], f"nbd+unix:///e?socket={socket}", socket, file, folder)

    def start(self) -> Peer:
        self.farm.start()
        return self

    def kill(self) -> None:
        self.farm.kill_everything()

    def freeze(self, on: bool) -> None:
        os.kill(self.farm.filter_pid(), signal.SIGSTOP if on else signal.SIGCONT)

    def close(self) -> None:
        self.farm.remove()


def our_farm(size: int) -> Peer:
    """Our own filter, behind another farm's control."""
    return FarmPeer(size)


PEERS: dict[str, Callable[[int], Peer]] = {
    "nbdkit": nbdkit,
    "qemu-nbd": qemu_nbd,
    "nbd-server": nbd_server,
    "nbdvvol": our_farm,
}


@pytest.fixture(name="peers")
def closed_peers() -> Iterator[list[Peer]]:
    """What a test puts in here is closed at its end."""
    started: list[Peer] = []
    yield started
    for one in started:
        one.close()
