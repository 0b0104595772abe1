"""Greedy samples equal a loop over single prompts; texts end where the document ends."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from trinity.config import RunConfig
from trinity.data.tokenizer.tokenizer import bos_id, load_text_encoder
from trinity.evaluation.generate import generate
from trinity.evaluation.samples import Sampler, greedy_decode
from trinity.models import Trinity

CPU = torch.device("cpu")


def test_greedy_decode_equals_single_prompts(exact: Trinity) -> None:
    """Prompts of several lengths in one batch, past the attention window, in float64 so that padding moves no tie."""
    prompts = [[0], [0, 5, 17, 300, 2, 9, 11, 40], [0, 77, 3]]
    calls = []

    def counted(tokens_PS: Tensor) -> Tensor:
        calls.append(tokens_PS.shape)
        return exact(tokens_PS)

    continuations = greedy_decode(counted, prompts, 14, CPU)
    assert continuations == [generate(exact, prompt, 14, temperature=0) for prompt in prompts]
    assert calls == [torch.Size([3, 8 + 14])] * 14, "the same calls on every rank, for any generated tokens"


def scripted_model(texts: list[list[int]], prompt_lengths: list[int]) -> Callable[[Tensor], Tensor]:
    """A model that generates given tokens."""

    def model(tokens_PS: Tensor) -> Tensor:
        logits_PSV = torch.zeros((*tokens_PS.shape, 512))
        for row, (tokens, length) in enumerate(zip(texts, prompt_lengths)):
            for index, token in enumerate(tokens):
                logits_PSV[row, length - 1 + index, token] = 1
        return logits_PSV

    return model


def test_texts_end_with_their_document(config: RunConfig) -> None:
    """Tokens after BOS or EOS belong to another document; an id without a text decodes to nothing."""
    folder = Path(config.data.tokenizer)
    tok = load_text_encoder(folder)
    bos, continuation = bos_id(tok), tok.encode(" and more", add_special_tokens=False).ids
    end = tok.token_to_id("<|end_of_text|>")
    prompts = ["the run", "", "<|begin_of_text|>"]
    lengths = [1 + len(tok.encode(text, add_special_tokens=False).ids) for text in prompts]
    assert lengths[2] > 2, "a special token that is spelled out is text"
    new = len(continuation) + 2
    texts = [
        [*continuation, bos, continuation[0]],
        [*continuation, end, continuation[0]],
        [511, *continuation, continuation[0]],
    ]
    sampler = Sampler(prompts, new, folder, 512)
    samples = sampler(scripted_model(texts, lengths), CPU)
    assert samples == [
        {"prompt": "the run", "text": " and more"},
        {"prompt": "", "text": " and more"},
        {"prompt": "<|begin_of_text|>", "text": " and more" + tok.decode([continuation[0]])},
    ]
