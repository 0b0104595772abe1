"""Average the checkpoints of one run, with weights that stand for a decay of the learning rate (WSM, arXiv 2507.17634).

A run at a constant rate moves by updates u_1 … u_k between the checkpoints n, n+1, …, n+k. Had update j been scaled by
w_j, with 1 ≥ w_1 ≥ … ≥ w_k ≥ 0, as a decay does, the result would be, updates unchanged,

    θ_n + Σ_j w_j u_j = Σ_j c_j θ_{n+j},   c_0 = 1 - w_1,  c_j = w_j - w_{j+1},  c_k = w_k.

So a wished decay is a weighted average of checkpoints: equal weights are a linear decay. The length of the averaged
window matters more than the number of checkpoints (arXiv 2505.12082). Masters are averaged in fp32, and expert_bias
with them; the momentum of the balancing rule is not in the folder.
"""

import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch

from trinity.checkpoint.directory import CheckpointDirectory
from trinity.errors import UserError
from trinity.interop.output_folder import SHARD_BYTES
from trinity.merging.merge_models import Merged, merge

DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}
"""Scale of the update after a share x of the window, from 1 at its beginning to 0 at its end."""


def average(
    run: str | Path,
    directory: str | Path,
    steps: str | Sequence[int],
    decay: str = "linear",
    *,
    dtype: torch.dtype = torch.bfloat16,
    workers: int = 1,
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: bool = False,
) -> Merged:
    """Average checkpoints of a run and write a Hugging Face folder, as merge does.

    Args:
        run: the run directory.
        directory: the folder to make.
        steps: the checkpoints: numbers, or A:B or A:B:EVERY, which takes all between A and B that there are, or those
            whose distance from A is a multiple of EVERY, which must all be there.
        decay: "linear", "1-sqrt", "cosine", or "equal": the plain mean.
        dtype: data type of the matrices.
        workers, max_shard_bytes, overwrite, progress: as for merge.
    Returns:
        the folder, and the count of tensors.
    Raises:
        UserError: not a run directory, a missing checkpoint, fewer than two, or an unknown decay.
    """
    chosen = choose_steps(Path(run), steps)
    weights = decay_weights(chosen, decay)
    names = {torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float16: "float16"}
    if dtype not in names:
        raise UserError(f"dtype={dtype} is not supported; use one of {', '.join(map(str, names))}")
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": f"{run}@{step}", "parameters": {"weight": weight}}
            for step, weight in zip(reversed(chosen), reversed(weights))
        ],
        "out_dtype": names[dtype],
    }
    return merge(
        recipe, directory, workers=workers, max_shard_bytes=max_shard_bytes, overwrite=overwrite, progress=progress
    )


def decay_weights(steps: Sequence[int], decay: str) -> list[float]:
    """The weight of each checkpoint, in the order of the steps; they sum to 1.

    Another decay d, with d(0) = 1 and d(1) = 0, scales the update that ends at checkpoint j of k + 1 evenly spaced ones
    by d(j/(k+1)): it reaches 0 one interval after the last. So a linear decay gives equal weights; "equal" does for any
    spacing.

    Raises:
        UserError: an unknown decay.
    """
    if decay == "equal":
        return [1 / len(steps)] * len(steps)
    if decay not in DECAYS:
        raise UserError(f"decay={decay!r} is unknown; use one of equal, {', '.join(DECAYS)}")
    length = (steps[-1] - steps[0]) * len(steps) / (len(steps) - 1)
    scales = [1.0, *(DECAYS[decay]((step - steps[0]) / length) for step in steps[1:]), 0.0]
    return [before - after for before, after in pairwise(scales)]


def choose_steps(run: Path, steps: str | Sequence[int]) -> list[int]:
    """The steps to average, ascending.

    Raises:
        UserError: not a run directory, words in another form, a missing checkpoint, or fewer than two.
    """
    there = CheckpointDirectory.of_run(run).complete_steps()
    wanted = _parsed(steps, there) if isinstance(steps, str) else sorted(set(steps))
    missing = [step for step in wanted if step not in there]
    if missing:
        raise UserError(
            f"{run} has no complete checkpoint of step {missing[0]}; it has {there}, of which A:B takes those between"
        )
    if len(wanted) < 2:
        raise UserError(f"steps={steps} selects {len(wanted)} of {run}'s checkpoints {there}; select at least two")
    return wanted


def _parsed(text: str, there: list[int]) -> list[int]:
    match = re.fullmatch(r"(\d+):(\d+)(?::(\d+))?", text)
    if match:
        first, last, every = int(match[1]), int(match[2]), match[3]
        if every is None:
            return [step for step in there if first <= step <= last]
        if int(every) > 0 and (last - first) // int(every) < 100_000:
            return list(range(first, last + 1, int(every)))
    elif re.fullmatch(r"\d+(,\d+)+", text):
        return sorted({int(step) for step in text.split(",")})
    raise UserError(f"steps={text!r} is not understood; write A:B, A:B:EVERY with EVERY ≥ 1, or A,B,C")
