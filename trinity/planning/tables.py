"""Format a plan: as text, with the verdict first and then tables, and as values for JSON."""

from textwrap import fill
from typing import Any

from trinity.config.run import RunConfig
from trinity.hardware import GPU
from trinity.planning.advice import warnings
from trinity.planning.communication import Flow, flow_seconds
from trinity.planning.plan import USABLE_SHARE, Plan, StepEstimate, make_plan
from trinity.planning.roofline import ADAMW_PASSES, LINKS, MUON_PASSES
from trinity.planning.step_terms import SHARES
from trinity.training.divisibility import process_counts

GB = 1e9
"""Bytes are shown in units of 10⁹, as vendors count a GPU's memory."""

Rows = list[tuple[str, ...]]


def describe(config: RunConfig, gpus: int | None = None, gpu: str | GPU = "h200", pick: bool = False) -> str:
    """The plan of a run as text; arguments as for make_plan."""
    return as_text(make_plan(config, gpus, gpu, pick))


def as_text(plan: Plan) -> str:
    """Verdict and warnings, then aligned tables, then the assumptions of the estimates."""
    tables = [_parameter_rows(plan), _flop_rows(plan), _length_rows(plan), _memory_rows(plan)]
    if plan.longest_step.flows:
        tables.append(_communication_rows(plan, plan.longest_step))
    tables += [_microbatch_rows(plan, plan.longest_step), _time_rows(plan, plan.longest_step)]
    return "\n\n".join([_verdict(plan, warnings(plan)), _mesh(plan), *map(table, tables), _assumptions(plan)])


def as_values(plan: Plan) -> dict[str, Any]:
    """The plan as values for JSON: bytes, FLOPs and seconds of rank 0."""
    return {
        "gpus": plan.gpus,
        "gpu": plan.gpu,
        "fits": plan.fits,
        "picked": plan.picked,
        "refusal": plan.refusal,
        "seconds": plan.total_seconds,
        "gpu_hours": _gpu_hours(plan),
        "mesh": plan.sizes._asdict(),
        "runs_on": process_counts(plan.config),
        "parameters": plan.parameters,
        "flops_per_token": plan.steps[0].flops,
        "state": plan.state,
        "memory": _memory_values(plan.peak_step),
        "steps": [_step_values(plan, step) for step in plan.steps],
        "warnings": warnings(plan),
    }


