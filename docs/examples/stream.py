"""Run a cell and follow it live, through lost connections: python stream.py SANDBOX_ID "CODE"."""

import json
import os
import sys
import uuid

from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import connect

base, key = os.environ["CELLVM_URL"].replace("http", "ws", 1), os.environ["CELLVM_API_KEY"]
run = {"type": "execute", "id": uuid.uuid4().hex, "code": sys.argv[2]}
seen = since = ""
while seen != "end":
    try:
        with connect(f"{base}/sandboxes/{sys.argv[1]}/stream{since}", max_size=None,
                     additional_headers={"Authorization": f"Bearer {key}"}) as socket:  # fmt: skip
            socket.send(json.dumps(run))  # sent again after a reconnect, because the same id runs once
            for event in map(json.loads, socket):
                since = f"?since={event['seq']}"
                if event.get("id") != run["id"]:
                    continue
                print(event.get("text") or event.get("data") or event.get("error") or "", end="", flush=True)
                if (seen := event["type"]) == "input_request":
                    socket.send(json.dumps({"type": "input", "text": input(event["prompt"])}))
                if seen in ("end", "refused"):
                    sys.exit(seen == "refused")
    except (ConnectionClosedError, OSError) as error:
        print(f"[{error}; connecting again]", file=sys.stderr)
