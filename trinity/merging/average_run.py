"""Average the checkpoints of one run, with weights that stand for a decay of the learning rate.

The weights are those of trinity.optim.decay_weights. Masters are averaged in fp32, and expert_bias with them; the
momentum of the balancing rule is not in the folder. A run with checkpoint.average evaluates the same average while it
trains (trinity.training.checkpoint_average).
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from trinity.checkpoint.directory import CheckpointDirectory
from trinity.errors import UserError
from trinity.interop.output_folder import SHARD_BYTES
from trinity.merging.merge_models import Merged, merge
from trinity.optim.decay_weights import decay_weights


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
