"""`cellvm e2b env` prints what a program for E2B needs."""

import pytest

from kernel_gateway.__main__ import main


def test_one_address(capsys: pytest.CaptureFixture[str]) -> None:
    """Without TLS the lines name the server's address twice."""
    assert main(["e2b", "env", "--port", "9000"]) == 0
    printed = capsys.readouterr().out
    assert "export E2B_API_URL=http://127.0.0.1:9000\nexport E2B_SANDBOX_URL=http://127.0.0.1:9000\n" in printed
    assert "from e2b_code_interpreter import Sandbox" in printed
    assert "from '@e2b/code-interpreter'" in printed


def test_names(capsys: pytest.CaptureFixture[str]) -> None:
    """With TLS they name the domain."""
    assert main(["e2b", "env", "--domain", "sbx.example.com:8443", "--tls-cert", "x.pem"]) == 0
    assert "export E2B_DOMAIN=sbx.example.com:8443\n" in capsys.readouterr().out
