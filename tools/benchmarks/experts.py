"""The routed experts of one layer, forward and backward, against every implementation that can be imported.

Shapes are those of the report's models and of Qwen3-30B-A3B, in bf16 on a GPU; on a CPU those of configs/smoke.yaml, in
fp32. Routing is balanced (each expert gets the same number of tokens) or Zipf (see zipf_routing) and not measured:
choices and gates are inputs. Each contender's output is compared with trinity_kernels' reference before it is timed.
FLOPs are 6·T·K·D·F forward and 12·T·K·D·F backward, whatever else a contender computes. "Kept" is the memory between
forward and backward, x included, weights and output not. A figure is the median over rounds in which the contenders
take turns.

Shapes: T tokens, D width, F expert width, E experts, K active experts.
"""

import gc
import sys
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from benchmarks.timing import DENSE_TF, Marks, device, one_line, out_of_time, record, take_turns
from torch import Tensor
from tqdm import tqdm

ZIPF = 0.5
"""Expert i is chosen with weight i^−ZIPF: of 128 experts and 8 choices the fullest gets about 4 times the mean.

Not from the report: chosen for this benchmark."""


class Case(NamedTuple):
    """One layer and its tokens; `layers` is the number of MoE layers of the model."""

    D: int
    F: int
    E: int
    K: int
    T: int
    layers: int


CUDA_CASES = {
    "Nano": Case(1024, 256, 128, 8, 32_768, 54),
    "Mini": Case(2048, 1024, 128, 8, 32_768, 30),
    "Large, 2048 tokens an expert": Case(3072, 3072, 256, 4, 131_072, 54),
    "Large, 512 tokens an expert": Case(3072, 3072, 256, 4, 32_768, 54),
    "Qwen3-30B-A3B": Case(2048, 768, 128, 8, 32_768, 48),
}
CPU_CASES = {"smoke": Case(256, 96, 16, 4, 2048, 4)}

GOALS = {
    "Nano": (400, 420),
    "Mini": (520, 520),
    "Large, 2048 tokens an expert": (600, 590),
    "Large, 512 tokens an expert": (560, 540),
}
"""Goals of trinity_kernels on an H200, TFLOP/s forward and backward."""

GOAL_KEPT_GIB = ("Nano", 17)
"""Most memory of all MoE layers' activations at 32,768 tokens."""

AGREES = {torch.bfloat16: 3e-2, torch.float32: 1e-4}
"""Largest relative L2 distance from the reference that is still accepted."""


class Inputs(NamedTuple):
    """Inputs of every contender; the gradient of the output is random."""

    x_TD: Tensor
    gate_up_E2FD: Tensor
    down_EDF: Tensor
    indices_TK: Tensor
    s_TK: Tensor
    grad_TD: Tensor


Forward = Callable[[Inputs], Tensor]


def run(
    quick: bool, *, routings: Collection[str] = ("balanced", "Zipf"), names: Collection[str] | None = None
) -> dict[str, Any]:
    """Measure every case, routing and contender; returns the figures and what they were measured on.

    Args:
        names: of the contenders to measure (benchmarks.expert_peers); all by default.
    """
    from benchmarks.step import machine

    cases = CUDA_CASES if torch.cuda.is_available() else CPU_CASES
    turns = [(name, routing) for routing in routings for name in cases]
    unit = "TF" if torch.cuda.is_available() else "GF"
    results: dict[str, Any] = {"on": machine(), "zipf": ZIPF, "unit": unit, "cases": {}}
    for name, routing in tqdm(turns, unit="case", file=sys.stderr, disable=None):
        case = results["cases"][f"{name}, {routing}"] = {"sizes": cases[name]._asdict(), "contenders": {}}
        try:
            _measure(case, cases[name], routing, 2 if quick else 7, names, f"{name}, {routing}")
        except Exception as error:  # a contender may break the device: keep what was measured before
            case["contenders"]["the rest"] = {"failed": one_line(error)}
            record(f"{name}, {routing}: the rest", case["contenders"]["the rest"])
    results["goals"] = goals(results)
    return results


