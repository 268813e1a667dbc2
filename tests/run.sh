#!/bin/sh
# `make test` runs checks, builds the templates, then runs all tests. `make test-fast` (argument `fast`) runs the tests
# that need no machine, `make test-full` (argument `full`) those of `code_interpreter_full`, and `make frameworks`
# (argument `frameworks`) those of frameworks on E2B's API. Several processes share the tests, because many tests wait.
# Tests marked `alone` come last, one after the other. A check or a build that fails ends the run. All tests run even if
# some fail, because one run should show all failures.
set -eu
bin=${VENV:-.venv}/bin
export PYTHONASYNCIODEBUG=1
fast="tests/unit tests/api tests/contract tests/siege"
machines="tests/guest tests/e2e"
failed=0

phase() {
    echo "== pytest $*"
    "$bin/python" -m pytest "$@" || failed=1
}

beside() {  # the number of processes, then the tests
    processes=$1
    shift
    phase -n "${WORKERS:-$processes}" --dist loadfile --no-loadscope-reorder -m "not alone and not full and not frameworks" "$@"
}

alone() {
    phase -m alone $(grep -rl --include="test_*.py" "mark\.alone" "$@")
}

if [ "${1:-}" = fast ]; then
    beside 3 $fast
    alone $fast
    exit $failed
fi
if [ "${1:-}" = frameworks ]; then
    phase tests/e2e/test_e2b_frameworks.py
    exit $failed
fi
if [ "${1:-}" = full ]; then
    phase -m full $machines
    exit $failed
fi
"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/mypy"
"$bin/cellvm" build
beside 3 $fast
beside 2 $machines
alone $fast $machines
exit $failed
