"""The experiments on the report's claims, at toy size: arms against direct computations, runs, tables, resuming."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import ablations
import ablations_report
import averaging
import balancing_rules
import numpy as np
import optimizers
import optimizers_report
import pytest
import scaling
import scaling_report
import torch
from ablations_report import spikes
from balancing_rules import Biases, linear_update, rule
from domains import Corpus
from experiment import Experiment
from small_run import QUICK_MODEL, SmallRun, small_config, small_corpus, small_run
from spikes import Spike, find_spikes
from variants import OPEN, VARIANTS

from tests.tools.call_experiment import EXIT_CODE, call_experiment
from trinity.balancing import smebu_update
from trinity.config.model import ModelConfig
from trinity.errors import UserError
from trinity.interop import export_hf
from trinity.models import Trinity

NAMES = ("ablations", "averaging", "balancing_rules", "optimizers", "scaling")
WORDS = ("--quick", "--seeds", 1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The corpus of every quick experiment."""
    return small_corpus(tmp_path_factory.mktemp("claims"), 512, every=24)


@pytest.fixture(scope="module")
def finished(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str]]:
    """Name → the folder of the finished quick experiment, and its output; each is run once."""
    done: dict[str, tuple[Path, str]] = {}

    def finish(name: str) -> tuple[Path, str]:
        if name not in done:
            out = tmp_path_factory.mktemp(name)
            shutil.copytree(corpus.tokenizer.parent, out / corpus.tokenizer.parent.name)
            code, output, errors = call_experiment(name, "--out", out, *WORDS)
            assert code == EXIT_CODE, errors
            done[name] = out, output
        return done[name]

    return finish


def config_of(corpus: Corpus, steps: int, *words: str):
    return small_config(corpus, 0, steps, list(QUICK_MODEL), list(words))


def losses_of(run: SmallRun, steps: int) -> list[float]:
    return [run.step().metrics["loss"] for _ in range(steps)]


# Runs, resuming, tables -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_run_and_its_tables(name: str, finished: Callable, tmp_path: Path) -> None:
    """A lost part alone is made again, with the same record; `--draw` needs the results file alone."""
    out, output = finished(name)
    results = json.loads((out / f"{name}.json").read_text())
    again = tmp_path / "again"
    shutil.copytree(out, again)
    lost = results["parts"][-1]["part"]
    (again / "parts" / f"0-{lost}.json").unlink()
    kept = {path: path.stat().st_mtime_ns for path in again.glob("parts/*.json")}
    assert call_experiment(name, "--out", again, *WORDS)[0] == EXIT_CODE
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert without_times(json.loads((again / f"{name}.json").read_text())) == without_times(results)
    alone = tmp_path / "alone" / f"{name}.json"
    alone.parent.mkdir()
    shutil.copy(out / f"{name}.json", alone)
    assert call_experiment(name, "--draw", alone)[:2] == (EXIT_CODE, output)
    if EXIT_CODE == 0:
        assert alone.with_suffix(".svg").read_bytes() == (out / f"{name}.svg").read_bytes()


def without_times(results: dict) -> list[dict]:
    """The records without CPU seconds."""
    times = ("seconds", "step_seconds", "step_times")
    return [{key: value for key, value in record.items() if key not in times} for record in results["parts"]]


