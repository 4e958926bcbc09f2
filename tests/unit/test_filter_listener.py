"""The TCP listener's rules: who must use TLS, and what an identity sees; unix socket paths; retries."""

from __future__ import annotations

import asyncio
import shutil
import socket
import struct
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

import nbdvvol.filter.listener as listener_module
from nbdvvol.dataplane.types import TlsAction, TlsConfig, TlsOption
from nbdvvol.filter.listener import Listeners
from nbdvvol.model.farm import HostListen, SocketConfig, TlsFiles, TlsMode
from nbdvvol.model.link import HostState, VmSpec
from nbdvvol.nbd.provider import Facts, Listing, Opened
from tests.unit.fake_plane import FakePlane
from tests.unit.filter_words import Reports, until

E = 1 << 31
POLICY, TLS_REQD = E + 2, E + 5
FILES = TlsFiles(certs="/pki", psk="/psk.keys")


class Who:
    """A provider whose list says whose it is."""

    def __init__(self, vm: str | None) -> None:
        self.vm = vm

    async def list(self) -> Sequence[Listing]:
        return [Listing(str(self.vm))]

    async def info(self, name: str) -> Facts:
        raise NotImplementedError

    async def list_meta(self, name: str, queries: Sequence[str]) -> Sequence[str]:
        raise NotImplementedError

    async def open(self, name: str) -> Opened:
        raise NotImplementedError


class Bench:
    def __init__(self, folder: Path) -> None:
        self.plane = FakePlane()
        self.reports = Reports()
        self.folder = folder
        self.listeners = Listeners(folder, self.plane, Who, self.reports)

    def listen(self, mode: TlsMode, *, plaintext: bool = False, tls: TlsFiles | None = FILES) -> None:
        listen = HostListen(address="127.0.0.1:0", tls=mode, plaintext=plaintext)
        self.listeners.follow(HostState(host="h", listen=listen, tls=tls))

    async def ask(self, option: int) -> tuple[int, bytes]:
        """Connect, send one option without data; the first reply. (0, b"") when the server closes."""
        host, port = self.listeners.address.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            hello = await asyncio.wait_for(reader.read(18), 5)
            if not hello:
                return 0, b""
            writer.write(b"\0\0\0\1IHAVEOPT" + struct.pack(">II", option, 0))
            _, _, kind, length = struct.unpack(">QIII", await asyncio.wait_for(reader.readexactly(20), 5))
            return kind, await reader.readexactly(length)
        finally:
            writer.close()

    async def encrypted_list(self, identity: str) -> bytes:
        """STARTTLS with this identity, LIST; the bytes of the answer."""
        self.plane.tls_identity = identity
        assert (await self.ask(5))[0] == 1
        _, tls = self.plane.tls[-1]
        tls.options.put_nowait(TlsOption(3, b""))
        await until(lambda: tls.replies)
        data, action, _, _ = tls.replies[0]
        assert action is TlsAction.CONTINUE
        return data


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="nv"))
    bench = Bench(folder)
    yield bench
    await bench.listeners.stop()
    for sock, _ in bench.plane.tls:
        sock.close()
    shutil.rmtree(folder)


def from_afar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "_is_local", lambda client: False)


async def test_no_tls_on_this_machine_sees_the_host(bench: Bench) -> None:
    bench.listen(TlsMode.NONE, tls=None)
    kind, data = await bench.ask(3)
    assert kind == 2 and data == struct.pack(">I", 4) + b"None"
    assert (await bench.ask(5))[0] == POLICY
    assert bench.plane.configs == []


async def test_no_tls_from_afar_is_closed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from_afar(monkeypatch)
    bench.listen(TlsMode.NONE)
    assert await bench.ask(3) == (0, b"")


async def test_no_tls_from_afar_with_plaintext_allowed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from_afar(monkeypatch)
    bench.listen(TlsMode.NONE, plaintext=True)
    assert (await bench.ask(3))[0] == 2


async def test_optional_tls(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.listen(TlsMode.OPTIONAL)
    assert bench.plane.configs == [
        TlsConfig("/pki/ca-cert.pem", "/pki/server-cert.pem", "/pki/server-key.pem", True, "/psk.keys")
    ]
    assert (await bench.ask(3))[0] == 2
    assert b"vm7" in await bench.encrypted_list("vm7")
    assert b"None" in await bench.encrypted_list("")
    from_afar(monkeypatch)
    assert (await bench.ask(3))[0] == TLS_REQD
    assert b"vm7" in await bench.encrypted_list("vm7")
    answer = await bench.encrypted_list("")
    assert struct.unpack_from(">QII", answer)[2] == POLICY and b"names your VM" in answer


async def test_required_tls(bench: Bench) -> None:
    bench.listen(TlsMode.REQUIRED)
    assert (await bench.ask(3))[0] == TLS_REQD
    assert b"vm7" in await bench.encrypted_list("vm7")


async def test_tls_without_files_is_reported(bench: Bench) -> None:
    bench.listen(TlsMode.REQUIRED, tls=None)
    assert bench.listeners.address == "" and bench.reports.lines == ["notice listen_failed listener 127.0.0.1:0"]


async def test_a_busy_port_is_tried_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "_RETRY_S", 0.05)
    holder = socket.create_server(("127.0.0.1", 0))
    listen = HostListen(address=f"127.0.0.1:{holder.getsockname()[1]}", tls=TlsMode.NONE)
    bench.listeners.follow(HostState(host="h", listen=listen))
    await asyncio.sleep(0.2)
    assert len(bench.reports.lines) == 1
    holder.close()
    await until(lambda: bench.listeners.address)
    bench.listeners.follow(HostState(host="h"))
    assert bench.listeners.address == ""


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1:x", "127.0.0.1:70000"])
async def test_a_bad_address_is_reported(bench: Bench, address: str) -> None:
    listen = HostListen.model_construct(address=address, tls=TlsMode.NONE, plaintext=False)
    bench.listeners.follow(HostState.model_construct(host="h", listen=listen, tls=None, vms={}))
    assert bench.reports.lines == [f"notice listen_failed listener {address}"]


async def test_ipv6(bench: Bench) -> None:
    listen = HostListen(address="[::1]:0", tls=TlsMode.NONE)
    bench.listeners.follow(HostState(host="h", listen=listen))
    assert bench.listeners.address.startswith("[::1]:")


async def test_a_socket_path_that_is_too_long_is_named(bench: Bench) -> None:
    deep = bench.folder / ("d" * 100)
    deep.mkdir()
    listeners = Listeners(deep, bench.plane, Who, bench.reports)
    listeners.follow(HostState(host="h", vms={"vm1": VmSpec(name="vm1", socket=SocketConfig())}))
    await listeners.stop()
    assert bench.reports.lines == ["notice listen_failed socket of VM vm1"]


async def test_a_given_socket_is_used(bench: Bench) -> None:
    given = socket.create_server(("127.0.0.1", 0))
    bench.listeners.adopt({"tcp": given})
    bench.listen(TlsMode.NONE)
    assert bench.listeners.address == f"127.0.0.1:{given.getsockname()[1]}"
    given.close()
    assert (await bench.ask(3))[0] == 2
