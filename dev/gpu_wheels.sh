#!/usr/bin/env bash
# Fetches what jepa_kit needs beside torch and what such images usually hold, for a machine without a network:
# dev/gpu_wheels.sh [DIR]   (default: dev/gpu_wheels, from where dev/gpu_check.sh installs). TARGET=3.12 is its Python,
# PYTHON an interpreter with pip here, PIP_ARGS goes to pip.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-dev/gpu_wheels}
python=${PYTHON:-python3}
target=${TARGET:-3.12}
mkdir -p "$folder"

# Wheels are picked for the target's Python and the oldest Linux that such machines run; --no-deps leaves torch out.
options=(--quiet --no-deps --disable-pip-version-check --only-binary :all: --python-version "$target"
    --implementation cp --dest "$folder")
for tag in manylinux_2_28_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64; do options+=(--platform "$tag"); done
names=(xformers==0.0.35 webdataset braceexpand portalocker termcolor yacs tabulate iniconfig pluggy pytest
    simplejpeg nvidia-cuda-runtime-cu12==12.8.90 einops safetensors)
# shellcheck disable=SC2086
"$python" -m pip download ${PIP_ARGS:-} "${options[@]}" "${names[@]}"
# These two have no wheels; they are pure Python.
# shellcheck disable=SC2086
"$python" -m pip wheel ${PIP_ARGS:-} --quiet --no-deps --disable-pip-version-check --wheel-dir "$folder" fvcore iopath
du -h "$folder"/*.whl | sort -h
du -ch "$folder"/*.whl | tail -1
