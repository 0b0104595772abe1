"""What can be known of the data without a model: the loss of one that knows only how often each token occurs.

Shapes: V vocabulary.
"""

from collections.abc import Mapping

import numpy as np

from trinity.data.mixture import normalised
from trinity.data.order import Source

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
