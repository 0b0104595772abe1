"""The mixture of sources: which source the next document comes from, in each phase of the run.

The next document comes from the source that is furthest behind its weight, counted in tokens that this stream has drawn
in this phase; so each source's share follows its weight throughout, for any lengths of its documents. A stream
starts as if it had already drawn part of a document of each source, a different part in each stream: otherwise all
streams would begin with the same source, and a phase's first steps would hold one source alone.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from trinity.data.stream.shuffle import random_key
from trinity.errors import UserError


class LengthBias(NamedTuple):
    """Prefers longer documents: a document of n tokens is taken with probability
    floor + (ceiling − floor)·min(1, n/tokens). The report, for context extension: 1 %, 90 %, 128k tokens. Not from the
    report: the probability is linear in between.
    """

    tokens: int
    floor: float
    ceiling: float

    def keep(self, length: int) -> float:
        """The probability that a document of `length` tokens is taken."""
        return self.floor + (self.ceiling - self.floor) * min(1.0, length / self.tokens)

    def token_share(self, lengths_N: np.ndarray, above: float) -> float:
        """Of the tokens of the documents that are taken, the expected share in documents of more than `above` tokens.

        Args:
            lengths_N: [N] tokens of the documents of a source, or of a sample of them.
        """
        chances_N = self.floor + (self.ceiling - self.floor) * np.minimum(1.0, lengths_N / self.tokens)
        taken_N = lengths_N * chances_N
        return float(taken_N[lengths_N > above].sum() / max(1.0, taken_N.sum()))


class Phase(NamedTuple):
    """The mixture and the packing from a token count on.

    weights: of the sources, in their order, summing to 1; 0 leaves a source out.
    rsdb_size: the size at which a stream's buffer is filled again, to twice that; 0: sequential packing.
    bias: None takes every document.
    best_fit_rows: the rows of a window of best-fit packing, which takes whole documents; 0: another packing.
    """

    weights: tuple[float, ...]
    rsdb_size: int = 0
    bias: LengthBias | None = None
    best_fit_rows: int = 0

    def furthest_behind(self, drawn: Sequence[int]) -> int:
        """The source with the largest weight·(all tokens drawn) − (tokens drawn from it); ties go to the first."""
        if len(self.weights) == 1:
            return 0
        total, furthest, most = sum(drawn), 0, -float("inf")
        for source, weight in enumerate(self.weights):
            behind = weight * total - drawn[source]
            if behind > most and weight > 0:
                furthest, most = source, behind
        return furthest

    def head_start(self, names: Sequence[str], lengths: Sequence[int], *key: object) -> tuple[int, list[int]]:
        """The source that a stream begins with, and the tokens of each source that count as drawn before that.

        The first source is chosen by weight and has no head start; each other source has a head start of up to the
        length of its first document. So the first sequences of many streams follow the weights approximately, and of
        two sources neither is ever more than a document away from its weight.

        Args:
            names: of the sources.
            lengths: tokens of each source's next document.
            key: seed, phase and stream, which determine the random numbers.
        """
        chance = _uniform(*key, "begin") * sum(self.weights)
        bounds = accumulate(self.weights)
        begin = next(number for number, bound in enumerate(bounds) if chance < bound)
        return begin, [
            0 if number == begin or not weight else int(_uniform(*key, name) * length)
            for number, (weight, name, length) in enumerate(zip(self.weights, names, lengths))
        ]


def _uniform(*key: object) -> float:
    """A number in [0, 1) that is a function of the key."""
    return random_key(*key) / 2**64


def normalised(names: Sequence[str], mixture: Mapping[str, float], key: str = "data.mixture") -> tuple[float, ...]:
    """The named sources' weights in their order, summing to 1; a source that the mixture leaves out has 0.

    Args:
        names: of all sources.
        mixture: name → weight, by tokens, in any unit; empty: equal weights.
        key: of the mixture in the config, for messages.
    Raises:
        UserError: the mixture names something else, or a weight is negative, or none is above 0.
    """
    mixture = mixture or dict.fromkeys(names, 1.0)
    unknown = sorted(set(mixture) - set(names))
    if unknown:
        raise UserError(f"{key} names {unknown[0]}, which is no source; known: {', '.join(names)}")
    total = sum(mixture.values())
    if not all(weight >= 0 for weight in mixture.values()) or not 0 < total < float("inf"):
        raise UserError(f"{key}={dict(mixture)} must hold weights of at least 0, one of them above 0")
    return tuple(mixture.get(name, 0) / total for name in names)
