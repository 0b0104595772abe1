"""Which packages the check needs that this Python lacks, found without importing any of them."""

import sys
from importlib.util import find_spec

NEEDED = {
    "torch": "torch", "triton": "triton", "numpy": "numpy", "omegaconf": "omegaconf", "yaml": "PyYAML",
    "pyarrow": "pyarrow", "fsspec": "fsspec", "tokenizers": "tokenizers", "safetensors": "safetensors", "tqdm": "tqdm",
    "transformers": "transformers", "pytest": "pytest", "typing_extensions": "typing-extensions",
}  # fmt: skip
"""Module → package. Not here: liger_kernel, whose contender is then a row, and datasets, which no part reads."""

if sys.version_info < (3, 14):
    NEEDED["backports.zstd"] = "backports.zstd"


def missing() -> list[str]:
    """Names of the packages that are missing, in the order above."""
    return [package for module, package in NEEDED.items() if not _is_there(module)]


def missing_sentence() -> str | None:
    """What to do about missing packages, in one sentence; None if there are none."""
    names = missing()
    if not names:
        return None
    words = " ".join(names)
    return (
        f"{sys.executable} lacks {', '.join(names)}: put wheels for Python {sys.version_info[0]}.{sys.version_info[1]} "
        f"into a folder (pip download --no-deps --only-binary=:all: -d wheels {words}) and name it in WHEELS"
    )


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False
