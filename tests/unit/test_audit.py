"""What `make audit` makes of the answers of pip-audit and apt."""

import json
from pathlib import Path

import pytest

from tests import audit

MADISON = """\
   libssl3 | 3.0.22-1~deb12u2 | http://archive.example/debian-security bookworm-security/main amd64 Packages
   libssl3 | 3.0.20-1~deb12u2 | http://archive.example/debian bookworm/main amd64 Packages
   libssl3 | 3.5.1-1 | http://archive.example/debian trixie/main amd64 Packages
     bash | 5.2.15-2+b10 | http://archive.example/debian bookworm/main amd64 Packages
linux-image-cloud-amd64 | 6.1.192-3 | http://archive.example/debian-security bookworm-security/main amd64 Packages
"""


def programs(directory: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    for name, script in scripts.items():
        file = directory / name.replace("_", "-")
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")


def test_vulnerabilities_are_listed() -> None:
    """Each finding has the package, the finding's name, and the version that mends it."""
    vulns = [{"id": "PYSEC-1", "fix_versions": ["2.20"]}, {"id": "PYSEC-2", "fix_versions": []}]
    packages = [{"name": "a", "version": "1", "vulns": []}, {"name": "b", "version": "2.19", "vulns": vulns}]
    assert audit.vulnerabilities(json.dumps({"dependencies": packages})) == [
        "b 2.19: PYSEC-1, mended in 2.20",
        "b 2.19: PYSEC-2, mended in no version",
    ]


def test_an_index_without_data_is_no_good_news(tmp_path: Path) -> None:
    """Packages that the index says nothing of are told. So is a pip-audit that fails or is missing."""
    with pytest.raises(audit.Unseen, match="nothing of 1 of 1 packages: a"):
        audit.vulnerabilities(json.dumps({"dependencies": [{"name": "a", "skip_reason": "not found"}]}))
    broken = tmp_path / "pip-audit"
    broken.write_text("#!/bin/sh\necho no route to host >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(audit.Unseen, match="no route to host"):
        audit.look_at_lock(str(broken), Path("x.lock"))
    with pytest.raises(audit.Unseen, match="No such file"):
        audit.look_at_lock(str(tmp_path / "gone"), Path("x.lock"))


def test_security_updates_that_an_image_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages are compared with the guests' own release, the kernel by the package that follows it."""
    (tmp_path / "madison").write_text(MADISON)
    programs(tmp_path, monkeypatch, apt_cache=f"cat {tmp_path}/madison")
    kernel = "linux-image-6.1.0-9-cloud-amd64_6.1.27-1_amd64.deb"
    (tmp_path / "packages").write_text(f"{kernel}\nlibssl3:amd64\t3.0.20-1~deb12u2\nbash\t5.2.15-2+b10\n")
    assert [line.partition(";")[0] for line in audit.look_at_image(tmp_path)] == [
        "linux-image-cloud-amd64 6.1.27-1: bookworm has 6.1.192-3",
        "libssl3 3.0.20-1~deb12u2: bookworm has 3.0.22-1~deb12u2",
    ]
    (tmp_path / "packages").write_text("busybox-static_1%3a1.35.0-4_amd64.deb\n")
    with pytest.raises(audit.Unseen, match="knows nothing of busybox-static"):
        audit.look_at_image(tmp_path)
    assert audit.installed((tmp_path / "packages").read_text()) == {"busybox-static": "1:1.35.0-4"}
    (tmp_path / "madison").write_text(MADISON.replace("bookworm-security", "trixie-security"))
    with pytest.raises(audit.Unseen, match="no security updates of bookworm"):
        audit.look_at_image(tmp_path)


@pytest.mark.parametrize(
    ("python", "status"), [("ok", 0), ("found", 1), ("unseen", 2)], ids=["nothing found", "something found", "not seen"]
)
def test_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], python: str, status: int
) -> None:
    """0 means that all was looked at and nothing was found."""
    answers = {
        "ok": [{"name": "a", "version": "1", "vulns": []}],
        "found": [{"name": "a", "version": "1", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2"]}]}],
        "unseen": [{"name": "a", "skip_reason": "not found"}],
    }
    (tmp_path / "answer").write_text(json.dumps({"dependencies": answers[python]}))
    programs(tmp_path, monkeypatch, pip_audit=f"cat {tmp_path}/answer", apt_get="exit 0")
    monkeypatch.setenv("CELLVM_CACHE_DIR", str(tmp_path / "cache"))
    assert audit.main(str(tmp_path / "pip-audit"), "a.lock") == status
    said = capsys.readouterr().out
    assert ("NOT SEEN" in said, "PYSEC-1" in said) == (python == "unseen", python == "found")
