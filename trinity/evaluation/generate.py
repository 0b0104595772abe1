"""Sampling from a model, for a look at what it has learned.

Every new token is one whole forward over everything before it: there is no cache of keys and values, so the time grows
with the square of the length. Serving is what exported folders are for.

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
    """The tokens that `stream` yields, as a list."""
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
    """Tokens that continue a text, each as soon as it is chosen.

    Args:
        model: on any device; not sharded.
        token_ids: what comes before, at least one token.
        max_new_tokens: the most that come.
        temperature: divides the logits; 0 takes the likeliest token always.
        top_p: only the likeliest tokens that together have this probability (Holtzman et al., arXiv 1904.09751).
        seed: the same seed gives the same tokens.
        stop_ids: tokens that end the text; the one that does comes last.
    Raises:
        UserError: no token to begin with, or a temperature or top_p that means nothing.
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
        top_p: the smallest set of likeliest tokens whose probability reaches it stays; the others get 0.
    Returns:
        [V] fp32, summing to 1.
    """
    probabilities_V = torch.softmax(logits_V / temperature, dim=-1)
    if top_p == 1:  # rounding in the sum below would drop a few of the unlikeliest
        return probabilities_V
    ranked_V, order_V = probabilities_V.sort(descending=True, stable=True)
    before_V = ranked_V.cumsum(dim=-1) - ranked_V  # the first token has nothing before it, so it always stays
    kept_V = ranked_V.where(before_V < top_p, 0)
    return torch.zeros_like(probabilities_V).scatter(0, order_V, kept_V / kept_V.sum())
