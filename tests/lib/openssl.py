"""OpenSSL's own client, `openssl s_client`, as the TLS layer of a raw NBD client: Python's ssl has no PSK.

The haggling up to STARTTLS is ours. From there on s_client speaks TLS on a socket that is relayed to the server's,
and its standard input and output are the decrypted stream."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.lib.nbdwords import OPT_STARTTLS
from tests.lib.procs import need
from tests.lib.rawnbd import TIMEOUT_S, Address, Haggle, Haggled, Stream
from tests.lib.relay import pump


@contextmanager
def openssl_haggle(address: Address, *options: str) -> Iterator[Haggle]:
    """A connection on which s_client, run with these options, has taken over after STARTTLS; its complaints go to
    our standard error."""
    with Haggle(address) as haggle:
        haggle.begin()
        assert haggle.demand(OPT_STARTTLS) == []
        with haggle.stream.sock as server, _s_client(server, options) as plaintext:
            haggle.stream = Stream(plaintext)
            haggle.agreed = Haggled()
            yield haggle


@contextmanager
def _s_client(server: socket.socket, options: tuple[str, ...]) -> Iterator[socket.socket]:
    server.settimeout(None)
    mine, its = socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listener, its:
        listener.settimeout(TIMEOUT_S)
        words = ["-connect", f"127.0.0.1:{listener.getsockname()[1]}", "-quiet", "-no_ign_eof", "-nocommands", *options]
        client = subprocess.Popen([need("openssl", "openssl"), "s_client", *words], stdin=its, stdout=its)
        relayed, _ = listener.accept()
    pumps = [threading.Thread(target=pump, args=ends, daemon=True) for ends in ((relayed, server), (server, relayed))]
    for one in pumps:
        one.start()
    try:
        with mine:
            yield mine
        client.wait(TIMEOUT_S)  # the end of its input ends it
    finally:
        client.kill()
        client.wait()
        for one in pumps:
            one.join()
        relayed.close()
