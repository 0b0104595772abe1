"""Generate text: a batch of prompts, each continued until it ends.

The prompts are read in chunks into a key-value cache (trinity.models.kv_cache); then each forward pass takes one token
of each row. A row that ends leaves the batch. Each row has a random generator of its own, so its text does not depend
on the other rows, except where rounding decides between two tokens: the shapes of matrix products differ.

Shapes: B rows, S tokens of the longest prompt, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from trinity.errors import UserError
from trinity.evaluation.sampling import PLAIN, Sampling, choose
from trinity.models.decode import Decoder
from trinity.models.kv_cache import KVCache
from trinity.models.trinity import Trinity

PREFILL_CHUNK = 2048
"""Most tokens of a row in one forward pass over the prompts; on a CPU, the mask over 131,072 keys then takes 1 GB."""

MOST_RESERVED = 8192
"""Most new tokens for which a cache allocates memory in advance; for more, it grows."""


def generate(
    model: Trinity,
    token_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Collection[int] = (),
    top_k: int = 0,
    min_p: float = 0.0,
) -> list[int]:
    """The new tokens as a list; for the arguments see `stream`."""
    return list(stream(model, token_ids, max_new_tokens, temperature, top_p, seed, stop_ids, top_k, min_p))


def stream(
    model: Trinity,
    token_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Collection[int] = (),
    top_k: int = 0,
    min_p: float = 0.0,
) -> Iterator[int]:
    """Continue a prompt; yields each new token as soon as it is sampled.

    Args:
        model: on any device; not sharded.
        token_ids: the prompt, at least one token.
        max_new_tokens: most tokens to generate.
        temperature, top_p, top_k, min_p: see Sampling.
        seed: the same seed gives the same tokens.
        stop_ids: tokens that end the text; the stop token is yielded last.
    Raises:
        UserError: the prompt is empty, or a value is out of range.
    """
    sampling = Sampling(temperature, top_p, top_k, min_p)
    for _, token in Generation(model, [token_ids], max_new_tokens, sampling, [seed], stop_ids):
        yield token


def generate_batch(
    model: Trinity,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = PLAIN,
    seeds: Sequence[int] | None = None,
    stop_ids: Collection[int] = (),
) -> list[list[int]]:
    """The new tokens of each prompt; for the arguments see Generation."""
    texts: list[list[int]] = [[] for _ in prompts]
    for row, token in Generation(model, prompts, max_new_tokens, sampling, seeds, stop_ids):
        texts[row].append(token)
    return texts


class Generation:
    """Continue a batch of prompts: iterate over it for the new tokens of all rows as they are chosen.

    Args:
        model: on any device; not sharded.
        prompts: token ids, at least one of each row.
        max_new_tokens: most tokens to generate for each row.
        sampling: how to choose tokens.
        seeds: of the rows; by default 0 for each.
        stop_ids: tokens that end a row; the stop token is yielded last.
        chunk: most tokens of a row in one forward pass over the prompts.
        cache: of earlier tokens of the rows, which precede the prompts; prompts are then equally long.
    Raises:
        UserError: a prompt is empty.

    Attributes:
        texts: the tokens of each row so far, prompt included.
    """

    def __init__(
        self,
        model: Trinity,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = PLAIN,
        seeds: Sequence[int] | None = None,
        stop_ids: Collection[int] = (),
        chunk: int = PREFILL_CHUNK,
        cache: KVCache | None = None,
    ) -> None:
        if not all(prompts):
            raise UserError("there is no token to continue; give a prompt that is not empty")
        self.prompts, self.max_new_tokens, self.stop_ids = prompts, max_new_tokens, frozenset(stop_ids)
        self._model, self._sampling, self._chunk, self._cache = model, sampling, chunk, cache
        self._seeds = [0] * len(prompts) if seeds is None else seeds
        self._finished: set[int] = set()
        self.texts = [list(prompt) for prompt in prompts]

    def finish(self, row: int) -> None:
        """End a row: no token of it is generated after those of the current forward pass."""
        self._finished.add(row)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(row, new token) of each row in turn, for each forward pass."""
        if not self.prompts or self.max_new_tokens < 1:
            return
        model, device = self._model, self._model.embed.weight.device
        tokens_BS, cache = left_padded(model, self.prompts, self.max_new_tokens, device)
        cache = cache if self._cache is None else self._cache
        texts = self.texts
        generators = [torch.Generator(device).manual_seed(seed) for seed in self._seeds]
        rows = list(range(len(texts)))
        with torch.inference_mode():
            logits_BV = prefill(model, tokens_BS, cache, self._chunk)
        decoder = Decoder(model, cache)
        for number in range(1, self.max_new_tokens + 1):
            chosen = choose(logits_BV, self._sampling, [texts[row] for row in rows], [generators[row] for row in rows])
            for row, token in zip(rows, chosen):
                texts[row].append(token)
                if token in self.stop_ids:
                    self._finished.add(row)
                yield row, token
            going = [place for place, row in enumerate(rows) if row not in self._finished]
            if not going or number == self.max_new_tokens:
                return
            if len(going) < len(rows):
                cache.keep(going, device)
                rows = [rows[place] for place in going]
            logits_BV = decoder(torch.tensor([texts[row][-1] for row in rows], device=device))


def left_padded(
    model: Trinity, prompts: Sequence[Sequence[int]], new_tokens: int, device: torch.device
) -> tuple[Tensor, KVCache]:
    """The prompts as tokens [B, S], padded on the left with id 0, and an empty cache for them.

    Args:
        model: whose cache it is.
        new_tokens: expected after each prompt, for the cache's size.
    """
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    tokens_BS = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts)], device=device)
    return tokens_BS, KVCache(model.config, padding, longest + min(new_tokens, MOST_RESERVED))


def prefill(
    model: Trinity,
    tokens_BS: Tensor,
    cache: KVCache,
    chunk: int = PREFILL_CHUNK,
    beat: Callable[[], None] = lambda: None,
) -> Tensor:
    """Read prompts into the cache; returns the logits after their last token, [B, V].

    Args:
        tokens_BS: [B, S] int64.
        chunk: most columns in one forward pass.
        beat: called after each forward pass.
    """
    for part_BS in tokens_BS.split(chunk, dim=1):
        logits_B1V = model(part_BS, cache=cache, logits_to_keep=1)
        beat()
    return logits_B1V[:, -1]
