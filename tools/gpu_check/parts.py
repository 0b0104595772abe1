"""The parts of the GPU check: what runs in which order, and for how many seconds at most.

The order is by what is lost if the rest does not run: the card's own rates, which every figure is compared with; one
test of each operation, since a wrong kernel makes its timing worthless; the training step; each operation; the
remaining tests; a short run. The limits add up to more than the check's time, because most parts end long before
theirs: a part that does not fit any more is left out and listed.
"""

from typing import Any, NamedTuple


class Part(NamedTuple):
    """One part, run in a process of its own.

    name: in check.json and on the command line.
    function: "module:function" of this package, called with the options as keywords.
    limit: seconds after which it is ended; cpu_limit: the same with --cpu.
    least: seconds without which it is not started.
    options: of the function on a GPU; cpu_options: the same with --cpu, or None: the part needs a GPU.
    extra: the check is complete without it.
    needs: parts whose files it reads; data may also come from the folder DATA.
    """

    name: str
    function: str
    limit: int
    least: int
    options: dict[str, Any]
    cpu_options: dict[str, Any] | None
    cpu_limit: int = 300  # on two quiet cores a part takes a few seconds; on busy ones the total time decides
    extra: bool = False
    needs: tuple[str, ...] = ()


def _step(name: str, variant: str, limit: int) -> Part:
    return Part(name, "measure:step", limit, 25, {"variant": variant}, {"variant": variant, "quick": True})


def _suite(name: str, limit: int, options: dict[str, Any], cpu_options: dict[str, Any] | None, suite: str = "") -> Part:
    """A suite of bench.py; cpu_options: None: it needs a GPU."""
    on_gpu = {"suite": suite or name, "quick": False} | options
    on_cpu = None if cpu_options is None else {"suite": suite or name, "quick": True} | cpu_options
    return Part(name, "measure:suite", limit, 12, on_gpu, on_cpu)


_OURS = ["trinity triton", "trinity's engine grouped_mm"]
_ON_CPU = ["trinity reference", "trinity's engine grouped_mm"]
# of each op, then of the model
_FIRST = "repetition or repeat_their_bits or in_the_order_of_places or same_sum_either_way or model_in_triton"
_GATE = ["tests/kernels/test_gate_triton.py"]

PARTS = (
    Part("ceilings", "measure:ceilings", 25, 10, {}, {}),
    Part("first_tests", "gpu_tests:run", 60, 15, {"select": _FIRST}, {"select": _FIRST, "files": _GATE}),
    _step("step_configured", "as configured", 80),
    _step("step_copying", "defer_reduce off", 45),
    _step("step_recomputing", "blocks recomputed, microbatch 8", 45),
    Part("profile", "kernel_profile:run", 30, 20, {}, {}),
    _suite("experts", 75, {"routings": ["balanced"], "names": _OURS}, {"routings": ["balanced"], "names": _ON_CPU}),
    _suite(
        "experts_liger", 45, {"routings": ["balanced"], "names": ["trinity triton", "Liger fused MoE"]},
        None, suite="experts",
    ),
    _suite(
        "attention", 30, {"engines": ["varlen", "sdpa"], "lengths": [4096], "documents": [False]},
        {"engines": ["sdpa"], "documents": [False]},
    ),
    Part("grouped_queries", "measure:grouped_queries", 20, 10, {}, None),
    _suite("head", 35, {"names": ["ours", "Liger"], "rep": 400}, {"names": ["ours"]}),
    _suite("muon", 25, {}, {"names": ["dense, float32: ours"]}),
    _suite("norms", 25, {"compiled": False, "rep": 50}, {}),
    _suite("routing", 20, {"quick": True}, {}),
    Part("tests", "gpu_tests:run", 75, 20, {"select": f"not ({_FIRST})"}, {"select": "any_strides", "files": _GATE}),
    Part("data", "smoke_run:data", 75, 10, {}, {"toy": True}),
    Part("smoke", "smoke_run:train", 50, 20, {"steps": 100}, {"steps": 2, "toy": True}, needs=("data",)),
    Part(
        "smoke_reference", "smoke_run:train", 40, 20, {"steps": 10, "without_triton": True},
        {"steps": 2, "toy": True, "without_triton": True}, needs=("data", "smoke"),
    ),
    Part("sanitizer", "gpu_tests:sanitizer", 60, 25, {}, None, extra=True),
    Part("tune", "measure:suite", 150, 20, {"suite": "tune", "quick": False, "op": "experts"}, None, extra=True),
)  # fmt: skip
