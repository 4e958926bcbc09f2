"""The HTTP API on real sockets: routes, errors, and every bad input of the catalogue's rows A1 to A7."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import warnings
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from nbdvvol.control.api import server
from nbdvvol.control.api.app import make_app
from nbdvvol.control.api.server import ApiServer, may_connect
from nbdvvol.control.credentials import HostTokens, Peer, bearer, may_use_socket, read_tokens, token_name
from nbdvvol.control.daemon import ControlOptions, Listeners, only_one
from nbdvvol.control.sockets import bind_unix
from nbdvvol.model import link
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.farm import ControlConfig, ControlTls, HostConfig
from tests.unit.control_farm import PLAIN, TestFarm

pytestmark = pytest.mark.timeout(60)
BODY_MAX = 8 << 20


class Api:
    """A control with its API on a unix socket."""

    def __init__(self, folder: Path, farm: TestFarm) -> None:
        self.folder = folder
        self.farm = farm
        self.path = folder / "c.sock"

    async def __aenter__(self) -> Api:
        control = await self.farm.start()
        self.server = ApiServer(make_app(control), bind_unix(self.path, None), may_connect(lambda: None), None)
        await self.server.start()
        self.client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(self.path)), base_url="http://control", timeout=20
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.aclose()
        await self.server.stop()
        await self.farm.end()

    async def raw(self, data: bytes) -> bytes:
        """Send bytes, return everything until the server closes."""
        reader, writer = await asyncio.open_unix_connection(str(self.path))
        writer.write(data)
        try:
            await writer.drain()
            return await asyncio.wait_for(reader.read(), 10)
        finally:
            writer.close()


@pytest.fixture
async def api(memory: Path) -> AsyncIterator[Api]:
    async with Api(memory, TestFarm(memory / "state")) as it:
        yield it


def _error(answer: httpx.Response) -> dict[str, Any]:
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"code", "message", "hint"}, body
    error: dict[str, Any] = body["error"]
    return error


async def _served(api: Api) -> None:
    answer = await api.client.post("/v1/apply", json={"farm": PLAIN})
    assert answer.status_code == 200, answer.text
    await api.farm.filter()
    for task in answer.json()["tasks"]:
        assert (await api.farm.over(task)).state == "success"


async def test_every_reading_route_answers(api: Api) -> None:
    await _served(api)
    for route in ("status", "vvols", "datastores", "hosts", "profiles", "vms", "tasks", "events"):
        assert (await api.client.get(f"/v1/{route}")).status_code == 200
    uri = (await api.client.get("/v1/vvols/vm1/root/uri")).json()
    assert uri["uri"] == "nbd+unix:///root?socket=/run/fake/vms/vm1.sock"
    assert {"qemu", "nbd-client", "nbdcopy", "attach"} <= set(uri["lines"])
    assert (await api.client.get("/v1/resolve", params={"name": "root"})).json()["vm"] == "vm1"
    assert (await api.client.get("/v1/status")).json()["problems"] == []
    routes = (await api.client.get("/openapi.json")).json()["paths"]
    assert "/v1/vvols/{vm}/{name}/resize" in routes


async def test_a_short_name_that_two_have_lists_both(api: Api) -> None:
    spec = PLAIN | {"vms": {vm: {"vvols": {"root": {"size": "1MiB"}}} for vm in ("vm1", "vm2")}}
    await api.client.post("/v1/apply", json={"farm": spec})
    answer = await api.client.get("/v1/resolve", params={"name": "root"})
    assert answer.status_code == 409 and "vm1/root, vm2/root" in _error(answer)["message"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/v1/nothing", None, 404, "NOT_FOUND"),
        ("GET", "/v1/vvols/vm9/x", None, 404, "NOT_FOUND"),
        ("GET", "/v1/tasks/99", None, 404, "NOT_FOUND"),
        ("GET", "/v1/tasks/abc", None, 400, "INVALID"),
        ("GET", "/v1/events?limit=0", None, 400, "INVALID"),
        ("PUT", "/v1/vvols", {}, 405, "INVALID"),
        ("POST", "/v1/vvols", {"vm": "vm1"}, 400, "INVALID"),
        ("POST", "/v1/vvols", {"vm": "vm1", "name": "../x", "size": 512}, 400, "INVALID"),
        ("POST", "/v1/vvols", {"vm": "vm1", "name": "x", "size": -5}, 400, "INVALID"),
        ("POST", "/v1/vvols", {"vm": "vm1", "name": "x", "size": "12 parsecs"}, 400, "INVALID"),
        ("POST", "/v1/vvols", {"vm": "vm1", "name": "x", "size": 512, "colour": "red"}, 400, "INVALID"),
        ("POST", "/v1/vvols", {"vm": "vm1", "name": "x", "size": "1EiB"}, 202, ""),
        ("POST", "/v1/vvols", {"vm": "vm9", "name": "x", "size": 512}, 404, "NOT_FOUND"),
        ("POST", "/v1/vvols", {"vm": "vm1", "name": "root", "size": 512}, 409, "EXISTS"),
        ("POST", "/v1/vvols/vm1/root/resize", {"size": 512}, 400, "INVALID"),
        ("POST", "/v1/vvols/vm1/root/bind", {"host": "nowhere"}, 404, "NOT_FOUND"),
        ("POST", "/v1/datastores/nowhere/clear-fault", None, 404, "NOT_FOUND"),
    ],
)
async def test_errors_have_one_form(api: Api, method: str, path: str, body: object, status: int, code: str) -> None:
    await _served(api)
    answer = await api.client.request(method, path, json=body)
    assert answer.status_code == status, answer.text
    if code:
        assert _error(answer)["code"] == code


async def test_all_validation_errors_are_listed(api: Api) -> None:
    answer = await api.client.post("/v1/vvols", json={"vm": "-", "size": "x", "extra": 1})
    assert answer.status_code == 400
    message = _error(answer)["message"]
    assert all(word in message for word in ("vm:", "name:", "size:", "extra:")), message


async def test_a1_an_oversize_body_is_refused_before_it_is_read(api: Api) -> None:
    head = f"POST /v1/apply HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {BODY_MAX + 1}"
    answer = await api.raw(head.encode() + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ") and b'"TOO_LARGE"' in answer


async def test_a1_an_endless_body_is_cut_off(api: Api) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(200):
            yield b" " * (1 << 16)

    answer = await api.client.post("/v1/apply", content=endless(), headers={"content-type": "application/json"})
    assert answer.status_code == 413 and _error(answer)["code"] == "TOO_LARGE"
    assert (await api.client.get("/v1/status")).status_code == 200


@pytest.mark.parametrize("deep", ["[" * 200_000, '{"farm":' * 100_000, "[" * 500 + "]" * 500])
async def test_a2_deep_json_is_refused(api: Api, deep: str) -> None:
    answer = await api.client.post("/v1/apply", content=deep, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and _error(answer)["code"] == "INVALID"
    assert (await api.client.get("/v1/status")).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/json5"])
async def test_a3_a_wrong_content_type_is_refused(api: Api, kind: str) -> None:
    answer = await api.client.post("/v1/apply", content=b'{"farm":{}}', headers={"content-type": kind})
    assert answer.status_code == 415 and "application/json" in _error(answer)["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"null", b"[]", b'{"farm": 3}', b'{"farm": {"vms": NaN}}'])
async def test_broken_json_is_refused(api: Api, body: bytes) -> None:
    answer = await api.client.post("/v1/apply", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and _error(answer)["code"] == "INVALID"


async def test_who_sends_no_request_is_not_waited_for(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "REQUEST_TIMEOUT_S", 0.3)
    assert await api.raw(b"GET /v1/status HTTP/1.1\r\nhost:") == b""
    assert (await api.client.get("/v1/status")).status_code == 200
    reader, writer = await asyncio.open_unix_connection(str(api.path))
    writer.write(b"GET /v1/events?after=999999&wait=1 HTTP/1.1\r\nhost: x\r\n\r\n")
    assert (await asyncio.wait_for(reader.readline(), 10)).startswith(b"HTTP/1.1 200 "), "waiting is the server's"
    writer.close()


async def test_a4_of_delete_and_resize_at_once_one_wins(api: Api) -> None:
    await _served(api)
    for fake in api.farm.filters:
        fake.hold_work.add("scrub")
    answers = await asyncio.gather(
        api.client.delete("/v1/vvols/vm1/root"),
        api.client.post("/v1/vvols/vm1/root/resize", json={"size": "6MiB"}),
    )
    assert sorted(answer.status_code for answer in answers) == [202, 409]
    loser = next(answer for answer in answers if answer.status_code == 409)
    assert _error(loser)["code"] == "CONFLICT"
    for fake in api.farm.filters:
        fake.hold_work.clear()


async def test_a5_a_repeated_key_has_the_same_answer_and_no_second_effect(api: Api) -> None:
    await _served(api)
    body = {"vm": "vm1", "name": "more", "size": "1MiB"}
    answers = [await api.client.post("/v1/vvols", json=body, headers={"idempotency-key": "k1"}) for _ in range(3)]
    assert {answer.status_code for answer in answers} == {202} and len({answer.text for answer in answers}) == 1
    other = await api.client.post("/v1/vvols", json=body | {"name": "x"}, headers={"idempotency-key": "k1"})
    assert other.status_code == 409 and _error(other)["code"] == "CONFLICT"
    assert len((await api.client.get("/v1/vvols")).json()) == 2
    applied = [
        await api.client.post("/v1/apply", json={"farm": PLAIN}, headers={"idempotency-key": "k2"}) for _ in range(2)
    ]
    assert applied[0].text == applied[1].text


STRANGER = """
import contextlib, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
with contextlib.suppress(BrokenPipeError):  # the answer may come before the question
    sock.sendall(b"GET /v1/status HTTP/1.1\\r\\nhost: x\\r\\n\\r\\n")
