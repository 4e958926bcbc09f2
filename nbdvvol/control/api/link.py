"""`/v1/link`: the WebSocket of a host's filter, once its credential is right."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from nbdvvol.control.credentials import Peer, bearer
from nbdvvol.control.registry import farm
from nbdvvol.control.service import Control
from nbdvvol.model import link
from nbdvvol.model.errors import NvError


class SocketChannel:
    """A WebSocket as the link wants it."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket

    async def receive(self) -> str:
        """The next text message. Raises ConnectionError when the peer is gone or sends something else."""
        try:
            return await self._socket.receive_text()
        except WebSocketDisconnect as error:
            raise ConnectionError(f"closed with code {error.code}") from None
        except (RuntimeError, KeyError) as error:
            raise ConnectionError(str(error)) from None

    async def send(self, text: str) -> None:
        """Send a text message. Raises ConnectionError when the peer is gone."""
        try:
            await self._socket.send_text(text)
        except (WebSocketDisconnect, RuntimeError) as error:
            raise ConnectionError(str(error)) from None

    async def close(self) -> None:
        """Close it; harmless when it is closed."""
        try:
            if self._socket.application_state is not WebSocketState.DISCONNECTED:
                await self._socket.close()
        except (WebSocketDisconnect, RuntimeError):
            return


def add_link(app: FastAPI, control: Control) -> None:
    """Add the route."""

    @app.websocket("/v1/link")
    async def serve(socket: WebSocket) -> None:
        host = socket.headers.get("x-nbdvvol-host", "")
        peer: Peer = socket.scope.get("state", {}).get("peer", Peer(local=False))
        channel = SocketChannel(socket)
        try:
            hosts = await control.registry.run(farm.host_names)
            token = bearer(socket.headers.get("authorization", ""))
            control.host_tokens.check(host, hosts.get(host), token, peer)
        except NvError as error:
            await socket.accept()
            await channel.send(link.Refused(reason=error.message).model_dump_json())
            await channel.close()
            return
        await socket.accept()
        await control.links.serve(host, channel)
