"""A certificate authority for tests: server, clients by name, an expired and a foreign one, and PSKs."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PSK = {"vm1": "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff", "vm2": "0f" * 32, "ghost": "1e" * 32}
"""Identity → hex key. `ghost` is a valid identity of no VM."""
DAY = datetime.timedelta(days=1)


class Authority:
    """One certificate authority."""

    def __init__(self, name: str) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = (
            self._builder(self.name, self.key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_usage(sign=True), critical=True)
            .sign(self.key, hashes.SHA256())
        )

    def _builder(self, name: x509.Name, key: ec.EllipticCurvePrivateKey, days: int = 3650) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        end = now + days * DAY
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(min(now, end) - DAY)
            .not_valid_after(end)
        )

    def issue(
        self, folder: Path, role: str, common_name: str, *, days: int = 3650, addresses: Sequence[str] = ("127.0.0.1",)
    ) -> None:
        """Write `ROLE-cert.pem` and `ROLE-key.pem` (role: server or client) and the CA's `ca-cert.pem`."""
        folder.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if role == "server" else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = (
            self._builder(name, key, days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(sign=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        )
        if role == "server":
            names: list[x509.GeneralName] = [
                x509.DNSName("localhost"),
                *(x509.IPAddress(ipaddress.ip_address(one)) for one in addresses),
            ]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(self.key, hashes.SHA256())
        (folder / "ca-cert.pem").write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))
        (folder / f"{role}-cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path = folder / f"{role}-key.pem"
        path.write_bytes(pem)
        path.chmod(0o600)


def _usage(*, sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign,
        crl_sign=sign,
        encipher_only=False,
        decipher_only=False,
    )


def make_pki(folder: Path) -> Path:
    """Fill a folder: the server's files, `clients/NAME/` for vm1, vm2, nobody, expired and stranger, `psk.keys`."""
    authority = Authority("nbdvvol test authority")
    authority.issue(folder, "server", "localhost")
    for name in ("vm1", "vm2", "nobody"):
        authority.issue(folder / "clients" / name, "client", name)
    authority.issue(folder / "clients" / "expired", "client", "vm1", days=-1)
    stranger = folder / "clients" / "stranger"
    Authority("somebody else").issue(stranger, "client", "vm1")
    (stranger / "ca-cert.pem").write_bytes((folder / "ca-cert.pem").read_bytes())
    keys = folder / "psk.keys"
    keys.write_text("".join(f"{name}:{key}\n" for name, key in PSK.items()))
    keys.chmod(0o600)
    for name, key in PSK.items():
        _psk_folder(folder, name, name, key)
    _psk_folder(folder, "wrong-key", "vm1", "ab" * 32)
    return folder


def _psk_folder(folder: Path, label: str, name: str, key: str) -> None:
    path = folder / "psk" / label / "keys.psk"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{name}:{key}\n")
    path.chmod(0o600)


def client_context(pki: Path, name: str | None) -> ssl.SSLContext:
    """OpenSSL's side of a client with the certificate of `name`, or with none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(pki / "ca-cert.pem")
    if name is not None:
        client = pki / "clients" / name
        context.load_cert_chain(client / "client-cert.pem", client / "client-key.pem")
    return context