while data := sock.recv(65536):
    sys.stdout.buffer.write(data)
"""


async def test_a6_a_user_that_is_not_allowed_is_refused(api: Api) -> None:
    """As root: a process of another user connects. Otherwise: the rule is asked about another user."""
    api.path.chmod(0o666)
    api.folder.chmod(0o755)
    if os.geteuid() == 0:
        done = await asyncio.to_thread(
            subprocess.run,
            ["/usr/bin/python3", "-c", STRANGER, str(api.path)],
            user=65534,
            group=65534,
            capture_output=True,
            timeout=20,
        )
        assert done.stdout.startswith(b"HTTP/1.1 403 ") and b'"DENIED"' in done.stdout, done
    else:
        assert not may_connect(lambda: None)(Peer(local=True, uid=65534, gid=65534))
    assert (await api.client.get("/v1/status")).status_code == 200


def test_a6_who_may_use_the_socket() -> None:
    assert may_use_socket(Peer(True, 0, 0), 1000, None)
    assert may_use_socket(Peer(True, 1000, 1000), 1000, None)
    assert not may_use_socket(Peer(True, 1001, 1001), 1000, None)
    assert not may_use_socket(Peer(True, 1001, 1001), 1000, "no-such-group")
    assert may_use_socket(Peer(True, 1001, 0), 1000, "root")
    assert not may_use_socket(Peer(True, 1001, 1001), 1000, "root")


def test_the_socket_is_closed_to_others(tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="nv"))
    sock = bind_unix(folder / "s", None)
    assert (folder / "s").stat().st_mode & 0o777 == 0o600
    sock.close()
    again = bind_unix(folder / "s", "root")
    assert (folder / "s").stat().st_mode & 0o777 == 0o660
    again.close()
    shutil.rmtree(folder)
    with pytest.raises(NvError, match="longer than"):
        bind_unix(tmp_path / ("x" * 120), None)


class Pki:
    """A certificate authority of a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.ca = self._sign("test ca", self.key, days=(-1, 30), ca=True)
        (folder / "ca.pem").write_bytes(self.ca.public_bytes(serialization.Encoding.PEM))

    def _sign(self, name: str, key: ec.EllipticCurvePrivateKey, days: tuple[int, int], ca: bool) -> x509.Certificate:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject if ca else self.ca.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(days=days[0]))
            .not_valid_after(now + datetime.timedelta(days=days[1]))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
            )
        )
        return builder.sign(self.key, hashes.SHA256())

    def make(self, name: str, days: tuple[int, int] = (-1, 30)) -> tuple[str, str]:
        """Certificate and key files of a name."""
        key = ec.generate_private_key(ec.SECP256R1())
        cert = self._sign(name, key, days, ca=False)
        cert_path, key_path = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        cert_path.write_bytes(cert.public_bytes(serialization.Encoding.PEM))
        form = serialization.PrivateFormat.PKCS8
        key_path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
        return str(cert_path), str(key_path)

    def client(self, pair: tuple[str, str] | None) -> ssl.SSLContext:
        """A client's context, with its certificate if it has one."""
        context = ssl.create_default_context(cafile=str(self.folder / "ca.pem"))
        if pair is not None:
            context.load_cert_chain(*pair)
        return context


