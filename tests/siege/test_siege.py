"""The short form of the siege. Times are for `make siege`, because they mean little beside other work."""

from pathlib import Path

import pytest

from tests.siege.attackers import FLOODS
from tests.siege.siege import STEPS, besieged


@pytest.mark.alone
async def test_a_tenant_does_not_notice_a_siege(tmp_path: Path) -> None:
    """Under everything at once no request of the tenant fails, memory is bounded, and a minute later all is over."""
    siege, figures = await besieged(tmp_path, 3, 25)
    assert figures["errors"] == siege.peer.errors == []
    assert figures["memory"]["peak"] - figures["memory"]["before"] <= 384 * 1024 * 1024, figures
    assert figures["recovered"] is not None
    assert set(figures["p95"]) == set(STEPS)
    did = figures["attackers"]
    for attack in ("floods sent", "queue", "messages", "service", "strangers", "429"):
        assert did.get(attack, 0) > 0, f"no {attack}: {did}"
    assert sum(did.get(f"flood {kind}", 0) for kind in FLOODS) >= 2, did
