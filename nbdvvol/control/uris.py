"""Where a VM attaches a VVol, and lines to paste."""

from __future__ import annotations

import shlex
from urllib.parse import quote

from nbdvvol.model.farm import HostListen, TlsMode


def socket_path(run_dir: str, vm: str) -> str:
    """The VM's unix socket under a filter's run directory."""
    return f"{run_dir}/vms/{vm}.sock"


def unix_uri(run_dir: str, vm: str, name: str) -> str:
    """The NBD URI of a VVol on its VM's unix socket; empty while the filter's run directory is unknown."""
    if not run_dir:
        return ""
    return f"nbd+unix:///{quote(name)}?socket={quote(socket_path(run_dir, vm))}"


def tcp_uri(listen: HostListen | None, address: str, vm: str, name: str) -> str:
    """The NBD URI of a VVol on a host's TCP listener; empty when it has none."""
    where = address or (listen.address if listen is not None else "")
    if listen is None or not where:
        return ""
    scheme = "nbd" if listen.tls is TlsMode.NONE else "nbds"
    return f"{scheme}://{where}/{quote(vm)}/{quote(name)}"


def attach_lines(uri: str, tcp: str, full_name: str, run_dir: str, vm: str, name: str) -> dict[str, str]:
    """Tool → a command line that attaches the VVol."""
    quoted = shlex.quote(uri)
    path = shlex.quote(socket_path(run_dir, vm))
    drive = f"driver=nbd,server.type=unix,server.path={socket_path(run_dir, vm)},export={name}"
    lines = {
        "attach": f"nbdvvol attach {full_name}",
        "qemu": f"-drive {shlex.quote(drive + ',reconnect-delay=30,if=virtio,cache=none')}",
        "nbd-client": f"nbd-client -unix {path} -N {shlex.quote(name)} /dev/nbd0",
        "nbdcopy": f"nbdcopy {quoted} backup.img",
        "nbdinfo": f"nbdinfo {quoted}",
        "qemu-img": f"qemu-img info {quoted}",
    }
    if tcp:
        lines["tcp"] = f"nbdinfo {shlex.quote(tcp)}"
    return lines
