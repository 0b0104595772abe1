"""Run tasks of lm-evaluation-harness (the optional package lm-eval) on a Hugging Face folder.

lm-eval runs the folder with transformers, whose AfMoE computes the same as Trinity and which has a key-value cache for
tasks that generate. Training documents begin with BOS, so every prompt gets BOS. Tasks download their data sets from
the Hugging Face hub, unless these are in its cache or the task is a file of the user's own.
"""

from pathlib import Path
from typing import Any

from trinity.errors import Failure, UserError
from trinity.interop.tokenizer_files import special_ids
from trinity.io.json_files import read_json

INSTALL = 'a task needs lm-eval; install it: pip install "trinity-moe[evaluation]"'


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
    """Task → metric → value, as lm-eval reports them: {"arc_easy": {"acc": 0.25, "acc_stderr": …}}.

    Args:
        folder: a Hugging Face folder with a tokenizer.
        tasks: tasks of lm-eval, or of files in task_folder.
        limit: most items of each task.
        window: most tokens of context. Default: the context length of config.json.
        dtype: data type of the matrices. float32, because transformers computes the router in this data type, and in
            bfloat16 it would choose other experts.
        device: where to compute.
        task_folder: folder with YAML files of the user's own tasks.
    Raises:
        UserError: lm-eval is not installed or does not know a task; or the tokenizer has ids beyond the model's.
        Failure: a data set cannot be downloaded.
    """
    manager = known_tasks(tasks, task_folder)
    import lm_eval

    _check_tokenizer(folder)
    model_args: dict[str, Any] = {
        "pretrained": str(folder),
        "dtype": dtype,
        "add_bos_token": True,
        "local_files_only": True,
    }
    if window is not None:
        model_args["max_length"] = window
    try:
        evaluation = lm_eval.simple_evaluate(
            model="hf",
            model_args=model_args,
            tasks=tasks,
            limit=limit,
            device=device,
            batch_size=8,
            task_manager=manager,
            log_samples=False,
        )
    except ImportError as error:  # its transformers backend needs further packages
        raise UserError(f"{INSTALL} ({error})") from None
    except (ConnectionError, OSError) as error:
        raise Failure(f"lm-eval could not download the data of its tasks ({' '.join(str(error).split())})") from error
    return {task: _metrics(values) for task, values in evaluation["results"].items()}


def known_tasks(tasks: list[str], task_folder: Path | None = None) -> Any:
    """lm-eval's TaskManager, after a look whether it knows the tasks; see run_tasks.

    Raises:
        UserError: lm-eval is not installed or does not know a task.
    """
    try:
        import lm_eval  # noqa: F401
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError(INSTALL) from None
    manager = TaskManager(include_path=str(task_folder) if task_folder else None)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UserError(f"the task {unknown[0]} is not known to lm-eval; `lm-eval ls tasks` lists the known ones")
    return manager


def _check_tokenizer(folder: Path) -> None:
    """Refuse a tokenizer with ids beyond the model's: transformers would fail at the first of these ids.

    If one of the files is missing, transformers reports it.
    """
    config = read_json(folder / "config.json") if (folder / "tokenizer.json").is_file() else None
    if config is not None:
        rows = config.get("vocab_size")
        if isinstance(rows, int):
            special_ids(folder, rows)


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """Metric → value. lm-eval names the metric acc_norm with the filter none (no filter) `acc_norm,none`."""
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    return {name.removesuffix(",none"): value for name, value in numbers.items()}
