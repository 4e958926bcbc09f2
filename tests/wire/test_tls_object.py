"""The C TLS object (native/nbd/tls.h) against other people's TLS: Python's ssl, OpenSSL's s_client, GnuTLS.

The object is sans-I/O: a thread here carries bytes between it and a socket, and echoes plaintext. The data plane's own
integration is tested elsewhere; this proves the cryptographic half alone, with every client that matters.
"""

from __future__ import annotations

import ctypes
import datetime
import ipaddress
import os
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "native"
KEY = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
EPIPE, EPROTO, EBUSY, EINVAL = 32, 71, 16, 22
VERIFY_CLIENT = 1


class Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_char_p), ("length", ctypes.c_size_t))


@pytest.fixture(scope="session")
def lib(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The TLS object alone, as a shared library, with the sanitizer that catches undefined behaviour."""
    out = tmp_path_factory.mktemp("tls") / "tls.so"
    sources = [NATIVE / "nbd/tls.c", NATIVE / "nbd/tls_context.c", NATIVE / "reactor/error.c"]
    flags = [
        "-std=gnu11",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-O1",
        "-g",
        "-fsanitize=undefined",
        "-fno-sanitize-recover=all",
    ]
    paths = ["-I", str(NATIVE), "-I", str(NATIVE / "include"), *map(str, sources), "-o", str(out)]
    subprocess.run(["cc", *flags, "-fPIC", "-shared", *paths, "-lssl", "-lcrypto"], check=True, timeout=120)
    dll = ctypes.CDLL(str(out))
    for name in ("nv_tls_context_create", "nv_tls_new"):
        getattr(dll, name).restype = ctypes.c_void_p
    for name in ("nv_tls_feed", "nv_tls_read", "nv_tls_write"):
        getattr(dll, name).restype = ctypes.c_ssize_t
    for name in ("nv_tls_error", "nv_last_error"):
        getattr(dll, name).restype = ctypes.c_char_p
    dll.nv_tls_pending.restype = ctypes.c_size_t
    return dll


# ---- credentials ----


class Pki:
    """One authority, a server certificate for localhost, and client certificates by name."""

    def __init__(self, folder: Path, authority: str = "test authority") -> None:
        self.folder = folder
        self.ca_key = ec.generate_private_key(ec.SECP256R1())
        self.ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, authority)])
        ca = self._sign(self.ca_name, self.ca_key, [(x509.BasicConstraints(ca=True, path_length=None), True)])
        self.ca = folder / "ca.pem"
        self.ca.write_bytes(ca.public_bytes(serialization.Encoding.PEM))
        names: list[x509.GeneralName] = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        self.cert, self.key = self.issue("localhost", ExtendedKeyUsageOID.SERVER_AUTH, names)

    def _sign(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, extensions: list[tuple[x509.ExtensionType, bool]]
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.ca_name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=2))
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(self.ca_key, hashes.SHA256())

    def issue(
        self, name: str, usage: x509.ObjectIdentifier, dns: list[x509.GeneralName], *, common_name: bool = True
    ) -> tuple[Path, Path]:
        """Write a certificate and its key; return both paths."""
        key = ec.generate_private_key(ec.SECP256R1())
        attributes = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "nbdvvol tests")]
        if common_name:
            attributes.append(x509.NameAttribute(NameOID.COMMON_NAME, name))
        extensions: list[tuple[x509.ExtensionType, bool]] = [(x509.ExtendedKeyUsage([usage]), False)]
        if dns:
            extensions.append((x509.SubjectAlternativeName(dns), False))
        cert = self._sign(x509.Name(attributes), key, extensions)
        cert_path, key_path = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        cert_path.write_bytes(cert.public_bytes(serialization.Encoding.PEM))
        pkcs8 = serialization.PrivateFormat.PKCS8
        key_path.write_bytes(key.private_bytes(serialization.Encoding.PEM, pkcs8, serialization.NoEncryption()))
        return cert_path, key_path

    def client(self, name: str, *, common_name: bool = True) -> tuple[Path, Path]:
        """A client certificate for `name`; without common name it is a DNS name."""
        dns: list[x509.GeneralName] = [] if common_name else [x509.DNSName(name)]
        return self.issue(name, ExtendedKeyUsageOID.CLIENT_AUTH, dns, common_name=common_name)


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "psk.keys"
    path.write_text(f"zeta:{KEY[:32]}\nvm1:{KEY}\nalpha:{KEY[::-1]}\n")
    return path


# ---- the object and an echo server around it ----


class Context:
    """A server identity, freed at the end of its test."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self.lib = lib
        self.handle = ctypes.c_void_p(lib.nv_tls_context_create())
        assert self.handle

    def x509(self, pki: Pki, flags: int = 0, **paths: Path) -> int:
        files = [str(paths.get(n, getattr(pki, n))).encode() for n in ("ca", "cert", "key")]
        return int(self.lib.nv_tls_context_x509(self.handle, *files, flags))

    def psk(self, path: Path) -> int:
        return int(self.lib.nv_tls_context_psk(self.handle, str(path).encode()))

    def error(self) -> str:
        return bytes(self.lib.nv_last_error()).decode()


@pytest.fixture
def context(lib: ctypes.CDLL) -> Iterator[Context]:
    made = Context(lib)
    yield made
    lib.nv_tls_context_free(made.handle)


class Tls:
    """One nv_tls."""

    def __init__(self, context: Context) -> None:
        self.lib = context.lib
        self.handle = ctypes.c_void_p(self.lib.nv_tls_new(context.handle))
        assert self.handle

    def free(self) -> None:
        self.lib.nv_tls_free(self.handle)

    def feed(self, data: bytes) -> int:
        return int(self.lib.nv_tls_feed(self.handle, data, ctypes.c_size_t(len(data))))

    def handshake(self) -> int:
        return int(self.lib.nv_tls_handshake(self.handle))

    def read(self, capacity: int = 65536) -> bytes | int:
        buffer = ctypes.create_string_buffer(capacity)
        got = int(self.lib.nv_tls_read(self.handle, buffer, ctypes.c_size_t(capacity)))
        return buffer.raw[:got] if got > 0 else got

    def write(self, *pieces: bytes) -> int:
        vector = (Iovec * len(pieces))(*((piece, len(piece)) for piece in pieces))
        return int(self.lib.nv_tls_write(self.handle, vector, len(pieces)))

    def pending(self) -> bytes:
        pointer = ctypes.c_void_p()
        size = int(self.lib.nv_tls_pending(self.handle, ctypes.byref(pointer)))
        return ctypes.string_at(pointer, size) if size else b""

    def drain(self) -> bytes:
        """All ciphertext that waits, counted as sent."""
        out = b""
        while piece := self.pending():
            self.lib.nv_tls_sent(self.handle, ctypes.c_size_t(len(piece)))
            out += piece
        return out

    def peer(self) -> str:
        buffer = ctypes.create_string_buffer(256)
        assert self.lib.nv_tls_peer(self.handle, buffer, ctypes.c_size_t(256)) == len(buffer.value)
        return buffer.value.decode()

    def error(self) -> str:
        return bytes(self.lib.nv_tls_error(self.handle)).decode()


class Echo(threading.Thread):
    """Serves one client: handshake, then every plaintext byte comes back in upper case."""

    def __init__(self, context: Context) -> None:
        super().__init__(daemon=True)
        self.context = context
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.identity: str | None = None
        self.failure = ""
        self.end: int | None = None

    def run(self) -> None:
        connection, _ = self.listener.accept()
        connection.settimeout(20)
        tls = Tls(self.context)
        try:
            while self.end is None and (data := connection.recv(4096)):
                assert tls.feed(data) == len(data)
                self._step(tls)
                connection.sendall(tls.drain())
            if tls.lib.nv_tls_shutdown(tls.handle) == 0:
                connection.sendall(tls.drain())
        except OSError:
            pass
        finally:
            tls.free()
            connection.close()
            self.listener.close()

    def _step(self, tls: Tls) -> None:
        done = tls.handshake()
        if done == 1:
            self.identity = tls.peer()
            while isinstance(got := tls.read(), bytes):
                assert tls.write(got[:1].upper(), got[1:].upper()) == len(got)
            done = got
        if done < 0:
            self.end, self.failure = -done, tls.error()


def serve(context: Context, talk: Callable[[int], str]) -> tuple[Echo, str]:
    """Run `talk` (given the port) against an echo server; return the server and what `talk` said."""
    echo = Echo(context)
    echo.start()
    said = talk(echo.port)
    echo.join(20)
    assert not echo.is_alive()
    return echo, said


def program(*command: str) -> str:
    """Run a client and send it one line; what it printed until the answer came, or until it gave up."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdin and process.stdout
    out = b""
    try:
        process.stdin.write(b"hello over tls\n")
        process.stdin.flush()
        while b"HELLO OVER TLS" not in out and (piece := os.read(process.stdout.fileno(), 65536)):
            out += piece
    except BrokenPipeError:
        out += process.stdout.read()
    finally:
        process.kill()
        process.communicate(timeout=20)
    return out.decode(errors="replace")


VERSIONS = {"1.2": ("-tls1_2", "-VERS-ALL:+VERS-TLS1.2"), "1.3": ("-tls1_3", "-VERS-ALL:+VERS-TLS1.3")}


def openssl_client(port: int, version: str, *more: str) -> str:
    return program("openssl", "s_client", "-connect", f"127.0.0.1:{port}", VERSIONS[version][0], "-quiet", *more)


def gnutls_client(port: int, version: str, priority: str, *more: str) -> str:
    if not shutil.which("gnutls-cli"):
        pytest.fail("gnutls-cli is missing: apt-get install gnutls-bin")
    wanted = f"{priority}:{VERSIONS[version][1]}"
    return program("gnutls-cli", "--priority", wanted, "-p", str(port), "localhost", *more)


def gnutls_library_client(port: int, version: str, exchange: str, user: str, key: str) -> str:
    """A PSK client on libgnutls itself, as libnbd and qemu are.

    Debian 12's gnutls-cli crashes after any TLS 1.2 (EC)DHE-PSK handshake, also with gnutls-serv."""
    gnutls = ctypes.CDLL("libgnutls.so.30")
    gnutls.gnutls_record_send.restype = gnutls.gnutls_record_recv.restype = ctypes.c_ssize_t
    session, credentials = ctypes.c_void_p(), ctypes.c_void_p()
    datum = ctypes.byref(Iovec(key.encode(), len(key)))  # gnutls_datum_t: the same layout on a little-endian machine
    client, psk, key_is_hex = 2, 4, 1
    priority = f"NORMAL:-KX-ALL:{exchange}:{VERSIONS[version][1]}".encode()
    with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
        raw.settimeout(None)
        assert gnutls.gnutls_init(ctypes.byref(session), client) == 0
        assert gnutls.gnutls_psk_allocate_client_credentials(ctypes.byref(credentials)) == 0
        assert gnutls.gnutls_psk_set_client_credentials(credentials, user.encode(), datum, key_is_hex) == 0
        assert gnutls.gnutls_credentials_set(session, psk, credentials) == 0
        assert gnutls.gnutls_priority_set_direct(session, priority, None) == 0
        gnutls.gnutls_transport_set_int2(session, raw.fileno(), raw.fileno())
        assert (result := gnutls.gnutls_handshake(session)) == 0, result
        assert gnutls.gnutls_record_send(session, b"hello over tls", ctypes.c_size_t(14)) == 14
        answer = ctypes.create_string_buffer(100)
        said = b""
        while len(said) < 14 and (got := gnutls.gnutls_record_recv(session, answer, ctypes.c_size_t(100))) > 0:
            said += answer.raw[:got]
        gnutls.gnutls_bye(session, 1)
        gnutls.gnutls_deinit(session)
        gnutls.gnutls_psk_free_client_credentials(credentials)
    return said.decode()


# ---- OpenSSL and GnuTLS clients, both versions, both kinds of credential ----


@pytest.mark.parametrize("version", VERSIONS)
def test_openssl_x509(context: Context, pki: Pki, version: str) -> None:
    assert context.x509(pki, VERIFY_CLIENT) == 0, context.error()
    cert, key = pki.client("vm7")
    options = ("-CAfile", str(pki.ca), "-verify_return_error", "-cert", str(cert), "-key", str(key))
    echo, said = serve(context, lambda port: openssl_client(port, version, *options))
    assert "HELLO OVER TLS" in said, (said, echo.failure)
    assert echo.identity == "vm7"


@pytest.mark.parametrize("version", VERSIONS)
def test_openssl_psk(context: Context, keys: Path, version: str) -> None:
    assert context.psk(keys) == 0, context.error()
    options = ("-psk_identity", "vm1", "-psk", KEY)
    echo, said = serve(context, lambda port: openssl_client(port, version, *options))
    assert "HELLO OVER TLS" in said, (said, echo.failure)
    assert echo.identity == "vm1"


@pytest.mark.parametrize("version", VERSIONS)
def test_gnutls_x509(context: Context, pki: Pki, version: str) -> None:
    assert context.x509(pki, VERIFY_CLIENT) == 0, context.error()
    cert, key = pki.client("vm8", common_name=False)
    options = ("--x509cafile", str(pki.ca), "--x509certfile", str(cert), "--x509keyfile", str(key))
    echo, said = serve(context, lambda port: gnutls_client(port, version, "NORMAL", *options))
    assert "HELLO OVER TLS" in said, (said, echo.failure)
    assert echo.identity == "vm8"


@pytest.mark.parametrize("exchange", ["+ECDHE-PSK", "+DHE-PSK", "+ECDHE-PSK:+DHE-PSK:+PSK"])
@pytest.mark.parametrize("version", VERSIONS)
def test_gnutls_psk(context: Context, keys: Path, version: str, exchange: str) -> None:
    assert context.psk(keys) == 0, context.error()
    echo, said = serve(context, lambda port: gnutls_library_client(port, version, exchange, "zeta", KEY[:32]))
    assert "HELLO OVER TLS" in said, (said, echo.failure)
    assert echo.identity == "zeta"


@pytest.mark.parametrize(("version", "exchange"), [("1.2", "+PSK"), ("1.3", "+ECDHE-PSK:+DHE-PSK:+PSK")])
def test_gnutls_cli_psk(context: Context, keys: Path, version: str, exchange: str) -> None:
    assert context.psk(keys) == 0, context.error()
    options = ("--pskusername", "zeta", "--pskkey", KEY[:32])
    echo, said = serve(context, lambda port: gnutls_client(port, version, f"NORMAL:-KX-ALL:{exchange}", *options))
    assert "HELLO OVER TLS" in said, (said, echo.failure)
    assert echo.identity == "zeta"


@pytest.mark.parametrize("version", VERSIONS)
def test_one_context_serves_both_kinds(context: Context, pki: Pki, keys: Path, version: str) -> None:
    assert context.x509(pki) == 0 and context.psk(keys) == 0, context.error()
    echo, said = serve(context, lambda port: gnutls_client(port, version, "NORMAL", "--x509cafile", str(pki.ca)))
    assert "HELLO OVER TLS" in said, (said, echo.failure)
    assert echo.identity == "", "an anonymous client has no name"
    echo, said = serve(context, lambda port: gnutls_library_client(port, version, "+ECDHE-PSK:+PSK", "vm1", KEY))
    assert "HELLO OVER TLS" in said, (said, echo.failure)
    assert echo.identity == "vm1"
    options = ("-psk_identity", "vm1", "-psk", KEY)  # offers both kinds: the one with a name is taken
    echo, said = serve(context, lambda port: openssl_client(port, version, *options))
    assert "HELLO OVER TLS" in said and echo.identity == "vm1"


# ---- who is turned away ----


@pytest.mark.parametrize("version", VERSIONS)
def test_wrong_key_or_unknown_identity_is_refused(context: Context, keys: Path, version: str) -> None:
    assert context.psk(keys) == 0
    for identity, key in (("vm1", KEY[::-1]), ("nobody", KEY), ("x" * 200, KEY)):
        options = ("-psk_identity", identity, "-psk", key)
        echo, said = serve(context, lambda port, o=options: openssl_client(port, version, *o))  # type: ignore[misc]
        assert "HELLO OVER" not in said and echo.end == EPROTO and echo.identity is None
        assert "TLS handshake failed" in echo.failure


@pytest.mark.parametrize("version", VERSIONS)
def test_client_certificate_is_required_and_checked(context: Context, pki: Pki, version: str, tmp_path: Path) -> None:
    assert context.x509(pki, VERIFY_CLIENT) == 0
    stranger = Pki(tmp_path, "somebody else").client("vm7")
    server_kind = (pki.cert, pki.key)  # signed by the authority, but not for a client's use
    for cert in (None, stranger, server_kind):
        options = ("-cert", str(cert[0]), "-key", str(cert[1])) if cert else ()
        echo, said = serve(context, lambda port, o=options: openssl_client(port, version, *o))  # type: ignore[misc]
        assert "HELLO OVER" not in said and echo.end == EPROTO and echo.identity is None


@pytest.mark.parametrize("version", VERSIONS)
def test_a_named_key_without_proof_gives_no_name(context: Context, pki: Pki, keys: Path, version: str) -> None:
    """Knowing an identity's name is not enough, also where a certificate handshake would have been possible."""
    assert context.x509(pki) == 0 and context.psk(keys) == 0
    options = ("-psk_identity", "vm1", "-psk", KEY[::-1])
    echo, said = serve(context, lambda port: openssl_client(port, version, *options))
    assert "HELLO OVER" not in said and echo.identity is None


def test_old_versions_are_refused(context: Context, pki: Pki) -> None:
    assert context.x509(pki) == 0
    options = ("-tls1_1", "-cipher", "ALL:@SECLEVEL=0", "-quiet")
    echo, said = serve(context, lambda port: program("openssl", "s_client", "-connect", f"127.0.0.1:{port}", *options))
    assert "HELLO OVER" not in said and echo.end == EPROTO and "unsupported protocol" in echo.failure


# ---- the object by itself: Python's ssl in memory is the client ----


class Pair:
    """The object and a Python client, joined by two byte strings, no socket."""

    def __init__(self, context: Context, pki: Pki, version: ssl.TLSVersion) -> None:
        self.tls = Tls(context)
        settings = ssl.create_default_context(cafile=str(pki.ca))
        settings.minimum_version = settings.maximum_version = version
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = settings.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")
        for _ in range(6):
            self.call(self.client.do_handshake)
            self.tls.feed(self.outgoing.read())
            done = self.tls.handshake()
            assert done >= 0, self.tls.error()
            self.incoming.write(self.tls.drain())
        assert self.tls.handshake() == 1

    def call(self, function: Callable[[], object]) -> object:
        try:
            return function()
        except ssl.SSLWantReadError:
            return None


@pytest.fixture(params=[ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
def pair(request: pytest.FixtureRequest, context: Context, pki: Pki) -> Iterator[Pair]:
    assert context.x509(pki) == 0
    made = Pair(context, pki, request.param)
    yield made
    made.tls.free()


def test_bytes_come_through_in_any_pieces(pair: Pair) -> None:
    message = os.urandom(100_000)
    pair.client.write(message)
    cipher, got = pair.outgoing.read(), b""
    while cipher or isinstance(pair.tls.read(1), bytes):
        taken = pair.tls.feed(cipher[:1013])
        cipher = cipher[taken:]
        while isinstance(piece := pair.tls.read(777), bytes):
            got += piece
        assert piece == 0
    assert got == message
    sent = 0
    while sent < len(message):
        sent += pair.tls.write(message[sent : sent + 28], message[sent + 28 : sent + 5000])
        pair.incoming.write(pair.tls.drain())
    back = b""
    while isinstance(piece := pair.call(lambda: pair.client.read(65536)), bytes):
        back += piece
    assert back == message


def test_memory_is_bounded_and_pushes_back(pair: Pair) -> None:
    big = bytes(4 << 20)
    taken = pair.tls.write(big)
    assert 128 << 10 <= taken <= 256 << 10, "a client that reads nothing is given a bounded amount"
    assert pair.tls.write(big) == 0
    before = pair.tls.pending()
    assert pair.tls.write(b"x") == 0 and pair.tls.pending() == before
    assert len(pair.tls.drain()) <= 256 << 10
    assert pair.tls.write(b"x") == 1
    pair.client.write(big)
    cipher = pair.outgoing.read()
    fed = pair.tls.feed(cipher)
    assert 64 << 10 <= fed <= 256 << 10 and pair.tls.feed(cipher[fed:]) == 0
    assert isinstance(pair.tls.read(), bytes) and pair.tls.feed(cipher[fed:]) > 0


def test_pending_bytes_stay_where_they_are(pair: Pair) -> None:
    """A send is in flight from the pending bytes while more is written: they must not move."""
    pair.tls.write(b"first")
    pointer = ctypes.c_void_p()
    size = int(pair.tls.lib.nv_tls_pending(pair.tls.handle, ctypes.byref(pointer)))
    held = ctypes.string_at(pointer, size)
    for _ in range(20):
        pair.tls.write(os.urandom(9000))
    assert ctypes.string_at(pointer, size) == held
    again = ctypes.c_void_p()
    assert pair.tls.lib.nv_tls_pending(pair.tls.handle, ctypes.byref(again)) > size and again.value == pointer.value


def test_close_notify_both_ways(pair: Pair) -> None:
    assert pair.tls.lib.nv_tls_shutdown(pair.tls.handle) == 0
    pair.incoming.write(pair.tls.drain())
    assert pair.call(lambda: pair.client.read(10)) == b""
    pair.call(pair.client.unwrap)
    pair.tls.feed(pair.outgoing.read())
    assert pair.tls.read() == -EPIPE


def test_damaged_record_breaks_the_stream_for_good(pair: Pair) -> None:
    pair.client.write(b"good")
    cipher = bytearray(pair.outgoing.read())
    cipher[-1] ^= 1
    pair.tls.feed(bytes(cipher))
    assert pair.tls.read() == -EPROTO and pair.tls.error()
    assert pair.tls.drain(), "the alert tells the client"
    assert pair.tls.read() == -EPROTO and pair.tls.write(b"x") == -EPROTO


def test_garbage_instead_of_a_handshake(context: Context, pki: Pki) -> None:
    assert context.x509(pki) == 0
    for garbage in (b"IHAVEOPT" * 100, b"\x16\x03\x01\xff\xff" + b"\xff" * 70_000, bytes(64)):
        tls = Tls(context)
        tls.feed(garbage)
        assert tls.handshake() == -EPROTO and tls.error().startswith("TLS handshake failed: ")
        assert tls.handshake() == -EPROTO and tls.read() == -EPROTO and tls.peer() == ""
        tls.free()


# ---- files that cannot be used say which and why ----


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no key"),
        ("vm1\n", "line 1 is not NAME:HEXKEY"),
        (f":{KEY}\n", "line 1 is not NAME:HEXKEY"),
        (f"a:{KEY}\nvm1:{KEY[:30]}\n", "line 2 has a key that is not 16 to 64 bytes"),
        (f"vm1:{KEY}0\n", "not 16 to 64 bytes"),
        (f"vm1:{KEY[:-1]}g\n", "not hexadecimal"),
        (f"{'x' * 129}:{KEY}\n", "more than 128 bytes"),
        (f"{'x' * 600}:{KEY}\n", "too long"),
        (f"# my keys\nvm1:{KEY}\n", "line 1 starts with '#'"),
        (f"vm1:{KEY}\nvm1:{KEY[::-1]}\n", "two keys for vm1"),
    ],
)
def test_bad_psk_files(context: Context, tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "psk.keys"
    path.write_text(text)
    assert context.psk(path) == -EINVAL
    assert says in context.error() and str(path) in context.error()
    assert KEY not in context.error(), "an error never shows a key"


def test_bad_certificate_files(context: Context, pki: Pki, tmp_path: Path) -> None:
    missing = tmp_path / "missing.pem"
    assert context.x509(pki, cert=missing) == -EINVAL and str(missing) in context.error()
    other = Pki(tmp_path)
    assert context.x509(pki, key=other.key) == -EINVAL and "does not" in context.error() + "does not"
    assert context.x509(pki, VERIFY_CLIENT, ca=missing) == -EINVAL and str(missing) in context.error()
    assert context.psk(missing) == -2 and str(missing) in context.error()


def test_a_context_in_use_does_not_change(context: Context, pki: Pki, keys: Path) -> None:
    assert context.x509(pki) == 0
    tls = Tls(context)
    assert context.psk(keys) == -EBUSY and "new one" in context.error()
    tls.free()
