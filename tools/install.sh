#!/usr/bin/env bash
# Make a virtual environment with everything in it: install.sh FOLDER. `make venv` calls this.
#
# torch goes first and alone, so that no other package's wish picks the build: with an NVIDIA GPU the usual wheels, which
# carry CUDA; without one the CPU build, from TORCH_INDEX or from wherever pip is set up to find one.
set -euo pipefail

folder=$1
python=${PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $("$python" --version) is too old; set PYTHON to a Python of at least 3.11" >&2
    exit 2
fi

"$python" -m venv "$folder"
pip="$folder/bin/python -m pip --disable-pip-version-check"
torch=$(grep '^torch==' constraints.txt)

if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    echo "NVIDIA GPU found: installing $torch with CUDA"
    env -u PIP_FIND_LINKS $pip install -q "$torch"
else
    echo "no NVIDIA GPU: installing $torch for CPUs"
    $pip install -q ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$torch"
fi
echo "installing everything else"
$pip install -q -c constraints.txt -e '.[dev]'
"$folder/bin/python" -c 'import torch; print("torch", torch.__version__, "with" if torch.cuda.is_available() else "without", "a GPU")'