def table(results: dict[str, Any]) -> str:
    """One Markdown table a case, then the goals."""
    lines = [results["on"], ""]
    for name, case in results["cases"].items():
        sizes = ", ".join(f"{key} {value}" for key, value in case["sizes"].items() if key != "layers")
        lines += [f"{name} ({sizes}; the fullest expert has {case.get('fullest', 0):.1f} times the mean)", ""]
        unit = results["unit"]
        lines += [f"| | forward, ms | {unit} | backward, ms | {unit} | in all, {unit} | of 789 TF | kept, MiB | GiB |"]
        lines += ["|---" * 9 + "|"]
        lines += [_row(contender, entry, case, unit) for contender, entry in case["contenders"].items()]
        lines += ["", f"GiB: kept, times the {case['sizes']['layers']} layers of the model", ""]
    lines += ["Goals (one H200): " + "; ".join(f"{goal}: {how}" for goal, how in results["goals"].items())]
    return "\n".join(lines)


def _row(name: str, entry: dict[str, Any], case: dict[str, Any], unit: str) -> str:
    if "tf" not in entry:
        entry = {"failed": "not timed"} | entry
        return f"| {name} | {entry['failed']}" + " |" * 8
    scale = {"TF": 1, "GF": 1000}[unit]
    rates = [f"{scale * rate:.3g}" for rate in (*entry["tf"], entry["tf_both"])]
    times = [f"{1000 * seconds:.2f}" for seconds in entry["seconds"]]
    share = f"{entry['tf_both'] / DENSE_TF:.1%}" if unit == "TF" else ""
    kept = entry.get("kept_mib")
    memory = ["", ""] if kept is None else [f"{kept:,.0f}", f"{kept * case['sizes']['layers'] / 1024:.1f}"]
    return "| " + " | ".join([name, times[0], rates[0], times[1], rates[1], rates[2], share, *memory]) + " |"


def flops(case: Case) -> tuple[int, int]:
    """Forward and backward of one layer; a multiplication and an addition are 2."""
    forward = 6 * case.T * case.K * case.D * case.F
    return forward, 2 * forward


def goals(results: dict[str, Any]) -> dict[str, str]:
    """Each goal as met, missed or not measured, with balanced routing and the faster op of trinity_kernels."""
    verdicts = {}
    for name, goal in GOALS.items():
        best = _best_trinity(results, name)
        for index, way in enumerate(("forward", "backward")):
            got = best["tf"][index] if best else None
            verdicts[f"{name} {way} ≥ {goal[index]} TF"] = _verdict(got, goal[index], 1)
    name, most = GOAL_KEPT_GIB
    best = _best_trinity(results, name)
    kept = best["kept_mib"] * results["cases"][f"{name}, balanced"]["sizes"]["layers"] / 1024 if best else None
    verdicts[f"{name} activations ≤ {most} GiB"] = _verdict(kept, most, -1)
    return verdicts


def _best_trinity(results: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Figures of trinity_kernels' faster implementation on an H200; None if not measured."""
    case = results["cases"].get(f"{name}, balanced")
    if case is None or "H200" not in results["on"]:
        return None
    figures = [v for k, v in case["contenders"].items() if k.startswith("trinity ") and "tf" in v]
    return max(figures, key=lambda entry: entry["tf_both"], default=None)


def _verdict(got: float | None, goal: float, sign: int) -> str:
    if got is None:
        return "not measured"
    return f"{'met' if sign * (got - goal) >= 0 else 'missed'} ({got:.0f})"


def balanced_routing(tokens: int, experts: int, active: int) -> Tensor:
    """[T, K] int64: K consecutive experts per token, tokens and experts in random order; loads differ by at most 1."""
    random = torch.Generator().manual_seed(0)
    token_T = torch.randperm(tokens, generator=random)
    place_TK = token_T.unsqueeze(1) * active + torch.arange(active)
    return torch.randperm(experts, generator=random)[place_TK % experts]


def zipf_routing(tokens: int, experts: int, active: int, exponent: float = ZIPF) -> Tensor:
    """[T, K] int64: K distinct experts per token, drawn one after the other with weights i^−exponent."""
    random = torch.Generator().manual_seed(0)
    noise_TE = torch.empty(tokens, experts).exponential_(generator=random)
    # the K smallest of exponential times are K draws without replacement, by their rates
    times_TE = noise_TE * torch.arange(1, experts + 1).pow(exponent)
    return torch.randperm(experts, generator=random)[times_TE.topk(active, largest=False).indices]


def make_inputs(case: Case, routing: str) -> Inputs:
    """Inputs on the device, in its dtype; all but the choices require gradients."""
    where, dtype = device(), torch.bfloat16 if torch.cuda.is_available() else torch.float32
    random = torch.Generator(where).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=where, dtype=dtype)

    D, F, E, K, T, _ = case
    indices_TK = (balanced_routing if routing == "balanced" else zipf_routing)(T, E, K).to(where)
    s_TK = torch.rand(T, K, generator=random, device=where)
    weights = normal(E, 2, F, D).div_(D**0.5), normal(E, D, F).div_(F**0.5)
    leaves = [x.requires_grad_() for x in (normal(T, D), *weights, s_TK)]
    return Inputs(*leaves[:3], indices_TK, leaves[3], normal(T, D))


