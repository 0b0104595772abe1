"""Which document a stream takes next: from which source, and which of it.

Source: the one that is furthest behind its weight, counted in tokens that this stream has drawn; so each source's share
follows its weight all the time, whatever the lengths of its documents. A stream counts as if it had drawn some tokens
already, another number for each stream: else all streams would begin with the same source and a run's first steps would
be of one source alone.
Document: each source has one endless order of documents, j = 0, 1, 2, …, a new permutation every epoch; of V streams,
stream s takes j = s, s + V, s + 2V, …. So each document is taken once an epoch, and no stream asks another.
"""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import accumulate

from trinity.data.permutation import permutation_keys, permute
from trinity.data.shards import TokenSource
from trinity.errors import UserError


class DocumentOrder:
    """What all streams share: the sources, their weights, and the order of documents in each.

    Attributes:
        names, sources, weights: in the order of the sources; weights sum to 1.
    """

    def __init__(self, sources: Mapping[str, TokenSource], mixture: Mapping[str, float], seed: int, streams: int):
        """Check the mixture and normalise it.

        Args:
            sources: name → documents; their order breaks ties.
            mixture: name → weight, by tokens, in any unit.
            seed: of the order of documents.
            streams: V.
        Raises:
            UserError: a mixture of other sources, or with weights that are no shares.
        """
        self.names, self.sources = list(sources), list(sources.values())
        self.weights = normalised(sources, mixture)
        self.seed, self.streams = seed, streams

    def document(self, source: int, j: int) -> int:
        """The j-th document of a source's endless order."""
        n = self.sources[source].documents
        return permute(j % n, n, permutation_keys(self.seed, self.names[source], j // n))

    def head_start(self, stream: int) -> list[int]:
        """Tokens of each source that a stream counts as drawn before it begins.

        The stream begins with a source chosen by weight, which has no head start; each of the others has one of up to
        its mean document. So the first rows of many streams hold about the sources' shares, and documents of unequal
        length soon put streams out of step.
        """
        cumulated = list(accumulate(self.weights))
        chance = self._uniform(stream, "begin") * cumulated[-1]
        begin = next(number for number, bound in enumerate(cumulated) if chance < bound)
        means = [source.tokens / source.documents for source in self.sources]
        return [
            0 if number == begin else int(self._uniform(stream, name) * mean)
            for number, (name, mean) in enumerate(zip(self.names, means))
        ]

    def _uniform(self, stream: int, name: str) -> float:
        """A number in [0, 1) that is a function of the seed, the stream and the name."""
        digest = hashlib.blake2b(f"{self.seed}/{stream}/{name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") / 2**64

    def furthest_behind(self, drawn: Sequence[int]) -> int:
        """The source with the largest weight·(all tokens drawn) − (tokens drawn from it); the first of several."""
        total = sum(drawn)
        behind = [weight * total - count if weight > 0 else -float("inf") for weight, count in zip(self.weights, drawn)]
        return behind.index(max(behind))


def normalised(sources: Mapping[str, TokenSource], mixture: Mapping[str, float]) -> list[float]:
    """The sources' weights in their order, summing to 1.

    Raises:
        UserError: mixture and sources differ in their names, or a weight is negative, or none is above 0.
    """
    unknown, missing = sorted(set(mixture) - set(sources)), sorted(set(sources) - set(mixture))
    if unknown:
        raise UserError(f"data.mixture names {unknown[0]}, which is no source; known: {', '.join(sources)}")
    if missing:
        raise UserError(f"data.mixture gives {missing[0]} no weight; add one, 0 to leave it out")
    total = sum(mixture.values())
    if not all(weight >= 0 for weight in mixture.values()) or not 0 < total < float("inf"):
        raise UserError(f"data.mixture={dict(mixture)} must hold weights of at least 0, one of them above 0")
    return [mixture[name] / total for name in sources]
