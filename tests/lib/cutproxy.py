"""A wire that a test can cut: bytes between clients and a server, until it is told to stop, stall or refuse."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
from pathlib import Path

from tests.lib.rawnbd import Address


class CutProxy:
    """Listens on a unix socket of its own and passes bytes on to `server`, one thread for all connections."""

    def __init__(self, path: Path, server: Address) -> None:
        self.path = path
        self.server = server
        self.connections = 0
        """How many came in."""
        self._stalled = False
        self._refusing = False
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._wake, self._woken = socket.socketpair()
        self._ending = False
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cut(self) -> int:
        """End every connection now; bytes under way are lost. How many there were."""
        with self._lock:
            pairs = list(self._pairs)
            for sock in pairs:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        return len(pairs) // 2

    def stall(self, on: bool) -> None:
        """Pass nothing on, and say nothing; connections stay."""
        self._stalled = on
        self._wake.send(b"w")

    def refuse(self, on: bool) -> None:
        """Hang up on whoever connects."""
        self._refusing = on

    def close(self) -> None:
        """End everything."""
        self._ending = True
        self._wake.send(b"w")
        self._thread.join(10)
        for sock in [*self._pairs, self._listener, self._wake, self._woken]:
            sock.close()
        self._selector.close()
        self.path.unlink()

    # ---- the thread ----

    def _run(self) -> None:
        while not self._ending:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._woken:
                    self._woken.recv(100)
                    self._follow_stall()
                elif isinstance(key.fileobj, socket.socket) and key.fileobj in self._pairs:
                    self._pass(key.fileobj)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        self.connections += 1
        if self._refusing:
            client.close()
            return
        try:
            if isinstance(self.server, tuple):
                server = socket.create_connection(self.server, timeout=10)
            else:
                server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                server.connect(os.fspath(self.server))
        except OSError:
            client.close()
            return
        with self._lock:
            self._pairs[client], self._pairs[server] = server, client
        for sock in (client, server):
            sock.settimeout(None)
            if not self._stalled:
                self._selector.register(sock, selectors.EVENT_READ)

    def _follow_stall(self) -> None:
        for sock in self._pairs:
            registered = sock in self._selector.get_map()
            if self._stalled and registered:
                self._selector.unregister(sock)
            elif not self._stalled and not registered:
                self._selector.register(sock, selectors.EVENT_READ)

    def _pass(self, sock: socket.socket) -> None:
        other = self._pairs[sock]
        try:
            data = sock.recv(1 << 16)
            if data:
                other.sendall(data)
                return
        except OSError:
            pass
        with self._lock:
            for one in (sock, other):
                del self._pairs[one]
                with contextlib.suppress(KeyError):
                    self._selector.unregister(one)
                one.close()
