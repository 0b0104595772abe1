"""DAM's loss: distances between merged and teacher's logits, and penalties on the coefficients.

    kl          T²·KL(softmax(z_teacher/T) ‖ softmax(z_merged/T))           for each token
    mse         mean over the vocabulary of (z_merged − z_teacher)²         for each token
    similarity  mean over pairs of models of cos(c_i, c_j)                  for each matrix
    l1, l2      mean over models and features of |c|, of c²                 for each matrix
    overlap     mean over pairs and features of |c_i·c_j|                   for each matrix

A penalty is the mean over all matrices that are learned. A matrix with one coefficient per model has no similarity: the
cosine of two numbers is constant. Not from the paper: the means in place of sums, so that a coefficient does not depend
on the model's size, and the form of overlap, which is 0 where each feature comes from one model.

The KL's gradient, T·(softmax(z_merged/T) − softmax(z_teacher/T)), is exactly 0 for equal logits. Logits are made for
CHUNK_NUMBERS numbers at a time and made again in backward.

Shapes: B rows, S tokens of a row, D width, V vocabulary, C tokens of a chunk, P matrices, N models, I input width.
"""

from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trinity.dam.config import DamConfig
from trinity.dam.layers import Compare, MergedHead
from trinity_kernels.norm import wide

CHUNK_NUMBERS = 1 << 26
"""Most logits of each model in memory: 256 MiB in fp32."""


class _TemperedKL(torch.autograd.Function):
    """T²·KL(softmax(teacher/T) ‖ softmax(merged/T)) of each row, in fp32 at least."""

    @staticmethod
    def forward(ctx, merged_CV: Tensor, teacher_CV: Tensor, temperature: float) -> Tensor:
        log_q, log_p = (F.log_softmax(wide(z) / temperature, dim=-1) for z in (merged_CV, teacher_CV))
        p = log_p.exp()
        ctx.temperature, ctx.dtype = temperature, merged_CV.dtype
        kl_C = temperature**2 * (p * (log_p - log_q)).sum(dim=-1)
        ctx.save_for_backward(log_q.exp_().sub_(p))
        return kl_C

    @staticmethod
    def backward(ctx, grad_C: Tensor) -> tuple[Tensor, None, None]:
        (difference_CV,) = ctx.saved_tensors
        return (ctx.temperature * grad_C.unsqueeze(-1) * difference_CV).to(ctx.dtype), None, None


def tempered_kl(merged_CV: Tensor, teacher_CV: Tensor, temperature: float) -> Tensor:
    """T²·KL(softmax(z_teacher/T) ‖ softmax(z_merged/T)) of each token.

    Args:
        merged_CV: [C, V] logits, floating point, differentiable.
        teacher_CV: [C, V] logits, constants.
    Returns:
        [C], fp32, or float64 for float64.
    """
    return _TemperedKL.apply(merged_CV, teacher_CV, temperature)


class Distillation(Compare):
    """The sum over tokens of the distance between the merged model's logits and a teacher's.

    Args:
        hidden_BSD: the head's input in the teacher.
        valid_BS: bool, which tokens count.
        source: number of the teacher among the models.
        kind: kl or mse.
        temperature: T.
    """

    def __init__(self, hidden_BSD: Tensor, valid_BS: Tensor, source: int, kind: str, temperature: float) -> None:
        self.index_T = valid_BS.flatten().nonzero().squeeze(1)
        self.hidden_TD = hidden_BSD.flatten(0, 1)[self.index_T]
        self.source, self.kind, self.temperature = source, kind, temperature

    def __call__(self, x: Tensor, head: MergedHead) -> Tensor:
        """x is the head's input in the merged model, [B, S, D]; returns a scalar."""
        x_TD = x.flatten(0, 1)[self.index_T]
        size = max(1, CHUNK_NUMBERS // len(head.get_parameter("weight_0")))
        sums = [
            checkpoint(self._chunk, part_CD, hidden_CD, head, use_reentrant=False, preserve_rng_state=False)
            for part_CD, hidden_CD in zip(x_TD.split(size), self.hidden_TD.split(size))
        ]
        return torch.stack(sums).sum()

    def _chunk(self, x_CD: Tensor, hidden_CD: Tensor, head: MergedHead) -> Tensor:
        merged_CV = head.logits(x_CD)
        with torch.no_grad():
            teacher_CV = head.teacher_logits(hidden_CD, self.source)
        if self.kind == "mse":
            return (wide(merged_CV) - wide(teacher_CV)).square().mean(dim=-1).sum()
        return tempered_kl(merged_CV, teacher_CV, self.temperature).sum()


def penalty(coefficients: list[Tensor], config: DamConfig, matrices: int) -> Tensor:
    """The penalties on the coefficients that a rank holds; sums over ranks give the whole model's.

    Args:
        coefficients: each [P, N, I].
        config: the factors.
        matrices: P of all learned coefficients of the model, summed over all ranks of a replica.
    Returns:
        scalar, differentiable.
    """
    total = coefficients[0].new_zeros(())
    for c_PNI in coefficients:
        pairs = list(combinations(c_PNI.unbind(1), 2))
        if config.l1:
            total = total + config.l1 * c_PNI.abs().mean(dim=(1, 2)).sum()
        if config.l2:
            total = total + config.l2 * c_PNI.square().mean(dim=(1, 2)).sum()
        if config.overlap and pairs:
            overlaps = [(a_PI * b_PI).abs().mean(dim=1).sum() for a_PI, b_PI in pairs]
            total = total + config.overlap / len(pairs) * torch.stack(overlaps).sum()
        if config.similarity and pairs and c_PNI.shape[2] > 1:
            cosines = [F.cosine_similarity(a_PI, b_PI, dim=1).sum() for a_PI, b_PI in pairs]
            total = total + config.similarity / len(pairs) * torch.stack(cosines).sum()
    return total / matrices
