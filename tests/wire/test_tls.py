"""TLS on the wire: x509 and PSK, from libnbd and qemu (GnuTLS), Python and s_client (OpenSSL); identity selects."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lib import nbdwords as w
from tests.lib.bystander import Bystander
from tests.lib.farm import Farm, free_port, tls_spec
from tests.lib.libnbd import libnbd
from tests.lib.openssl import openssl_haggle
from tests.lib.pattern import difference, pattern
from tests.lib.pki import PSK, client_context
from tests.lib.procs import need, run
from tests.lib.rawio import STYLES, Style, Transmission, enter
from tests.lib.rawnbd import Closed, Haggle, info_payload, meta_payload

MiB = w.MiB
pytestmark = pytest.mark.timeout(90)
ROOT_SIZE = 48 * MiB


@dataclass(frozen=True)
class Secure:
    """A farm whose TCP listener takes TLS only."""

    farm: Farm
    port: int
    pki: Path

    @property
    def address(self) -> tuple[str, int]:
        return ("127.0.0.1", self.port)

    def x509_uri(self, name: str = "root", who: str = "vm1") -> str:
        return f"nbds://localhost:{self.port}/{name}?tls-certificates={self.pki / 'clients' / who}"

    def psk_uri(self, name: str = "root", who: str = "vm1", keys: str | None = None) -> str:
        file = self.pki / "psk" / (keys or who) / "keys.psk"
        return f"nbds://{who}@localhost:{self.port}/{name}?tls-psk-file={file}"

    def haggle(self, who: str | None = "vm1") -> Haggle:
        haggle = Haggle(self.address).begin()
        haggle.starttls(client_context(self.pki, who))
        return haggle

    def open(self, style: Style = "structured", who: str = "vm1", name: str = "root") -> Transmission:
        return enter(self.haggle(who), name, style)


@pytest.fixture(scope="module")
def secure(pki: Path) -> Iterator[Secure]:
    port = free_port()
    with Farm(tls_spec(pki, port)) as farm:
        farm.start()
        yield Secure(farm, port, pki)


@pytest.fixture(autouse=True)
def lives_on(secure: Secure) -> Iterator[None]:
    """The same daemon serves another client's verified I/O through every test."""
    pid = secure.farm.filter_pid()
    bystander = Bystander(secure.open(), base=ROOT_SIZE - MiB)
    bystander.check()
    yield
    bystander.check()
    bystander.stop()
    assert secure.farm.filter_pid() == pid


# ---- OpenSSL ----


@pytest.mark.parametrize("style", STYLES)
def test_openssl_io(secure: Secure, style: Style) -> None:
    data = pattern(70, 0, 4 * MiB)
    with secure.open(style) as nbd:
        assert nbd.size == ROOT_SIZE
        nbd.write(12345, data)
        nbd.flush()
        assert difference(data, nbd.read(12345, len(data))) == ""
        nbd.zero(MiB, MiB, w.CMD_FLAG_FUA)
        assert not any(nbd.read(MiB, MiB))
        nbd.trim(0, MiB)
        if style != "simple":
            assert sum(length for length, _ in nbd.status(0, ROOT_SIZE)) == ROOT_SIZE


@pytest.mark.parametrize("style", STYLES)
def test_openssl_largest_payload(secure: Secure, style: Style) -> None:
    data = pattern(71, 0, MiB) * 32
    with secure.open(style) as nbd:
        nbd.write(0, data)
        assert difference(data, nbd.read(0, w.PAYLOAD_MAX)) == ""


def test_openssl_pipelined(secure: Secure) -> None:
    with secure.open() as nbd:
        for n in range(200):
            nbd.write(n * 8192, pattern(72, n * 8192, 8192))
        cookies = {n: nbd.send(w.CMD_READ, n * 8192, 8192) for n in range(200)}
        for n, cookie in cookies.items():
            assert nbd.wait(cookie).check().data == pattern(72, n * 8192, 8192)