def test_the_fifth_size_is_compared_with_the_committed_prediction(finished: Callable, tmp_path: Path) -> None:
    """Its results hold the prediction, and the verdict follows from it; another prediction is another experiment."""
    out, _ = finished("scaling")
    fifth = tmp_path / "fifth"
    shutil.copytree(out / "corpus-512", fifth / "corpus-512")
    words = ("--fifth", out / "scaling.json", "--out", fifth, *WORDS)
    code, _, errors = call_experiment("scaling", *words)
    assert code == EXIT_CODE, errors
    results = json.loads((fifth / "scaling_fifth.json").read_text())
    first = json.loads((out / "scaling.json").read_text())
    size = scaling.active_parameters(scaling.QUICK_FIFTH)
    assert results["settings"]["size"]["prediction"] == scaling_report.predict(first, size)
    assert [record["active"] for record in results["parts"]] == [size]
    middle = results["parts"][0]["validation"]
    for low, high, verdict in ((middle - 1, middle + 1, "agrees with"), (middle + 1, middle + 2, "contradicts")):
        results["settings"]["size"]["prediction"] |= {"low": low, "high": high}
        assert f"This {verdict} the claim" in scaling_report.fifth_outcome(results)
    first["parts"][0]["validation"] += 0.5
    (tmp_path / "other.json").write_text(json.dumps(first))
    code, _, errors = call_experiment("scaling", "--fifth", tmp_path / "other.json", "--out", fifth, *WORDS)
    assert code == 2
    assert "has other settings" in errors
    first["settings"]["texts"]["tokens"] += 1
    (tmp_path / "other.json").write_text(json.dumps(first))
    code, _, errors = call_experiment("scaling", "--fifth", tmp_path / "other.json", "--out", fifth, *WORDS)
    assert code == 2
    assert "was measured on other text" in errors


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--seeds", 0), "--seeds 0 must be at least 1"),
        (("--draw", "nowhere.json"), "does not exist; give the JSON file of a finished experiment"),
        (("--draw", Path(__file__).parents[2] / "tools/experiments/results/rsdb.json"), "is not a results file of"),
        (("--draw", Path(__file__).parents[2] / "tools/experiments/results/optimizers.svg"), "overwritten by the plot"),
    ],
)
def test_mistakes(words: tuple, sentence: str) -> None:
    """One sentence, and exit code 2."""
    code, output, errors = call_experiment("optimizers", *words)
    assert (code, output) == (2, "")
    assert sentence in errors.splitlines()[-1]


@pytest.mark.parametrize("damage", ["parts", "settings", "text", "a number"])
def test_results_that_are_not_whole(finished: Callable, tmp_path: Path, damage: str) -> None:
    """One sentence that names the file; the file stays."""
    results = json.loads((finished("averaging")[0] / "averaging.json").read_text())
    if damage == "parts":
        results["parts"] = []
    elif damage == "settings":
        del results["settings"]
    elif damage == "a number":
        results["parts"][0]["constant"] = None
    content = "{" if damage == "text" else json.dumps(results)
    path = tmp_path / "averaging.json"
    path.write_text(content)
    code, _, errors = call_experiment("averaging", "--draw", path)
    assert code == 2
    assert "cannot be shown" in errors or "give the averaging.json of a finished experiment" in errors
    assert str(path) in errors
    assert path.read_text() == content


def test_results_of_more_seeds_stay(finished: Callable, tmp_path: Path) -> None:
    """A call with fewer seeds neither loses nor changes what is there."""
    again = tmp_path / "again"
    shutil.copytree(finished("averaging")[0], again)
    path = again / "averaging.json"
    results = json.loads(path.read_text())
    results["parts"] += [record | {"seed": 1} for record in results["parts"]]
    path.write_text(json.dumps(results))
    assert call_experiment("averaging", "--out", again, *WORDS)[0] == EXIT_CODE
    assert json.loads(path.read_text()) == results
    results["settings"]["versions"]["torch"] = "0"  # results of other settings, whose parts were removed
    path.write_text(json.dumps(results))
    assert call_experiment("averaging", "--out", again, *WORDS)[0] == EXIT_CODE
    assert {record["seed"] for record in json.loads(path.read_text())["parts"]} == {0}


