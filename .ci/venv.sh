#!/bin/sh
# Makes the virtual environment ($2) with everything the lock file pins, by the interpreter $1. As root on Debian it
# installs python3-venv first where that is missing.
set -eu
python=$1 venv=$2
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "CellVM needs Python 3.11 or newer" >&2; exit 1; }
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    [ "$(id -u)" = 0 ] || { echo "Run as root: apt-get install python3-venv" >&2; exit 1; }
    echo "installing python3-venv …"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv
fi
echo "setting up $venv …"
"$python" -m venv "$venv"
"$venv/bin/pip" install --quiet --require-hashes --requirement requirements-dev.lock
"$venv/bin/pip" install --quiet --no-deps --no-build-isolation --editable .
