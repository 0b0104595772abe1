"""One step of learning: each text's distance to its own model, the penalties, one update of the coefficients.

For each text: a pass of its model without a graph, which gives the head's inputs; a pass of the merged model; backward.
Both passes use the same frozen weights. Losses of a text are the mean over the valid tokens of its global batch, so
neither the mesh nor the microbatch changes the gradient.

With `granularity: group` each layer keeps coefficients of its own. Their gradients are added up over each group after
backward, so all copies start equal, get equal gradients, and stay equal: no parameter is shared between FSDP groups.

Shapes: B rows, N models, P matrices, I input width.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from trinity.dam.config import DamConfig
from trinity.dam.data import TextRows
from trinity.dam.loss import Distillation, penalty
from trinity.dam.model import MergedTrinity, hidden_states, merged_layers
from trinity.errors import UserError
from trinity.optim.grad_clip import clip_, global_norm
from trinity.parallel.grad_accumulation import end_accumulation, set_reduction
from trinity.parallel.mesh import Ranks

GROUPS = ("attention", "experts", "router")
"""Parts that are a group of their own with `granularity: group`; all others are the group `rest`."""


class Learner:
    """The learned coefficients of a merged model and their AdamW, without weight decay.

    Args:
        model: sharded, its values loaded.
        config: the settings.
        ranks: the mesh.
    """

    def __init__(self, model: MergedTrinity, config: DamConfig, ranks: Ranks) -> None:
        self.model, self.config, self.ranks = model, config, ranks
        self.learned = {name: each for name, each in model.named_parameters() if each.requires_grad}
        # one by one: torch's fused loops take no parameters of different meshes together
        self.optimizer = torch.optim.AdamW(self.learned.values(), lr=config.lr, weight_decay=0.0, foreach=False)
        for parameter in self.learned.values():
            zeros = {key: torch.zeros_like(parameter.detach()) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **zeros}
        self._matrices = sum(len(parameter) for parameter in self.learned.values())
        self._groups: dict[str, list[torch.nn.Parameter]] = {}
        for path, layer in merged_layers(model).items():
            for name, _ in layer.named_parameters(recurse=False):
                learned = self.learned.get(f"{path}.{name}")
                if learned is not None:
                    self._groups.setdefault(layer.part if layer.part in GROUPS else "rest", []).append(learned)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the coefficients and AdamW's moments, by name; not copies."""
        found = {f"coefficients.{name}": parameter.detach() for name, parameter in self.learned.items()}
        for name, parameter in self.learned.items():
            moments = self.optimizer.state[parameter]
            found |= {f"{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
        return found

    def set_step(self, steps: int) -> None:
        """Record that `steps` updates were made; for a state that was loaded."""
        for parameter in self.learned.values():
            self.optimizer.state[parameter]["step"].fill_(float(steps))

    def step(self, batch: dict[int, TextRows]) -> dict[str, Any]:
        """One update.

        Args:
            batch: number of the model → the global batch of its text; every rank has all of it.
        Returns:
            loss, loss of each text by the number of its model, penalty, grad_norm.
        Raises:
            UserError: the loss is not finite.
        """
        distances, penalties = self.gradients(batch)
        norm = self._norm()
        clip_([parameter.grad for parameter in self.learned.values()], norm, self.config.clip)
        loss = math.fsum(distances.values()) + penalties
        if not (math.isfinite(loss) and math.isfinite(norm.item())):
            raise UserError(
                f"the loss is {loss} and the gradient's norm {norm.item()}; lower lr, or look for a model whose logits "
                "are not finite (tools/evaluate.py)"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss, "distances": distances, "penalty": penalties, "grad_norm": norm.item()}

    def gradients(self, batch: dict[int, TextRows]) -> tuple[dict[int, float], float]:
        """Compute the gradients of all coefficients; returns (distance of each text, penalty) over all ranks."""
        sums = torch.zeros(len(batch) + 1, dtype=torch.float64)
        for at, (source, rows) in enumerate(batch.items()):
            tokens = max(int(rows.valid_BS.sum()), 1)
            own = rows.of_rank(self.ranks.data_rank, self.ranks.data_ranks)
            parts = list(zip(own.tokens_BS.split(self.config.microbatch), own.valid_BS.split(self.config.microbatch)))
            for number, (tokens_BS, valid_BS) in enumerate(parts, 1):
                # gradients are as small as coefficients: to keep them until the last pass costs nothing
                last = at + 1 == len(batch) and number == len(parts)
                set_reduction(self.model, last=last, defer=True)
                sums[at] += self._backward(source, tokens_BS.to(self.ranks.device), valid_BS, tokens)
        end_accumulation(self.model)
        sums[-1] = self._add_penalty() / self.ranks.sizes.replicate
        dist.all_reduce(sums)
        if self.config.granularity == "group":
            self._tie_groups()
        *distances, penalties = sums.tolist()
        return dict(zip(batch, distances)), penalties

    def _backward(self, source: int, tokens_BS: Tensor, valid_BS: Tensor, tokens: int) -> float:
        """Backward of one microbatch's share of a text's mean distance; returns the share."""
        hidden_BSD = hidden_states(self.model, source, tokens_BS)
        config, valid_BS = self.config, valid_BS.to(tokens_BS.device)
        compare = Distillation(hidden_BSD, valid_BS, source, config.loss, config.temperature)
        loss = self.model(tokens_BS, compare=compare) / tokens
        loss.backward()
        return loss.item()

    def _add_penalty(self) -> float:
        """Add the gradient of the penalties to this rank's shards; returns this rank's share of their value."""
        shards = {name: _local(each.detach()).clone().requires_grad_() for name, each in self.learned.items()}
        value = penalty(list(shards.values()), self.config, self._matrices)
        if not value.requires_grad:
            return 0.0
        value.backward()
        for name, shard in shards.items():
            gradient = self.learned[name].grad
            if shard.grad is not None and gradient is not None:
                _local(gradient).add_(shard.grad)
        return value.item()

    def _tie_groups(self) -> None:
        """Give each coefficient of a group the sum of the gradients of all."""
        for parameters in self._groups.values():
            gradients = [_local(each.grad) for each in parameters if each.grad is not None]
            sum_N = torch.stack([each.sum(dim=(0, 2)) for each in gradients]).sum(dim=0)
            dist.all_reduce(sum_N, group=self.ranks.shard_group)
            for each in gradients:
                each.copy_(sum_N.view(1, -1, 1).expand_as(each))

    def _norm(self) -> Tensor:
        """The norm of the gradient; a group's coefficients count once."""
        group = self.ranks.shard_group
        if self.config.granularity != "group":
            return global_norm([each.grad for each in self.learned.values()], group)
        squares = []
        for parameters in self._groups.values():
            copies = sum(len(each) for each in parameters)
            squares.append(global_norm([each.grad for each in parameters], group).square() / copies)
        return torch.stack(squares).sum().sqrt()


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