def test_kept_parts_of_other_settings_are_refused(finished: Callable, tmp_path: Path) -> None:
    """A part that was made with other versions of packages is not mixed with new ones."""
    again = tmp_path / "again"
    shutil.copytree(finished("averaging")[0], again)
    path = again / "parts" / "0-losses.json"
    content = json.loads(path.read_text())
    content["settings"]["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(content))
    code, output, errors = call_experiment("averaging", "--out", again, *WORDS)
    assert (code, output) == (2, "")
    assert "was made by other versions of Python or packages; give another --out" in errors.splitlines()[-1]


@pytest.mark.parametrize("module", [ablations, averaging, balancing_rules, optimizers, scaling])
def test_designs(module) -> None:
    """Each is fixed in the docstring of its command, which names its own commands; sizes are JSON values."""
    experiment: Experiment = module.experiment()
    assert experiment.design is module.__doc__
    assert f"python tools/experiments/{experiment.name}.py --out runs/{experiment.name}" in experiment.design
    assert "The design, fixed before the first run:" in experiment.design
    for size in (experiment.full, experiment.quick):
        json.dumps(size._asdict())
        for seed in (0, 1):
            assert all(part.steps >= 0 for part in experiment.parts(size, seed).values())


# One run --------------------------------------------------------------------------------------------------------------


def test_a_restored_run_is_the_uninterrupted_one(corpus: Corpus) -> None:
    """Bit for bit: losses and every weight and bias after steps that were taken twice, with others between."""
    config = config_of(corpus, 6)
    with small_run(config) as run:
        losses_of(run, 2)
        saved = run.save()
        expected, state = losses_of(run, 4), run.state()
        run.restore(saved)
        run.config = config_of(corpus, 6, "optim.muon.lr=0.5")
        losses_of(run, 2)
        run.restore(saved)
        run.config = config
        assert losses_of(run, 4) == expected
        assert all(torch.equal(value, state[name]) for name, value in run.state().items())


def test_the_runs_data_is_read_once(corpus: Corpus) -> None:
    """The largest full run reads fewer tokens than the corpus of its experiment has."""
    full = scaling.Size()
    tokens = {width: scaling.steps_of(width, full.tokens) * scaling.ROW * scaling.ROWS for width in (*full.widths, 72)}
    assert max(tokens.values()) < 4.0e6
    assert tokens[scaling.FULL_FIFTH] == pytest.approx(full.tokens * scaling.active_parameters(72), rel=1e-3)
    model = Trinity(ModelConfig(**small_config(corpus, 0, 1).model.__dict__))
    counted = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(("embed", "head")))
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    biases = sum(b.numel() for name, b in model.named_buffers() if name.endswith("expert_bias"))
    assert scaling.active_parameters(64) == counted + biases - experts * 6 // 8


# Optimizers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ["adamw", "one_rate"])
def test_adamw_everywhere_is_torchs(arm: str, corpus: Corpus) -> None:
    """Three steps against torch.optim.AdamW by hand, given the same gradients: fp32, elementwise, so 1e-6."""
    config = config_of(corpus, 3, "optim.schedule.decay=none")
    rate, other = 3e-3, 3e-3 if arm == "one_rate" else config.optim.adamw.lr
    with small_run(config, optimizers=optimizers.adamw_optimizers(arm, rate)) as run:
        named = {name: local(p) for name, p in run.model.named_parameters()}
        copies = {name: torch.nn.Parameter(p.detach().clone()) for name, p in named.items()}
        outer = ("embed", "head", "norm")
        groups = []
        for name, value in copies.items():
            gain = name.endswith("gain")
            of_outer = gain or name.startswith(outer)
            groups.append({"params": [value], "lr": other if of_outer else rate, "weight_decay": 0.0 if gain else 0.01})
        by_hand = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
        step = run.optimizers.step

        def both() -> None:
            for name, parameter in run.model.named_parameters():
                gradient = parameter.grad
                copies[name].grad = None if gradient is None else local(gradient).detach().clone()
            by_hand.step()
            step()

        run.optimizers.step = both
        losses_of(run, 3)
        for name, value in named.items():
            torch.testing.assert_close(value.detach(), copies[name].detach(), rtol=1e-6, atol=1e-6)
        assert not run.optimizers.muon_roles


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def test_amount_at_a_loss() -> None:
    """Interpolated in the logarithm; the first amount if it is enough; none if no loss is as low."""
    amounts, losses = [100.0, 400.0, 1600.0], [5.0, 4.0, 3.0]
    assert optimizers_report.amount_at(4.5, amounts, losses) == pytest.approx(200)
    assert optimizers_report.amount_at(3.25, amounts, losses) == pytest.approx(400 * 4**0.75)
    assert optimizers_report.amount_at(6.0, amounts, losses) == 100
    assert optimizers_report.amount_at(2.9, amounts, losses) == math.inf


