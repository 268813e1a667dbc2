"""`make siege`: the long form. The curve and the figures go to test-results/."""

import argparse
import asyncio
import json
import tempfile
from pathlib import Path

from tests.siege.attackers import ATTACKS
from tests.siege.siege import besieged

RESULTS = Path("test-results")


def main() -> None:
    """Run a siege and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quiet", type=float, default=60, help="seconds of peace before it (default: 60)")
    parser.add_argument("--seconds", type=float, default=600, help="seconds of siege (default: 600)")
    parser.add_argument("--attacks", default=ATTACKS, help=f"which ones, with commas (default: {ATTACKS})")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="siege-") as directory:
        siege, figures = asyncio.run(besieged(Path(directory), options.quiet, options.seconds, options.attacks))
    (RESULTS / "siege.svg").write_text(siege.drawn())
    raw = {"attacked": siege.attacked.samples, "peer": siege.peer.samples, "memory": siege.memory}
    (RESULTS / "siege.json").write_text(json.dumps({**figures, "samples": raw}))
    print(json.dumps(figures, indent=1))


main()