@pytest.fixture
async def https(api: Api) -> AsyncIterator[tuple[Api, Pki, str]]:
    pki = Pki(api.folder)
    cert, key = pki.make("server")
    (api.folder / "tokens").write_text("admin correct-horse-battery  # the operator\n")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    control = {
        "listen": f"https://{address}",
        "tls": {"cert": cert, "key": key, "client_ca": str(api.folder / "ca.pem")},
        "tokens": str(api.folder / "tokens"),
    }
    listeners = Listeners(api.farm.control, ControlOptions(api.folder / "state", api.folder))
    await listeners.open()
    spec = PLAIN | {"control": control, "hosts": {"local": {}, "cert": {"certificate": "the-host"}}}
    spec["vms"] = {"vm1": {"host": "local", "vvols": {}}}
    answer = await api.client.post("/v1/apply", json={"farm": spec})
    assert answer.status_code == 200, answer.text
    yield api, pki, address
    await listeners.close()


async def test_https_wants_a_token(https: tuple[Api, Pki, str]) -> None:
    _, pki, address = https
    async with httpx.AsyncClient(verify=pki.client(None), base_url=f"https://{address}") as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic correct-horse-battery"}):
            answer = await client.get("/v1/status", headers=headers)
            assert answer.status_code == 401 and _error(answer)["code"] == "DENIED"
        right = await client.get("/v1/status", headers={"authorization": "Bearer correct-horse-battery"})
        assert right.status_code == 200


