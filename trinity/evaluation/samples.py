"""What a model in training says: fixed prompts, each continued by the likeliest tokens.

A sharded model is called by all ranks or not at all. So every rank continues every prompt, always by the same number of
tokens: a rank that stopped at a document's end would leave the others waiting. Texts are cut there afterwards.

All prompts go together, padded on the right to one length that never changes: attention looks only to the left and
routing drops no token, so what stands on the right changes nothing, and compiled blocks are compiled once. Each token
is a whole forward pass, in which a sharded model gathers all of its weights: on a large mesh ask for few tokens.

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
    """The likeliest continuation of each prompt, token by token; ties go to the smaller id.

    Args:
        model: tokens [P, S] → logits [P, S, V]; called `new_tokens` times, sharded or not.
        prompts: each at least one token.
        new_tokens: how many are made for each.
        device: where the model computes.
        beat: called when a forward pass is done.
    """
    longest = max(map(len, prompts))
    tokens_PS = torch.zeros((len(prompts), longest + new_tokens), dtype=torch.int64, device=device)
    for row_S, prompt in zip(tokens_PS, prompts):
        row_S[: len(prompt)] = torch.tensor(prompt)
    rows_P = torch.arange(len(prompts), device=device)
    ends_P = torch.tensor([len(prompt) for prompt in prompts], device=device)
    for made in range(new_tokens):
        logits_PV = model(tokens_PS)[rows_P, ends_P + made - 1]
        tokens_PS[rows_P, ends_P + made] = logits_PV.argmax(dim=-1)
        if beat is not None:
            beat()
    return [row[len(prompt) : len(prompt) + new_tokens] for row, prompt in zip(tokens_PS.tolist(), prompts)]


class Sampler:
    """Continues the same texts again and again, each as the beginning of a document.

    Args:
        prompts: the texts, at least one; an empty one lets the model begin by itself.
        new_tokens: tokens that are made for each.
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
        """{"prompt", "text"} for each prompt, the text without the prompt; every rank must call it."""
        made = greedy_decode(model, self._ids, self._new_tokens, device, beat)
        return [{"prompt": prompt, "text": self._text(tokens)} for prompt, tokens in zip(self._prompts, made)]

    def _text(self, tokens: list[int]) -> str:
        end = next((place for place, token in enumerate(tokens) if token in self._stop), len(tokens))
        return self._tokenizer.decode(tokens[:end], skip_special_tokens=False)