def test_disc_ends_with_close_notify(secure: Secure) -> None:
    with secure.open() as nbd:
        nbd.read(0, 512)
        nbd.send(w.CMD_DISC)
        assert nbd.stream.sock.recv(1) == b"", "without close_notify this raises SSLEOFError"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_versions_taken(secure: Secure, version: ssl.TLSVersion) -> None:
    context = client_context(secure.pki, "vm1")
    context.minimum_version = context.maximum_version = version
    with Haggle(secure.address) as haggle:
        haggle.begin().starttls(context)
        with enter(haggle, "root") as nbd:
            nbd.write(0, b"version")
            assert nbd.read(0, 7) == b"version"
            nbd.disconnect()


def fails_tls(secure: Secure, context: ssl.SSLContext) -> None:
    """The client's TLS is refused: at the handshake, or (TLS 1.3) at the first use of the connection."""
    with Haggle(secure.address) as haggle, pytest.raises((ssl.SSLError, Closed, ConnectionError)):
        haggle.begin().starttls(context)
        haggle.list_exports()


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1")
def test_tls_1_1_is_refused(secure: Secure) -> None:
    context = client_context(secure.pki, "vm1")
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    fails_tls(secure, context)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("who", [None, "expired", "stranger"])
def test_a_client_without_a_good_certificate_is_refused(
    secure: Secure, who: str | None, version: ssl.TLSVersion
) -> None:
    context = client_context(secure.pki, who)
    context.minimum_version = context.maximum_version = version
    fails_tls(secure, context)


# ---- OpenSSL with a pre-shared key ----

OPENSSL_VERSIONS = {"1.2": "-tls1_2", "1.3": "-tls1_3"}


def psk_options(version: str, who: str, key: str | None = None) -> tuple[str, ...]:
    return (OPENSSL_VERSIONS[version], "-psk_identity", who, "-psk", key or PSK[who])


@pytest.mark.parametrize("version", OPENSSL_VERSIONS)
@pytest.mark.parametrize("style", STYLES)
def test_openssl_psk_io(secure: Secure, version: str, style: Style) -> None:
    data = pattern(75, 0, 4 * MiB)
    with openssl_haggle(secure.address, *psk_options(version, "vm1")) as haggle:
        nbd = enter(haggle, "root", style)
        assert nbd.size == ROOT_SIZE
        nbd.write(12345, data)
        nbd.flush()
        nbd.zero(20 * MiB, MiB, w.CMD_FLAG_FUA)
        assert difference(data, nbd.read(12345, len(data))) == ""
        assert not any(nbd.read(20 * MiB, MiB))
        places = range(0, len(data) - 8192, 8192)
        cookies = {at: nbd.send(w.CMD_READ, 12345 + at, 8192) for at in places}
        for at, cookie in cookies.items():
            assert nbd.wait(cookie).check().data == data[at : at + 8192]
        nbd.send(w.CMD_DISC)
        assert nbd.stream.wait_closed() == b""
    with secure.open() as nbd:
        assert difference(data, nbd.read(12345, len(data))) == "", "another client sees what was written"


@pytest.mark.parametrize("version", OPENSSL_VERSIONS)
def test_openssl_psk_largest_payload(secure: Secure, version: str) -> None:
    data = pattern(76, 0, MiB) * 32
    with openssl_haggle(secure.address, *psk_options(version, "vm1")) as haggle:
        nbd = enter(haggle, "root")
        nbd.write(0, data)
        assert difference(data, nbd.read(0, w.PAYLOAD_MAX)) == ""


@pytest.mark.parametrize("version", OPENSSL_VERSIONS)
def test_the_key_selects_the_vm(secure: Secure, version: str) -> None:
    with openssl_haggle(secure.address, *psk_options(version, "vm2")) as haggle:
        assert list(haggle.list_exports()) == ["root"]
        assert haggle.refused(w.OPT_GO, info_payload("vm1/root")).type == w.REP_ERR_UNKNOWN
        assert enter(haggle, "root").size == 8 * MiB


@pytest.mark.parametrize("version", OPENSSL_VERSIONS)
@pytest.mark.parametrize(("who", "key"), [("vm1", "ab" * 32), ("nobody", PSK["vm1"]), ("vm2", PSK["vm1"])])
def test_openssl_without_the_right_key_is_refused(secure: Secure, version: str, who: str, key: str) -> None:
    with openssl_haggle(secure.address, *psk_options(version, who, key)) as haggle, pytest.raises(Closed):
        haggle.list_exports()


