"""The parts of the comparison of adaptations, in the order in which they are made."""

from collections.abc import Callable, Iterator
from typing import Any

import trinity  # noqa: F401  # before torch, for the policy of its threads

# isort: split
import adapt_merge
import adapt_train
from adapt_texts import DOMAINS
from adapt_train import SCORES, SHARES
from experiment import Done, Lab, Part, Record

Make = Callable[[Lab, Done], Record]


def _parts() -> Iterator[tuple[str, Make]]:
    yield "base", _of(adapt_train.base)
    yield "modules", _of(adapt_train.score_modules)
    yield "step_times", lambda lab, done: adapt_train.step_times(lab, done[lab.seed, "modules"]["chosen"])
    for domain in DOMAINS:
        for name in (f"{domain}_no_replay", domain):  # without and with replay
            yield name, _of(adapt_train.continued, domain, name == domain, [], name)
        for how in SCORES:
            for share in SHARES:
                yield f"{domain}_{how}{share}", _of_modules(domain, f"{how}{share}")
        for name in (f"{domain}_no_replay", domain):
            yield f"{name}_back_mean", _of(adapt_merge.back_mean, name)
            yield f"{name}_back_ties", _of(adapt_merge.back_ties, name)
            yield f"{name}_back_alpha", _of(adapt_merge.back_search, domain, name, False)
            yield f"{name}_back_parts", _of(adapt_merge.back_search, domain, name, True)
    for name in adapt_merge.RECIPES:
        yield f"merge_{name}", _of(adapt_merge.without_data, name)
    yield "merge_cma_es", _of(adapt_merge.cma_es)
    yield "merge_dam", _of(adapt_merge.dam, False)
    yield "merge_dam_base", _of(adapt_merge.dam, True)


def _of(function: Callable[..., Record], *words: Any) -> Make:
    return lambda lab, done: function(lab, *words)


def _of_modules(domain: str, chosen: str) -> Make:
    return lambda lab, done: adapt_train.continued(lab, domain, True, done[lab.seed, "modules"]["chosen"][chosen])


PARTS: dict[str, Part] = {name: Part(1, make) for name, make in _parts()}
"""In the order in which they are made."""
