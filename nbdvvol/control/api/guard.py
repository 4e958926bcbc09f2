"""What no request may do, checked before a route sees it: be too large, be of the wrong type, come from a stranger."""

from __future__ import annotations

import json

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nbdvvol.control.credentials import Peer, bearer, token_name
from nbdvvol.control.service import Control
from nbdvvol.model.errors import Code, NvError

BODY_BYTES_MAX = 8 << 20
LINK_PATH = "/v1/link"


class _TooLargeError(Exception):
    """The body went over the limit while it was read."""


async def send_error(send: Send, status: int, error: NvError) -> None:
    """Answer with an ErrorBody; the connection closes, because the rest of the request is not read."""
    body = json.dumps({"error": error.body().model_dump(mode="json")}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _too_large(size: str) -> NvError:
    return NvError(Code.TOO_LARGE, f"the body has {size} bytes, more than {BODY_BYTES_MAX}", "send less at once")


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, control: Control) -> None:
        self._app = app
        self._control = control

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse early, or pass on with a receive that counts."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {key.lower(): value.decode("latin-1") for key, value in scope["headers"]}
        denied = self._denied(scope, headers)
        if denied is not None:
            await send_error(send, 401 if denied.code is Code.DENIED else 503, denied)
            return
        length = headers.get(b"content-length", "")
        if length.isdigit() and int(length) > BODY_BYTES_MAX:
            await send_error(send, 413, _too_large(length))
            return
        has_body = length not in ("", "0") or b"transfer-encoding" in headers
        kind = headers.get(b"content-type", "").split(";")[0].strip().lower()
        if has_body and kind != "application/json":
            error = NvError(Code.INVALID, f"content type {kind!r} is not application/json", "send JSON")
            await send_error(send, 415, error)
            return
        await self._counted(scope, receive, send)

    async def _counted(self, scope: Scope, receive: Receive, send: Send) -> None:
        seen = 0

        async def counting() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > BODY_BYTES_MAX:
                raise _TooLargeError
            return message

        async def filtering(message: Message) -> None:
            if seen <= BODY_BYTES_MAX:  # else whatever the application makes of the broken-off body is not the answer
                await send(message)

        try:
            await self._app(scope, counting, filtering)
        except _TooLargeError:
            assert seen > BODY_BYTES_MAX, "raised by counting() only"
        if seen > BODY_BYTES_MAX:
            await send_error(send, 413, _too_large(f"at least {seen}"))

    def _denied(self, scope: Scope, headers: dict[bytes, str]) -> NvError | None:
        peer: Peer = scope.get("state", {}).get("peer", Peer(local=False))
        if peer.local:
            return None
        name = token_name(self._control.tokens, bearer(headers.get(b"authorization", "")))
        if name:
            return None
        return NvError(Code.DENIED, "no valid API token", "send `Authorization: Bearer TOKEN`")
