"""A plan as tables to read, and as values for a program."""

from textwrap import fill
from typing import Any

from trinity.config.run import RunConfig
from trinity.planning.advice import USABLE, warnings
from trinity.planning.communication import seconds
from trinity.planning.gpus import gpus_that_run
from trinity.planning.plan import Plan, Step, make_plan
from trinity.planning.work import ACHIEVED, PASSES, UPDATE_PASSES
from trinity.training.hardware import GPUS_PER_NODE

GB = 1e9
"""Bytes are shown in units of 10⁹, as vendors count a GPU's memory."""

Rows = list[tuple[str, ...]]


def describe(config: RunConfig, gpus: int | None = None, gpu: str = "h200") -> str:
    """What a run costs, as text: make_plan's arguments."""
    return as_text(make_plan(config, gpus, gpu))


def as_text(plan: Plan) -> str:
    """Aligned tables, the assumptions behind them, and what is wrong."""
    first = plan.steps[0]
    tables = [_parameter_rows(plan), _flop_rows(plan), _length_rows(plan), _memory_rows(plan), _time_rows(plan, first)]
    if first.flows:
        tables.insert(-1, _traffic_rows(plan, first))
    found = [f"warning: {sentence}" for sentence in warnings(plan)]
    return "\n\n".join([_mesh(plan), *map(table, tables), _assumptions(plan), *found])


def as_values(plan: Plan) -> dict[str, Any]:
    """Everything in it, for JSON: bytes, FLOPs and seconds of rank 0."""
    return {
        "gpus": plan.gpus,
        "gpu": plan.gpu,
        "mesh": plan.sizes._asdict(),
        "runs_on": gpus_that_run(plan.config),
        "parameters": plan.parameters,
        "flops_per_token": plan.flops,
        "state": plan.state,
        "memory": {"moment": plan.memory.moment, "parts": plan.memory.parts, "total": plan.memory.total},
        "steps": [_step_values(plan, step) for step in plan.steps],
        "warnings": warnings(plan),
    }


