"""The train step against its equations, written out on the model's own logits, in float64.

Bounds: both sides compute in float64, whose rounding is 1e-16; sums of some thousand terms leave 1e-12.
"""

import copy
import math
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from trinity import balancing
from trinity.config.load import OmegaConf, build_config
from trinity.config.run import RunConfig
from trinity.data.stream.collate import PADDING_ID, Batch
from trinity.models import ZOO, Trinity
from trinity.models.attention_backends import AttentionMask
from trinity.models.trinity import moe_layers
from trinity.optim.grad_clip import global_norm
from trinity.parallel import mesh
from trinity.training.build import build_model, make_optimizers
from trinity.training.build_data import open_data
from trinity.training.divisibility import microbatch_size
from trinity.training.train_step import StepResult, train_step

BOUND = 1e-12


@pytest.fixture
def ranks() -> Iterator[mesh.Ranks]:
    """This process as a mesh of one."""
    from trinity.config.run import ParallelConfig

    yield mesh.start(ParallelConfig(), ZOO["smoke"], 1, False)
    mesh.stop()


def in_float64(settings: dict, **changes: object) -> RunConfig:
    """The config in float64, with dotted changes."""
    settings = copy.deepcopy(settings)
    settings["precision"] = {"compute": "float64"}
    settings["optim"]["muon"]["dtype"] = "float64"
    words = [f"{key}={value}" for key, value in changes.items()]
    return build_config([("test", OmegaConf.create(settings)), ("test", OmegaConf.from_dotlist(words))])


def start(config: RunConfig, ranks: mesh.Ranks) -> SimpleNamespace:
    """Model, optimizers and a batch with uneven numbers of valid targets."""
    model = build_model(config, ranks)
    model.init_weights(config.run.seed)
    optimizers = make_optimizers(config, model)
    batch = open_data(config, ranks).loader.take(config.batch.sequences)
    batch.targets_BS[0, :11] = -100
    run = SimpleNamespace(gradients={}, config=config, model=model, optimizers=optimizers, batch=batch, ranks=ranks)
    step = optimizers.step

    def watched() -> None:
        run.gradients = {name: whole(p.grad).clone() for name, p in model.named_parameters()}
        step()

    optimizers.step = watched
    return run


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def take_step(run: SimpleNamespace, rate: float = 1.0) -> StepResult:
    return train_step(run.model, run.optimizers, run.batch, run.config, rate, run.ranks)


def trained_tensors(run: SimpleNamespace) -> dict[str, torch.Tensor]:
    """Every tensor that a step may change."""
    state = {name: whole(tensor).clone() for name, tensor in run.model.state_dict().items()}
    return state | {name: whole(tensor).clone() for name, tensor in run.optimizers.state_dict().items()}


def test_loss_is_the_equation_on_the_logits(settings: dict, ranks: mesh.Ranks) -> None:
    """Loss, z-loss and BatchHet from whole logits; the gradient of their sum and the sequence loss by autograd."""
    run = start(in_float64(settings, **{"optim.clip_norm": 0}), ranks)
    batch, config = run.batch, run.config
    other = Trinity(config.model).double()
    other.init_weights(config.run.seed)
    logits = other(batch.tokens_BS, document_ids_BS=batch.document_ids_BS)
    valid = batch.targets_BS != -100
    ce = F.cross_entropy(logits.flatten(0, 1), batch.targets_BS.flatten(), reduction="none").view_as(valid)
    lse = torch.logsumexp(logits, dim=-1)[valid]
    row_losses = ce.sum(dim=1) / valid.sum(dim=1)
    aux = other(batch.tokens_BS, document_ids_BS=batch.document_ids_BS, targets_BS=batch.targets_BS).sequence_loss_B
    total = ce[valid].mean() + config.loss.z * lse.square().mean() + config.balancing.sequence_loss * aux.mean()
    total.backward()

    metrics = take_step(run).metrics
    assert metrics["loss"] == pytest.approx(ce[valid].mean().item(), rel=BOUND)
    assert metrics["z_loss"] == pytest.approx(config.loss.z * lse.square().mean().item(), rel=BOUND)
    assert metrics["sequence_loss"] == pytest.approx(config.balancing.sequence_loss * aux.mean().item(), rel=BOUND)
    assert metrics["batch_het"] == pytest.approx((row_losses.max() - row_losses.mean()).item(), rel=1e-9)
    assert metrics["max_head_logit"] == pytest.approx(logits.max().item(), rel=BOUND)
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(run.gradients[name], parameter.grad, rtol=1e-9, atol=BOUND)


