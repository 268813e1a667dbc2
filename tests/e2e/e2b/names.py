"""E2B's SDK reaches sandboxes by names: python names.py PROXY. E2B_DOMAIN and SSL_CERT_FILE are set."""

import os
import sys
from typing import Any

from e2b_code_interpreter import Sandbox

options: dict[str, Any] = {"proxy": sys.argv[1]}
with Sandbox.create(timeout=60, **options) as box:
    assert box.run_code("1 + 1").text == "2"
    assert box.commands.run("echo hello").stdout == "hello\n"
    box.files.write("a", "content")
    assert box.files.read("a") == "content"
    assert box.get_host(8000) == f"8000-{box.sandbox_id}.{os.environ['E2B_DOMAIN']}"
    assert box.is_running()
    same = Sandbox.connect(box.sandbox_id, **options)
    assert same.commands.run("cat a").stdout == "content"
sys.stdout.flush()
os._exit(0)  # the SDK's HTTP client now and then aborts while the interpreter ends