async def test_a7_an_expired_client_certificate_is_refused_by_tls(https: tuple[Api, Pki, str]) -> None:
    _, pki, address = https
    token = {"authorization": "Bearer correct-horse-battery"}
    expired = pki.client(pki.make("old", days=(-30, -2)))

    def knock() -> bytes:
        host, _, port = address.partition(":")
        plain = socket.create_connection((host, int(port)), timeout=10)
        with plain, expired.wrap_socket(plain, server_hostname=host) as tls:
            tls.sendall(b"GET /v1/status HTTP/1.1\r\nhost: x\r\n\r\n")
            return tls.recv(100)

    try:
        answer = await asyncio.to_thread(knock)
    except (ssl.SSLError, ConnectionError):
        answer = b""
    assert answer == b"", "the handshake is broken off: no HTTP is spoken"
    valid = pki.client(pki.make("new"))
    async with httpx.AsyncClient(verify=valid, base_url=f"https://{address}") as client:
        assert (await client.get("/v1/status", headers=token)).status_code == 200


async def test_old_tls_and_plain_http_are_refused(https: tuple[Api, Pki, str]) -> None:
    _, pki, address = https
    old = pki.client(None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        old.minimum_version = ssl.TLSVersion.TLSv1
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(httpx.ConnectError):
        async with httpx.AsyncClient(verify=old, base_url=f"https://{address}") as client:
            await client.get("/v1/status")
    with pytest.raises(httpx.HTTPError):
        async with httpx.AsyncClient(base_url=f"http://{address}") as client:
            await client.get("/v1/status")


async def _first_words(url: str, headers: dict[str, str], **how: Any) -> Any:
    async with websockets.connect(url, additional_headers=headers, **how) as ws:
        hello = link.Hello(host=headers.get("X-Nbdvvol-Host", ""), instance="i").model_dump_json()
        try:
            await ws.send(hello)
        except websockets.ConnectionClosed:
            await asyncio.sleep(0)
        return link.from_control.validate_json(await ws.recv())


async def test_a_filter_needs_its_own_hosts_credential(https: tuple[Api, Pki, str]) -> None:
    api, pki, address = https
    token = (api.farm.state / "hosts" / "local.token").read_text().strip()
    assert (api.farm.state / "hosts" / "local.token").stat().st_mode & 0o777 == 0o600
    url, tls = f"wss://{address}/v1/link", {"ssl": pki.client(None)}
    bad: list[dict[str, str]] = [
        {},
        {"X-Nbdvvol-Host": "local"},
        {"X-Nbdvvol-Host": "local", "Authorization": "Bearer wrong"},
        {"X-Nbdvvol-Host": "cert", "Authorization": f"Bearer {token}"},
        {"X-Nbdvvol-Host": "nobody", "Authorization": f"Bearer {token}"},
        {"X-Nbdvvol-Host": "local", "Authorization": "Bearer correct-horse-battery"},
    ]
    for headers in bad:
        assert isinstance(await _first_words(url, headers, **tls), link.Refused), headers
    right = {"X-Nbdvvol-Host": "local", "Authorization": f"Bearer {token}"}
    assert isinstance(await _first_words(url, right, **tls), link.Welcome)
    name = {"X-Nbdvvol-Host": "cert"}
    assert isinstance(await _first_words(url, name, ssl=pki.client(pki.make("another"))), link.Refused)
    assert isinstance(await _first_words(url, name, ssl=pki.client(pki.make("the-host"))), link.Welcome)


async def test_https_without_tokens_is_refused(api: Api) -> None:
    listeners = Listeners(api.farm.control, ControlOptions(api.folder / "state", api.folder))
    with pytest.raises(NvError, match="tokens"):
        await listeners.configure(ControlConfig(listen="https://127.0.0.1:1"))
    tls = ControlTls(cert="/nowhere", key="/nowhere")
    with pytest.raises(NvError, match="TLS files"):
        await listeners.configure(ControlConfig(listen="https://127.0.0.1:0", tls=tls, tokens="/nowhere"))


def test_tokens_and_headers(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("a " + "x" * 16 + "\n\n# comment\nb " + "y" * 20 + "\n")
    tokens = read_tokens(str(path))
    assert token_name(tokens, "y" * 20) == "b" and token_name(tokens, "z") == "" == token_name(tokens, "")
    assert bearer("Bearer  t ") == "t" and bearer("basic t") == "" and bearer("") == ""
    path.write_text("a short\n")
    with pytest.raises(NvError, match=":1: not a name and a token"):
        read_tokens(str(path))
    with pytest.raises(NvError, match="No such file"):
        read_tokens(str(tmp_path / "none"))


def test_a_farm_may_name_a_hosts_token_file(tmp_path: Path) -> None:
    own = tmp_path / "mine"
    own.write_text("secret-of-the-host\n")
    tokens = HostTokens(tmp_path / "state")
    config = HostConfig(token_file=str(own))
    tokens.check("h", config, "secret-of-the-host", Peer(local=True))
    for token in ("", "secret", "secret-of-the-host "):
        with pytest.raises(NvError) as denied:
            tokens.check("h", config, token, Peer(local=True))
        assert denied.value.code is Code.DENIED
    own.write_text("")
    with pytest.raises(NvError):
        tokens.check("h", config, "", Peer(local=True))


def test_one_control_a_state_directory(tmp_path: Path) -> None:
    with only_one(tmp_path), pytest.raises(NvError, match=f"pid {os.getpid()}"), only_one(tmp_path):
        raise AssertionError("two at once")
    with only_one(tmp_path):
        assert (tmp_path / "control.lock").read_text() == f"{os.getpid()}\n"


async def test_waiting_for_tasks_and_events(api: Api) -> None:
    await _served(api)
    last = (await api.client.get("/v1/events")).json()[-1]["id"]
    waiting = asyncio.ensure_future(api.client.get("/v1/events", params={"after": last, "wait": 10}))
    await asyncio.sleep(0.05)
    created = await api.client.post("/v1/vvols", json={"vm": "vm1", "name": "x", "size": "1MiB"})
    events = (await waiting).json()
    assert events and all(event["id"] > last for event in events)
    number = created.json()["task"]["id"]
    task = (await api.client.get(f"/v1/tasks/{number}", params={"wait": 10})).json()
    assert task["state"] in ("queued", "running", "success")
    assert (await api.client.get("/v1/events", params={"after": 10**9, "wait": 0.05})).json() == []


async def test_the_daemon_starts_once_and_stops_cleanly(tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="nv"))
    command = [sys.executable, "-m", "nbdvvol.control", "--state", str(folder / "s"), "--run", str(folder / "r")]
    child = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    try:
        sock = folder / "r" / "control.sock"
        for _ in range(600):
            if sock.exists():
                break
            await asyncio.sleep(0.05)
        async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(sock)), timeout=20) as client:
            assert (await client.get("http://control/v1/status")).status_code == 200
            second = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
            _, said = await second.communicate()
            assert second.returncode == 1 and b"BUSY" in said
            waiting = asyncio.ensure_future(client.get("http://control/v1/events?after=9999&wait=30"))
            await asyncio.sleep(0.1)
            child.terminate()
            await asyncio.gather(waiting, return_exceptions=True)
        async with asyncio.timeout(10):
            assert await child.wait() == 0
        assert not sock.exists() and not (folder / "r" / "target.sock").exists()
    finally:
        if child.returncode is None:
            child.kill()
        shutil.rmtree(folder, ignore_errors=True)


