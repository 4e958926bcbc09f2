"""Links to remote exports over the C library (types.Link, types.SecureLink)."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

from nbdvvol.dataplane.errors import PlaneError
from nbdvvol.dataplane.ffi import check, ffi, lib
from nbdvvol.dataplane.tls import LoadedContext, c_path
from nbdvvol.dataplane.types import LinkEnd, LinkParams, RemoteConfig, TlsClientConfig

_REASON_BYTES = 256


def encode_config(config: RemoteConfig) -> Any:
    """The C form of a remote export's configuration."""
    out = ffi.new("nv_remote_config *")
    out.size, out.align, out.timeout_ms, out.hold_ms = config.size, config.align, config.timeout_ms, config.hold_ms
    out.flags = lib.NV_REMOTE_READ_ONLY * config.read_only | lib.NV_REMOTE_WRITE_THROUGH * config.write_through
    out.flags |= lib.NV_REMOTE_FLUSH_FIRST * config.flush_first
    return out


def encode_params(params: LinkParams) -> Any:
    """The C form of what the haggling agreed."""
    out = ffi.new("nv_link_params *")
    out.flags = lib.NV_CONN_STRUCTURED * params.structured | lib.NV_CONN_EXTENDED * params.extended
    out.tflags = params.tflags
    out.payload_max = min(params.payload_max, 32 << 20)
    out.has_allocation = params.allocation is not None
    out.allocation_id = params.allocation or 0
    out.size, out.align = params.size, params.align
    return out


class ClientContext(LoadedContext):
    """Whom we trust and who we are, as a client."""

    def __init__(self, config: TlsClientConfig) -> None:
        def load(pointer: Any) -> None:
            if config.psk_file is not None and config.ca_file is None and config.cert_file is not None:
                raise PlaneError(errno.EINVAL, "a certificate beside a pre-shared key needs the CA that servers have")
            if config.psk_file is None or config.ca_file is not None:
                files = [c_path(name) for name in (config.ca_file, config.cert_file, config.key_file)]
                flags = 0 if config.verify else lib.NV_TLS_TRUST_ANYBODY
                check(lib.nv_tls_client_x509(pointer, *files, flags))
            if config.psk_file is not None:
                check(lib.nv_tls_client_psk(pointer, c_path(config.psk_file), (config.psk_identity or "").encode()))

        super().__init__(lib.nv_tls_client_create(), load)


class PlaneLink:
    """One link, from the moment that C owns its socket; it may still be haggled through TLS."""

    def __init__(self, plane: Any, number: int, loop: asyncio.AbstractEventLoop) -> None:
        self._plane = plane
        self._number = number
        self._heard: asyncio.Future[None] | None = None
        self.ended: asyncio.Future[LinkEnd] = loop.create_future()

    def on_heard(self) -> None:
        """What was asked for is there."""
        if self._heard is not None and not self._heard.done():
            self._heard.set_result(None)

    def on_lost(self, error: int) -> None:
        """It has ended; C forgets it."""
        reason = ffi.new("char[]", _REASON_BYTES)
        check(lib.nv_link_forget(self._plane, self._number, reason, _REASON_BYTES))
        self.on_end(LinkEnd(error, ffi.string(reason).decode("utf-8", "replace")))

    def on_end(self, end: LinkEnd) -> None:
        """Whoever waits is told."""
        if not self.ended.done():
            self.ended.set_result(end)
        if self._heard is not None and not self._heard.done():
            self._heard.set_exception(ConnectionError(end.errno, end.reason))

    def leave(self) -> None:
        """Say DISC; harmless when it has ended."""
        if not self.ended.done():
            check(lib.nv_link_close(self._plane, self._number))

    async def say(self, data: bytes, want: int) -> bytes:
        """Send, then wait for exactly so many bytes. Raises ConnectionError when the link has ended."""
        if self.ended.done():
            end = self.ended.result()
            raise ConnectionError(end.errno, end.reason)
        self._heard = asyncio.get_running_loop().create_future()
        check(lib.nv_link_say(self._plane, self._number, data, len(data), want))
        if not want:
            return b""
        await self._heard
        out = ffi.new("uint8_t[]", want)
        length = check(lib.nv_link_heard(self._plane, self._number, out, want))
        return bytes(ffi.buffer(out, length))

    def enter(self, params: LinkParams) -> None:
        """Go on to the transmission phase."""
        check(lib.nv_link_enter(self._plane, self._number, encode_params(params)))