# ---- who sees what ----


def test_plaintext_is_told_that_tls_is_required(secure: Secure) -> None:
    with Haggle(secure.address) as haggle:
        haggle.begin()
        options = {
            w.OPT_LIST: b"",
            w.OPT_INFO: info_payload("root"),
            w.OPT_GO: info_payload("root"),
            w.OPT_STRUCTURED_REPLY: b"",
            w.OPT_EXTENDED_HEADERS: b"",
            w.OPT_SET_META_CONTEXT: meta_payload("root", []),
            w.OPT_LIST_META_CONTEXT: meta_payload("root", []),
            0x7654321: b"",
        }
        for option, payload in options.items():
            assert haggle.refused(option, payload).type == w.REP_ERR_TLS_REQD, option
        haggle.abort()
    with Haggle(secure.address) as haggle, pytest.raises(Closed) as caught:
        haggle.begin().export_name("root")
    assert caught.value.partial == b""


@pytest.mark.parametrize("who", ["vm1", "vm2"])
def test_the_certificate_selects_the_vm(secure: Secure, who: str) -> None:
    with secure.haggle(who) as haggle:
        assert list(haggle.list_exports()) == ["root"]
        other = {"vm1": "vm2", "vm2": "vm1"}[who]
        for name in (f"{other}/root", other, "private"):
            assert haggle.refused(w.OPT_GO, info_payload(name)).type == w.REP_ERR_UNKNOWN
        facts = haggle.facts(w.OPT_GO, "root")
        assert facts.size == {"vm1": ROOT_SIZE, "vm2": 8 * MiB}[who]


def test_a_valid_certificate_of_no_vm_sees_nothing(secure: Secure) -> None:
    with secure.haggle("nobody") as haggle:
        assert haggle.ask(w.OPT_LIST)[0].type in (w.REP_ACK, w.REP_ERR_POLICY)
        for name in ("root", "vm1/root", ""):
            assert haggle.refused(w.OPT_GO, info_payload(name)).is_error


# ---- libnbd ----


def libnbd_io(uri: str) -> int:
    """Verified I/O by libnbd over TLS; the export's size."""
    script = """
h = connect()
assert h.get_tls_negotiated()
data = random.Random(5).randbytes(3 * MiB + 17)
h.pwrite(data, 777)
h.flush()
assert h.pread(len(data), 777) == data
h.zero(MiB, MiB)
assert h.pread(MiB, MiB) == bytes(MiB)
result = h.get_size()
h.shutdown()
"""
    size: int = libnbd(script, uri=uri)
    return size


def test_libnbd_x509(secure: Secure) -> None:
    assert libnbd_io(secure.x509_uri()) == ROOT_SIZE
    assert libnbd_io(secure.x509_uri(who="vm2")) == 8 * MiB


def test_libnbd_psk(secure: Secure) -> None:
    assert libnbd_io(secure.psk_uri()) == ROOT_SIZE
    assert libnbd_io(secure.psk_uri(who="vm2")) == 8 * MiB


@pytest.mark.parametrize("kind", ["x509", "psk"])
def test_nbdinfo_lists_only_the_identitys_exports(secure: Secure, kind: str) -> None:
    uri = secure.x509_uri("") if kind == "x509" else secure.psk_uri("")
    listing = run([need("nbdinfo", "libnbd-bin"), "--list", uri]).stdout
    assert listing.count("export=") == 1 and str(ROOT_SIZE) in listing


@pytest.mark.parametrize("kind", ["x509", "psk"])
def test_nbdcopy_there_and_back(secure: Secure, tmp_path: Path, kind: str) -> None:
    uri = secure.x509_uri(who="vm2") if kind == "x509" else secure.psk_uri(who="vm2")
    source, back = tmp_path / "source", tmp_path / "back"
    source.write_bytes(pattern(73, 0, 8 * MiB))
    run([need("nbdcopy", "libnbd-bin"), "--connections=4", source, uri])
    run([need("nbdcopy", "libnbd-bin"), "--connections=4", uri, back])
    assert difference(source.read_bytes(), back.read_bytes()) == ""


