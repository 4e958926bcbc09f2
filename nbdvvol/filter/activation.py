"""Listening sockets from a service manager, by sd_listen_fds(3): LISTEN_PID, LISTEN_FDS, LISTEN_FDNAMES, fd 3 on."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping

from nbdvvol.model.errors import Code, NvError

_FIRST_FD = 3
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


def take_sockets(environ: MutableMapping[str, str] = os.environ, pid: int | None = None) -> dict[str, socket.socket]:
    """The given sockets by name (`fd3` and so on when they have none), once: the variables are removed.

    Empty when they are meant for another process. Raises NvError USAGE when they make no sense."""
    count = _count(environ, os.getpid() if pid is None else pid)
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    for variable in _VARIABLES:
        environ.pop(variable, None)
    found: dict[str, socket.socket] = {}
    for index in range(count):
        fd = _FIRST_FD + index
        try:
            os.set_inheritable(fd, False)
            sock = socket.socket(fileno=fd)
            listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise NvError(Code.USAGE, f"LISTEN_FDS={count}: fd {fd} is no socket: {error.strerror}") from error
        if not listening:
            raise NvError(Code.USAGE, f"LISTEN_FDS={count}: fd {fd} is a socket that does not listen")
        name = names[index] if index < len(names) and names[index] not in ("", "unknown") else f"fd{fd}"
        found[_name_of(sock, name)] = sock
    return found


def _count(environ: Mapping[str, str], pid: int) -> int:
    if environ.get("LISTEN_PID", "") != str(pid):
        return 0
    text = environ.get("LISTEN_FDS", "")
    if not text.isdigit() or int(text) > 1024:
        raise NvError(Code.USAGE, f"LISTEN_FDS={text!r} is not a number of sockets")
    return int(text)


def _name_of(sock: socket.socket, name: str) -> str:
    """TCP sockets are `tcp` whatever they were called; unix ones bound to NAME.sock are NAME."""
    if sock.family != socket.AF_UNIX:
        return "tcp"
    path = sock.getsockname()
    if name.startswith("fd") and isinstance(path, str) and path.endswith(".sock"):
        return os.path.basename(path).removesuffix(".sock")  # noqa: PTH119
    return name.removesuffix(".sock")
