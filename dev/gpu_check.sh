#!/usr/bin/env bash
# Measures and checks everything that a machine with a GPU can tell, in under ten minutes and without a network:
# dev/gpu_check.sh OUT [--device cuda|cpu] [--small] ...; dev/gpu_check.py --help has the rest. PYTHON picks the interpreter.
# It needs torch and what jepa_kit imports; what is missing is installed from dev/gpu_wheels if dev/gpu_wheels.sh filled it.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
wheels=$root/dev/gpu_wheels
if [ -d "$wheels" ]; then
    # What is there stays, torch above all. A wheel for another Python is refused and named.
    missing='import importlib.metadata, pathlib, re, sys
have = {re.sub("[-_.]+", "_", d.name).lower() for d in importlib.metadata.distributions()}
print(*(w for w in sys.argv[1:] if pathlib.Path(w).name.split("-")[0].lower() not in have), sep="\n")'
    "$python" -c "$missing" "$wheels"/*.whl | while read -r wheel; do
        [ -z "$wheel" ] || "$python" -m pip install --quiet --no-index --no-deps --disable-pip-version-check "$wheel" ||
            echo "gpu_check: $(basename "$wheel") was not installed" >&2
    done
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# xformers' kernels of the CUDA 12 build load beside a torch for CUDA 13 if they find this library.
runtime=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cuda_runtime/lib
[ ! -d "$runtime" ] || export LD_LIBRARY_PATH="$runtime${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
# As the tools set it (jepa_kit/machine.py); benchmarks import torch first.
[ -n "${PYTORCH_CUDA_ALLOC_CONF:-}" ] || export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
exec "$python" "$root/dev/gpu_check.py" "$@"
