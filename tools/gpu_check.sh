#!/usr/bin/env bash
# Test and measure everything that needs a GPU, in one call of under ten minutes: gpu_check.sh [--cpu] OUT [PART ...]
#
#     timeout -k 5 555 env WHEELS=wheels DATA=data/smoke tools/gpu_check.sh OUT
#
# The parts run in the order of tools/gpu_check/parts.py, all of them or those named, each in a process with a time
# limit: one that fails, hangs or runs out of memory is a row, and the check goes on. OUT gets four files, complete
# after every part and readable after a kill at any time: results.jsonl (every case, written as it is measured),
# check.json (machine, date, versions, outcomes, all cases: the file to commit), summary.md (to read), and
# results.tar.gz (these, and every part's log, tables and trace). The exit code is 1 if a part failed (an error, or no
# case without one) or had no time, 2 after a mistake in the call, without a GPU, or if OUT could not be written. An OUT
# that holds a check is refused, and no refused call makes or changes OUT.
#
#     CHECK_SECONDS   time for everything; parts that no longer fit are skipped (540)
#     CHECK_PART_SECONDS  most seconds of any part (its own limit)
#     WHEELS          folder of wheels that are installed first, for this call only. Beside torch >= 2.11, triton,
#                     transformers and pytest a bare machine needs omegaconf and backports.zstd (for its own Python
#                     version); liger_kernel adds a contender to three parts
#     DATA            folder with tokenizer/ and shards/, as `make data` writes them; without it a part makes them
#     PYTHON          the interpreter (python3)
#
# --cpu runs every part at toy size without a GPU, in a few minutes.
set -uo pipefail
export CHECK_BEGAN
CHECK_BEGAN=$(date +%s.%N)

if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
    sed -n '2,/^set /{/^set /d;s/^# \?//p}' "${BASH_SOURCE[0]}"
    exit 0
fi
refuse() {
    echo "error: $1" >&2
    exit 2
}

words=()
if [ "${1:-}" = --cpu ]; then
    words=(--cpu)
    export CUDA_VISIBLE_DEVICES="" # also where there is one
    shift
fi
case "${1:-}" in
"") refuse "name a folder for the results: gpu_check.sh [--cpu] OUT [PART ...]" ;;
-*) refuse "there is no option $1; use gpu_check.sh [--cpu] OUT [PART ...]" ;;
esac
for word in "${@:2}"; do
    [ "$word" != --cpu ] || refuse "--cpu goes first: gpu_check.sh --cpu OUT [PART ...]"
done
for name in WHEELS DATA; do # relative to the caller's folder, as OUT is
    [ -n "${!name:-}" ] || continue
    [ -d "${!name}" ] || refuse "$name=${!name} is not a folder; name one that exists, or unset $name"
    export "$name=$(realpath "${!name}")"
done
wheels=()
if [ -n "${WHEELS:-}" ]; then
    shopt -s nullglob
    wheels=("$WHEELS"/*.whl)
    [ ${#wheels[@]} -gt 0 ] || refuse "WHEELS=$WHEELS has no file *.whl; put wheels into it, or unset WHEELS"
fi
for name in tokenizer shards; do
    [ -z "${DATA:-}" ] || [ -d "$DATA/$name" ] ||
        refuse "DATA=$DATA has no folder $name; name a folder that \`make data\` wrote, or unset DATA"
done
case "$1" in # the supervisor makes the folder once nothing is left to refuse
/*) words+=("$@") ;;
*) words+=("$PWD/$1" "${@:2}") ;;
esac
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
command -v "$python" >/dev/null ||
    refuse "PYTHON=$python is no program; set PYTHON to a Python, as PYTHON=.venv/bin/python"
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/tools${PYTHONPATH:+:$PYTHONPATH}"
[ -n "${OMP_WAIT_POLICY:-}" ] || export OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-3000}"
export TOKENIZERS_PARALLELISM=true PYTHONUNBUFFERED=1
unset CHECK_SCRATCH

if [ ${#wheels[@]} -gt 0 ]; then
    CHECK_SCRATCH=$(mktemp -d) || exit 2
    export CHECK_SCRATCH
    trap 'rm -rf "$CHECK_SCRATCH"' EXIT # until exec: then the supervisor removes it
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$CHECK_SCRATCH/site" "${wheels[@]}" || exit 2
    export PYTHONPATH="$PYTHONPATH:$CHECK_SCRATCH/site"
fi
# in this process, so that a signal reaches the supervisor at once
exec "$python" -m gpu_check.supervisor "${words[@]}"