def test_without_weight_the_sequence_loss_is_not_computed(settings: dict, ranks: mesh.Ranks) -> None:
    """With α = 0 the model computes none, the metric is 0, and gradients are those of the other losses."""
    run = start(in_float64(settings, **{"balancing.sequence_loss": 0, "optim.clip_norm": 0}), ranks)
    batch, config = run.batch, run.config
    asked = []
    run.model.blocks[1].ffn.register_forward_hook(lambda module, args, output: asked.append(output[1].sequence_loss_B))
    metrics = take_step(run).metrics
    assert metrics["sequence_loss"] == 0.0
    assert asked
    assert all(loss is None for loss in asked)

    other = Trinity(config.model).double()
    other.init_weights(config.run.seed)
    losses = other(batch.tokens_BS, document_ids_BS=batch.document_ids_BS, targets_BS=batch.targets_BS, z=config.loss.z)
    (losses.token_loss / (batch.targets_BS != -100).sum()).backward()
    assert losses.sequence_loss_B is not None
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(run.gradients[name], parameter.grad, rtol=1e-9, atol=BOUND)


@pytest.mark.parametrize("microbatch", [1, 2, 3])
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_microbatches_and_recompute_change_nothing(
    settings: dict, ranks: mesh.Ranks, microbatch: int, recompute: str
) -> None:
    """Raw gradients, counts (through the biases), metrics and weights after a step, against one whole microbatch."""
    reference = start(in_float64(settings, **{"batch.microbatch": 6}), ranks)
    run = start(in_float64(settings, **{"batch.microbatch": microbatch, "recompute": recompute}), ranks)
    expected, metrics = take_step(reference).metrics, take_step(run).metrics
    for name, gradient in reference.gradients.items():
        torch.testing.assert_close(run.gradients[name], gradient, rtol=1e-9, atol=BOUND)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-9), name
    state = trained_tensors(run)
    for name, tensor in trained_tensors(reference).items():
        # Newton-Schulz amplifies rounding by its steepest slope, about 500, on each weight
        torch.testing.assert_close(state[name], tensor, rtol=1e-8, atol=1e-9, msg=name)


