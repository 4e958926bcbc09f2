"""Listening sockets: made beside their place and moved there, so that they are never half open to others."""

from __future__ import annotations

import grp
import os
import socket
from pathlib import Path

from nbdvvol.model.errors import Code, NvError

PATH_BYTES_MAX = 100


def bind_unix(path: Path, group: str | None) -> socket.socket:
    """A listening unix socket for root, this user and `group`; it replaces one that a killed control left.

    Raises CONFIG for a path that is too long or a group that is not there."""
    if len(os.fsencode(path)) > PATH_BYTES_MAX:
        raise NvError(
            Code.CONFIG,
            f"socket path {path} is longer than the {PATH_BYTES_MAX} bytes that are safe for a unix socket",
            "use a shorter --run",
        )
    fresh = path.with_name(f".{path.name[:4]}{os.getpid()}")
    fresh.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        sock.bind(str(fresh))
    finally:
        os.umask(before)
    if group is not None:
        try:
            os.chown(fresh, -1, grp.getgrnam(group).gr_gid)
        except KeyError:
            raise NvError(
                Code.CONFIG, f"control.group: no group {group} on this machine", "make it, or correct it"
            ) from None
        fresh.chmod(0o660)
    sock.listen(128)
    fresh.rename(path)
    return sock


def bind_tcp(address: str) -> socket.socket:
    """A listening TCP socket at `ADDRESS:PORT`. Raises CONFIG."""
    host, _, port = address.rpartition(":")
    try:
        family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
        return socket.create_server((host.strip("[]"), int(port)), family=family, reuse_port=False)
    except (OSError, ValueError, OverflowError) as error:
        raise NvError(Code.CONFIG, f"control cannot listen at {address}: {error}", "correct control.listen") from None
