#!/usr/bin/env bash
# Runs tests: dev/test.sh [quick|slow|gpu] [pytest's arguments...]. WORKERS is the number of processes (2).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${VENV:-.venv}/bin/python
[ -x "$python" ] || python=${PYTHON:-python}
kind=${1:-quick}
[ $# -eq 0 ] || shift

case $kind in
    quick) marks="not slow and not gpu" workers=${WORKERS:-2} ;;
    slow) marks="slow and not gpu" workers=${WORKERS:-2} ;;
    gpu) marks="gpu" workers=0 ;; # one GPU, one process
    *) sed -n 2p "$0" >&2; exit 2 ;;
esac
# `python -m` puts this clone first on the path, whichever one the environment was made for.
# Without workers no plugin is needed (xdist).
[ "$workers" = 0 ] || set -- -n "$workers" "$@"
exec "$python" -m pytest -m "$marks" "$@"
