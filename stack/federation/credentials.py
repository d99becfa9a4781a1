"""Keys and certificates of a federation: TLS for the coordinator, a key pair for each silo, one that signs bundles.

Formats are Flower's: PEM for TLS, OpenSSH for the keys of SuperNodes (EC P-384) and of bundles (Ed25519).
"""

import ipaddress
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from services.common.files import replace_file
from services.contracts.errors import ConfigError

PRIVATE = 0o600
SIGNER_ID = "fpk_fedward"  # the name under which SuperNodes know the key that signs bundles


@dataclass(frozen=True)
class Credentials:
    """The files of one federation. Those of a silo are its own; the coordinator gets their public halves only."""

    folder: Path

    @property
    def authority(self) -> Path:
        """The certificate that every party trusts."""
        return self.folder / "authority.pem"

    @property
    def server_certificate(self) -> Path:
        """The coordinator's certificate."""
        return self.folder / "coordinator.pem"

    @property
    def server_key(self) -> Path:
        """Its private key."""
        return self.folder / "coordinator.key"

    @property
    def server_bundle(self) -> Path:
        """Certificate and key in one file, as HAProxy reads them."""
        return self.folder / "coordinator-bundle.pem"

    @property
    def signing_key(self) -> Path:
        """The private key that signs bundles; it need not be on the coordinator's machine."""
        return self.folder / "signer.key"

    @property
    def trusted_entities(self) -> Path:
        """Flower's list of the keys whose bundles a SuperNode runs."""
        return self.folder / "trusted-entities.yaml"

    def silo_key(self, name: str) -> Path:
        """A silo's private key; the public one lies beside it, with ``.pub``."""
        return self.folder / f"{name}.key"

    def task_secret(self, name: str) -> Path:
        """What a SuperExec has to know to take tasks from the SuperLink or SuperNode of that name."""
        return self.folder / f"{name}.secret"


def make_credentials(credentials: Credentials, hosts: Sequence[str], silos: Sequence[str]) -> None:
    """Make what is missing: silos keep their keys, which are registered; certificates are made anew.

    Args:
        credentials: where the files go; private ones are for this user only (mode 600).
        hosts: names and addresses that the coordinator is reached by.
        silos: names of the silos.

    Raises:
        OSError: a file cannot be written.
    """
    credentials.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    make_certificates(credentials, hosts, timedelta(days=30))
    for name in silos:
        if not credentials.silo_key(name).exists():
            _write_key_pair(credentials.silo_key(name), ec.generate_private_key(ec.SECP384R1()))
    for name in ("coordinator", *silos):
        if not credentials.task_secret(name).exists():
            replace_file(credentials.task_secret(name), secrets.token_bytes(32), mode=PRIVATE)
    if not credentials.signing_key.exists():
        _write_key_pair(credentials.signing_key, ed25519.Ed25519PrivateKey.generate())
    public = credentials.signing_key.with_suffix(".key.pub").read_text().strip()
    replace_file(credentials.trusted_entities, json.dumps({SIGNER_ID: public}).encode())  # JSON is YAML


def make_certificates(credentials: Credentials, hosts: Sequence[str], lifetime: timedelta) -> None:
    """Make an authority and the coordinator's certificate; the authority's key is thrown away.

    A ``lifetime`` below zero gives a certificate that has expired.
    """
    now = datetime.now(UTC)
    start, end = now - timedelta(days=1) + min(lifetime, timedelta()), now + lifetime
    authority_key, server_key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    authority_name = _name("Fedward federation")
    authority = (
        _certificate(authority_name, authority_name, authority_key, start, end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(authority_key, hashes.SHA384())
    )
    server = (
        _certificate(_name("Fedward coordinator"), authority_name, server_key, start, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(authority_key, hashes.SHA384())
    )
    pem = serialization.Encoding.PEM
    key = server_key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    certificate = server.public_bytes(pem)
    replace_file(credentials.authority, authority.public_bytes(pem))
    replace_file(credentials.server_certificate, certificate)
    replace_file(credentials.server_key, key, mode=PRIVATE)
    replace_file(credentials.server_bundle, certificate + key, mode=PRIVATE)


def certificate_end(path: Path) -> datetime:
    """When the certificate in a PEM file ends.

    Raises:
        ConfigError: the file holds no certificate, or cannot be read.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: no certificate in PEM format") from error


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, start: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write_key_pair(path: Path, key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> None:
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    replace_file(path, private, mode=PRIVATE)
    replace_file(path.with_suffix(".key.pub"), public + b"\n")