def test_the_best_rate_is_used(finished: Callable) -> None:
    """The rates are extended where the best is at an end; each arm has the rate of its best run with seed 0."""
    results = json.loads((finished("optimizers")[0] / "optimizers.json").read_text())
    by_part = {record["part"]: record for record in results["parts"]}
    best = {}
    for arm in optimizers_report.TITLES:
        runs = optimizers_report.tuning(results["parts"], arm)
        rates = [run["rate"] for run in runs]
        assert rates == sorted(set(rates))
        best[arm] = min(runs, key=lambda run: run["validation"])
        assert len(runs) == 2 or best[arm]["rate"] in (rates[0], rates[-1]) or by_part[f"{arm}_beyond_0"]["rate"]
    adamw = min(best["adamw"], best["one_rate"], key=lambda run: run["validation"])
    assert (by_part["muon"]["rate"], by_part["muon"]["validation"]) == (
        best["muon"]["rate"],
        best["muon"]["validation"],
    )
    assert (by_part["adamw"]["arm"], by_part["adamw"]["rate"]) == (adamw["arm"], adamw["rate"])
    assert [by_part[f"muon_{share}"]["steps"] for share in ("50%", "75%")] == [2, 3]


def test_the_outcome_follows_the_figures(finished: Callable) -> None:
    """AdamW's loss is set so that Muon's shortest run has it, none has, and in one of two seeds one has."""
    results = json.loads((finished("optimizers")[0] / "optimizers.json").read_text())
    results["parts"] += [record | {"seed": 1} for record in copy.deepcopy(results["parts"]) if record["seed"] == 0]

    def outcome(*losses: float) -> str:
        for loss, record in zip(losses, (r for r in results["parts"] if r["part"] == "adamw")):
            record["validation"] = loss
        return optimizers_report.outcome(results)

    assert "AdamW needs 2.00, 2.00 times the tokens of Muon: this agrees with the claim, and meets" in outcome(9.0, 9.0)
    assert "in 2 of 2 seeds Muon does not reach AdamW's final loss: this contradicts the claim" in outcome(0.0, 0.0)
    assert "in 1 of 2 seeds Muon does not reach AdamW's final loss: this shows no clear" in outcome(9.0, 0.0)


# Balancing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ("smebu", ("balancing.kind=smebu", "balancing.rate=0.02")),
        ("sign", ("balancing.kind=sign", "balancing.gamma=0.02")),
        ("no_momentum", ("balancing.kind=smebu", "balancing.rate=0.02", "balancing.beta=0")),
        ("none", ("balancing.kind=none",)),
    ],
)
def test_arms_are_the_configs_rules(arm: str, words: tuple[str, ...], corpus: Corpus) -> None:
    """Losses and biases bit for bit those of a run whose config names the rule."""
    size = balancing_rules.quick()
    with small_run(config_of(corpus, 4, *words)) as run:
        expected, state = losses_of(run, 4), run.state()
    losses, steps = [], []
    with small_run(config_of(corpus, 4, "balancing.kind=none")) as run:
        biases = Biases(run.model, rule(arm, 0.02, size))
        for _ in range(4):
            before = stacked_biases(run)
            result = run.step()
            losses.append(result.metrics["loss"])
            steps.append((biases.update(result.counts_ME)["step"], stacked_biases(run) - before))
        assert losses == expected
        assert all(torch.equal(value, state[name]) for name, value in run.state().items())
    for step, moved in steps:
        assert step == pytest.approx(moved.double().square().mean().sqrt().item(), rel=1e-6)


