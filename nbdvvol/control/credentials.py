"""Who may talk to control: peers of the unix socket, API tokens, and one credential for each host."""

from __future__ import annotations

import grp
import hmac
import os
import pwd
import secrets
from dataclasses import dataclass
from pathlib import Path

from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.farm import HostConfig


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of a connection: a local user, or a TLS client with the name of its certificate, if any."""

    local: bool
    uid: int = -1
    gid: int = -1
    certificate: str = ""


def groups_of(uid: int, gid: int) -> set[int]:
    """Every group of a user."""
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        return {gid}
    return {gid, *os.getgrouplist(name, gid)}


def may_use_socket(peer: Peer, own_uid: int, group: str | None) -> bool:
    """Whether a local user may use the control socket: root, control's own user, members of the group."""
    if peer.uid in (0, own_uid):
        return True
    if group is None:
        return False
    try:
        return grp.getgrnam(group).gr_gid in groups_of(peer.uid, peer.gid)
    except KeyError:
        return False


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())


def read_tokens(path: str) -> dict[str, str]:
    """API tokens by name from a file of `NAME TOKEN` lines; `#` starts a comment. Raises CONFIG."""
    tokens: dict[str, str] = {}
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise NvError(
            Code.CONFIG, f"tokens {path}: {error.strerror}", "make the file, one `NAME TOKEN` a line"
        ) from None
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        if len(words) != 2 or len(words[1]) < 16:
            raise NvError(
                Code.CONFIG,
                f"tokens {path}:{number}: not a name and a token of at least 16 characters",
                "write one `NAME TOKEN` a line",
            )
        tokens[words[0]] = words[1]
    return tokens


def bearer(header: str) -> str:
    """The token of an `Authorization: Bearer TOKEN` header, or ""."""
    scheme, _, token = header.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def token_name(tokens: dict[str, str], token: str) -> str:
    """Whose token this is, or "". Looks at every one, in constant time each."""
    found = ""
    for name, known in tokens.items():
        if token and _same(known, token):
            found = name
    return found


class HostTokens:
    """The hosts' own tokens: the file the farm names, else STATE/hosts/NAME.token, made when missing."""

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / "hosts"

    def ensure(self, host: str, config: HostConfig) -> Path:
        """The path of a host's token; makes one unless the farm names a file."""
        if config.token_file is not None:
            return Path(config.token_file)
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._folder / f"{host}.token"
        if not path.exists():
            fresh = self._folder / f".{host}.{secrets.token_hex(4)}"
            descriptor = os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_urlsafe(32) + "\n")
                file.flush()
                os.fsync(file.fileno())
            fresh.rename(path)
        return path

    def check(self, host: str, config: HostConfig | None, token: str, peer: Peer) -> None:
        """Raise DENIED unless the credential is this host's own."""
        if config is not None and config.certificate and peer.certificate:
            if _same(config.certificate, peer.certificate):
                return
        elif config is not None and token:
            path = self.ensure(host, config)
            try:
                known = path.read_text(encoding="utf-8").strip()
            except OSError as error:
                raise NvError(
                    Code.DENIED, f"host {host}: its token {path} cannot be read: {error.strerror}", "make it readable"
                ) from None
            if known and _same(known, token):
                return
        raise NvError(
            Code.DENIED,
            f"no credential of host {host}",
            "give the filter the host's token (--token-file) or its certificate; apply a farm file that names the host",
        )
