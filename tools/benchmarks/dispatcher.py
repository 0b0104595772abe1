"""Host time of the token dispatcher of expert parallelism: µs and operations of a layer, forward and backward.

Two processes, a few tokens, and identities in place of the experts and the shared expert, so that what remains is the
host's work: queueing the exchange. It is CPU time of the calling thread, because a shared machine delays the others;
waiting for a collective costs none. On a GPU the host spends it on top of launching kernels, in each MoE layer.

Then the same for the weights of split experts: taking this rank's part of both, and returning their gradients.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trinity.io.json_files import to_json

TOKENS, WIDTH, ACTIVE, EXPERTS = 64, 16, 4, 16
PARTS = {
    "dispatcher": "dispatch, combine, counts",
    "weights": "both weights' parts, through autograd",
    "weights, in place": "both weights' parts, sharing their gradients",
}
"""What is measured → in words."""


def run(quick: bool) -> dict[str, Any]:
    """Measure on two processes; return the figures of the first, and the machine."""
    from benchmarks.step import machine

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, __file__, "20" if quick else "300"], capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"2 processes: {done.stderr.strip()[-2000:]}")
    return {"on": machine(), "layer": json.loads(done.stdout.splitlines()[-1])}


def table(results: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [f"{results['on']}; 2 processes, CPU time of one", ""]
    lines += ["| of a layer | forward, µs | operations | backward, µs | operations |", "|---|---|---|---|---|"]
    for part, row in results["layer"].items():
        lines.append(
            f"| {PARTS[part]} | {1e6 * row['forward']:.0f} | {row['forward operations']} "
            f"| {1e6 * row['backward']:.0f} | {row['backward operations']} |"
        )
    return "\n".join(lines)


def _measure(calls: int) -> None:
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    from trinity.parallel.expert_parallel import local_part
    from trinity.parallel.token_dispatcher import AllToAll

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    dispatcher = AllToAll(mesh.get_group(), EXPERTS)
    random = torch.Generator().manual_seed(dist.get_rank())
    indices_TK = torch.rand(TOKENS, EXPERTS, generator=random).argsort(dim=1)[:, :ACTIVE]
    gates_TK = torch.rand(TOKENS, ACTIVE, generator=random).requires_grad_()
    x_TD = torch.randn(TOKENS, WIDTH, generator=random).requires_grad_()

    def dispatch() -> torch.Tensor:
        # the gates take part, so that their gradients are sent too
        return dispatcher(x_TD, indices_TK, gates_TK, lambda x, _, gates, *rows: x + gates[:, :1], lambda: x_TD)

    def weights(in_place: bool) -> Callable[[], torch.Tensor]:
        pair = [nn.Parameter(DTensor.from_local(torch.ones(4, 8), mesh, [Shard(0)], run_check=False)) for _ in "12"]
        return lambda: torch.cat([local_part(weight, in_place) for weight in pair])

    calls_of = {"dispatcher": dispatch, "weights": weights(False), "weights, in place": weights(True)}
    figures = {part: _time(call, calls) for part, call in calls_of.items()}
    if dist.get_rank() == 0:
        print(to_json(figures))
    dist.destroy_process_group()


def _time(forward: Callable[[], Any], calls: int) -> dict[str, float]:
    """Median CPU seconds of the calling thread, and the number of operations, in forward and backward."""
    import torch

    seconds: dict[str, list[float]] = {"forward": [], "backward": []}
    for _ in range(calls + 5):
        marks = [time.thread_time()]
        y = forward()
        marks.append(time.thread_time())
        y.backward(torch.ones_like(y))
        marks.append(time.thread_time())
        for kind, began, ended in zip(seconds, marks, marks[1:]):
            seconds[kind].append(ended - began)
    found = {kind: statistics.median(values[5:]) for kind, values in seconds.items()}
    with _operations() as count:
        y = forward()
        forward_operations = count.operations
        y.backward(torch.ones_like(y))
    backward_operations = count.operations - forward_operations - 1  # without the ones
    return found | {"forward operations": forward_operations, "backward operations": backward_operations}


def _operations() -> Any:
    """A context that counts the operations below autograd."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            self.operations += 1
            return op(*args, **(kwargs or {}))

    return Counter()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    _measure(int(sys.argv[1]))
