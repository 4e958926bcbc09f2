"""Where clients come in: one unix socket a VM (RUN/vms/VM.sock), and the host's TCP listener.

A socket appears under its name only when it has its owner and mode and listens; a stale one of an earlier
process is replaced in the same step. On TCP the client's TLS identity selects the VM; a client without one sees
the whole host, which is allowed from this machine, or from anywhere when the farm says `plaintext`.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import ipaddress
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog

from nbdvvol.dataplane.types import DataPlane, TlsConfig, TlsContext
from nbdvvol.filter.exports import Reporter
from nbdvvol.filter.view import Nothing
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.farm import HostListen, TlsFiles, TlsMode
from nbdvvol.model.link import HostState, VmSpec
from nbdvvol.nbd.haggle import TlsRule
from nbdvvol.nbd.provider import Provider
from nbdvvol.nbd.server import Limits, Server, Visit

_log = structlog.get_logger("listener")
_SUN_PATH_MAX = 107
_BACKLOG = 128
_RETRY_S = 5.0
VM_LIMITS = Limits()
TCP_LIMITS = Limits(haggling_max=256, connections_max=2048)
_RULES = {TlsMode.NONE: TlsRule.OFF, TlsMode.OPTIONAL: TlsRule.OFFERED, TlsMode.REQUIRED: TlsRule.REQUIRED}

ViewOf = Callable[[str | None], Provider]
"""The Provider of a VM's clients; None: of clients that may see the whole host."""


@dataclass(eq=False, slots=True)
class _Door:
    """One listening socket and those who came through it."""

    server: Server
    sock: socket.socket
    task: asyncio.Task[None]
    path: Path | None = None


class Listeners:
    """All listening sockets of this filter, following control's state."""

    def __init__(self, run_dir: Path, plane: DataPlane, view_of: ViewOf, reporter: Reporter) -> None:
        self._folder = run_dir / "vms"
        self._plane = plane
        self._view_of = view_of
        self._reporter = reporter
        self._given: dict[str, socket.socket] = {}
        self._vms: dict[str, tuple[VmSpec, _Door]] = {}
        self._tcp: _Door | None = None
        self._tcp_wanted: tuple[HostListen | None, TlsFiles | None] = (None, None)
        self._context: TlsContext | None = None
        self._parting: set[asyncio.Task[None]] = set()
        self._errors: dict[str, str] = {}
        self._retry: asyncio.TimerHandle | None = None

    def adopt(self, given: Mapping[str, socket.socket]) -> None:
        """Listening sockets from the service manager: by VM name, or `tcp`."""
        self._given.update(given)

    @property
    def address(self) -> str:
        """`ADDRESS:PORT` of the TCP listener, or ""."""
        if self._tcp is None:
            return ""
        host, port = self._tcp.sock.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def follow(self, state: HostState) -> None:
        """Make the sockets be what control wants; a socket that fails is reported, the others are unharmed."""
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        for name in [name for name, (spec, _) in self._vms.items() if state.vms.get(name) != spec]:
            self._part(self._vms.pop(name)[1])
        failed = [spec for name, spec in state.vms.items() if name not in self._vms and not self._try_vm(spec)]
        if (state.listen, state.tls) != self._tcp_wanted:
            self._close_tcp()
            self._tcp_wanted = state.listen, state.tls
        missing = state.listen is not None and self._tcp is None and not self._try_tcp(state.listen, state.tls)
        if failed or missing:
            self._retry = asyncio.get_running_loop().call_later(_RETRY_S, self.follow, state)

    async def stop(self) -> None:
        """Stop accepting, tell clients in haggling, remove the sockets."""
        if self._retry is not None:
            self._retry.cancel()
        doors = [door for _, door in self._vms.values()]
        self._vms.clear()
        if self._tcp is not None:
            doors.append(self._tcp)
            self._tcp = None
        for door in doors:
            self._part(door)
        await asyncio.gather(*self._parting, return_exceptions=True)

    def _try_vm(self, spec: VmSpec) -> bool:
        return self._attempt(f"socket of VM {spec.name}", lambda: self._open_vm(spec))

    def _try_tcp(self, listen: HostListen, files: TlsFiles | None) -> bool:
        return self._attempt(f"listener {listen.address}", lambda: self._open_tcp(listen, files))

    def _attempt(self, what: str, act: Callable[[], None]) -> bool:
        """Run `act`; a new error of it is reported once."""
        try:
            act()
        except (OSError, NvError) as error:
            if self._errors.get(what) != str(error):
                self._errors[what] = str(error)
                _log.error("cannot listen", what=what, error=str(error))
                self._reporter.notice("listen_failed", what, str(error))
            return False
        self._errors.pop(what, None)
        return True

    def _part(self, door: _Door) -> None:
        """Close a listening socket; those in haggling are told, those in transmission are not touched."""
        door.task.cancel()
        if door.path is not None:
            with contextlib.suppress(OSError):
                door.path.unlink()
        task = asyncio.get_running_loop().create_task(self._see_off(door))
        self._parting.add(task)
        task.add_done_callback(self._parting.discard)

    async def _see_off(self, door: _Door) -> None:
        await asyncio.gather(door.task, return_exceptions=True)
        door.sock.close()
        await door.server.stop()

    # ---- unix ----

    def _open_vm(self, spec: VmSpec) -> None:
        given = self._given.get(spec.name)
        path = None if given is not None else self._folder / f"{spec.name}.sock"
        sock = given.dup() if given is not None else _listen_unix(self._folder / f"{spec.name}.sock", spec)
        visit = Visit(self._view_of(spec.name))
        server = Server(lambda _: visit, self._plane, VM_LIMITS)
        task = asyncio.get_running_loop().create_task(server.serve(sock))
        self._vms[spec.name] = spec, _Door(server, sock, task, path)

    # ---- TCP ----

    def _open_tcp(self, listen: HostListen, files: TlsFiles | None) -> None:
        if listen.tls is not TlsMode.NONE:
            self._context = self._plane.load_tls(_tls_config(files))
        sock = self._given["tcp"].dup() if "tcp" in self._given else _listen_tcp(listen.address)
        server = Server(lambda client: self._receive_tcp(client, listen), self._plane, TCP_LIMITS)
        task = asyncio.get_running_loop().create_task(server.serve(sock))
        self._tcp = _Door(server, sock, task)
        _log.info("listening", address=self.address, tls=listen.tls.value)

    def _close_tcp(self) -> None:
        if self._tcp is not None:
            self._part(self._tcp)
            self._tcp = None
        if self._context is not None:
            self._context.close()
            self._context = None

    def _receive_tcp(self, client: socket.socket, listen: HostListen) -> Visit | None:
        trusted = listen.plaintext or _is_local(client)
        rule = _RULES[listen.tls]
        if not trusted:
            if rule is TlsRule.OFF:
                return None
            rule = TlsRule.REQUIRED

        def by_identity(identity: str) -> Provider:
            if identity:
                return self._view_of(identity)
            if trusted:
                return self._view_of(None)
            return Nothing("a client certificate or PSK identity that names your VM is needed here")

        return Visit(self._view_of(None), rule, self._context, by_identity)