async def test_https_settings_that_cannot_be_are_refused_whole_and_never_keep_control_down(api: Api) -> None:
    bad = await api.client.post("/v1/apply", json={"farm": PLAIN | {"control": {"listen": "https://127.0.0.1:1"}}})
    assert bad.status_code == 400 and "needs control.tls" in _error(bad)["message"]
    assert (await api.client.get("/v1/hosts")).json() == []
    tokens = api.folder / "tokens"
    tokens.write_text("admin correct-horse-battery\n")
    control = {"listen": "https://127.0.0.1:1", "tls": {"cert": "/none", "key": "/none"}, "tokens": str(tokens)}
    assert (await api.client.post("/v1/apply", json={"farm": PLAIN | {"control": control}})).status_code == 200
    tokens.unlink()
    await api.farm.stop()
    again = await api.farm.start()
    listeners = Listeners(again, ControlOptions(api.folder / "state", api.folder))
    await listeners.open()
    tokens.write_text("admin correct-horse-battery\n")
    async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(api.folder / "control.sock"))) as client:
        assert (await client.get("http://control/v1/hosts")).status_code == 200
        told = await client.post("http://control/v1/apply", json={"farm": PLAIN | {"control": control}})
        assert told.status_code == 400 and "the farm is applied, but" in _error(told)["message"]
    await listeners.close()