def as_fine_tuning(batch: Batch, weighted: bool) -> list[tuple[int, torch.Tensor]]:
    """Turn a batch into rows of examples: some tokens at the end are padding, and two thirds of the rest are prompts.

    Returns:
        row and places [S] of the targets of each example.
    """
    B, S = batch.tokens_BS.shape
    batch.document_ids_BS = torch.arange(S).div(7, rounding_mode="floor").repeat(B, 1).int()
    batch.document_ids_BS[torch.arange(S) >= S - torch.arange(B).unsqueeze(1) % 5] = PADDING_ID
    batch.targets_BS[(batch.document_ids_BS == PADDING_ID) | (torch.arange(S) * 5 % 7 < 4)] = -100
    examples = []
    weights_BS = torch.zeros(B, S)
    for b in range(B):
        for document in range(-(-S // 7)):
            places_S = (batch.document_ids_BS[b] == document) & (batch.targets_BS[b] != -100)
            if places_S.any():
                examples.append((b, places_S))
                weights_BS[b, places_S] = 1 / places_S.sum()
    batch.weights_BS = weights_BS if weighted else None
    return examples


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("microbatch", [1, 3])
def test_fine_tuning_loss(settings: dict, ranks: mesh.Ranks, microbatch: int, weighted: bool) -> None:
    """The mean over trained tokens, or with weights the mean over examples of each example's mean, from whole logits.

    fp32 weights 1/n round by 6e-8; so does a mean with them. Metrics are of the same means; balancing is by the tokens
    that are not padding.
    """
    run = start(in_float64(settings, **{"batch.microbatch": microbatch, "optim.clip_norm": 0}), ranks)
    config, batch, bound = run.config, run.batch, 1e-7 if weighted else BOUND
    examples = as_fine_tuning(batch, weighted)
    assert len({int(places_S.sum()) for _, places_S in examples}) > 1
    other = Trinity(config.model).double()
    other.init_weights(config.run.seed)
    logits = other(batch.tokens_BS, document_ids_BS=batch.document_ids_BS)
    losses = other(batch.tokens_BS, document_ids_BS=batch.document_ids_BS, targets_BS=batch.targets_BS)
    ce = F.cross_entropy(logits.flatten(0, 1), batch.targets_BS.flatten(), reduction="none").view_as(batch.targets_BS)
    lse_square = torch.logsumexp(logits, dim=-1).square()
    if weighted:
        mean = lambda x: sum(x[b][places_S].mean() for b, places_S in examples) / len(examples)  # noqa: E731
    else:
        mean = lambda x: x[batch.targets_BS != -100].mean()  # noqa: E731
    total = mean(ce) + config.loss.z * mean(lse_square)
    (total + config.balancing.sequence_loss * losses.sequence_loss_B.mean()).backward()

    result = take_step(run)
    metrics, trained_BS, real_BS = result.metrics, batch.targets_BS != -100, batch.document_ids_BS != PADDING_ID
    assert metrics["loss"] == pytest.approx(mean(ce).item(), rel=bound)
    assert metrics["z_loss"] == pytest.approx(config.loss.z * mean(lse_square).item(), rel=bound)
    assert metrics["max_head_logit"] == pytest.approx(logits.amax(dim=-1)[trained_BS].max().item(), rel=BOUND)
    assert metrics["router_entropy"] == pytest.approx((losses.entropy_M / real_BS.sum()).mean().item(), rel=BOUND)
    assert torch.equal(result.counts_ME, losses.counts_ME)
    assert result.counts_ME.sum(dim=1).tolist() == [2 * int(real_BS.sum())] * 2
    largest = max(parameter.grad.abs().max() for parameter in other.parameters())
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(run.gradients[name], parameter.grad, rtol=0, atol=bound * largest.item(), msg=name)


def test_batch_het_of_weighted_rows(settings: dict, ranks: mesh.Ranks) -> None:
    """The loss of a row is the mean over its examples."""
    run = start(in_float64(settings), ranks)
    examples = as_fine_tuning(run.batch, True)
    other = Trinity(run.config.model).double()
    other.init_weights(run.config.run.seed)
    ce_BS = other(run.batch.tokens_BS, document_ids_BS=run.batch.document_ids_BS, targets_BS=run.batch.targets_BS).ce_BS
    rows = [[ce_BS[b][places_S].mean().item() for b, places_S in examples if b == row] for row in range(len(ce_BS))]
    means = torch.tensor([sum(row) / len(row) for row in rows], dtype=torch.float64)
    assert take_step(run).metrics["batch_het"] == pytest.approx((means.max() - means.mean()).item(), rel=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_batch_without_targets(settings: dict, ranks: mesh.Ranks, weighted: bool) -> None:
    """A microbatch, and a whole batch, of prompts or padding alone: no NaN; the loss of the batch is 0."""
    run = start(in_float64(settings, **{"batch.microbatch": 1}), ranks)
    as_fine_tuning(run.batch, weighted)
    run.batch.targets_BS[1] = -100
    run.batch.document_ids_BS[2], run.batch.targets_BS[2] = PADDING_ID, -100
    metrics = take_step(run).metrics
    assert not metrics["skipped"]
    assert all(math.isfinite(value) for value in metrics.values())
    run.batch.targets_BS.fill_(-100)
    metrics = take_step(run).metrics
    assert (metrics["loss"], metrics["z_loss"], metrics["skipped"]) == (0.0, 0.0, False)
    assert all(math.isfinite(value) for value in metrics.values())


def test_pretraining_computes_the_head_for_all_tokens(
    settings: dict, ranks: mesh.Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest logit is of all tokens, an ignored one among them, while three quarters at least are trained."""
    run, calls = start(in_float64(settings), ranks), []
    run.model.register_forward_pre_hook(lambda _, __, options: calls.append(options["trained"]), with_kwargs=True)
    take_step(run)
    trained = int((run.batch.targets_BS != -100).sum())
    assert trained > 0.75 * run.batch.targets_BS.numel()
    assert set(calls) == {None}
    run.batch.targets_BS[:, ::2] = -100
    calls.clear()
    take_step(run)
    assert sum(calls) == (run.batch.targets_BS != -100).sum()


def test_attention_gets_the_number_of_documents(
    settings: dict, ranks: mesh.Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted on the host, so that the device's boundaries of documents are the counted ones, then empty documents."""
    masks = []

    class Recorded(AttentionMask):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            masks.append(self)

    monkeypatch.setattr("trinity.models.trinity.AttentionMask", Recorded)
    run = start(in_float64(settings, **{"batch.microbatch": 2}), ranks)
    run.batch.document_ids_BS[1, 7:] += 100  # two documents at least in a row
    take_step(run)
    assert len(masks) == 3
    assert sum(len(mask.document_ids_BS.unique()) > 1 for mask in masks)
    for mask in masks:
        bounded, _ = mask.cu_seqlens(2)
        counted, S = AttentionMask(mask.positions_BS, mask.document_ids_BS).cu_seqlens(2)
        assert len(counted) - 1 <= mask.most_documents
        assert bounded.tolist() == counted.tolist() + [2 * S] * (len(bounded) - len(counted))


def test_clip_and_rates(settings: dict, ranks: mesh.Ranks) -> None:
    """The norm is of the raw gradients, what the optimizers see has the clipped norm, and rates are peak × fraction."""
    run = start(in_float64(settings, **{"optim.clip_norm": 0.01}), ranks)
    metrics = take_step(run, rate=0.25).metrics
    assert metrics["grad_norm"] > 0.01
    assert global_norm(run.gradients.values()).item() == pytest.approx(0.01, rel=BOUND)
    assert metrics["lr_muon"] == 0.25 * 0.02
    assert run.optimizers.muon.param_groups[0]["lr"] == 0.25 * 0.02
    assert {group["lr"] for group in run.optimizers.adamw.param_groups} == {0.25 * 0.01}


@pytest.mark.parametrize("kind", ["smebu", "sign", "none"])
def test_balancing_after_the_step(settings: dict, ranks: mesh.Ranks, kind: str) -> None:
    """Each layer's bias moves once, by the counts of the whole batch, which another forward pass gives here."""
    run = start(in_float64(settings, **{"balancing.kind": kind}), ranks)
    batch, balance = run.batch, run.config.balancing
    counts = run.model(batch.tokens_BS, document_ids_BS=batch.document_ids_BS, targets_BS=batch.targets_BS).counts_ME
    assert counts.sum(dim=1).tolist() == [batch.tokens_BS.numel() * 2] * 2
    take_step(run)
    for layer, count_E in zip(moe_layers(run.model), counts):
        bias = momentum = torch.zeros(8, dtype=torch.float64)
        if kind == "smebu":
            bias, momentum = balancing.smebu_update(bias, momentum, count_E, balance.rate, balance.kappa, balance.beta)
        elif kind == "sign":
            bias = balancing.sign_update(bias, count_E, balance.gamma)
        torch.testing.assert_close(layer.expert_bias, bias, rtol=0, atol=BOUND)
        torch.testing.assert_close(layer.expert_momentum, momentum, rtol=0, atol=BOUND)


@pytest.mark.parametrize("where", ["weight", "gradient"])
def test_a_bad_step_changes_nothing(settings: dict, ranks: mesh.Ranks, where: str) -> None:
    """A loss or only a gradient that is not finite: the step is marked and every tensor stays bit for bit."""
    run = start(in_float64(settings), ranks)
    take_step(run)
    if where == "weight":
        with torch.no_grad():
            run.model.norm.gain.fill_(math.inf)
    else:
        run.model.embed.weight.register_post_accumulate_grad_hook(lambda p: p.grad.to_local().fill_(math.nan))
    before = trained_tensors(run)
    result = take_step(run)
    assert (result.metrics["skipped"], result.skip_reason) == (True, "not finite")
    assert all(parameter.grad is None for parameter in run.model.parameters())
    for name, tensor in trained_tensors(run).items():
        assert torch.equal(tensor, before[name]), name


def test_dtypes_inside_a_bf16_block(settings: dict, ranks: mesh.Ranks) -> None:
    """Matrices multiply in bf16; gains, router, scores and balancing state are fp32, and so are all gradients."""
    settings["precision"] = {"compute": "bfloat16"}
    config = build_config([("test", OmegaConf.create(settings))])
    run = start(config, ranks)
    block, dtypes = run.model.blocks[2], {}

    def note(name: str, module: torch.nn.Module) -> None:
        def before(module: torch.nn.Module, inputs: tuple) -> None:  # after FSDP has gathered, before it frees
            weights[name] = {key: p.dtype for key, p in module.named_parameters(recurse=False)}

        def after(module: torch.nn.Module, inputs: tuple, output: object) -> None:
            first = output[0] if isinstance(output, tuple) else output
            dtypes[name] = (first.dtype, weights[name])

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    weights: dict[str, dict[str, torch.dtype]] = {}
    parts = {"norm": block.ffn_norm, "router": block.ffn.router, "experts": block.ffn.experts}
    for name, module in (parts | {"qkvg": block.attention.qkvg, "q_norm": block.attention.q_norm}).items():
        note(name, module)
    take_step(run)
    bf16, fp32 = torch.bfloat16, torch.float32
    assert dtypes["norm"] == (bf16, {"gain": fp32})
    assert dtypes["q_norm"] == (bf16, {"gain": fp32})
    assert dtypes["router"] == (fp32, {"weight": fp32})
    assert dtypes["experts"] == (bf16, {"gate_up": bf16, "down": bf16})
    assert dtypes["qkvg"] == (bf16, {"weight": bf16})
    assert block.ffn.expert_bias.dtype == fp32
    assert {gradient.dtype for gradient in run.gradients.values()} == {fp32}


def test_microbatch_is_the_largest_divisor() -> None:
    """12 rows with at most 5 at once go in fours."""
    assert [microbatch_size(12, most) for most in (1, 4, 5, 12, 99)] == [1, 4, 4, 12, 12]
