"""Shared parts of the benchmark suites, and the pure functions of attention, nano_step and bench.py."""

import json
import subprocess
import sys
from pathlib import Path

import bench
import pytest
import torch
from benchmarks import attention, host, nano_step, step, timing
from benchmarks.attention import Case, make_documents, pairs_seen
from benchmarks.timing import medians, one_line, take_turns

import trinity_kernels
from trinity.config.model import ZOO
from trinity.models.attention_backends import AttentionMask
from trinity.models.flops import flops_per_token
from trinity.models.moe import Router


def test_contenders_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """One warm-up and three rounds; a contender that fails, or takes twenty times as long, is not called again."""
    monkeypatch.setattr(timing, "parts_of", lambda call: call(None))
    order = []

    def call(name: str, seconds: list[float]):
        def timed(_: object) -> list[float]:
            order.append(name)
            if name == "broken":
                raise RuntimeError("no | such\n thing")
            return seconds

        return timed

    parts = {"fast": [1.0, 2.0], "slow": [50.0, 11.0], "broken": []}
    results = take_turns({name: call(name, seconds) for name, seconds in parts.items()}, 3)
    assert order == ["fast", "slow", "broken", "fast", "fast", "fast"]
    assert results["fast"] == {"seconds": [1.0, 2.0]}
    assert results["slow"] == {"seconds": [50.0, 11.0]}
    assert results["broken"] == {"failed": "RuntimeError: no / such thing"}


