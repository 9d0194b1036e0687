#!/usr/bin/env bash
# What `make lint` and the pre-commit hooks run: dev/lint.sh [all|check|format|types|words|fix]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${VENV:-.venv}/bin/python
[ -x "$python" ] || python=python

case ${1:-all} in
    check) "$python" -m ruff check . ;;
    format) "$python" -m ruff format --check . ;;
    types) "$python" -m mypy ;;
    words) "$python" dev/check_words.py ;;
    all) for part in check format types words; do "$0" "$part"; done ;;
    fix) "$python" -m ruff check --fix . && "$python" -m ruff format . ;;
    *) sed -n 2p "$0" >&2; exit 2 ;;
esac
