"""Samples during training: fixed prompts, each continued by greedy decoding.

The forward pass of a sharded model is a collective. So every rank continues every prompt by the same number of tokens:
a rank that stopped at the end of a document would leave the others waiting. Texts are cut at that end afterwards.

All prompts form one batch, padded on the right to a constant length: attention is causal and routing drops no token, so
padding changes nothing, and compiled blocks are compiled once. Each token takes a forward pass, in which a sharded
model gathers all of its weights: generate few tokens on a large mesh.

Shapes: P prompts, S tokens of the longest prompt with its continuation, V vocabulary.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from trinity.data.tokenizer.tokenizer import bos_id, load_text_encoder
from trinity.interop.tokenizer_files import special_ids


@torch.no_grad()
def greedy_decode(
    model: Callable[[Tensor], Tensor],
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    device: torch.device,
    beat: Callable[[], None] | None = None,
) -> list[list[int]]:
    """Continue each prompt by greedy decoding; a tie goes to the smaller id.

    Args:
        model: tokens [P, S] → logits [P, S, V]; called `new_tokens` times, sharded or not.
        prompts: token ids, at least one per prompt.
        new_tokens: tokens to generate per prompt.
        device: where the model computes.
        beat: called after each forward pass.
    Returns:
        the new tokens of each prompt.
    """
    longest = max(map(len, prompts))
    tokens_PS = torch.zeros((len(prompts), longest + new_tokens), dtype=torch.int64, device=device)
    for row_S, prompt in zip(tokens_PS, prompts):
        row_S[: len(prompt)] = torch.tensor(prompt)
    rows_P = torch.arange(len(prompts), device=device)
    ends_P = torch.tensor([len(prompt) for prompt in prompts], device=device)
    for step in range(new_tokens):
        logits_PV = model(tokens_PS)[rows_P, ends_P + step - 1]
        tokens_PS[rows_P, ends_P + step] = logits_PV.argmax(dim=-1)
        if beat is not None:
            beat()
    return [row[len(prompt) : len(prompt) + new_tokens] for row, prompt in zip(tokens_PS.tolist(), prompts)]


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
        self, model: Callable[[Tensor], Tensor], device: torch.device, beat: Callable[[], None] | None = None
    ) -> list[dict[str, str]]:
        """{"prompt", "text"} for each prompt; the text excludes the prompt. Every rank must call this."""
        continuations = greedy_decode(model, self._ids, self._new_tokens, device, beat)
        return [
            {"prompt": prompt, "text": self._decode(tokens)} for prompt, tokens in zip(self._prompts, continuations)
        ]

    def _decode(self, tokens: list[int]) -> str:
        end = next((index for index, token in enumerate(tokens) if token in self._stop), len(tokens))
        return self._tokenizer.decode(tokens[:end], skip_special_tokens=False)