def table(rows: Rows) -> str:
    """Columns as wide as their widest cell, the first to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join(lines)


def _step_values(plan: Plan, step: Step) -> dict[str, Any]:
    took = step.seconds
    derived = {name: getattr(took, name) for name in ("compute", "update", "traffic", "step")}
    return {
        **step.stretch._asdict(),
        **step.load._asdict(),
        "deferred": step.deferred,
        "work": step.work._asdict(),
        "traffic": [flow._asdict() | {"seconds": _seconds(plan, flow)} for flow in step.flows],
        "seconds": took._asdict() | derived,
        "mfu": plan.mfu(step),
        "tokens_per_second_per_gpu": plan.tokens_per_second(step),
    }


def _seconds(plan: Plan, flow: Any) -> float:
    return seconds(flow, plan.card, ACHIEVED["links"])


def _mesh(plan: Plan) -> str:
    sizes, model = plan.sizes, plan.config.model
    lines = [
        f"{plan.config.run.name} on {plan.gpus} × {plan.gpu}",
        f"mesh, dense    replicate {sizes.replicate} × shard {sizes.shard}",
        f"mesh, experts  replicate {sizes.replicate} × expert_shard {sizes.expert_shard} × expert {sizes.expert}",
    ]
    if model.moe_layers:
        share = model.experts // sizes.expert
        cut = "split" if sizes.experts_by == "experts" else "each cut by its width"
        lines[-1] += f": {share} of {model.experts} experts a rank of expert, {cut} over expert_shard"
    numbers = ", ".join(map(str, gpus_that_run(plan.config)))
    return "\n".join([*lines, f"runs on        {numbers} GPUs: mesh, batches and streams divide"])


def _parameter_rows(plan: Plan) -> Rows:
    counts = plan.parameters
    rows = [(name, f"{count:,}", f"{count / counts['total']:.1%}") for name, count in counts.items()]
    return [("parameters", "number", "of total"), *rows]


def _flop_rows(plan: Plan) -> Rows:
    rows = [(name, f"{value / 1e9:,.3f}", f"{value / plan.flops['total']:.0%}") for name, value in plan.flops.items()]
    return [(f"GFLOP per token, rows of {plan.config.data.sequence_length}", "", "of total"), *rows]


def _length_rows(plan: Plan) -> Rows:
    rows: Rows = [
        ("the run", "steps", "sequences", "rows a GPU", "tokens", "s a step", "MFU", "tokens/s a GPU", "days")
    ]
    steps = tokens = days = 0.0
    for step in plan.steps:
        stretch, load = step.stretch, step.load
        seen = stretch.steps * stretch.sequences * plan.config.data.sequence_length
        took = stretch.steps * step.seconds.step / 86400
        rows_of_one = f"{load.microbatches} × {load.microbatch}"
        cells = (f"{stretch.steps:,}", f"{stretch.sequences:,}", rows_of_one, f"{seen:,}")
        speed = (f"{step.seconds.step:.3g}", f"{plan.mfu(step):.0%}", f"{plan.tokens_per_second(step):,.0f}")
        rows.append((f"from step {stretch.step:,}", *cells, *speed, f"{took:,.3g}"))
        steps, tokens, days = steps + stretch.steps, tokens + seen, days + took
    return [*rows, ("in all", f"{steps:,.0f}", "", "", f"{tokens:,.0f}", "", "", "", f"{days:,.3g}")]


def _memory_rows(plan: Plan) -> Rows:
    """State beside the fullest moment, at which some gradients may not be there yet."""
    memory, card = plan.memory, plan.card
    parts = {**dict.fromkeys(plan.state), **memory.parts}
    rows = [(name, _gigabytes(plan.state.get(name)), _gigabytes(memory.parts.get(name))) for name in parts]
    return [
        ("GB on rank 0", "state", f"in {memory.moment}"),
        *rows,
        ("in all", _gigabytes(sum(plan.state.values())), _gigabytes(memory.total)),
        (f"for tensors on a {plan.gpu} of {card.memory / GB:.0f}", "", _gigabytes(USABLE * card.memory)),
    ]


def _gigabytes(size: float | None) -> str:
    return "" if size is None else f"{size / GB:,.2f}"


def _traffic_rows(plan: Plan, step: Step) -> Rows:
    rows = [
        (flow.purpose, flow.kind, f"{flow.along} {flow.ranks}", f"{flow.calls:,}", _size(flow.bytes),
         f"{_seconds(plan, flow):.3f}")
        for flow in step.flows
    ]  # fmt: skip
    total = ("in all", "", "", "", _size(sum(flow.bytes for flow in step.flows)), f"{step.seconds.traffic:.3f}")
    return [("rank 0 says in a step", "how", "to", "calls", "GB", "s"), *rows, total]


def _size(size: float) -> str:
    return f"{size / GB:,.3f}" if size >= 1e6 else "< 0.001"


def _time_rows(plan: Plan, step: Step) -> Rows:
    took, work = step.seconds, step.work
    return [
        (f"rank 0 does in a step of {step.stretch.sequences} sequences", "TFLOP", "s"),
        ("the model, as MFU counts it", _tera(work.model), ""),
        ("matrix products, with what recompute repeats", _tera(work.products), f"{took.products:.3f}"),
        ("attention's core", _tera(work.attention), f"{took.attention:.3f}"),
        ("reading and writing activations", "", f"{took.memory:.3f}"),
        ("traffic beside these", "", f"{took.gathers:.3f}"),
        ("traffic in their midst", "", f"{took.tokens:.3f}"),
        ("Newton-Schulz", _tera(work.newton_schulz), f"{took.newton_schulz:.3f}"),
        ("reading and writing the state", "", f"{took.state:.3f}"),
        ("traffic of the update", "", f"{took.moved:.3f}"),
        ("the step", "", f"{took.step:.3f}"),
    ]


def _tera(flops: float) -> str:
    return f"{flops / 1e12:,.2f}"


def _assumptions(plan: Plan) -> str:
    card = plan.card
    shares = ", ".join(f"{name} {share:.0%}" for name, share in ACHIEVED.items())
    sheet = (
        f"{plan.gpu} by its data sheet: {card.bf16 / 1e12:,.0f} TFLOP/s in bf16, {card.fp32 / 1e12:,.0f} in fp32, "
        f"memory {card.bandwidth / 1e12:.2f} TB/s; in each direction NVLink {card.nvlink / GB:.0f} and network "
        f"{card.network / GB:.0f} GB/s; {GPUS_PER_NODE} in a node. "
    )
    ours = (
        f"Assumed and not measured: of these rates, {shares} are reached; {PASSES} passes over activations (2 more "
        f"with recompute) and {UPDATE_PASSES} over the state; routing is even; weights and gradients travel beside the "
        "computing, the longer of the two counts; tokens do not. "
    )
    exact = (
        "State, calls and bytes are what runs, but for tokens, which follow the routing. Activations are measured "
        "without a GPU; buffers, and all seconds, are estimates."
    )
    return fill(sheet + ours + exact, 118)
