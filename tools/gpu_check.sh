#!/usr/bin/env bash
# Everything that wants a GPU, in one command of under ten minutes: gpu_check.sh [--cpu] OUT
#
# Runs the tests marked gpu, a short smoke run in bf16, and every benchmark suite; writes OUT/check.json (what ran, its
# exit code and seconds), the suites' own JSON beside it, and a log of each part. It needs torch >= 2.11 and pytest; what
# else is missing is taken from the wheels in $WHEELS (a folder). --cpu tries all of it at toy size without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."

cpu=0
if [ "${1:-}" = --cpu ]; then
    cpu=1
    shift
fi
out=${1:?usage: gpu_check.sh [--cpu] OUT}
mkdir -p "$out"
out=$(cd "$out" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1

if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install -q --no-index --no-deps --upgrade --target "$scratch/site" "$WHEELS"/*.whl || exit 1
    export PYTHONPATH="$PYTHONPATH:$scratch/site"
fi
if [ $cpu = 0 ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: no GPU that torch can use; run with --cpu to try the script" >&2
    exit 2
fi

rows=()
part() { # part NAME SECONDS COMMAND...: run under a limit, keep its log, note how it ended
    local name=$1 limit=$2 began code
    shift 2
    began=$(date +%s)
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    code=$?
    rows+=("{\"part\": \"$name\", \"code\": $code, \"seconds\": $(($(date +%s) - began))}")
    echo "$name: exit $code after $(($(date +%s) - began)) s"
    return $code
}

data() {
    "$python" tools/prepare_corpus.py --out "$scratch/corpus" &&
        "$python" tools/train_tokenizer.py --input "$scratch"/corpus/*.train.jsonl --vocab-size 8192 \
            --out "$scratch/tokenizer" || return 1
    for source in code prose; do
        for set in train validation; do
            "$python" tools/prepare_data.py --input "$scratch/corpus/$source.$set.jsonl" \
                --tokenizer "$scratch/tokenizer" --out "$scratch/shards/$source/$set" || return 1
        done
    done
}
export -f data
export python scratch

steps=250 precision=bfloat16 quick=
if [ $cpu = 1 ]; then
    steps=3 precision=float32 quick=--quick
fi
settings=("run.dir=$scratch/run" "run.steps=$steps" "precision.compute=$precision" "data.tokenizer=$scratch/tokenizer")
settings+=("optim.schedule.decay_start_steps=$((steps / 2))")
for set in train validation; do
    for source in code prose; do
        settings+=("data.$set.$source=$scratch/shards/$source/$set")
    done
done

part tests 150 "$python" -m pytest -m gpu -ra tests
part data 60 bash -c data
part smoke 120 "$python" launch/pretrain.py configs/smoke.yaml "${settings[@]}"
cp "$scratch/run/metrics.jsonl" "$out/smoke.metrics.jsonl" 2>/dev/null
for suite in $("$python" tools/bench.py --list | cut -d' ' -f1); do
    part "bench_$suite" 85 "$python" tools/bench.py "$suite" $quick --json "$out/bench_$suite.json"
done

"$python" - "$out/check.json" "${rows[@]}" <<'PY'
import datetime, importlib.metadata, json, sys
import torch

versions = {}
for name in ("torch", "triton", "transformers"):
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        versions[name] = None
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
found = {"gpu": gpu, "date": datetime.date.today().isoformat(), "versions": versions}
found["parts"] = [json.loads(row) for row in sys.argv[2:]]
with open(sys.argv[1], "w") as file:
    json.dump(found, file, indent=1)
sys.exit(any(part["code"] not in (0, 5) for part in found["parts"]))  # 5: pytest found no test to run
PY
