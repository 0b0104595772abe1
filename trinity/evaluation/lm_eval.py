"""Named tasks through lm-evaluation-harness (the package lm-eval), where it is installed.

It runs the folder with transformers, whose AfMoE computes what ours does, and which has what generating tasks need: a
cache of keys and values. Documents of our models begin with BOS, so every prompt is given it. Tasks fetch their data
sets from the Hugging Face hub unless these are in its cache, or the task is of a folder of the user's own.
"""

from pathlib import Path
from typing import Any

from trinity.errors import Failure, UserError
from trinity.interop.tokenizer_files import special_ids
from trinity.io.json_files import read_json

INSTALL = '--tasks needs lm-eval; install it: pip install "trinity-moe[evaluation]"'


def run_tasks(
    folder: Path,
    tasks: list[str],
    *,
    limit: int | None = None,
    window: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    task_folder: Path | None = None,
) -> dict[str, dict[str, float]]:
    """Every figure that the harness finds, by task: {"arc_easy": {"acc": 0.25, "acc_stderr": …}}.

    Args:
        folder: a Hugging Face folder with a tokenizer.
        tasks: names that lm-eval knows, or of files in task_folder.
        limit: items of each task, at most.
        window: tokens that the model sees, at most; by default what its config.json says.
        dtype: of the matrices; float32, because transformers routes in this format, and bfloat16 picks other experts.
        device: where to compute.
        task_folder: YAML files of tasks of one's own.
    Raises:
        UserError: lm-eval is not installed, or does not know a task; the tokenizer has ids that the model does not.
        Failure: a data set that cannot be fetched.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError(INSTALL) from None
    manager = TaskManager(include_path=str(task_folder) if task_folder else None)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UserError(f"--tasks {unknown[0]} is not known to lm-eval; `lm-eval ls tasks` lists what is")
    _check_tokenizer(folder)
    arguments = {"pretrained": str(folder), "dtype": dtype, "add_bos_token": True, "local_files_only": True}
    if window is not None:
        arguments["max_length"] = window
    try:
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args=arguments,
            tasks=tasks,
            limit=limit,
            device=device,
            batch_size=8,
            task_manager=manager,
            log_samples=False,
        )
    except ImportError as error:  # its transformers backend needs more than the package alone
        raise UserError(f"{INSTALL} ({error})") from None
    except (ConnectionError, OSError) as error:
        raise Failure(f"lm-eval could not get what its tasks need ({' '.join(str(error).split())})") from error
    return {task: _figures(values) for task, values in found["results"].items()}


def _check_tokenizer(folder: Path) -> None:
    """Raises UserError for a tokenizer that does not fit the model, where transformers would fail at the first such id.

    A folder that lacks one of the files is left to transformers.
    """
    if (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file():
        rows = read_json(folder / "config.json").get("vocab_size")
        if isinstance(rows, int):
            special_ids(folder, rows)


def _figures(values: dict[str, Any]) -> dict[str, float]:
    """`acc_norm,none` is lm-eval's name for the figure acc_norm of the filter none, which filters nothing."""
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    return {name.removesuffix(",none"): value for name, value in numbers.items()}
