"""Recalibrate the expert biases of a merged model: forward passes and the balancing rule, no gradients.

Merged routers send tokens elsewhere than the models' own did, so biases that balanced those do not balance them. A pass
counts each expert's tokens over all rows and takes one step of the rule (SMEBU or sign, trinity.balancing) in every
layer. The step size begins at START_RATE; where PATIENCE passes bring no better balance, it is halved and the search
goes on from the best biases yet. It ends below END_RATE. The best biases are kept, so the balance on these rows never
gets worse. The same rows, model and rule give the same biases.

Shapes: B rows of a pass, S tokens of a row, M MoE layers, E experts.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trinity.balancing import max_violation, next_biases, set_biases
from trinity.config.run import BalancingConfig
from trinity.data.sources.source import Source
from trinity.data.stream.collate import PADDING_ID
from trinity.data.stream.validation import validation_sequences
from trinity.errors import UserError
from trinity.evaluation.expert_load import ExpertLoad, moe_layers, up_to_last_target
from trinity.models.trinity import Trinity
from trinity.terminal import Progress

Rule = Literal["smebu", "sign"]
START_RATE, END_RATE = 1e-2, 1e-4
"""Step sizes in units of the scores. Not from the report, whose runs step by 5e-4 (SMEBU)."""
PATIENCE = 2
"""Passes without a better balance before the step is halved."""
MAX_PASSES = 100
ROWS = 32
"""Rows by default: of 2048 tokens, each of 128 experts gets 4096 choices of 8, so counts are right to 2 %."""


class Rows(NamedTuple):
    """Rows of equal length for one forward pass: tokens_BS int64; ids_BS int32, PADDING_ID for padding, else 0."""

    tokens_BS: Tensor
    ids_BS: Tensor | None


def read_rows(source: Source, row_tokens: int, count: int, batch_tokens: int, device: str) -> list[Rows]:
    """Pack documents into the first `count` rows, those of the validation loss, and batch them.

    Raises:
        UserError: the text has no token.
    """
    sequences = list(validation_sequences(source, row_tokens, count))
    size = max(1, batch_tokens // row_tokens)
    batches = []
    for start in range(0, len(sequences), size):
        group = sequences[start : start + size]
        tokens_BS = torch.stack([sequence.tokens for sequence in group]).to(device)
        kept_BS = up_to_last_target(torch.stack([sequence.targets for sequence in group]).to(device))
        ids_BS = None if bool(kept_BS.all()) else torch.where(kept_BS, 0, PADDING_ID).int()
        batches.append(Rows(tokens_BS, ids_BS))
    if not batches:
        raise UserError("the text to recalibrate on holds no document; give a longer one")
    return batches


@torch.no_grad()
def expert_counts(model: Trinity, batches: list[Rows]) -> Tensor:
    """[M, E] int64 on the CPU: tokens that each expert gets."""
    with ExpertLoad(model) as load:
        for rows in batches:
            model(rows.tokens_BS, document_ids_BS=rows.ids_BS, logits_to_keep=1)
    return load.counts_ME


@dataclass(frozen=True)
class Settled:
    """What the recalibration of the biases did.

    passes: over the rows. before, after: MaxVio on them, the mean over the layers.
    """

    passes: int
    before: float
    after: float


@torch.no_grad()
def settle_biases(model: Trinity, batches: list[Rows], config: BalancingConfig, progress: bool = False) -> Settled:
    """Move the expert biases of a model until MaxVio settles.

    Args:
        model: its expert_bias is changed; its expert_momentum is not used, and is 0 afterwards.
        batches: all rows of a pass.
        config: kind, and κ and β of SMEBU; the step size is this function's.
        progress: show progress on stderr.
    """
    layers = moe_layers(model)
    device = layers[0].expert_bias.device
    rate, passes, stale = START_RATE, 0, 0
    first = best = state = _State.of(model, expert_counts(model, batches))
    first.restore(model)  # without momentum
    with Progress("balancing", MAX_PASSES, "step", progress) as done:
        while rate >= END_RATE and best.violation > 0 and passes < MAX_PASSES:
            biases = next_biases(layers, state.counts_ME.to(device), replace(config, rate=rate, gamma=rate))
            assert biases is not None  # there are counts
            set_biases(layers, biases)
            state = _State.of(model, expert_counts(model, batches))
            passes, stale = passes + 1, stale + 1
            done.update()
            if state.violation < best.violation:
                best, stale = state, 0
            elif stale == PATIENCE:
                state, stale, rate = best, 0, rate / 2
                best.restore(model)
    best.restore(model)
    return Settled(passes, first.violation, best.violation)


class _State(NamedTuple):
    """Biases, the counts that they give, and MaxVio of these."""

    bias_ME: Tensor
    counts_ME: Tensor
    violation: float

    @classmethod
    def of(cls, model: Trinity, counts_ME: Tensor) -> "_State":
        bias_ME = torch.stack([layer.expert_bias for layer in moe_layers(model)])
        return cls(bias_ME, counts_ME, max_violation(counts_ME).mean().item())

    def restore(self, model: Trinity) -> None:
        """Write the biases into the model, without momentum."""
        for layer, bias_E in zip(moe_layers(model), self.bias_ME):
            layer.expert_bias.copy_(bias_E)
            layer.expert_momentum.zero_()
