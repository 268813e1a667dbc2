"""`cellvm certs`: a certificate authority of one's own, and a certificate for all names of a domain.

The authority's key is as long-lived as the authority and lies beside it, readable by its owner alone. Whoever has the
key can pretend to be any server to those who trust the authority, so the authority may sign names of this domain
and of this machine alone.
"""

import os
import socket
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_DAYS, DAYS = 3650, 397
"""Days that an authority and a certificate are valid. Some clients take no certificate of more than 398."""
LOOPBACK = ("127.0.0.1", "::1")
RENEW = 30
"""Days before its end from which on a certificate is due."""


class Files(NamedTuple):
    """Where the authority, its key and the server's certificate with its key are."""

    authority: Path
    authority_key: Path
    server: Path

    @classmethod
    def of(cls, directory: Path) -> "Files":
        return cls(directory / "ca.pem", directory / "ca.key", directory / "server.pem")


def make(directory: Path, domain: str, *, renew: bool = False) -> tuple[Files, bool]:
    """A certificate for `*.domain`, by the authority in a directory, and whether it is a new one.

    One that is there is taken if it is for the domain and for RENEW more days. An authority that is missing, is for
    another domain, or ends before the certificate would, is made anew.

    Args:
        domain: a name without a port.
        renew: make a new certificate in any case.

    Raises:
        OSError: the files can't be written.
        ValueError: what is in the directory is no authority.
    """
    files, now = Files.of(directory), datetime.now(UTC)
    is_there = files.authority.exists() and files.authority_key.exists() and _fits(files.authority, domain, now)
    if is_there and not renew and files.server.exists():
        known = read(files.server)
        if f"*.{domain}" in names(known) and days_left(known) > RENEW:
            return files, False
    if not is_there:
        key = ec.generate_private_key(ec.SECP256R1())
        files.server.unlink(missing_ok=True)  # no later run may take it for one of the new authority's
        write(files.authority_key, _pem(key))
        write(files.authority, _authority(key, domain, now).public_bytes(Encoding.PEM))
    authority = read(files.authority)
    authority_key = load_pem_private_key(files.authority_key.read_bytes(), None)
    if not isinstance(authority_key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{files.authority_key} is no key of `cellvm certs`")
    key = ec.generate_private_key(ec.SECP256R1())
    made = _signed(key, domain, authority, authority_key, now)
    write(files.server, made.public_bytes(Encoding.PEM) + _pem(key))
    return files, True


def read(path: Path) -> x509.Certificate:
    """The first certificate of a file.

    Raises:
        OSError: the file can't be read.
        ValueError: it has none.
    """
    return x509.load_pem_x509_certificates(path.read_bytes())[0]


def names(certificate: x509.Certificate) -> list[str]:
    """The host names that a certificate is for."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return found.value.get_values_for_type(x509.DNSName)


def days_left(certificate: x509.Certificate) -> float:
    """Days until its end; negative after it."""
    return (certificate.not_valid_after_utc - datetime.now(UTC)) / timedelta(days=1)


def resolves(name: str) -> bool:
    """Whether this machine's resolver knows a name, as Python and Node ask it."""
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return False
    return True


def write(path: Path, data: bytes) -> None:
    """Write a file whose owner alone may read it. It is there with all of the data, or as it was."""
    new = path.with_name(f".{path.name}-{os.getpid()}")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
    new.replace(path)


def _fits(path: Path, domain: str, now: datetime) -> bool:
    """Whether an authority may sign a certificate of that domain, and outlives it.

    Raises:
        ValueError: it is none of this command's.
    """
    authority = read(path)
    try:
        allowed = authority.extensions.get_extension_for_class(x509.NameConstraints).value.permitted_subtrees or []
    except x509.ExtensionNotFound:
        raise ValueError(f"{path} is no authority of `cellvm certs`") from None
    return x509.DNSName(domain) in allowed and authority.not_valid_after_utc > now + timedelta(days=DAYS)


def _authority(key: ec.EllipticCurvePrivateKey, domain: str, now: datetime) -> x509.Certificate:
    """A certificate that signs itself, and others for one domain and this machine's own names."""
    permitted = [
        x509.DNSName(domain),
        x509.DNSName("localhost"),
        *(x509.IPAddress(ip_network(each)) for each in LOOPBACK),
    ]
    name = _name(f"CellVM authority for {domain}")
    return (
        _builder(name, name, key, now, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.NameConstraints(permitted, None), critical=True)
        .sign(key, hashes.SHA256())
    )


def _signed(
    key: ec.EllipticCurvePrivateKey,
    domain: str,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    now: datetime,
) -> x509.Certificate:
    """A server's certificate for a domain, all names one step below it, and this machine's own."""
    own = [
        *(x509.DNSName(each) for each in (f"*.{domain}", domain, "localhost")),
        *(x509.IPAddress(ip_address(each)) for each in LOOPBACK),
    ]
    return (
        _builder(_name(domain), authority.subject, key, now, DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.SubjectAlternativeName(own), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # clocks differ
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
