"""fio with verification on an export, all the time, over the export's daemons' deaths.

fio's own NBD engine gives up with its connection. So between it and the export stands qemu-nbd, whose client waits for
a server that is away, connects again, and sends again what was not answered; it waits longer from try to try, so behind
it stands a relay that takes its connection at once and connects it on when the export is there. Any error, and any
block that is not what was written there, ends a run of fio. Each block says its place and which run wrote it: by
checksums alone a block that a lost write has left as the run before made it would pass."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

from tests.lib.farm import serves
from tests.lib.procs import Process, need, run, unix_listens, wait_until
from tests.lib.relay import Relay

BLOCK_BYTES = 4096


class Patient(Relay):
    """Connects a client on only when the export is served: until then it waits for its greeting."""

    def __init__(self, listen: Path, socket: Path, export: str) -> None:
        self._export = export
        super().__init__(str(listen), str(socket))

    def _serve(self, client: socket.socket) -> None:
        wait_until("the export is served", lambda: serves(Path(self.target), self._export), 60, 0.1)
        super()._serve(client)


class FioLoad:
    """Runs of fio, one after the other, until `stop`: each writes its part of the export at random and reads it all."""

    def __init__(self, folder: Path, path: Path, export: str, offset: int, size: int, iops: int = 400) -> None:
        self.runs = 0
        self._failure: BaseException | None = None
        self._folder = folder
        self._where = {"offset": offset, "size": size, "rate_iops": iops}
        self._bridge = folder / "fio.sock"
        self._relay = Patient(folder / "relay.sock", path, export)
        server = f"server.type=unix,server.path={folder / 'relay.sock'}"
        image = f"driver=nbd,{server},export={export},reconnect-delay=60"
        argv = [need("qemu-nbd", "qemu-utils"), "--persistent", "-k", self._bridge, "-x", "e", "--image-opts", image]
        self._process = Process(argv, folder / "qemu-nbd.log")
        wait_until("qemu-nbd listens", lambda: unix_listens(self._bridge) or not self._process.alive())
        assert self._process.alive(), self._process.text()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="fio", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Wait for the run at hand, the last one; raises what went wrong."""
        self._stop.set()
        self._thread.join(180)
        assert not self._thread.is_alive(), "fio hangs"
        if self._failure is not None:
            raise AssertionError("fio found an error") from self._failure

    def stop(self) -> None:
        """The same, and read once more what it wrote."""
        self.end()
        self._fio(self.runs, verify_only=1)
        self.close()

    def close(self) -> None:
        """End the bridge."""
        self._process.kill_group()
        self._relay.close()

    def _loop(self) -> None:
        try:
            while not self._stop.is_set():
                self._fio(self.runs + 1)
                self.runs += 1
        except BaseException as error:
            self._failure = error

    def _fio(self, number: int, **more: int) -> None:
        options: dict[str, str | int] = {
            "ioengine": "nbd", "uri": f"nbd+unix:///e?socket={self._bridge}", "thread": 1, "rw": "randwrite",
            "bs": BLOCK_BYTES, "iodepth": 8, "randseed": number, "fsync": 64, "verify": "pattern", "do_verify": 1,
            "verify_pattern": f"0x{number:08x}%o", "verify_fatal": 1, **self._where, **more,
        }  # fmt: skip
        job = self._folder / "job.fio"
        job.write_text("\n".join(["[job]", *(f"{key}={value}" for key, value in options.items()), ""]))
        argv = [need("fio", "fio"), "--output-format=json", f"--aux-path={self._folder}", job]
        done = run(argv, timeout_s=150)
        found = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        assert found["error"] == 0 and found["read"]["total_ios"] * BLOCK_BYTES == self._where["size"], done.stdout