def test_out_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the deadline no contender without a result is started."""
    monkeypatch.setenv("BENCH_SECONDS", "0")
    assert take_turns({"a": lambda _: None}, 3) == {"a": {"failed": "not measured: the suite's time was up"}}
    assert nano_step.in_process("configs/smoke.yaml", "balanced", [], (1,))[0]["failed"].startswith("not measured")
    monkeypatch.delenv("BENCH_SECONDS")
    assert timing.time_left() == float("inf")


def test_parts_and_medians() -> None:
    """Two marks make three parts; the median is each part's own."""
    assert len(timing.parts_of(lambda mark: (mark(), mark()))) == 3
    assert medians([[1, 9], [2, 7], [30, 8]]) == [2, 8]
    assert one_line(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate…")) == "out of memory"
    assert len(one_line(ValueError("x" * 999))) == 160


@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize("documents", [False, True])
def test_pairs_are_those_of_the_mask(window: int | None, documents: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted one by one in the mask that the model uses."""
    monkeypatch.setattr(attention, "MEAN_DOCUMENT", 7)
    documents_BS = make_documents(Case(4, 2, 8, window, 64, 3, documents))
    assert (len(documents_BS.unique()) > 5) == documents
    mask = AttentionMask(torch.arange(64).unsqueeze(0), documents_BS, True).dense(window).expand(3, 1, 64, 64)
    assert pairs_seen(documents_BS, window) == mask.sum()


def test_flops_of_attention_are_those_of_the_model() -> None:
    """A local and a global layer of Nano, weighted as in the model, against flops_per_token's exact windows."""
    nano, S = ZOO["nano"], 4096
    forward = {}
    for kind, window in (("local", nano.window), ("global", None)):
        case = Case(nano.heads, nano.kv_heads, nano.head_dim, window, S, 1, False)
        forward[kind], backward = attention.flops(case, make_documents(case))
        assert backward == 2.5 * forward[kind]
    layers = [forward["global" if nano.is_global(layer) else "local"] for layer in range(nano.layers)]
    assert sum(layers) / S == pytest.approx(flops_per_token(nano, S)["attention core"], rel=1e-12)


def test_keys_are_repeated_for_one_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    """varlen's second row: each key and value head as often as it has query heads; gradients of all heads given."""
    heads = []

    def attend(q, k, v, window, mask):
        heads.append((mask.engine, k.shape[2], v.shape[2]))
        return q * k.sum() * v.sum()

    monkeypatch.setattr("trinity.models.attention_backends.attend", attend)
    monkeypatch.setattr("trinity.models.attention_backends.pick_engine", lambda name, *_: name)
    results = attention._measure(Case(4, 2, 8, None, 16, 1, False), rounds=1)
    assert [name for name, row in results.items() if "failed" in row] == []
    assert set(heads) == {(e, 2, 2) for e in ("flash4", "flash2", "varlen", "blocks", "sdpa", "flex")} | {
        ("varlen", 4, 4)
    }
    assert list(results) == list(attention.CONTENDERS)


def test_table_of_attention() -> None:
    """An engine that fails everywhere is one line; one that fails once is named with its case."""
    row = {"seconds": [0.001, 0.002], "tf": [400.0, 300.0], "tf_both": 328.0}
    cases = {"a": {"sdpa": row, "flex": {"failed": "no"}}, "b": {"sdpa": {"failed": "late"}, "flex": {"failed": "no"}}}
    lines = attention.table({"on": "here", "unit": "TF", "cases": cases}).splitlines()
    assert "| a | sdpa | 1 | 400 | 2 | 300 | 42% |" in lines
    assert lines[-2:] == ["flex: no (everywhere)", "sdpa: late (b)"]


def test_rows_of_a_process_that_fails() -> None:
    """The last line of its stderr is a row."""
    rows = nano_step.in_process("configs/none.yaml", "balanced", [], (1,))
    assert len(rows) == 1
    assert "the config configs/none.yaml does not exist" in rows[0]["failed"]


def test_a_process_that_times_out_keeps_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    first = {"what": "forward + backward", "tokens": 4096, "seconds": 0.5, "mfu": 0.25, "memory_gib": 3.0}

    def late(*_: object, **options: object) -> None:
        raise subprocess.TimeoutExpired("x", 75, output=f"noise\n{json.dumps(first)}\n".encode())

    monkeypatch.setattr(subprocess, "run", late)
    rows = nano_step.in_process("configs/smoke.yaml", "balanced", [], (1,))
    assert rows == [first, {"failed": "not at its end after 75 s"}]
    lines = nano_step.table({"Nano, balanced": rows}).splitlines()
    assert lines[2] == "| Nano, balanced: forward + backward | 4,096 | 0.500 | 8,192 | 25.0% | 3.0 |"
    assert lines[3].startswith("| Nano, balanced | not at its end after 75 s |")
    assert len({line.count("|") for line in lines}) == 1


def test_forced_routing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly even counts, gates of the scores as the router makes them, and gradients to its weight."""
    monkeypatch.setattr(trinity_kernels, "route", trinity_kernels.route)
    nano_step._force_routing("balanced")
    config = ZOO["smoke"]
    router = Router(config)
    torch.nn.init.normal_(router.weight)
    x_TD = torch.randn(32, config.width, generator=torch.Generator().manual_seed(0))
    gates_TK, scores_TE, indices_TK, (counts_E, _, _) = router(x_TD, torch.zeros(config.experts))
    assert counts_E.eq(32 * config.active_experts // config.experts).all()
    assert torch.equal(counts_E, torch.bincount(indices_TK.flatten(), minlength=config.experts))
    chosen_TK = scores_TE.gather(1, indices_TK)
    assert torch.allclose(gates_TK, chosen_TK / chosen_TK.sum(dim=1, keepdim=True) * config.route_scale)
    gates_TK[:, 0].sum().backward()
    assert router.weight.grad.abs().sum() > 0


def test_a_failing_suite_does_not_stop_the_others(run_command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench._about("none").startswith("(the suite none cannot be imported here: No module named 'benchmarks.none'")
    monkeypatch.setitem(sys.modules, "benchmarks.muon", None)
    assert bench._about("muon").startswith("(the suite muon cannot be imported here")
    done = run_command("tools/bench.py", "--list")
    assert done.code == 0, done.errors
    assert [line.split()[0] for line in done.output.splitlines()] == list(bench.SUITES)
    for name in bench.SUITES:
        assert (Path(bench.__file__).parent / "benchmarks" / f"{name}.py").exists(), name


@pytest.mark.parametrize(
    ("program", "seconds", "reason"),
    [
        ("time.sleep(600)", 0.2, "a step takes more than 0.2 s"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 600, "killed by SIGKILL, as the system does if memory is short"),
        ("sys.exit('no such engine')", 600, "no such engine"),
    ],
)
def test_why_a_contender_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, seconds: float, reason: str
) -> None:
    """The suite's own kill of a slow contender is not taken for another's."""
    path = tmp_path / "contender.py"
    path.write_text(f"import os, signal, sys, time\n{program}\n")
    monkeypatch.setattr(step, "__file__", str(path))
    monkeypatch.setattr(step, "TIMEOUT", seconds)
    assert step._alone(step.Contender("trinity", "float32", tmp_path), 1) == {"failed": reason}


@pytest.mark.parametrize("name", host._cases())
def test_host_calls_every_op(name: str) -> None:
    """By its present name and arguments, through both passes: the whole suite is too slow with interpreted kernels."""
    with host._no_launches():
        began, between, ended = host._two_passes(*host._cases()[name][:2])
    assert began <= between <= ended


@pytest.mark.parametrize("words", [["tune"], ["step", "experts"], ["none"], []])
def test_wrong_arguments(run_command, words: list[str]) -> None:
    assert run_command("tools/bench.py", *words).code == 2
