"""Greedy samples equal a loop over single prompts; texts end where the document ends."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity.config import RunConfig
from trinity.config.model import ModelConfig
from trinity.data.tokenizer.tokenizer import bos_id, load_text_encoder
from trinity.evaluation.samples import Sampler, greedy_decode
from trinity.models import Trinity

CPU = torch.device("cpu")


def test_greedy_decode_equals_single_prompts(exact: Trinity) -> None:
    """Prompts of several lengths in one batch, past the attention window, in float64 so that padding moves no tie."""
    prompts = [[0], [0, 5, 17, 300, 2, 9, 11, 40], [0, 77, 3]]
    calls, beats = [], []
    hook = exact.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0].shape))
    continuations = greedy_decode(exact, prompts, 14, CPU, lambda: beats.append(len(calls)))
    hook.remove()
    assert continuations == [uncached(exact, prompt, 14) for prompt in prompts]
    assert calls == [(3, 8)] + [(3, 1)] * 13, "the same calls on every rank, for any generated tokens"
    assert beats == list(range(1, 15))


def uncached(model: Trinity, prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy tokens, each from a forward pass over the whole text."""
    tokens = list(prompt)
    for _ in range(new_tokens):
        with torch.no_grad():
            tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    return tokens[len(prompt) :]


class ScriptedModel:
    """A model that generates given tokens, one a call."""

    def __init__(self, config: ModelConfig, texts: list[list[int]]) -> None:
        self.config, self._columns = config, zip(*texts)

    def __call__(self, tokens_PS: Tensor, **_: object) -> Tensor:
        return F.one_hot(torch.tensor(next(self._columns)), 512).unsqueeze(1)


def test_texts_end_with_their_document(config: RunConfig) -> None:
    """Tokens after BOS or EOS belong to another document; an id without a text decodes to nothing."""
    folder = Path(config.data.tokenizer)
    tok = load_text_encoder(folder)
    bos, continuation = bos_id(tok), tok.encode(" and more", add_special_tokens=False).ids
    end = tok.token_to_id("<|end_of_text|>")
    prompts = ["the run", "", "<|begin_of_text|>"]
    assert len(tok.encode(prompts[2], add_special_tokens=False).ids) > 1, "a special token that is spelled out is text"
    new = len(continuation) + 2
    texts = [
        [*continuation, bos, continuation[0]],
        [*continuation, end, continuation[0]],
        [511, *continuation, continuation[0]],
    ]
    sampler = Sampler(prompts, new, folder, 512)
    samples = sampler(ScriptedModel(config.model, texts), CPU)
    assert samples == [
        {"prompt": "the run", "text": " and more"},
        {"prompt": "", "text": " and more"},
        {"prompt": "<|begin_of_text|>", "text": " and more" + tok.decode([continuation[0]])},
    ]
