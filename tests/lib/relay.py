"""Connects sockets to sockets, byte for byte: unix paths and TCP addresses, here or, as a script, inside a guest.

As a script (`python relay.py LISTEN TARGET [LISTEN TARGET ...]`) it needs nothing but Python's own library; an address
is a path, or HOST:PORT."""

from __future__ import annotations

import socket
import sys
import threading
from contextlib import suppress


def _socket(address: str) -> tuple[socket.socket, object]:
    if "/" in address:
        return socket.socket(socket.AF_UNIX), address
    host, _, port = address.rpartition(":")
    return socket.socket(socket.AF_INET), (host, int(port))


def pump(source: socket.socket, sink: socket.socket) -> None:
    """Carry bytes one way until either end is gone; then both are."""
    with suppress(OSError):
        while data := source.recv(1 << 18):
            sink.sendall(data)
    for end in (source, sink):  # an end of one direction is the end of both: no client of ours half-closes
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


class Relay:
    """Listens on one address and connects every client to another one, until it is closed."""

    def __init__(self, listen: str, target: str) -> None:
        self.target = target
        self._listener, address = _socket(listen)
        if "/" not in listen:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(address)  # type: ignore[arg-type]  # of its family
        self._listener.listen(16)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server, address = _socket(self.target)
        with client, server:
            try:
                server.connect(address)
            except OSError:
                return  # nobody is there: the client sees its connection end
            there = threading.Thread(target=pump, args=(client, server), daemon=True)
            there.start()
            pump(server, client)
            there.join()

    def close(self) -> None:
        """Take no more clients; those that are there go on to their end."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


if __name__ == "__main__":
    for listen, target in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        Relay(listen, target)
    threading.Event().wait()
