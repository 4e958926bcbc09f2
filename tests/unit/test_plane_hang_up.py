"""Hanging up on an encrypted client that haggles: the handshake's total limit relies on it."""

from __future__ import annotations

import errno
import time
from pathlib import Path

import pytest

from nbdvvol.dataplane.types import TlsContext, TlsOption
from tests.lib import nbdwords as w
from tests.lib.pki import client_context
from tests.lib.rawnbd import option_bytes
from tests.unit.plane_rig import Rig, rig
from tests.unit.test_plane_tls import Peer, files

__all__ = ["rig"]


@pytest.fixture
def identity(rig: Rig, pki: Path) -> TlsContext:
    return rig.plane.load_tls(files(pki))


@pytest.mark.parametrize(
    "when", ["before the handshake", "before an option", "inside an option", "with an option waiting"]
)
def test_hanging_up_ends_the_haggling_whatever_it_is_doing(
    rig: Rig, identity: TlsContext, pki: Path, when: str
) -> None:
    peer = Peer(rig, identity)
    if when != "before the handshake":
        waiting = rig.start(peer.server.ready())
        peer.handshake(client_context(pki, "vm1"))
        assert waiting.result(10) == "vm1"
    if when == "inside an option":
        peer.sock.sendall(option_bytes(w.OPT_LIST, b"x" * 100)[:50])
        time.sleep(0.05)
    if when == "with an option waiting":
        peer.sock.sendall(option_bytes(w.OPT_LIST, b""))
        assert peer.option() == TlsOption(w.OPT_LIST, b"")
    for _ in range(2):
        rig.call(peer.server.hang_up)
    assert peer.end() in (0, errno.ECONNRESET)
    rig.call(peer.server.hang_up)
    assert (peer.sock or peer.raw).recv(1) == b""