def table(rows: Rows) -> str:
    """Aligned text: the first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join(lines)


def _step_values(plan: Plan, step: StepEstimate) -> dict[str, Any]:
    seconds = step.seconds
    derived = {name: getattr(seconds, name) for name in ("compute", "update", "traffic", "step")}
    return {
        **step.load._asdict(),  # "tokens" counts one rank's step; the segment's are steps × sequences × length
        **step.segment._asdict(),
        "flops_per_token": step.flops,
        "deferred": step.deferred,
        "memory": _memory_values(step),
        "work": step.work._asdict(),
        "traffic": [flow._asdict() | {"seconds": _seconds(plan, flow)} for flow in step.flows],
        "seconds": seconds._asdict() | derived,
        "microbatch_seconds": {
            "terms": [term._asdict() for term in step.microbatch.terms],
            "host": sum(step.microbatch.host),
            "update": step.seconds.update / step.load.microbatches,
        },
        "mfu": plan.mfu(step),
        "tokens_per_second_per_gpu": plan.tokens_per_second(step),
    }


def _memory_values(step: StepEstimate) -> dict[str, Any]:
    return {"moment": step.memory.moment, "parts": step.memory.parts, "total": step.memory.total}


def _seconds(plan: Plan, flow: Flow) -> float:
    return flow_seconds(flow, plan.card, LINKS)


def _verdict(plan: Plan, sentences: list[str]) -> str:
    """Whether the run fits, its speed and its length, then the warnings."""
    most = USABLE_SHARE * plan.card.memory
    tokens = sum(step.segment.tokens for step in plan.steps)
    duration, hours = _duration_and_gpu_hours(plan, plan.total_seconds)
    one = "process" if plan.gpu == "cpu" else "GPU"
    speed, mfu = plan.tokens_per_second(plan.longest_step), plan.mfu(plan.longest_step)
    lines = [
        f"{plan.config.run.name} on {plan.gpus} × {plan.gpu}",
        f"{'fits' if plan.fits else 'DOES NOT FIT':<14} {plan.memory.total / GB:.1f} of {most / GB:.1f} GB a {one}",
        f"speed          {speed:,.0f} tokens/s a {one}, {speed * plan.gpus:,.0f} in all, MFU {mfu:.0%}",
        f"the run        {tokens:,} tokens, {duration}, {hours} {one}-hours",
    ]
    if plan.picked:
        lines.append(f"mesh picked    {plan.refusal}; planned with: {' '.join(plan.picked)}")
    return "\n".join([*lines, *(f"warning: {sentence}" for sentence in sentences)])


def _gpu_hours(plan: Plan) -> float:
    return plan.gpus * plan.total_seconds / 3600


def _mesh(plan: Plan) -> str:
    sizes, model = plan.sizes, plan.config.model
    context = f" ({sizes.shard // sizes.context} × context {sizes.context})" if sizes.context > 1 else ""
    lines = [
        f"mesh, dense    replicate {sizes.replicate} × shard {sizes.shard}{context}",
        f"mesh, experts  replicate {sizes.replicate} × expert_shard {sizes.expert_shard} × expert {sizes.expert}",
    ]
    if model.moe_layers:
        share = model.experts // sizes.expert
        how = "split" if sizes.experts_by == "experts" else "each split by its width"
        lines[-1] += f": {share} of {model.experts} experts a rank of expert, {how} over expert_shard"
    numbers = ", ".join(map(str, process_counts(plan.config)))
    return "\n".join([*lines, f"runs on        {numbers} GPUs: mesh, batches and streams divide"])


def _parameter_rows(plan: Plan) -> Rows:
    counts = plan.parameters
    rows = [(name, f"{count:,}", f"{count / counts['total']:.1%}") for name, count in counts.items()]
    return [("parameters", "number", "of total"), *rows]


def _flop_rows(plan: Plan) -> Rows:
    """A pair of columns for each sequence length of the run."""
    by_length = {step.segment.sequence_length: step.flops for step in plan.steps}
    head = [cell for length in by_length for cell in (f"rows of {length:,}", "of total")]
    rows: Rows = [("GFLOP per token", *head)]
    for name in plan.steps[0].flops:
        values = [(flops[name], flops[name] / flops["total"]) for flops in by_length.values()]
        rows.append((name, *(cell for value, share in values for cell in (f"{value / 1e9:,.3f}", f"{share:.0%}"))))
    return rows


def _length_rows(plan: Plan) -> Rows:
    """A row for each segment of the schedule (batch size × sequence length), and their sum."""
    columns = ("steps", "sequences", "length", "rows a GPU", "tokens", "GB", "s a step", "MFU", "tokens/s a GPU")
    rows: Rows = [("the run", *columns, "time", "GPU-hours")]
    for step in plan.steps:
        segment, load = step.segment, step.load
        rows.append((
            f"from step {segment.step:,}", f"{segment.steps:,}", f"{segment.sequences:,}",
            f"{segment.sequence_length:,}", f"{load.microbatches} × {load.microbatch}", f"{segment.tokens:,}",
            f"{step.memory.total / GB:,.1f}", f"{step.seconds.step:.3g}", f"{plan.mfu(step):.0%}",
            f"{plan.tokens_per_second(step):,.0f}", *_duration_and_gpu_hours(plan, step.total_seconds),
        ))  # fmt: skip
    steps, tokens = (sum(column) for column in zip(*((s.segment.steps, s.segment.tokens) for s in plan.steps)))
    most = f"{plan.memory.total / GB:,.1f}"
    length = _duration_and_gpu_hours(plan, plan.total_seconds)
    return [*rows, ("in all", f"{steps:,}", "", "", "", f"{tokens:,}", most, "", "", "", *length)]


def _duration_and_gpu_hours(plan: Plan, seconds: float) -> tuple[str, str]:
    return _duration(seconds), _number(plan.gpus * seconds / 3600)


def _duration(seconds: float) -> str:
    unit, size = next((u, s) for u, s in (("days", 86400), ("h", 3600), ("min", 60), ("s", 0)) if seconds >= 2 * s)
    return f"{_number(seconds / (size or 1))} {unit}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _memory_rows(plan: Plan) -> Rows:
    """State beside the peak. At the peak some gradients may not exist yet."""
    memory, card = plan.memory, plan.card
    parts = {**dict.fromkeys(plan.state), **memory.parts}
    rows = [(name, _gigabytes(plan.state.get(name)), _gigabytes(memory.parts.get(name))) for name in parts]
    return [
        (f"GB on rank 0, {_batch_text(plan.peak_step)}", "state", f"in {memory.moment}"),
        *rows,
        ("in all", _gigabytes(sum(plan.state.values())), _gigabytes(memory.total)),
        (f"for tensors on a {plan.gpu} of {card.memory / GB:.0f}", "", _gigabytes(USABLE_SHARE * card.memory)),
    ]


def _batch_text(step: StepEstimate) -> str:
    return f"{step.segment.sequences} sequences of {step.segment.sequence_length}"


def _gigabytes(size: float | None) -> str:
    return "" if size is None else f"{size / GB:,.2f}"


def _communication_rows(plan: Plan, step: StepEstimate) -> Rows:
    rows = [
        (flow.purpose, flow.kind, f"{flow.along} {flow.ranks}", f"{flow.calls:,}", _size(flow.bytes),
         f"{_seconds(plan, flow):.3f}")
        for flow in step.flows
    ]  # fmt: skip
    total = ("in all", "", "", "", _size(sum(flow.bytes for flow in step.flows)), f"{step.seconds.traffic:.3f}")
    return [("rank 0 communicates in a step", "collective", "over", "calls", "GB", "s"), *rows, total]


def _size(size: float) -> str:
    return f"{size / GB:,.3f}" if size >= 1e6 else "< 0.001"


def _microbatch_rows(plan: Plan, step: StepEstimate) -> Rows:
    """Milliseconds of each term in forward, backward and recompute; the update is divided by the microbatches."""
    load, microbatch = step.load, step.microbatch
    update = step.seconds.update / load.microbatches
    in_all = microbatch.device + update

    def row(name: str, forward: float, backward: float, again: float, seconds: float) -> tuple[str, ...]:
        cells = [f"{1e3 * value:,.1f}" if value else "" for value in (forward, backward, again, seconds)]
        return (name, *cells, f"{seconds / in_all:.0%}" if in_all else "")

    forward, backward, again = (sum(column) for column in zip(*(term[2:] for term in microbatch.terms)))
    there, back = microbatch.host
    share = f"the update, 1/{load.microbatches} of it"
    return [
        (f"ms of a microbatch of {load.microbatch} × {step.segment.sequence_length // plan.sizes.context:,} tokens",
         "forward", "backward", "again", "in all", "share"),
        *(row(term.name, term.forward, term.backward, term.again, term.seconds) for term in microbatch.terms),
        row(share, 0, 0, 0, update),
        row(f"on the {'CPU' if plan.gpu == 'cpu' else 'GPU'}", forward, backward, again, in_all),
        row("on the host, at the same time", there, back, 0, there + back),
    ]  # fmt: skip


def _time_rows(plan: Plan, step: StepEstimate) -> Rows:
    seconds, work = step.seconds, step.work
    return [
        (f"rank 0 in a step of {_batch_text(step)}", "TFLOP", "s"),
        ("the model, as MFU counts it", _teraflops(work.model), ""),
        ("matrix products, including recompute", _teraflops(work.products), f"{seconds.products:.3f}"),
        ("attention's core", _teraflops(work.attention), f"{seconds.attention:.3f}"),
        ("memory-bound kernels and copies", "", f"{seconds.memory:.3f}"),
        ("the host, beside these", "", f"{seconds.host:.3f}"),
        ("communication that overlaps with these", "", f"{seconds.gathers:.3f}"),
        ("exchanges of experts and context, not overlapped", "", f"{seconds.tokens:.3f}"),
        ("idle after waits for its sizes", "", f"{seconds.waits:.3f}"),
        ("Newton-Schulz", _teraflops(work.newton_schulz), f"{seconds.newton_schulz:.3f}"),
        ("clipping, reading and writing the state", "", f"{seconds.state:.3f}"),
        ("communication of the update", "", f"{seconds.moved:.3f}"),
        ("the step", "", f"{seconds.step:.3f}"),
    ]


def _teraflops(flops: float) -> str:
    return f"{flops / 1e12:,.2f}"


def _rate(flops: float) -> str:
    return f"{flops / 1e12:,.4g}"


def _assumptions(plan: Plan) -> str:
    card = plan.card
    shares = ", ".join(f"{name} {share:.0%}" for name, share in (SHARES | {"links": LINKS}).items())
    sheet = (
        f"{plan.gpu} {card.origin}: {_rate(card.bf16)} TFLOP/s in bf16, {_rate(card.fp32)} in fp32, "
        f"memory {card.bandwidth / 1e12:.2g} TB/s; in each direction {card.node_link / GB:.3g} GB/s to the "
        f"{card.per_node} of a node and {card.network / GB:.3g} to others. "
    )
    assumed = (
        f"Predicted and not measured: of these rates, {shares} are reached; {MUON_PASSES} passes over what Muon "
        f"updates and {ADAMW_PASSES} over the rest; routing is even; gathers and reductions of weights and gradients "
        "overlap with computation, and so does the host, so the longest counts; the exchanges of experts and context "
        "parallelism do not overlap. "
    )
    exact = (
        "State, calls and bytes are those of the run, except the expert exchange, which depends on the routing. "
        "Activations are measured without a GPU; buffers, and all seconds, are estimates."
    )
    return fill(sheet + assumed + exact, 118)
