#!/usr/bin/env bash
# Run every check that needs a GPU, in one command of under ten minutes: gpu_check.sh [--cpu] OUT
#
# Runs the tests marked gpu except the slow ones, some kernels under compute-sanitizer if it is installed, a short smoke
# run in bf16 and its first steps again without Triton, and every benchmark suite. Writes OUT/check.json (each part's
# exit code and seconds), the suites' JSON, and a log of each part. If a part fails or exceeds its time limit, the others
# still run and the script exits with 1. It needs torch >= 2.11 and pytest; other missing packages are installed from
# the wheels in the folder $WHEELS. --cpu runs everything at toy size without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
    sed -n '2,9s/^# \?//p' tools/gpu_check.sh
    exit 0
fi
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
    echo "error: torch finds no GPU; use --cpu to try the script without one" >&2
    exit 2
fi

rows=()
part() { # part NAME SECONDS COMMAND...: run with a time limit; keep its log, exit code and seconds
    local name=$1 limit=$2 began code
    shift 2
    began=$(date +%s)
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    code=$?
    rows+=("{\"part\": \"$name\", \"code\": $code, \"seconds\": $(($(date +%s) - began))}")
    echo "$name: exit $code after $(($(date +%s) - began)) s"
    return $code
}

each_file() { # COMMAND WORD..., file names on stdin: one process for each file; exit code 5 (no test found) is ignored
    # Triton's compiler takes most of the time and uses one core
    # shellcheck disable=SC2016
    xargs -P 8 -I{} bash -c '"$@"; code=$?; [ $code = 5 ] || exit $code' _ "$@" {}
}

gpu_tests() {
    export CUBLAS_WORKSPACE_CONFIG=:4096:8 # needed for determinism, which the tests of kernels check
    { find tests/kernels -name 'test_*.py' && find tests -mindepth 1 -maxdepth 1 -type d ! -name kernels; } |
        each_file "$python" -m pytest -m "gpu and not slow" -ra
}

cpu_tests() { # finds none
    "$python" -m pytest -m "gpu and not slow" -ra tests
}

sanitizer() { # one test of each op, forward and backward; without torch's memory cache, so that overruns are detected
    command -v compute-sanitizer || { echo "compute-sanitizer is not on PATH" && return 5; }
    export CUBLAS_WORKSPACE_CONFIG=:4096:8 PYTORCH_NO_CUDA_MEMORY_CACHING=1
    find tests/kernels -name 'test_*_triton.py' | each_file compute-sanitizer --tool memcheck --error-exitcode 9 \
        "$python" -m pytest -m "gpu and not slow" -k repetition
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

first_losses() { # same weights and batches: bf16 rounding differs between the runs by far less than half a per cent
    "$python" - "$out"/smoke.metrics.jsonl "$out"/smoke_reference.metrics.jsonl <<'PY'
import json, sys

runs = [[json.loads(line)["loss"] for line in open(path)] for path in sys.argv[1:]]
pairs = list(zip(*runs))
for step, (auto, reference) in enumerate(pairs, 1):
    print(f"step {step}: auto {auto:.5f}, reference {reference:.5f}, {auto / reference - 1:+.2e}")
sys.exit(not pairs or any(not abs(auto / reference - 1) <= 5e-3 for auto, reference in pairs[:5]))
PY
}

without_triton() { # settings that replace every Triton kernel by its reference
    "$python" - <<'PY'
from dataclasses import fields

from trinity.config.run import KernelsConfig

print(*(f"kernels.{field.name}=reference" for field in fields(KernelsConfig) if "triton" in str(field.type)))
PY
}

limit_of() { # SUITE: time limit in seconds; all parts together take less than 600
    case $1 in
    step) echo 90 ;;
    experts) echo 80 ;;
    attention) echo 30 ;;
    head) echo 20 ;;
    mesh) echo 10 ;;
    *) echo 15 ;;
    esac
}

export -f each_file gpu_tests cpu_tests sanitizer data first_losses
export python scratch out

kind=gpu steps=100 precision=bfloat16 quick=
if [ $cpu = 1 ]; then
    kind=cpu steps=3 precision=float32 quick=--quick
fi
settings=("precision.compute=$precision" "data.tokenizer=$scratch/tokenizer")
settings+=("optim.schedule.decay_start_steps=$((steps / 2))")
for set in train validation; do
    for source in code prose; do
        settings+=("data.$set.$source=$scratch/shards/$source/$set")
    done
done
smoke() { # NAME SECONDS WORD...
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$python" launch/pretrain.py configs/smoke.yaml "${settings[@]}" "run.dir=$scratch/$name" "$@"
    cp "$scratch/$name/metrics.jsonl" "$out/$name.metrics.jsonl" 2>/dev/null
}

part tests 120 bash -c "${kind}_tests"
[ $cpu = 1 ] || part sanitizer 40 bash -c sanitizer
part data $((cpu ? 150 : 60)) bash -c data
smoke smoke 55 "run.steps=$steps"
read -ra words <<<"$(without_triton)"
smoke smoke_reference 35 "run.steps=$((steps < 10 ? steps : 10))" evaluation.every=0 "${words[@]}"
part first_losses 5 bash -c first_losses
for suite in $("$python" tools/bench.py --list | cut -d' ' -f1); do
    limit=$(limit_of "$suite")
    [ $cpu = 0 ] || limit=100
    part "bench_$suite" "$limit" env "BENCH_SECONDS=$((limit - limit / 10 - 4))" \
        "$python" tools/bench.py "$suite" $quick --json "$out/bench_$suite.json"
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
check = {"gpu": gpu, "date": datetime.date.today().isoformat(), "versions": versions}
check["parts"] = [json.loads(row) for row in sys.argv[2:]]
with open(sys.argv[1], "w") as file:
    json.dump(check, file, indent=1)
sys.exit(any(part["code"] not in (0, 5) for part in check["parts"]))  # 5: pytest found no test to run
PY
