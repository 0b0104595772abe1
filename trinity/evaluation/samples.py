"""Samples during training: fixed prompts, each continued by greedy decoding.

The forward pass of a sharded model is a collective. So every rank continues every prompt by the same number of tokens:
a rank that stopped at the end of a document would leave the others waiting. Texts are cut at that end afterwards.

All prompts form one batch: one forward pass reads them into a key-value cache, and each further one takes a token of
each. So compiled blocks are compiled for two shapes. A sharded model gathers all of its weights in each forward pass:
generate few tokens on a large mesh.

Shapes: P prompts, S tokens of the longest prompt, V vocabulary.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from trinity.data.tokenizer.tokenizer import bos_id, load_text_encoder
from trinity.evaluation.generate import left_padded, prefill
from trinity.interop.tokenizer_files import special_ids
from trinity.models.trinity import Trinity


@torch.no_grad()
def greedy_decode(
    model: Trinity,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    device: torch.device,
    beat: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Continue each prompt by greedy decoding; a tie goes to the smaller id.

    Args:
        model: called the same number of times on every rank, sharded or not.
        prompts: token ids, at least one per prompt.
        new_tokens: tokens to generate per prompt, at least one.
        device: where the model computes.
        beat: called after each forward pass.
    Returns:
        the new tokens of each prompt.
    """
    tokens_PS, cache = left_padded(model, prompts, new_tokens, device)
    chosen = [prefill(model, tokens_PS, cache, beat=beat).argmax(dim=-1, keepdim=True)]
    while len(chosen) < new_tokens:
        chosen.append(model(chosen[-1], cache=cache)[:, -1].argmax(dim=-1, keepdim=True))
        beat()
    return torch.cat(chosen, dim=1).tolist()


class Sampler:
    """Continue the same prompts at every evaluation, each as the beginning of a document.

    Args:
        prompts: the texts, at least one; an empty one is BOS alone.
        new_tokens: tokens to generate per prompt.
        tokenizer: folder with tokenizer.json.
        vocab_size: V of the model.
    Raises:
        UserError: there is no tokenizer, or it does not fit the model.
    """

    def __init__(self, prompts: list[str], new_tokens: int, tokenizer: Path, vocab_size: int) -> None:
        self._prompts, self._new_tokens = prompts, new_tokens
        self._stop = set(special_ids(tokenizer, vocab_size).stop)
        self._tokenizer = load_text_encoder(tokenizer)
        begin = bos_id(self._tokenizer)
        self._stop.add(begin)
        self._ids = [[begin, *self._tokenizer.encode(text, add_special_tokens=False).ids] for text in prompts]

    def __call__(
        self, model: Trinity, device: torch.device, beat: Callable[[], None] = lambda: None
    ) -> list[dict[str, str]]:
        """{"prompt", "text"} for each prompt; the text excludes the prompt. Every rank must call this."""
        continuations = greedy_decode(model, self._ids, self._new_tokens, device, beat)
        return [
            {"prompt": prompt, "text": self._decode(tokens)} for prompt, tokens in zip(self._prompts, continuations)
        ]

    def _decode(self, tokens: list[int]) -> str:
        end = next((index for index, token in enumerate(tokens) if token in self._stop), len(tokens))
        return self._tokenizer.decode(tokens[:end], skip_special_tokens=False)
