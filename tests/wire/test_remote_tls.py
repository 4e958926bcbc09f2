"""Remote datastores through TLS: certificates and keys, on both sides, to nbdkit, qemu-nbd and our own filter."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdvvol.model.errors import Code, NvError
from tests.lib import nbdwords as w
from tests.lib.farm import Farm, free_port, tls_spec
from tests.lib.peers import Peer, closed_peers
from tests.lib.procs import need, short_dir, wait_until
from tests.unit.test_plane_data import Model
from tests.wire.remote import using

__all__ = ["closed_peers"]
pytestmark = pytest.mark.timeout(120)
SIZE = 8 << 20


def tcp_peer(argv: list[str | Path], port: int, folder: Path, name: str = "") -> Peer:
    return Peer(argv, f"nbds://127.0.0.1:{port}/{name}", ("127.0.0.1", port), folder / "export.img", folder)


def image() -> tuple[Path, Path]:
    folder = short_dir()
    with (folder / "export.img").open("wb") as out:
        out.truncate(SIZE)
    return folder, folder / "export.img"


def nbdkit_tls(*options: str | Path) -> Peer:
    folder, file = image()
    port = free_port()
    argv = [need("nbdkit", "nbdkit"), "-f", "-i", "127.0.0.1", "-p", str(port), "--tls=require", *options]
    return tcp_peer([*argv, "file", file], port, folder)


def qemu_tls(credentials: str) -> Peer:
    folder, file = image()
    port = free_port()
    argv = [need("qemu-nbd", "qemu-utils"), "--persistent", "--shared=16", "-f", "raw", "-x", "e"]
    argv += ["-b", "127.0.0.1", "-p", str(port), "--object", f"{credentials},id=t,endpoint=server", "--tls-creds", "t"]
    return tcp_peer([*argv, str(file)], port, folder, "e")


Make = Callable[[Path], tuple[Peer, dict[str, Any]]]


def _psk(pki: Path) -> dict[str, Any]:
    return {"psk": str(pki / "psk.keys"), "identity": "vm1"}


MAKES: dict[str, Make] = {
    "nbdkit-x509": lambda pki: (
        nbdkit_tls(f"--tls-certificates={pki}", "--tls-verify-peer"),
        {"certs": str(pki / "clients" / "vm1")},
    ),
    "nbdkit-x509-anonymous": lambda pki: (nbdkit_tls(f"--tls-certificates={pki}"), {"certs": str(only_ca(pki))}),
    "nbdkit-psk": lambda pki: (nbdkit_tls(f"--tls-psk={pki / 'psk.keys'}"), _psk(pki)),
    "qemu-x509": lambda pki: (
        qemu_tls(f"tls-creds-x509,dir={pki},verify-peer=yes"),
        {"certs": str(pki / "clients" / "vm1"), "hostname": "localhost"},
    ),
    "qemu-psk": lambda pki: (qemu_tls(f"tls-creds-psk,dir={pki / 'psk' / 'vm1'}"), _psk(pki)),
}


def only_ca(pki: Path) -> Path:
    """A client's folder without a certificate of its own."""
    folder = pki / "clients" / "anonymous"
    folder.mkdir(exist_ok=True)
    shutil.copy(pki / "ca-cert.pem", folder)
    return folder


