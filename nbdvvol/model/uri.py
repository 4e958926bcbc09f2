"""NBD URIs: where an export is and what it is called. Source: NetworkBlockDevice/nbd, doc/uri.md."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from nbdvvol.model.errors import Code, NvError

NBD_PORT = 10809
"""IANA's TCP port."""
NAME_BYTES_MAX = 4096
"""Longest export name."""
SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix")
TLS_PARAMETERS = ("tls-type", "tls-hostname", "tls-verify-peer", "tls-certificates", "tls-psk-file", "tls-username")


@dataclass(frozen=True, slots=True)
class NbdUri:
    """An export's address: either `socket` (a path) or `host` and `port`."""

    name: str
    socket: str | None = None
    host: str = ""
    port: int = NBD_PORT
    tls: bool = False
    has_tls_parameters: bool = field(default=False, compare=False)
    """The text had some; they are not kept."""

    def __str__(self) -> str:
        scheme = self.scheme
        name = quote(self.name)
        if self.socket is not None:
            return f"{scheme}:///{name}?{urlencode({'socket': self.socket}, safe='/')}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}" + (f":{self.port}" if self.port != NBD_PORT else "") + f"/{name}"

    @property
    def scheme(self) -> str:
        """One of SCHEMES."""
        return ("nbds" if self.tls else "nbd") + ("+unix" if self.socket is not None else "")

    @property
    def where(self) -> str:
        """The server's address, for messages."""
        return self.socket if self.socket is not None else f"{self.host}:{self.port}"


def parse_uri(text: str) -> NbdUri:
    """Parse an NBD URI. Raises NvError(INVALID) that says which part is wrong; TLS parameters are passed over."""
    try:
        parts = urlsplit(text)
        port = parts.port or NBD_PORT
        name = unquote(parts.path.removeprefix("/"), errors="strict")
        length = len(name.encode())
    except ValueError as error:
        raise _invalid(text, str(error)) from error
    if parts.scheme not in SCHEMES:
        raise _invalid(text, f"scheme {parts.scheme!r} is not one of {', '.join(SCHEMES)}")
    if length > NAME_BYTES_MAX:
        raise _invalid(text[:80] + "…", f"its name has {length} bytes, the limit is {NAME_BYTES_MAX}")
    parameters = dict(parse_qsl(parts.query, keep_blank_values=True))
    socket = parameters.pop("socket", None)
    unknown = [key for key in parameters if key not in TLS_PARAMETERS]
    if unknown:
        raise _invalid(text, f"parameter {unknown[0]!r} is unknown")
    tls = parts.scheme.startswith("nbds")
    if parts.scheme.endswith("+unix"):
        if not socket:
            raise _invalid(text, "a unix URI needs ?socket=PATH")
        return NbdUri(name, socket=socket, tls=tls, has_tls_parameters=bool(parameters))
    if socket is not None or not parts.hostname:
        raise _invalid(text, "a TCP URI needs a host and takes no socket=")
    return NbdUri(name, host=parts.hostname, port=port, tls=tls, has_tls_parameters=bool(parameters))


def _invalid(text: str, why: str) -> NvError:
    return NvError(Code.INVALID, f"NBD URI {text!r}: {why}", "nbdvvol uri NAME prints the right one")
