"""Which packages the check needs that this Python lacks, found without importing any of them."""

import re
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]

NEEDED = {
    "torch": "torch", "triton": "triton", "numpy": "numpy", "omegaconf": "omegaconf", "yaml": "PyYAML",
    "pyarrow": "pyarrow", "fsspec": "fsspec", "tokenizers": "tokenizers", "safetensors": "safetensors", "tqdm": "tqdm",
    "transformers": "transformers", "pytest": "pytest", "typing_extensions": "typing-extensions",
}  # fmt: skip
"""Module → package. Not here: liger_kernel, whose cases are then skipped, and datasets, which no part reads."""

if sys.version_info < (3, 14):
    NEEDED["backports.zstd"] = "backports.zstd"


def missing() -> list[str]:
    """Names of the packages that are missing, in the order above."""
    return [package for module, package in NEEDED.items() if not _is_there(module)]


def missing_in(reason: str) -> str | None:
    """The package that a case lacks by its reason for failing, "No module named …"; None if that is no reason."""
    found = re.fullmatch(r"No module named '(\w+)[\w.]*'", reason)
    return found[1] if found and not _is_there(found[1]) else None


def missing_sentence() -> str | None:
    """What to do about missing packages, in one sentence; None if there are none."""
    names = missing()
    return advice(names, ROOT / ".venv") if names else None


def advice(names: list[str], environment: Path) -> str:
    """One sentence: the repository's environment first, if there is one and it is not in use; then wheels.

    torch does not come by WHEELS: without its dependencies, the CUDA libraries, it cannot be imported.

    Args:
        names: of the packages that are missing.
        environment: where `make venv` puts the virtual environment.
    """
    ways = []
    if (environment / "bin" / "python").exists() and environment.resolve() != Path(sys.prefix).resolve():
        ways.append(
            f"activate the repository's environment (. {environment.name}/bin/activate) "
            f"or set PYTHON={environment.name}/bin/python"
        )
    if "torch" in names:
        ways.append("set PYTHON to a Python with torch >= 2.11" + ("" if ways else ", or make one with `make venv`"))
    else:
        words = " ".join(names)
        ways.append(
            f"put wheels for Python {sys.version_info[0]}.{sys.version_info[1]} into a folder "
            f"(pip download --no-deps --only-binary=:all: -d wheels {words}) and name it in WHEELS"
        )
    return f"{sys.executable} lacks {', '.join(names)}: {'; or '.join(ways)}"


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False