def stacked_biases(run: SmallRun) -> torch.Tensor:
    return torch.stack([value for name, value in sorted(run.state().items()) if name.endswith("expert_bias")])


def test_without_the_clamp() -> None:
    """By hand in float64; and where violations are small it is SMEBU: tanh(x) = x − x³/3, here x < 0.002."""
    bias, momentum = torch.zeros(2, 4, dtype=torch.float64), torch.full((2, 4), 0.25, dtype=torch.float64)
    counts = torch.tensor([[1, 2, 3, 2], [0, 0, 8, 0]])
    moved, kept = linear_update(bias, momentum, counts, 0.5, 0.75)
    violation = torch.tensor([[0.5, 0, -0.5, 0], [1, 1, -3, 1]], dtype=torch.float64)
    assert torch.equal(kept, 0.75 * 0.25 + 0.25 * 0.5 * violation)
    assert torch.equal(moved, kept)
    even = torch.tensor([[10_000, 10_010, 9_990, 10_000]])
    exact = smebu_update(bias[:1], momentum[:1], even, 0.1, 2.0, 0.5)
    for ours, theirs in zip(linear_update(bias[:1], momentum[:1], even, 0.2, 0.5), exact):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.1 * 0.002**3 / 3 * 1.01)


def test_reversals() -> None:
    """Counts that lean the same way twice move each bias on; the other way, back."""

    class Layer(torch.nn.Module):
        expert_bias, expert_momentum = torch.zeros(4), torch.zeros(4)

    class Model:
        layer = Layer()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trinity.models.trinity.moe_layers", lambda model: [model.layer])
        biases = Biases(Model(), rule("sign", 0.1, balancing_rules.quick()))
        one, other = torch.tensor([[3, 3, 1, 1]]), torch.tensor([[1, 3, 1, 3]])
        assert [biases.update(counts)["reversals"] for counts in (one, one, other)] == [0.0, 0.0, 0.5]


# Ablations ------------------------------------------------------------------------------------------------------------

MODEL = ModelConfig(
    vocab_size=64, width=16, layers=4, dense_layers=1, dense_width=32, heads=2, kv_heads=1, head_dim=8, window=4,
    experts=4, active_experts=2, expert_width=8,
)  # fmt: skip


def model_of(variant: str | None) -> Trinity:
    """A model in float64, with gains that are not 1."""
    model = Trinity(MODEL).double()
    with torch.no_grad():
        random = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if name.endswith("gain"):
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=random, dtype=torch.float64))
            elif "qkvg" in name:
                parameter.mul_(4)
    if variant is not None:
        VARIANTS[variant](model)
    return model


