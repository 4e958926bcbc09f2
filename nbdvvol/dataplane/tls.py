"""TLS identities and connections that are still haggling, over the C library (types.TlsContext, TlsConnection)."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import Any

from nbdvvol.dataplane.errors import PlaneError
from nbdvvol.dataplane.ffi import check, ffi, last_error, lib
from nbdvvol.dataplane.types import ConnectionEnd, ConnectionParams, TlsAction, TlsConfig, TlsOption

OPTION_MAX = 64 << 10
"""Longest option payload, bytes (native/include/limits.h)."""


def c_path(path: str | None) -> Any:
    """A path as C takes it; None is NULL."""
    return ffi.NULL if path is None else path.encode()


class LoadedContext:
    """A TLS identity in C, a server's or a client's; counted there, so that connections keep theirs."""

    def __init__(self, pointer: Any, load: Callable[[Any], None]) -> None:
        """`load` fills it in; when that fails, nothing stays."""
        if pointer == ffi.NULL:
            raise PlaneError(errno.ENOMEM, last_error())
        try:
            load(pointer)
        except BaseException:
            lib.nv_tls_context_free(pointer)
            raise
        self._pointer = pointer

    @property
    def pointer(self) -> Any:
        """The C context. Raises PlaneError after close()."""
        if self._pointer is None:
            raise PlaneError(errno.EBADF, "the TLS identity is closed")
        return self._pointer

    def close(self) -> None:
        """Drop this reference; live connections keep theirs."""
        if self._pointer is not None:
            lib.nv_tls_context_free(self._pointer)
            self._pointer = None


class Context(LoadedContext):
    """Who we are as a server."""

    def __init__(self, config: TlsConfig) -> None:
        def load(pointer: Any) -> None:
            if config.cert_file is not None or config.key_file is not None or config.ca_file is not None:
                flags = lib.NV_TLS_VERIFY_CLIENT if config.verify_client else 0
                files = [c_path(path) for path in (config.ca_file, config.cert_file, config.key_file)]
                check(lib.nv_tls_context_x509(pointer, *files, flags))
            if config.psk_file is not None:
                check(lib.nv_tls_context_psk(pointer, c_path(config.psk_file)))

        super().__init__(lib.nv_tls_context_create(), load)


class Connection:
    """A socket that C owns since the STARTTLS acknowledgement, still haggling."""

    def __init__(
        self,
        plane: Any,
        number: int,
        closed: asyncio.Future[ConnectionEnd],
        encode_params: Callable[[ConnectionParams], Any],
    ) -> None:
        self._plane = plane
        self._number = number
        self._encode_params = encode_params
        self._ready = asyncio.Event()
        self._option = asyncio.Event()
        self._gone = False
        self._entered = False
        self.closed = closed

    def on_event(self, *, ready: bool) -> None:
        """An event of this connection: the TLS handshake is done, or an option waits."""
        (self._ready if ready else self._option).set()

    def on_closed(self) -> None:
        """The connection has ended: whoever waits is told."""
        self._gone = True
        self._ready.set()
        self._option.set()

    def _check_alive(self) -> None:
        if self._gone:
            raise ConnectionError("the client is gone, or its TLS handshake failed or timed out")

    async def ready(self) -> str:
        """Wait for the TLS handshake; return the peer's identity."""
        await self._ready.wait()
        self._check_alive()
        out = ffi.new("char[]", 1024)
        check(lib.nv_tls_identity(self._plane, self._number, out, 1024))
        return str(ffi.string(out).decode("utf-8", "replace"))

    async def option(self) -> TlsOption:
        """Wait for the next whole option. Raises ConnectionError when the client is gone."""
        await self._option.wait()
        self._check_alive()
        self._option.clear()
        number = ffi.new("uint32_t *")
        out = ffi.new("uint8_t[]", OPTION_MAX)
        length = check(lib.nv_tls_option(self._plane, self._number, number, out, OPTION_MAX))
        return TlsOption(int(number[0]), bytes(ffi.buffer(out, length)))

    def reply(
        self,
        data: bytes,
        action: TlsAction = TlsAction.CONTINUE,
        *,
        volume: int | None = None,
        params: ConnectionParams | None = None,
    ) -> None:
        """Answer the last option; with ENTER, go on to the transmission phase on `volume`."""
        if self._gone:
            return
        encoded = ffi.NULL if params is None else self._encode_params(params)
        check(lib.nv_tls_reply(self._plane, self._number, data, len(data), action, volume or 0, encoded))

    def hang_up(self) -> None:
        """End the connection whatever it is doing; harmless when it has ended."""
        if not self._gone:
            check(lib.nv_connection_close(self._plane, self._number))
