"""Dialling a server: a peer that vanishes is noticed, also while nothing is asked of it."""

from __future__ import annotations

import socket

from nbdvvol.model.uri import parse_uri
from nbdvvol.nbd.dial import KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES, dial


async def test_tcp_connections_are_kept_alive_and_do_not_wait_to_send() -> None:
    async def look(sock: socket.socket) -> list[int]:
        with sock:
            names = [
                (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
                (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
                (socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
                (socket.IPPROTO_TCP, socket.TCP_NODELAY),
            ]
            return [sock.getsockopt(level, name) for level, name in names]

    with socket.create_server(("127.0.0.1", 0)) as server:
        found = await dial(parse_uri(f"nbd://127.0.0.1:{server.getsockname()[1]}/e"), look)
    assert found == [1, KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES, 1]
    assert KEEPALIVE_IDLE_S + KEEPALIVE_INTERVAL_S * KEEPALIVE_PROBES <= 30
