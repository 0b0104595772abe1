"""Generation with a key-value cache, tokens/s against transformers' generate, greedy, on the same export and prompts.

A model of random weights is exported once and loaded by both: on a CPU the smoke model in fp32, on a GPU one of Nano's
sizes with 8 layers in bf16. Nothing stops a row. The contenders take turns, and a figure is a median over rounds. In
fp32 the tokens must be equal, else the suite says so. "decode" is the time of all tokens but the first of each row.

Shapes: B rows, S tokens of a prompt, N new tokens of each row.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmarks.timing import Marks, device, record, take_turns
from tqdm import tqdm

from trinity.config.model import ZOO, ModelConfig
from trinity.evaluation.generate import generate_batch
from trinity.evaluation.sampling import Sampling
from trinity.interop import export_hf, load_hf
from trinity.models.trinity import Trinity

GOAL = 1.5
"""Least ratio to transformers' tokens/s. Not from the report."""


class Case(NamedTuple):
    """Prompts and new tokens."""

    B: int
    S: int
    N: int


CASES = {
    "one row": Case(1, 64, 64),
    "eight rows": Case(8, 64, 64),
    "beyond the window": Case(2, 512, 32),
}


def run(quick: bool) -> dict[str, Any]:
    """Measure every case; returns the figures and what they were measured on."""
    from benchmarks.step import machine

    results: dict[str, Any] = {"on": machine(), "goal": GOAL, "cases": {}}
    with tempfile.TemporaryDirectory() as folder:
        models = _models(Path(folder))
        for name, case in tqdm(CASES.items(), unit="case", file=sys.stderr, disable=None):
            case = case._replace(N=4) if quick else case
            results["cases"][name] = _measure(models, case, 1 if quick else 7)
            record(name, results["cases"][name])
    return results


def sizes() -> ModelConfig:
    """Of the model: what fits the device."""
    return replace(ZOO["nano"], layers=8) if torch.cuda.is_available() else ZOO["smoke"]


def _models(folder: Path) -> tuple[Trinity, Any]:
    """The same weights in Trinity and in transformers."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    export_hf(Trinity(sizes()), folder / "hf", dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=dtype)
    return load_hf(folder / "hf", dtype=dtype).to(device()), theirs.to(device()).eval()


def _measure(models: tuple[Trinity, Any], case: Case, rounds: int) -> dict[str, Any]:
    """Seconds of both for N tokens and for one, whose difference is decoding."""
    ours, theirs = models
    tokens_BS = torch.randint(ours.config.vocab_size, case[:2], generator=torch.Generator().manual_seed(0))
    prompts, on_device_BS = tokens_BS.tolist(), tokens_BS.to(device())
    last: dict[str, list[list[int]]] = {}

    def trinity(new_tokens: int) -> None:
        last["trinity"] = generate_batch(ours, prompts, new_tokens, Sampling(temperature=0))

    def transformers(new_tokens: int) -> None:
        out_BN = theirs.generate(
            on_device_BS, attention_mask=torch.ones_like(on_device_BS), do_sample=False, use_cache=True,
            max_new_tokens=new_tokens, min_new_tokens=new_tokens, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        last["transformers"] = out_BN[:, case.S :].tolist()

    times = take_turns({"trinity": _timed(trinity, case.N), "transformers": _timed(transformers, case.N)}, rounds)
    return {"sizes": case._asdict(), "contenders": times, "equal": last["trinity"] == last["transformers"]}


def _timed(generate: Callable[[int], None], new_tokens: int) -> Callable[[Marks], None]:
    """One new token, and then all: the parts of a timed call."""

    def call(mark: Marks) -> None:
        generate(1)
        mark()
        generate(new_tokens)

    return call


def table(results: dict[str, Any]) -> str:
    """A Markdown table, and whether the goal is met."""
    lines = [results["on"], "", "| case | | tokens/s | decode, tokens/s | ratio | same tokens |", "|---" * 6 + "|"]
    for name, case in results["cases"].items():
        B, S, N = case["sizes"].values()
        for contender, entry in case["contenders"].items():
            figures = [entry["failed"], "", "", ""] if "failed" in entry else _figures(case, contender)
            lines.append(f"| {name}: {B} of {S} + {N} | {contender} | " + " | ".join(figures) + " |")
    met = [ratio(case) >= results["goal"] for case in results["cases"].values()]
    lines += ["", f"Goal, {results['goal']} times transformers' tokens/s: met in {sum(met)} of {len(met)} cases"]
    return "\n".join(lines)


def ratio(case: dict[str, Any]) -> float:
    """Trinity's tokens/s over transformers'; NaN if one of them failed."""
    whole = [case["contenders"][name].get("seconds", [0, float("nan")])[1] for name in ("transformers", "trinity")]
    return whole[0] / whole[1]


def _figures(case: dict[str, Any], contender: str) -> list[str]:
    B, _, N = case["sizes"].values()
    first, whole = case["contenders"][contender]["seconds"]
    decode = f"{B * (N - 1) / (whole - first):,.0f}" if whole > first else "too short"
    return [
        f"{B * N / whole:,.0f}",
        decode,
        f"{ratio(case):.2f}" if contender == "trinity" else "",
        ("yes" if case["equal"] else "no") if contender == "trinity" else "",
    ]
