"""The family of small models of tests/merging, a text for each, and the settings of a short run."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.merging.conftest import family, one_thread, originals, tokenizer  # noqa: F401 (fixtures)
from trinity.parallel import mesh

WORDS = ["the", "rain", "in", "Spain", "stays", "mainly", "in", "the", "plain;", "plainly"]
SETTINGS = {"rows": 8, "window": 24, "sequences": 4, "microbatch": 2, "lr": 1e-2, "threads": 1}
ALL = ["attention", "ffn", "router", "head", "experts", "embedding", "gains"]


def write_text(path: Path, seed: int, lines: int = 30) -> str:
    """Lines of random words."""
    choose = random.Random(seed)
    path.write_text("\n".join(" ".join(choose.choices(WORDS, k=20)) for _ in range(lines)))
    return str(path)


@pytest.fixture
def texts(family: Path) -> dict[str, str]:  # noqa: F811
    """Name of a model → its text."""
    return {name: write_text(family / f"{name}.txt", seed) for seed, name in enumerate(("base", "a", "b", "c"))}


@pytest.fixture
def settings(texts: dict[str, str]) -> Callable[..., dict]:
    """settings(models, **changes): the content of a DAM.yaml of these models, each with its text."""

    def make(models: str = "ab", **changes: object) -> dict:
        return {"models": [{"model": name, "text": texts[name]} for name in models]} | SETTINGS | changes

    return make


@pytest.fixture(autouse=True)
def no_process_group() -> Iterator[None]:
    """Whatever a test leaves, the next one begins without a process group."""
    yield
    mesh.stop()