@pytest.mark.parametrize("name", MAKES)
def test_data_through_tls(peers: list[Peer], pki: Path, name: str) -> None:
    peer, tls = MAKES[name](pki)
    peers.append(peer.start())
    with using(peer.uri, tls=tls, connections=3) as far:
        client = far.client()
        model = Model(client, SIZE, 1, seed=8)
        model.run(60)
        client.write(0, bytes(range(256)) * (SIZE // 256))
        client.flush()
        assert client.read(0, SIZE) == bytes(range(256)) * (SIZE // 256) == peer.file.read_bytes()
        assert far.stats.errors == far.stats.lost == 0


def test_many_requests_in_flight(peers: list[Peer], pki: Path) -> None:
    """More than TLS holds at once, both ways."""
    peer, tls = MAKES["qemu-x509"](pki)
    peers.append(peer.start())
    with using(peer.uri, tls=tls) as far:
        client = far.client(timeout_s=60)
        data = [bytes([at]) * 65536 for at in range(100)]
        cookies = [client.send(w.CMD_WRITE, at * 65536, 65536, payload=data[at]) for at in range(100)]
        for cookie in cookies:
            client.wait(cookie).check()
        cookies = [client.send(w.CMD_READ, at * 65536, 65536) for at in range(100)]
        assert [client.wait(cookie).check().data for cookie in cookies] == data


@pytest.fixture(scope="module")
def secure_farm(pki: Path) -> Iterator[tuple[Farm, int]]:
    port = free_port()
    with Farm(tls_spec(pki, port)) as farm:
        yield farm.start(), port


@pytest.mark.parametrize("kind", ["x509", "psk"])
def test_our_own_filter(secure_farm: tuple[Farm, int], pki: Path, kind: str) -> None:
    farm, port = secure_farm
    tls = {"certs": str(pki / "clients" / "vm1")} if kind == "x509" else _psk(pki)
    with using(f"nbds://localhost:{port}/root", tls=tls, connections=2) as far:
        client = far.client(style="extended", size=SIZE)
        Model(client, SIZE, 4096, seed=9).run(40)
        client.write(0, kind.encode() * 1024)
        client.flush()
        assert far.export._info.extended and not far.stats.lost
    with farm.open("root") as near:
        assert near.read(0, len(kind) * 1024) == kind.encode() * 1024


def test_reconnecting_through_tls(peers: list[Peer], pki: Path) -> None:
    peer, tls = MAKES["qemu-psk"](pki)
    peers.append(peer.start())
    with using(peer.uri, tls=tls, write_through=True) as far:
        client = far.client()
        client.write(0, b"x" * 4096)
        peer.kill()
        time.sleep(0.2)
        peer.start()
        assert client.read(0, 4096) == b"x" * 4096
        wait_until("it is told", lambda: [up for up, _ in far.told] == [False, True])


def refused(code: Code, says: str, uri: str, **how: Any) -> None:
    with pytest.raises(NvError) as failed, using(uri, **how):
        pass
    assert failed.value.code is code and says in failed.value.message, failed.value


def test_a_server_that_we_do_not_trust(peers: list[Peer], pki: Path) -> None:
    peer, _ = MAKES["nbdkit-x509-anonymous"](pki)
    peers.append(peer.start())
    mine = str(only_ca(pki))
    stranger = short_dir()
    try:
        shutil.copy(pki / "clients" / "stranger" / "client-cert.pem", stranger / "ca-cert.pem")
        refused(Code.DENIED, "certificate verify failed", peer.uri, tls={"certs": str(stranger)})
        refused(Code.DENIED, "verify failed", peer.uri, tls={"certs": mine, "hostname": "other.example"})
        refused(Code.DENIED, "verify failed", peer.uri, tls=None)  # the system's authorities do not know it
        refused(Code.DENIED, "", peer.uri, tls=_psk(pki))  # a certificate is no key
        with using(peer.uri, tls={"certs": mine, "hostname": "other.example", "verify": False}) as far:
            assert far.client().read(0, 512) == bytes(512)
    finally:
        shutil.rmtree(stranger)


def test_a_server_that_does_not_trust_us(peers: list[Peer], pki: Path) -> None:
    for name in ("nbdkit-x509", "qemu-x509"):
        peer, _ = MAKES[name](pki)
        peers.append(peer.start())
        # In TLS 1.3 a client hears only afterwards that its certificate will not do.
        with pytest.raises(NvError), using(peer.uri, tls={"certs": str(only_ca(pki))}):
            pass
    peer, _ = MAKES["qemu-psk"](pki)
    peers.append(peer.start())
    wrong = {"psk": str(pki / "psk" / "wrong-key" / "keys.psk"), "identity": "vm1"}
    with pytest.raises(NvError), using(peer.uri, tls=wrong):
        pass


def test_files_that_are_wrong_are_named(peers: list[Peer], pki: Path) -> None:
    peer, _ = MAKES["nbdkit-psk"](pki)
    peers.append(peer.start())
    refused(Code.CONFIG, "no key for nobody", peer.uri, tls={"psk": str(pki / "psk.keys"), "identity": "nobody"})
    refused(Code.CONFIG, "/nowhere/ca-cert.pem", peer.uri, tls={"certs": "/nowhere"})


def test_who_wants_tls_gets_it_or_nothing(peers: list[Peer], pki: Path) -> None:
    """nbds to a server without TLS is refused; nbd to one that insists on it too, with words that help."""
    folder, file = image()
    port = free_port()
    argv = [need("nbdkit", "nbdkit"), "-f", "-i", "127.0.0.1", "-p", str(port), "file", file]
    peers.append(tcp_peer(argv, port, folder).start())
    refused(Code.UNSUPPORTED, "does not start TLS", peers[0].uri, tls={"certs": str(only_ca(pki))})
    secure, _ = MAKES["nbdkit-x509"](pki)
    peers.append(secure.start())
    refused(Code.UNSUPPORTED, "wants TLS", secure.uri.replace("nbds", "nbd"))
