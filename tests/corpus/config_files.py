"""Settings from TOML, INI, JSON, YAML and the environment, merged in their order, with a schema."""

# %%
import configparser
import json
import os
import tomllib
from collections import ChainMap
from pathlib import Path

import yaml
from jsonschema import Draft202012Validator

Path("a.toml").write_text('[server]\nport = 8080\nhosts = ["a", "b"]\nstarted = 2024-03-01\n')
Path("b.ini").write_text("[server]\nport = 9090\n; a comment\nname = %(port)s-box\n")
Path("c.yaml").write_text("server:\n  debug: yes\n  levels: &l [1, 2]\n  again: *l\n  text: |\n    two\n    lines\n")
os.environ["APP_SERVER"] = json.dumps({"port": 7070})

# %%
toml = tomllib.loads(Path("a.toml").read_text())["server"]
ini = configparser.ConfigParser()
ini.read("b.ini")
layers = [
    json.loads(os.environ["APP_SERVER"]),
    yaml.safe_load(Path("c.yaml").read_text())["server"],
    dict(ini["server"]),
    toml,
]
merged = dict(ChainMap(*layers))
for name in sorted(merged):
    print(f"{name} = {merged[name]!r}")

# %%
SCHEMA = {"type": "object", "properties": {"port": {"type": "integer", "maximum": 1000}, "debug": {"type": "string"}}}
for error in sorted(Draft202012Validator(SCHEMA).iter_errors(merged), key=lambda error: list(error.path)):
    print(list(error.path), error.message)
merged["port"]