def rms(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain


def by_hand(model: Trinity, tokens_BS: torch.Tensor, variant: str | None) -> torch.Tensor:
    """Logits of a variant from the equations, with the MoE and the FFN of the model."""
    x = model.embed(tokens_BS)
    length = tokens_BS.shape[1]
    for index, block in enumerate(model.blocks):
        attention = block.attention
        u = rms(x, block.attention_norm.gain, MODEL.norm_eps)
        q, k, v, gate = (u @ attention.qkvg.weight.T).split(attention.qkvg.rows, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, MODEL.head_dim)) for part in (q, k, v))
        if variant != "no_qk_norm":
            q, k = rms(q, attention.q_norm.gain, MODEL.norm_eps), rms(k, attention.k_norm.gain, MODEL.norm_eps)
        visible = torch.ones(length, length).tril().bool()
        if not MODEL.is_global(index):
            visible &= torch.ones(length, length).triu(1 - MODEL.window).bool()
            turns = torch.outer(
                torch.arange(length).double(), MODEL.rope_theta ** -(torch.arange(0, 8, 2).double() / 8)
            )
            q, k = (rotated(part, turns) for part in (q, k))
        k, v = (part.repeat_interleave(MODEL.heads // MODEL.kv_heads, dim=2) for part in (k, v))
        scores = torch.einsum("bqhc,bkhc->bhqk", q, k) / MODEL.head_dim**0.5
        mixed = torch.einsum("bhqk,bkhc->bqhc", scores.masked_fill(~visible, -torch.inf).softmax(-1), v).flatten(-2)
        y = (mixed if variant == "no_gate" else mixed * gate.sigmoid()) @ attention.out.weight.T
        x = x + (y if variant == "no_post_norm" else rms(y, block.attention_post_norm.gain, MODEL.norm_eps))
        u = rms(x, block.ffn_norm.gain, MODEL.norm_eps)
        y = block.ffn(u, False, None, None)[0] if block.sparse else block.ffn(u)
        x = x + (y if variant == "no_post_norm" else rms(y, block.ffn_post_norm.gain, MODEL.norm_eps))
    return rms(x, model.norm.gain, MODEL.norm_eps) @ model.head.weight.T


def rotated(x_BSHC: torch.Tensor, turns_SF: torch.Tensor) -> torch.Tensor:
    """RoPE as a product of complex numbers."""
    first, second = x_BSHC.chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(turns_SF), turns_SF)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("variant", [None, "no_gate", "no_post_norm", "no_qk_norm"])
def test_variants_are_the_equations(variant: str | None) -> None:
    """Logits against the equations, and gradients against autograd's of them: float64 in another order, 1e-10."""
    model = model_of(variant)
    tokens_BS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(2))
    weight = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gradients = []
    for logits in (model(tokens_BS), by_hand(model, tokens_BS, variant)):
        gradients.append(torch.autograd.grad((logits * weight).sum(), list(model.parameters()), allow_unused=True))
        last = logits
    torch.testing.assert_close(model(tokens_BS), last, rtol=1e-10, atol=1e-10)
    for (name, parameter), ours, theirs in zip(model.named_parameters(), *gradients):
        expected = torch.zeros_like(parameter) if theirs is None else theirs
        found = torch.zeros_like(parameter) if ours is None else ours
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    if variant is not None:
        assert not torch.allclose(model_of(None)(tokens_BS), last, rtol=1e-3, atol=1e-3)
    assert torch.tensor(OPEN, dtype=torch.float64).sigmoid() == 1


def test_depth_scale() -> None:
    """Without it the gains after a sublayer begin at 1, the others as ever; training changes them."""
    whole, flat = Trinity(MODEL), Trinity(MODEL)
    VARIANTS["no_depth_scale"](flat)
    for (name, before), after in zip(whole.named_parameters(), flat.parameters()):
        assert torch.equal(after, before * 2 if "post_norm" in name else before)


