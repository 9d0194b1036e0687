#!/usr/bin/env bash
# Makes a virtual environment and installs this clone into it: dev/make_venv.sh DIR [PYTHON]
# Repeats are cheap and safe. PIP_ARGS is handed to pip.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: dev/make_venv.sh DIR [PYTHON]}
python=${2:-python3}

fail() { echo "make_venv: $*" >&2; exit 1; }

if [ ! -x "$venv/bin/python" ]; then
    command -v "$python" >/dev/null || fail "no '$python' on the path; name an interpreter of 3.10 or newer with PYTHON=..."
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "Python 3.10 or newer is needed, and '$python' is $("$python" --version 2>&1); name another with PYTHON=..."
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "'$python' has no venv module (on Debian and Ubuntu: apt-get install python3-venv)"
    "$python" -m venv "$venv"
    echo '*' >"$venv/.gitignore" # wherever it is, git and ruff leave it alone
fi
echo "make_venv: installing jepa_kit and what it needs, torch above all, into $venv (minutes)"
quiet=$([ -t 1 ] || echo --quiet)
# shellcheck disable=SC2086
"$venv/bin/python" -m pip install $quiet ${PIP_ARGS:-} --editable '.[dev,docs]'
pwd >"$venv/.jepa_kit_clone"
