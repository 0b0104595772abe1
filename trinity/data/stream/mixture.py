"""How a stretch of the run, a phase, is drawn from the sources and packed.

Which source comes next: the one that is furthest behind its weight, counted in tokens that this stream has drawn in
this phase; so each source's share follows its weight all the time, whatever the lengths of its documents. A stream
counts as if it had drawn part of a document of each source already, another part in each stream: else all streams
would begin with the same source, and a phase's first steps would be of one source alone.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from trinity.data.stream.permutation import random_key
from trinity.errors import UserError


class LengthBias(NamedTuple):
    """Longer documents are taken more often: a document of n tokens with probability
    floor + (ceiling − floor)·min(1, n/tokens). The report, for context extension: 1 %, 90 %, 128k tokens; that the way
    between is straight is ours.
    """

    tokens: int
    floor: float
    ceiling: float

    def keep(self, length: int) -> float:
        """The probability with which a document of so many tokens is taken."""
        return self.floor + (self.ceiling - self.floor) * min(1.0, length / self.tokens)


class Phase(NamedTuple):
    """Weights of the sources, in their order and summing to 1, and how documents fill rows.

    weights: 0 leaves a source out.
    rsdb_size: documents a stream's buffer is asked to hold (it holds up to twice as many); 0: sequential packing.
    bias: None takes every document.
    """

    weights: tuple[float, ...]
    rsdb_size: int = 0
    bias: LengthBias | None = None

    def furthest_behind(self, drawn: Sequence[int]) -> int:
        """The source with the largest weight·(all tokens drawn) − (tokens drawn from it); the first of several."""
        if len(self.weights) == 1:
            return 0
        total, found, most = sum(drawn), 0, -float("inf")
        for source, weight in enumerate(self.weights):
            behind = weight * total - drawn[source]
            if behind > most and weight > 0:
                found, most = source, behind
        return found

    def head_start(self, names: Sequence[str], lengths: Sequence[int], *key: object) -> tuple[int, list[int]]:
        """The source that a stream begins with, and tokens of each source that it counts as drawn before that.

        It begins with a source chosen by weight, which has no head start; each of the others has one of up to its first
        document. So the first rows of many streams hold about the sources' shares, and of two sources neither is ever
        more than a document away from its weight.

        Args:
            names: of the sources.
            lengths: tokens of the document with which each source would begin.
            key: what the random numbers are a function of: seed, phase and stream.
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