@pytest.mark.parametrize("variant", ["no_gate", "no_post_norm", "no_qk_norm"])
def test_a_variant_is_not_exported(variant: str, tmp_path: Path) -> None:
    """transformers would compute something else with its weights."""
    with pytest.raises(UserError, match=rf"architecture of this model was changed \({variant}\)"):
        export_hf(model_of(variant), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_variants_train_on_a_mesh_of_one(variant: str, corpus: Corpus) -> None:
    """FSDP's groups do not hide a hook: the gradient norm of the first step is that of the model alone, fp32: 1e-4."""
    config = config_of(corpus, 2, "balancing.sequence_loss=0", "loss.z=0")
    with small_run(config, variant=VARIANTS[variant]) as run:
        state = {name: local(value).clone() for name, value in run.model.state_dict().items()}
        norm = run.step().metrics["grad_norm"]
        batch = run.batch
        run.step()
    model = Trinity(config.model)
    VARIANTS[variant](model)
    model.load_state_dict(state)
    losses = model(batch.tokens_BS, document_ids_BS=batch.document_ids_BS, targets_BS=batch.targets_BS)
    (losses.token_loss / (batch.targets_BS != -100).sum()).backward()
    squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
    assert norm == pytest.approx(math.sqrt(sum(squares)), rel=1e-4)


def test_spikes_are_counted_by_the_rule_of_health() -> None:
    """A planted jump counts once; neither the first steps nor one that was not finite does."""
    random = np.random.default_rng(0)
    loss = (4 + 0.01 * random.normal(size=200)).tolist()
    norm = (1 + 0.01 * random.normal(size=200)).tolist()
    record = {"curves": {"loss": loss, "grad_norm": norm}}
    assert spikes(record, 50) == find_spikes(loss, norm) == []
    loss[150], norm[120] = 4.5, None
    assert spikes(record, 50) == find_spikes(loss, norm) == find_spikes(loss) == [Spike(150, in_loss=True)]
    norm[120] = 2.0
    both = [Spike(120, in_loss=False), Spike(150, in_loss=True)]
    assert spikes(record, 50) == find_spikes(loss, norm) == both
    loss[30] = 9.0
    assert spikes(record, 50) == both


def test_what_counts_in_the_ablations(finished: Callable) -> None:
    """One run of three that spikes, a peak of the gradient norm, a difference for every seed: each is said."""
    results = json.loads((finished("ablations")[0] / "ablations.json").read_text())
    for seed in (1, 2):
        results["parts"] += [copy.deepcopy(r) | {"seed": seed} for r in results["parts"] if r["seed"] == 0]
    size = results["settings"]["size"]
    size["ignored"] = 0
    for record in results["parts"]:
        record["curves"] = {"loss": [4.0, 4.1] * 60, "grad_norm": [1.0, 1.1] * 60, "max_head_logit": [5.0] * 120}
        record["attention_logits"], record["validation"] = [6.0] * 12, 4.0
    for record in results["parts"]:
        if (record["part"], record["seed"]) == ("no_gate_3x", 1):
            record["curves"]["loss"][100] = 9.0
        if record["part"] == "no_qk_norm_1x":
            record["attention_logits"][3] = 12.1
            record["validation"] += 0.006
        if record["part"] == "no_z_loss_1x":
            record["curves"]["grad_norm"][7] = 2.4
            record["validation"] += 0.004
    assert ablations_report.less_stable(results, "no_gate", 3.0) == ["spikes"]
    assert ablations_report.less_stable(results, "no_gate", 1.0) == []
    assert ablations_report.less_stable(results, "no_qk_norm", 1.0) == ["attention"]
    assert ablations_report.less_stable(results, "no_z_loss", 1.0) == ["peak"]
    said = ablations_report.outcome(results)
    assert "higher than with the whole recipe: without QK-norm at the recipe's rates (+0.006 nats)." in said
    assert "lower than with the whole recipe: nowhere." in said
    assert "without QK-norm at the recipe's rates (largest attention logit 12.1 against 6.0)" in said
    assert "without the attention gate at 3 times the rates (spikes 1 against 0)" in said
    assert "have 1 spikes, 1 in the loss; 0 of them are at a step" in said
    assert "agrees in part with the claim" in said


def test_a_spike_of_the_batch_is_not_of_the_part(finished: Callable) -> None:
    """Two runs of a seed that spike at one step read the same batch; the same step of another seed is another batch."""
    results = json.loads((finished("ablations")[0] / "ablations.json").read_text())
    results["settings"]["size"]["ignored"] = 0
    results["parts"] += [copy.deepcopy(record) | {"seed": 1} for record in results["parts"]]
    for record in results["parts"]:
        record["curves"] |= {"loss": [4.0, 4.1] * 60, "grad_norm": [1.0, 1.1] * 60}
        if (record["part"], record["seed"]) in (("no_gate_1x", 0), ("full_3x", 0), ("no_gate_1x", 1)):
            record["curves"]["grad_norm"][100] = 9.0
    assert ablations_report.spikes_of_batches(results) == {(0, 100)}
    assert "spikes" in ablations_report.less_stable(results, "no_gate", 1.0)
    results["parts"] = [record for record in results["parts"] if record["seed"] == 0]
    assert "spikes" not in ablations_report.less_stable(results, "no_gate", 1.0)


# Averaging and scaling ------------------------------------------------------------------------------------------------


def test_averages() -> None:
    """Weighted sums by tensor; a few checkpoints are evenly spaced, the last among them."""
    states = [{"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(value)} for value in (0.0, 4.0)]
    result = averaging.weighted_sum(states, [0.25, 0.75])
    assert result["a"].tolist() == [1.0, 2.0]
    assert result["b"].item() == 3.0
    assert averaging.evenly_spaced(list(range(10, 20)), 4) == [10, 13, 16, 19]
    assert averaging.evenly_spaced(list(range(10)), 4) == [0, 3, 6, 9]
    assert averaging.evenly_spaced([5, 6], 5) == [5, 6]


def test_averages_of_a_run(corpus: Corpus) -> None:
    """The loss of the average of two checkpoints with equal weights is that of their mean, loaded by hand."""
    with small_run(config_of(corpus, 4)) as run:
        states = {}
        for step in (1, 2, 3):
            run.step()
            states[step] = run.state()
        found = averaging.average(run, states, 2, "equal", None)
        mean = {name: ((states[2][name].double() + states[3][name].double()) / 2).float() for name in states[2]}
        run.load(mean)
        assert run.validation_loss() == found
        run.load(states[3])
        assert run.validation_loss() != found


def test_the_fit_finds_a_planted_law() -> None:
    """E, A and α of exact losses; without a floor, E stays 0; the prediction is the law's, its range holds it."""
    sizes = [4e4, 6e4, 9e4, 12e4]
    law = scaling_report.Law(2.5, 40.0, 0.31)
    found = scaling_report.fit(sizes, [law.at(size) for size in sizes])
    assert found.alpha == pytest.approx(law.alpha, abs=1e-9)
    assert pytest.approx((law.E, law.A), rel=1e-6) == (found.E, found.A)
    below = scaling_report.fit(sizes, [20.0 * size**-0.2 - 0.5 for size in sizes])
    assert below.E == 0
    random = np.random.default_rng(0)
    parts = [
        {"part": f"width_{width}", "seed": seed, "active": int(size), "validation": law.at(size) + noise}
        for width, size in zip((1, 2, 3, 4), sizes)
        for seed, noise in enumerate(0.001 * random.normal(size=3))
    ]
    predicted = scaling_report.predict({"parts": parts, "settings": {"size": {"widths": [1, 2, 3, 4]}}}, 200_000)
    assert predicted["low"] < law.at(200_000) < predicted["high"]
    assert predicted["high"] - predicted["low"] < 0.02


def test_the_range_of_the_prediction_is_hit() -> None:
    """Nine of ten medians of three more runs lie in it, for a law with noise: of 60 such experiments at least 46.

    The deviations of 12 runs are all that is known of the noise. A binomial with p = 0.9 is below 46 in 0.05 % of
    cases, with p = 0.7, about that of the law's range alone, in 85 %.
    """
    law, sizes = scaling_report.Law(2.5, 40.0, 0.31), [40824, 63344, 90792, 123168]
    hits = 0
    for experiment in range(60):
        random = np.random.default_rng(experiment)

        def noisy(size: int, random: np.random.Generator = random) -> float:
            return law.at(size) + 0.004 * random.normal()

        parts = [
            {"part": f"width_{size}", "seed": seed, "active": size, "validation": noisy(size)}
            for size in sizes
            for seed in range(3)
        ]
        results = {"parts": parts, "settings": {"size": {"widths": sizes}}}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scaling_report, "DRAWS", 300)
            predicted = scaling_report.predict(results, 202704)
        hits += predicted["low"] <= np.median([noisy(202704) for _ in range(3)]) <= predicted["high"]
    assert hits >= 46
