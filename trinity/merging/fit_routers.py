"""Fit the routers of a merged model to those of the models it was made of, each on a text of its own.

A merged router sees activations that no model's router has seen. After HARC (arXiv 2606.03391), here for sigmoid
scores: layer by layer, on the merged model's activations x, each expert's row w moves so that the tokens of each text
get the logits z = W_i x_i that the text's own model gives them. This is the least-squares problem with the weights
ω = p(1 − p), p = σ(z), at which an error of a logit moves the score:

    A = Σ ω x xᵀ,  w ← w + (0.9·A + 0.1·diag A)⁻¹ Σ ω x (z − w·x)

It is one step along the gradient of the squared error, scaled by the inverse Hessian with its off-diagonal entries
shrunk, as few tokens determine them badly. Several such steps come near the unshrunk solution; STEPS are taken. A
router that gives its own model's logits already stays as it is.

Shapes: T tokens, D model width, E experts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trinity.evaluation.expert_load import moe_layers
from trinity.merging.balance import Rows
from trinity.models.moe import MoE
from trinity.models.trinity import Trinity
from trinity.terminal import Progress

OFF_DIAGONAL = 0.9
STEPS = 3
_RIDGE = 1e-6


class Fitted(NamedTuple):
    """Mean squared differences of the scores from those of the rows' own models, over layers, tokens and experts."""

    before: float
    after: float


class _Reached(Exception):
    """Ends a forward pass at the router whose input was wanted."""


@torch.no_grad()
def router_logits(model: Trinity, batches: list[Rows]) -> list[Tensor]:
    """The router logits of a model for the tokens of these rows, padding left out.

    Returns:
        [T, E] fp32 on the CPU, for each MoE layer.
    """
    layers = moe_layers(model)
    found: list[list[Tensor]] = [[] for _ in layers]
    kept_T = torch.empty(0)

    def collector(number: int) -> Callable[..., None]:
        def collect(router: nn.Module, args: tuple[Any, ...]) -> None:
            x_TD = args[0][kept_T].double()
            found[number].append((x_TD @ layers[number].router.weight.double().T).float().cpu())

        return collect

    handles = [layer.router.register_forward_pre_hook(collector(number)) for number, layer in enumerate(layers)]
    for rows in batches:
        kept_T = _kept(rows)
        model(rows.tokens_BS, document_ids_BS=rows.ids_BS, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    return [torch.cat(parts) for parts in found]


@torch.no_grad()
def fit_routers(merged: Trinity, batches: list[Rows], logits: list[Tensor], progress: bool = False) -> Fitted:
    """Fit all routers of a model, in the order of its layers; the weights of its routers change.

    Args:
        merged: the model.
        batches: the rows of all texts.
        logits: for each MoE layer, [T, E], the logits that each text's own model gives its tokens (router_logits).
        progress: show progress on stderr.
    """
    layers = moe_layers(merged)
    before = after = 0.0
    with Progress("fitting routers", len(layers), "layer", progress) as done:
        for layer, z_TE in zip(layers, logits):
            x_TD = torch.cat([_inputs(merged, layer, rows) for rows in batches]).double()
            z_TE = z_TE.to(x_TD)
            before += _difference(x_TD, z_TE, layer.router.weight)
            layer.router.weight.copy_(_fit(x_TD, z_TE, layer.router.weight.double()))
            after += _difference(x_TD, z_TE, layer.router.weight)
            done.update()
    return Fitted(before / len(layers), after / len(layers))


def _fit(x_TD: Tensor, z_TE: Tensor, weight_ED: Tensor) -> Tensor:
    """The rows after STEPS steps, one expert at a time: A is [D, D]."""
    fitted_ED = weight_ED.clone()
    for expert, z_T in enumerate(z_TE.T):
        omega_T = z_T.sigmoid() * (-z_T).sigmoid()
        weighted_TD = x_TD * omega_T.unsqueeze(1)
        a_DD = weighted_TD.T @ x_TD
        diagonal_D = a_DD.diagonal()
        shrunk_DD = OFF_DIAGONAL * a_DD + torch.diag((1 - OFF_DIAGONAL) * diagonal_D + _RIDGE * diagonal_D.mean())
        factor = torch.linalg.cholesky(shrunk_DD)
        for _ in range(STEPS):
            gradient_D = weighted_TD.T @ (z_T - x_TD @ fitted_ED[expert])
            fitted_ED[expert] += torch.cholesky_solve(gradient_D.unsqueeze(1), factor).squeeze(1)
    return fitted_ED


def _difference(x_TD: Tensor, z_TE: Tensor, weight_ED: Tensor) -> float:
    return ((x_TD @ weight_ED.double().T).sigmoid() - z_TE.sigmoid()).square().mean().item()


def _inputs(model: Trinity, layer: MoE, rows: Rows) -> Tensor:
    """The input of one router, [T, D], without padding."""
    found: list[Tensor] = []

    def stop(router: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0])
        raise _Reached

    handle = layer.router.register_forward_pre_hook(stop)
    try:
        model(rows.tokens_BS, document_ids_BS=rows.ids_BS, logits_to_keep=1)
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0][_kept(rows)]


def _kept(rows: Rows) -> Tensor:
    """[T] bool: the tokens that are not padding."""
    kept_BS = torch.ones_like(rows.tokens_BS, dtype=torch.bool) if rows.ids_BS is None else rows.ids_BS >= 0
    return kept_BS.flatten()
