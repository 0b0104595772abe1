"""Unigram entropy of a run's data: the loss of a model that knows only the frequency of each token."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from trinity.config.run import RunConfig
from trinity.data.sources.shards import TokenSource
from trinity.data.stream.mixture import normalised
from trinity.errors import UserError

MAX_TOKENS = 1 << 28
"""Largest data set that is counted for a report: about a second. Not from the report."""
CHUNK_TOKENS = 1 << 24


def unigram_entropies(config: RunConfig) -> dict[str, float]:
    """Nats per token of "training" and each "validation NAME", for local token shards of at most MAX_TOKENS.

    The training mixture is left out if phases change it.
    """
    data = config.data
    entropies = {} if data.phases else {"training": _entropy(data.train, data.mixture)}
    entropies |= {f"validation {name}": _entropy({name: folder}, {}) for name, folder in data.validation.items()}
    return {name: entropy for name, entropy in entropies.items() if entropy is not None}


def _entropy(folders: dict[str, str], mixture: dict[str, float]) -> float | None:
    """Entropy of shard folders; None if they cannot be read or are too large."""
    if not folders or not all((Path(folder) / "index.json").is_file() for folder in folders.values()):
        return None
    with suppress(UserError, OSError):  # damaged, or written by another version
        sources = {name: TokenSource(folder, verify="never") for name, folder in folders.items()}
        if sum(source.tokens for source in sources.values()) <= MAX_TOKENS:
            return unigram_entropy(sources, mixture)
    return None


def unigram_entropy(sources: Mapping[str, TokenSource], mixture: Mapping[str, float]) -> float:
    """Entropy of the mixture's token frequencies, −Σ p ln p, in nats per token; reads every token of every source.

    Args:
        sources: name → token shards, all of one tokenizer.
        mixture: name → weight by tokens, one for each source.
    Raises:
        UserError: the mixture does not fit the sources.
    """
    p_V = np.zeros(max(source.vocab_size for source in sources.values()))
    for source, weight in zip(sources.values(), normalised(list(sources), mixture)):
        counts_V = np.zeros_like(p_V)
        for ids in source.chunks(CHUNK_TOKENS):
            counts_V += np.bincount(ids, minlength=len(p_V))
        p_V += weight * counts_V / counts_V.sum()
    p_V = p_V[p_V > 0]
    return float(-(p_V * np.log(p_V)).sum())