def _measure(
    entry: dict[str, Any], case: Case, routing: str, rounds: int, names: Collection[str] | None = None, title: str = ""
) -> None:
    """Fill in the figures of a case, and record each contender's under the case's title."""
    from benchmarks.expert_peers import contenders

    from trinity_kernels import expert_mlp

    counts_E = torch.bincount(make_indices(case, routing).flatten(), minlength=case.E)
    entry["fullest"] = (counts_E.max() / counts_E.double().mean()).item()
    rows, ready = entry["contenders"], {}
    if out_of_time():
        raise TimeoutError("the suite's time was up")
    inputs = make_inputs(case, routing)
    with torch.no_grad():
        expected_TD = expert_mlp.reference(*inputs[:5])
    for name, make in contenders(case).items():
        if names is not None and name not in names:
            continue
        try:
            if out_of_time():
                raise TimeoutError("the suite's time was up")
            forward = make(inputs)
            rows[name] = {"kept_mib": _check(forward, inputs, expected_TD)}
            ready[name] = _timed(forward, inputs)
        except Exception as error:  # not installed, or not able to: the reason is its row
            rows[name] = {"failed": one_line(error)}
        record(f"{title}: {name}", rows[name])
        gc.collect()
    del expected_TD
    work = flops(case)

    def report(name: str, figures: dict[str, Any]) -> None:
        rows[name] |= figures
        if "seconds" in figures:
            rows[name]["tf"] = [flop / seconds / 1e12 for flop, seconds in zip(work, figures["seconds"])]
            rows[name]["tf_both"] = sum(work) / sum(figures["seconds"]) / 1e12
        record(f"{title}: {name}", rows[name])

    take_turns(ready, rounds, report)


def make_indices(case: Case, routing: str) -> Tensor:
    """The choices of a routing."""
    return (balanced_routing if routing == "balanced" else zipf_routing)(case.T, case.E, case.K)


def _check(forward: Forward, inputs: Inputs, expected_TD: Tensor) -> float | None:
    """MiB kept by one forward pass on a GPU, else None; raises if the output is not close to the reference."""
    on_gpu = inputs.x_TD.is_cuda
    y_TD = forward(inputs)  # compiles on the first call
    error = ((y_TD.detach().float() - expected_TD.float()).norm() / expected_TD.float().norm()).item()
    if not error <= AGREES[inputs.x_TD.dtype]:
        raise ValueError(f"computes something else: {error:.1e} from the reference")
    del y_TD
    if not on_gpu:
        return None
    gc.collect()
    before = torch.cuda.memory_allocated()
    y_TD = forward(inputs)
    kept = torch.cuda.memory_allocated() - before - y_TD.nbytes + inputs.x_TD.nbytes
    return kept / 2**20


def _timed(forward: Forward, inputs: Inputs) -> Callable[[Marks], None]:
    leaves = [x for x in inputs if x.requires_grad]

    def call(mark: Marks) -> None:
        y_TD = forward(inputs)
        mark()
        # allow_unused: SonicMoE holds a copy of W1 in another layout
        torch.autograd.grad(y_TD, leaves, inputs.grad_TD, allow_unused=True)

    return call
