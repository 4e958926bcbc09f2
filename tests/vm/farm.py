"""The farm that guests attach to: small VVols on a file, on vm1's unix socket and on a TCP port of the loopback."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from tests.lib import relay
from tests.lib.farm import Farm, JsonDict, free_port
from tests.lib.relay import Relay
from tests.vm.guest import HOST, Guest

DISK_BYTES = 96 << 20


class GuestFarm(Farm):
    """vm1 has `disk` (for QEMU) and `net` (for the kernel's own client), `DISK_BYTES` each, unless a test says else."""

    def __init__(self, spec: JsonDict | None = None) -> None:
        self.port = free_port()
        self._relays: list[Relay] = []
        disk = {"size": DISK_BYTES, "profile": "plain"}
        super().__init__(
            spec
            or {
                "hosts": {"local": {"listen": {"address": f"127.0.0.1:{self.port}", "tls": "none"}}},
                "datastores": {"main": {"kind": "file", "path": "main.img", "size": "512MiB"}},
                "profiles": {"plain": {"datastore": "main"}},
                "vms": {"vm1": {"vvols": {"disk": dict(disk), "net": dict(disk)}}},
            }
        )

    def run_dir_in_guest(self, guest: Guest) -> str:
        """Make this farm's run directory a guest's too: control's socket and vm1's, as on a VM host; return its path.

        A guest sees the host's files, but not what listens behind its sockets: those are relayed."""
        script = Path(relay.__file__)
        words = []
        for path in (self.run / "control.sock", self.socket()):
            address = f"127.0.0.1:{free_port()}"
            self._relays.append(Relay(address, str(path)))
            words += [str(path), f"{HOST}:{address.rpartition(':')[2]}"]
        guest.check(f"rm {self.run}/control.sock {self.socket()}")  # in its own copy of the tree
        guest.background(f"exec {sys.executable} -S {script} {shlex.join(words)}", "/run/relay.log")
        guest.wait(f"test -S {self.socket()}")
        return str(self.run)

    def remove(self) -> None:
        """End the relays too."""
        for one in self._relays:
            one.close()
        super().remove()

    def drive(self, name: str = "disk") -> str:
        """QEMU's -drive value for a VVol of vm1; it waits 30 s for a daemon that is away."""
        server = f"server.type=unix,server.path={self.socket()}"
        return f"driver=nbd,{server},export={name},reconnect-delay=30,if=virtio,discard=unmap"

    def grow(self, name: str, size: int) -> None:
        """Resize a VVol of vm1; the farm file goes on naming the old size."""
        self.task(self.api("POST", f"/v1/vvols/vm1/{name}/resize", {"size": size}))
