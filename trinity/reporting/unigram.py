"""The unigram entropy of what a run reads: the loss of a model that knows only how often each token occurs."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from trinity.config.run import RunConfig
from trinity.data.sources.shards import TokenSource
from trinity.data.sources.source import Source
from trinity.data.stream.mixture import normalised
from trinity.errors import UserError

MOST_TOKENS = 1 << 28
"""Of a set that is counted for a report: about a second. Not from the report."""


def unigram_entropies(config: RunConfig) -> dict[str, float]:
    """Nats per token by "training" and "validation NAME", of token shards that are here and not too large to count.

    The training mixture has none where phases change it.
    """
    data = config.data
    found = {} if data.phases else {"training": _entropy(data.train, data.mixture)}
    found |= {f"validation {name}": _entropy({name: place}, {}) for name, place in data.validation.items()}
    return {name: entropy for name, entropy in found.items() if entropy is not None}


def _entropy(places: dict[str, str], mixture: dict[str, float]) -> float | None:
    if not places or not all((Path(place) / "index.json").is_file() for place in places.values()):
        return None
    with suppress(UserError, OSError):  # damaged, or prepared anew by another version
        sources = {name: TokenSource(place, verify="never") for name, place in places.items()}
        if sum(source.tokens for source in sources.values()) <= MOST_TOKENS:
            return unigram_entropy(sources, mixture)
    return None


CHUNK = 1 << 24


def unigram_entropy(sources: Mapping[str, Source], mixture: Mapping[str, float]) -> float:
    """Entropy of the mixture's token frequencies, −Σ p ln p, in nats per token; every token of every source is read.

    Args:
        sources: name → documents, all of one tokenizer.
        mixture: name → weight by tokens, one for each source.
    Raises:
        UserError: the mixture does not fit the sources.
    """
    p_V = np.zeros(max(source.vocab_size for source in sources.values()))
    for source, weight in zip(sources.values(), normalised(sources, mixture)):
        counts_V = np.zeros_like(p_V)
        for ids in source.chunks(CHUNK):
            counts_V += np.bincount(ids, minlength=len(p_V))
        p_V += weight * counts_V / counts_V.sum()
    p_V = p_V[p_V > 0]
    return float(-(p_V * np.log(p_V)).sum())
