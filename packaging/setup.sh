#!/bin/sh
# Makes the virtual environment for working on vllmd: setup.sh PYTHON DIRECTORY. Needs Python 3.11 or later.
set -eu
python=$1 venv=$2
say() { printf '%s\n' "set-up: $*" >&2; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    say "cannot use $python: vllmd needs Python 3.11 or later (make PYTHON=/path/to/python3.11 ...)"; exit 1; }
"$python" -c 'import venv, ensurepip' 2>/dev/null || {
    say "cannot make a virtual environment: its module is missing (apt-get install python3-venv)"; exit 1; }

say "virtual environment in $venv (about 20 s the first time)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install -qq --disable-pip-version-check --editable '.[dev]'
touch "$venv/.ready"
