"""Forks and snapshots of a real machine: each copy has all that its parent had, and is a sandbox of its own."""

import json
import time

from tests.guest.client import Sandbox, Server

START = """
import numpy as np, os, pandas as pd, random, secrets, socket, ssl, tempfile, uuid
df = pd.DataFrame({"a": np.arange(100_000), "b": np.random.rand(100_000)})
random.seed(1); np.random.seed(1)
os.environ["MINE"] = "kept"
open("mine", "w").write("parent")
"""
DRAW = """
found = {"random": random.random(), "numpy": float(np.random.rand()), "uuid": str(uuid.uuid4()),
  "secret": secrets.token_hex(8), "tls": ssl.RAND_bytes(8).hex(), "urandom": os.urandom(8).hex(),
  "name": tempfile.mktemp(), "host": socket.gethostname(), "machine": open("/etc/machine-id").read(),
  "boot": open("/proc/sys/kernel/random/boot_id").read(), "id": os.environ["E2B_SANDBOX_ID"],
  "session": get_ipython().kernel.session.session}
found
"""


def test_copies(server: Server) -> None:
    """R19: three forks and a start from a snapshot: the DataFrame is there, what must differ does, and files part."""
    with server.sandbox() as parent:
        parent.execute(START, timeout=120)
        beating = {"cmd": "sh", "args": ["-c", "while :; do date >> /tmp/beats; sleep 0.2; done"], "tag": "beat"}
        assert parent.post("/commands", json=beating).status_code == 201
        answer = parent.post("/fork", json={"count": 3, "timeout": 600})
        assert answer.status_code == 201, answer.text
        copies = [Sandbox(server, each["sandbox"]) for each in answer.json()]
        answer = parent.post("/snapshots", json={"name": "with-frame"})
        assert answer.status_code == 201, answer.text
        try:
            draws = [parent.value(DRAW, timeout=60)]
            for number, box in enumerate(copies):
                assert box.value("[*df.shape]", timeout=60) == [100_000, 2]
                assert box.value("[os.environ['MINE'], open('mine').read()]") == ["kept", "parent"]
                assert abs(box.value("__import__('time').time()") - time.time()) < 0.5 + 2 * server.scale
                draws.append(box.value(DRAW, timeout=60))
                box.execute(f"open('mine', 'w').write('{number}'); df.loc[0, 'a'] = {number + 7}")
            for name in draws[0]:
                assert len({json.dumps(each[name]) for each in draws}) == len(draws), (name, draws)
            assert [each["id"] for each in draws[1:]] == [box.id for box in copies]
            for number, box in enumerate(copies):
                assert box.value("[open('mine').read(), int(df.loc[0, 'a'])]") == [str(number), number + 7]
                assert box.get("/commands/beat").json()["status"] == "running"
                beats = int(box.shell("wc -l < /tmp/beats; sleep 1").split()[0])
                assert int(box.shell("wc -l < /tmp/beats").split()[0]) > beats
            assert parent.value("[open('mine').read(), int(df.loc[0, 'a'])]") == ["parent", 0]
            for box in copies:
                assert server.request("DELETE", f"/sandboxes/{box.id}").status_code == 204
            with server.sandbox("with-frame") as other:
                assert other.value("[*df.shape, open('mine').read()]", timeout=60) == [100_000, 2, "parent"]
                assert other.value(DRAW, timeout=60)["random"] not in [each["random"] for each in draws]
        finally:
            assert server.request("DELETE", "/snapshots/with-frame").status_code == 204
