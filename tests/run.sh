#!/bin/sh
# `make test`: checks, then the templates, then all tests, the fast ones first. Stops at the first part that fails.
set -eu
bin=${VENV:-.venv}/bin
export PYTHONASYNCIODEBUG=1
"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/mypy"
"$bin/cellvm" build
exec "$bin/python" -m pytest tests/unit tests/api tests/contract tests/guest tests/e2e