def _listen_unix(path: Path, spec: VmSpec) -> socket.socket:
    """A listening unix socket that appears at `path` ready, with its group and mode."""
    size = len(os.fsencode(path))
    if size > _SUN_PATH_MAX:
        raise NvError(
            Code.TOO_LARGE,
            f"the socket path {path} has {size} bytes; the kernel's limit is {_SUN_PATH_MAX}",
            "use a shorter run directory (--run)",
        )
    fresh = path.with_name(".new")
    path.parent.mkdir(mode=0o755, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        fresh.unlink()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        mask = os.umask(0o177)
        try:
            sock.bind(str(fresh))
        finally:
            os.umask(mask)
        if spec.socket.group is not None:
            os.chown(fresh, -1, _group_id(spec.socket.group))
        fresh.chmod(int(spec.socket.mode, 8))
        sock.listen(_BACKLOG)
        fresh.rename(path)
    except BaseException:
        sock.close()
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise
    return sock


def _group_id(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise NvError(Code.NOT_FOUND, f"group {name} does not exist on this host", "create it, or correct it") from None


def _listen_tcp(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not port.isdigit() or int(port) > 65535:
        raise NvError(Code.CONFIG, f"listen address {address!r} is not ADDRESS:PORT", "such as 127.0.0.1:10809")
    found = socket.getaddrinfo(host or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, where = found[0]
    sock = socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _tls_config(files: TlsFiles | None) -> TlsConfig:
    if files is None or (files.certs is None and files.psk is None):
        raise NvError(Code.CONFIG, "the listener wants TLS but the farm names no certs and no psk", "add tls: to it")
    certs = Path(files.certs) if files.certs is not None else None
    return TlsConfig(
        ca_file=str(certs / "ca-cert.pem") if certs else None,
        cert_file=str(certs / "server-cert.pem") if certs else None,
        key_file=str(certs / "server-key.pem") if certs else None,
        verify_client=files.verify_client,
        psk_file=files.psk,
    )


def _is_local(client: socket.socket) -> bool:
    """Whether the peer is on this machine."""
    if client.family == socket.AF_UNIX:
        return True
    try:
        peer = ipaddress.ip_address(client.getpeername()[0].partition("%")[0])
    except (OSError, ValueError):
        return False
    mapped = peer.ipv4_mapped if isinstance(peer, ipaddress.IPv6Address) else None
    return (mapped or peer).is_loopback
