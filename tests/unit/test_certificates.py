"""`cellvm certs`, and what `cellvm doctor` says of names and certificates."""

import socket
import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from kernel_gateway import certificates, host
from kernel_gateway.__main__ import main
from kernel_gateway.settings import Settings

DOMAIN = "sbx.example.com"


def levels(settings: Settings) -> list[str]:
    return [each.level for each in host._names(settings)]


def shake_hands(files: certificates.Files, name: str) -> None:
    """Let a client that trusts the authority connect to a server of that name, without a network."""
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(files.server)
    client = ssl.create_default_context(cafile=files.authority)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    pipes = [ssl.MemoryBIO() for _ in range(2)]
    ends = [client.wrap_bio(*pipes, server_hostname=name), server.wrap_bio(*pipes[::-1], server_side=True)]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue


def test_what_it_is_for(tmp_path: Path) -> None:
    """The certificate is for the names of sandboxes, the domain and this machine, and for no others."""
    files, is_new = certificates.make(tmp_path, DOMAIN)
    assert is_new
    for name in (f"8000-sbx1.{DOMAIN}", DOMAIN, f"api.{DOMAIN}", "localhost", "127.0.0.1", "::1"):
        shake_hands(files, name)
    for name in ("example.com", f"a.b.{DOMAIN}", "127.0.0.2", "a.localhost"):
        with pytest.raises(ssl.SSLCertVerificationError):
            shake_hands(files, name)
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {path.name for path in tmp_path.iterdir()} == {"ca.pem", "ca.key", "server.pem"}


def test_an_authority_that_signs_another_name(tmp_path: Path) -> None:
    """Clients that trust the authority believe nothing that it signs for other domains."""
    files, _ = certificates.make(tmp_path, DOMAIN)
    authority = certificates.read(files.authority)
    key = certificates.load_pem_private_key(files.authority_key.read_bytes(), None)
    forged = certificates._signed(key, "bank.example", authority, key, datetime.now(UTC))  # type: ignore[arg-type]
    certificates.write(files.server, forged.public_bytes(certificates.Encoding.PEM) + certificates._pem(key))  # type: ignore[arg-type]
    with pytest.raises(ssl.SSLCertVerificationError, match="permitted subtree"):
        shake_hands(files, "bank.example")


def test_an_authority_of_somebody_else(tmp_path: Path) -> None:
    """What `cellvm certs` has not made is refused, and stays as it is."""
    files, _ = certificates.make(tmp_path, DOMAIN)
    foreign = files.server.read_bytes()
    files.authority.write_bytes(foreign)
    with pytest.raises(ValueError, match="no authority of `cellvm certs`"):
        certificates.make(tmp_path, DOMAIN)
    assert files.authority.read_bytes() == foreign


def test_renewal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A good certificate stays. One that is due, or on request, is replaced, and the authority stays, so clients do."""
    files, _ = certificates.make(tmp_path, DOMAIN)
    first, authority = files.server.read_bytes(), files.authority.read_bytes()
    assert certificates.make(tmp_path, DOMAIN) == (files, False)
    assert files.server.read_bytes() == first
    assert certificates.make(tmp_path, DOMAIN, renew=True) == (files, True)
    second = files.server.read_bytes()
    monkeypatch.setattr(certificates, "RENEW", 400)
    assert certificates.make(tmp_path, DOMAIN)[1]
    assert len({first, second, files.server.read_bytes()}) == 3
    assert files.authority.read_bytes() == authority
    assert certificates.make(tmp_path, "other.example.com")[1]
    assert files.authority.read_bytes() != authority
    shake_hands(files, "a.other.example.com")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It prints what to start and what to paste. `e2b env` then names the authority."""
    flags = ["--data-dir", str(tmp_path)]
    assert main(["certs", *flags]) == 0
    server, authority = tmp_path / "certificates/server.pem", tmp_path / "certificates/ca.pem"
    printed = capsys.readouterr().out
    assert f"cellvm serve --domain sbx.localhost:8443 --port 8443 --tls-cert {server}\n" in printed
    for line in ("E2B_DOMAIN=sbx.localhost:8443", f"SSL_CERT_FILE={authority}", f"NODE_EXTRA_CA_CERTS={authority}"):
        assert f"export {line}" in printed
    assert main(["e2b", "env", *flags, "--domain", "sbx.localhost:8443", "--tls-cert", str(server)]) == 0
    assert f"export SSL_CERT_FILE={authority}" in capsys.readouterr().out
    authority.write_text("nonsense")
    assert main(["certs", *flags]) == 1
    assert "delete what is there" in capsys.readouterr().err


def test_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells whether names resolve, and whether the certificate is for them and for how long."""
    files, _ = certificates.make(tmp_path, DOMAIN)
    good = Settings(domain=f"{DOMAIN}:8443", tls_cert=str(files.server))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    assert levels(Settings()) == ["ok"]
    assert levels(good) == ["ok", "ok"]
    assert levels(Settings(domain="other.example.com", tls_cert=str(files.server))) == ["ok", "warn", "ok"]
    assert levels(Settings(tls_cert=str(tmp_path / "none"))) == ["ok", "fail"]
    now = datetime.now(UTC) - timedelta(days=certificates.DAYS)
    for later, level in ((10, "warn"), (-1, "fail")):
        key = certificates.load_pem_private_key(files.authority_key.read_bytes(), None)
        authority = certificates.read(files.authority)
        made = certificates._signed(key, DOMAIN, authority, key, now + timedelta(days=later))  # type: ignore[arg-type]
        files.server.write_bytes(made.public_bytes(certificates.Encoding.PEM))
        assert levels(good) == ["ok", level]

    def fails(*_: object) -> None:
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", fails)
    assert next(each.meaning for each in host._names(Settings())).startswith("browsers")
    assert levels(Settings(domain="sbx.example.com")) == ["warn"]
