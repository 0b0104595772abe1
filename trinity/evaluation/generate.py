"""Sample text from a model, for a quick look at what it has learned.

Every new token takes a forward pass over the whole text: there is no key-value cache, so the time grows with the square
of the length. To serve a model, export it.

Shapes: S tokens so far, V vocabulary.
"""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from trinity.errors import UserError
from trinity.models.trinity import Trinity


def generate(
    model: Trinity,
    token_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Collection[int] = (),
) -> list[int]:
    """The new tokens as a list; for the arguments see `stream`."""
    return list(stream(model, token_ids, max_new_tokens, temperature, top_p, seed, stop_ids))


def stream(
    model: Trinity,
    token_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Collection[int] = (),
) -> Iterator[int]:
    """Continue a prompt; yields each new token as soon as it is sampled.

    Args:
        model: on any device; not sharded.
        token_ids: the prompt, at least one token.
        max_new_tokens: most tokens to generate.
        temperature: divides the logits; 0 is greedy decoding.
        top_p: nucleus sampling: sample from the likeliest tokens that together have this probability (Holtzman et al.,
            arXiv 1904.09751).
        seed: the same seed gives the same tokens.
        stop_ids: tokens that end the text; the stop token is yielded last.
    Raises:
        UserError: the prompt is empty, or temperature or top_p is out of range.
    """
    if not token_ids:
        raise UserError("there is no token to continue; give a prompt that is not empty")
    if not temperature >= 0:
        raise UserError(f"temperature={temperature} is negative; write 0 for the likeliest token, or more")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p} is not a probability above 0; write 1 to allow every token")
    device = model.embed.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    tokens_1S = torch.tensor([list(token_ids)], device=device)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits_V = model(tokens_1S)[0, -1].float()
        if temperature == 0:
            chosen = logits_V.argmax()
        else:
            chosen = torch.multinomial(distribution(logits_V, temperature, top_p), 1, generator=generator).squeeze(0)
        yield chosen.item()
        if chosen.item() in stop_ids:
            return
        tokens_1S = torch.cat((tokens_1S, chosen.view(1, 1)), dim=1)


def distribution(logits_V: Tensor, temperature: float, top_p: float) -> Tensor:
    """Probabilities of the next token.

    Args:
        logits_V: [V] fp32.
        temperature: greater than 0.
        top_p: the smallest set of likeliest tokens whose total probability reaches it is kept; the others get 0.
    Returns:
        [V] fp32, summing to 1.
    """
    probabilities_V = torch.softmax(logits_V / temperature, dim=-1)
    if top_p == 1:  # rounding of the sum below could drop the least likely tokens
        return probabilities_V
    ranked_V, order_V = probabilities_V.sort(descending=True, stable=True)
    before_V = ranked_V.cumsum(dim=-1) - ranked_V  # 0 for the likeliest token, so that it is always kept
    kept_V = ranked_V.where(before_V < top_p, 0)
    return torch.zeros_like(probabilities_V).scatter(0, order_V, kept_V / kept_V.sum())
