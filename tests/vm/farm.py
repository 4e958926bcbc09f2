"""The farm that guests attach to: small VVols on a file, on vm1's unix socket and on a TCP port of the loopback."""

from __future__ import annotations

from tests.lib.farm import Farm, free_port

DISK_BYTES = 96 << 20


class GuestFarm(Farm):
    """vm1 has `disk` (for QEMU) and `net` (for the kernel's own client), `DISK_BYTES` each."""

    def __init__(self) -> None:
        self.port = free_port()
        disk = {"size": DISK_BYTES, "profile": "plain"}
        super().__init__(
            {
                "hosts": {"local": {"listen": {"address": f"127.0.0.1:{self.port}", "tls": "none"}}},
                "datastores": {"main": {"kind": "file", "path": "main.img", "size": "512MiB"}},
                "profiles": {"plain": {"datastore": "main"}},
                "vms": {"vm1": {"vvols": {"disk": dict(disk), "net": dict(disk)}}},
            }
        )

    def drive(self, name: str = "disk") -> str:
        """QEMU's -drive value for a VVol of vm1; it waits 30 s for a daemon that is away."""
        server = f"server.type=unix,server.path={self.socket()}"
        return f"driver=nbd,{server},export={name},reconnect-delay=30,if=virtio,discard=unmap"

    def grow(self, name: str, size: int) -> None:
        """Resize a VVol of vm1; the farm file goes on naming the old size."""
        self.task(self.api("POST", f"/v1/vvols/vm1/{name}/resize", {"size": size}))