def test_libnbd_psk_with_a_wrong_key_is_refused(secure: Secure) -> None:
    failed = run([need("nbdinfo", "libnbd-bin"), secure.psk_uri(keys="wrong-key")], check=False)
    assert failed.returncode != 0


def test_libnbd_psk_of_no_vm_sees_nothing(secure: Secure) -> None:
    assert "ghost" in PSK
    assert run([need("nbdinfo", "libnbd-bin"), secure.psk_uri("root", "ghost")], check=False).returncode != 0


# ---- qemu ----


def qemu_options(secure: Secure, kind: str, who: str) -> list[str]:
    """Arguments that let a qemu tool reach `root` as `who`."""
    if kind == "x509":
        creds = f"tls-creds-x509,id=tls,endpoint=client,dir={secure.pki / 'clients' / who}"
    else:
        creds = f"tls-creds-psk,id=tls,endpoint=client,username={who},dir={secure.pki / 'psk' / who}"
    return ["--object", creds]


def qemu_image(secure: Secure) -> str:
    file = f"file.driver=nbd,file.host=localhost,file.port={secure.port},file.export=root,file.tls-creds=tls"
    return f"driver=raw,{file}"


@pytest.mark.parametrize("kind", ["x509", "psk"])
def test_qemu_img_compare(secure: Secure, tmp_path: Path, kind: str) -> None:
    image = tmp_path / "image"
    image.write_bytes(pattern(74, 0, 8 * MiB))
    with secure.open(who="vm2") as nbd:
        nbd.write(0, image.read_bytes())
    argv = [need("qemu-img", "qemu-utils"), "compare", *qemu_options(secure, kind, "vm2"), "--image-opts"]
    same = run([*argv, f"driver=raw,file.driver=file,file.filename={image}", qemu_image(secure)])
    assert "identical" in same.stdout


@pytest.mark.parametrize("kind", ["x509", "psk"])
def test_qemu_io_patterns(secure: Secure, kind: str) -> None:
    argv = [need("qemu-io", "qemu-utils"), *qemu_options(secure, kind, "vm1"), "--image-opts"]
    for command in ("write -P 7 1M 5M", "flush", "write -z 2M 1M", "read -P 7 1M 1M", "read -P 0 2M 1M"):
        argv += ["-c", command]
    done = run([*argv, qemu_image(secure)])
    assert "failed" not in done.stdout.lower(), done.stdout


def test_qemu_without_a_certificate_is_refused(secure: Secure) -> None:
    plain = f"driver=nbd,host=localhost,port={secure.port},export=root"
    failed = run([need("qemu-img", "qemu-utils"), "info", "--image-opts", plain], check=False)
    assert failed.returncode != 0 and "TLS" in failed.stderr


# ---- harm ----


def test_a_client_that_vanishes_in_the_middle_of_a_record(secure: Secure) -> None:
    for cut in (1, 5, 40, 2000):
        fd = secure.open().stream.sock.detach()
        os.write(fd, b"\x17\x03\x03\x40\x00" + bytes(cut))
        os.close(fd)


def test_garbage_instead_of_a_record_ends_the_connection(secure: Secure) -> None:
    nbd = secure.open()
    raw = socket.socket(fileno=os.dup(nbd.stream.sock.fileno()))
    raw.settimeout(5)
    raw.sendall(b"\x17\x03\x03\x00\x20" + b"\x55" * 32)
    got = b"x"
    while got:
        try:
            got = raw.recv(65536)
        except ConnectionResetError:
            break
    raw.close()
    nbd.stream.close()


def test_many_clients_that_stop_in_the_handshake(secure: Secure) -> None:
    stuck = []
    for _ in range(30):
        haggle = Haggle(secure.address).begin()
        assert haggle.demand(w.OPT_STARTTLS) == []
        haggle.stream.send(b"\x16\x03\x01")
        stuck.append(haggle)
    with secure.open() as nbd:
        nbd.read(0, 4096)
    for haggle in stuck:
        haggle.stream.close()
