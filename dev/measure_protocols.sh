#!/usr/bin/env bash
# The protocols on any number of runs, and one table of them: dev/measure_protocols.sh OUT TRAIN_SHARDS TEST_SHARDS RUN...
#
# OUT gets a folder for each run with its results, `features` (kept, so that a second call extracts nothing), and
# comparison.md, .csv and .png. Raw pixels and patches are evaluated beside the first run alone: they are the same for all.
# FINETUNE_LABEL names the label of the fine-tuning (empty: none), FINETUNE its options, PROTOCOLS replaces the others,
# BASELINES those of the first run (untrained,pixels,patches), PYTHON the interpreter.
set -euo pipefail
python=${PYTHON:-python}
root=$(cd "$(dirname "$0")/.." && pwd)
[ $# -ge 4 ] || { sed -n 2,7p "$0" >&2; exit 2; }
out=$1 train=$2 test=$3
shift 3
protocols=${PROTOCOLS:-'knn,linear,count,distance,attentive,{name: dense, most: 1},{name: logistic, subsets: [1%, 10%, all]}'}
finetune=${FINETUNE:-'{name: finetune, epochs: 3, drop_path: 0, mixup: 0.2}'}

names=()
split() { # NAMES,{MAPPING},...: one --protocol each; commas inside braces stay
    "$python" -c 'import re, sys; print("\n".join(re.findall(r"\{.*?\}|[^,{}]+", sys.argv[1])))' "$1"
}
options=()
while read -r one; do options+=(--protocol "$one"); done < <(split "$protocols")

baselines=${BASELINES:-untrained,pixels,patches}
for run in "$@"; do
    name=$(basename "$(cd "$run" && pwd)")
    [ "$name" != run ] || name=$(basename "$(cd "$run/.." && pwd)")
    names+=("$out/$name")
    common=(--checkpoint "$run" --train-shards "$train" --test-shards "$test")
    "$python" "$root/tools/eval_net.py" "${common[@]}" "${options[@]}" --encoder both --layers last4 \
        --baselines "$baselines" --features "$out/features" --output "$out/$name/evaluation/frozen.json"
    if [ -n "${FINETUNE_LABEL:-}" ]; then
        "$python" "$root/tools/eval_net.py" "${common[@]}" --protocol "$finetune" --label "$FINETUNE_LABEL" \
            --encoder both --baselines untrained --output "$out/$name/evaluation/finetune.json"
    fi
    baselines=untrained
done
"$python" "$root/tools/compare.py" "${names[@]}" --output "$out/comparison"
