"""Trinity equals transformers' AfMoE: same experts, logits and gradients, over configs that differ in every field.

Both run in fp32 and add the same numbers in another order, so results differ by a few units of 2⁻²⁴ per sum, and sums
follow each other through the layers: 3e-5 of the largest value is five times the measured error. A wrong equation shows
at 1e-2 and more. One flipped expert would too, without anything being wrong; so the experts are compared first.

Weights and config are carried over here by hand, not through trinity.interop.export, which has its own tests.

Shapes: B batch, S sequence, V vocabulary, T tokens, K active experts.
"""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AfmoeConfig, AfmoeForCausalLM

from trinity.interop.weight_map import weight_map
from trinity.models import ModelConfig, Trinity

BOUND = 3e-5
SMALL = {
    "vocab_size": 61, "width": 24, "layers": 5, "dense_layers": 1, "dense_width": 40, "heads": 4, "kv_heads": 2,
    "head_dim": 8, "window": 7, "experts": 6, "active_experts": 2, "expert_width": 16,
}  # fmt: skip
SEQUENCE = 19


def random_config(seed: int) -> dict:
    """Any sizes that fit together; h_q·d_h is the width only by chance."""
    pick = random.Random(seed)
    kv_heads, experts, layers = pick.choice((1, 2, 3)), pick.randint(2, 9), pick.randint(1, 7)
    return {
        "vocab_size": pick.randint(17, 80),
        "width": 2 * pick.randint(4, 20),
        "layers": layers,
        "dense_layers": pick.randint(0, layers),
        "dense_width": pick.randint(3, 50),
        "heads": kv_heads * pick.randint(1, 3),
        "kv_heads": kv_heads,
        "head_dim": 2 * pick.randint(2, 8),
        "window": pick.randint(1, 2 * SEQUENCE),
        "global_every": pick.randint(1, 4),
        "experts": experts,
        "active_experts": pick.randint(1, experts),
        "shared_experts": pick.randint(1, 3),
        "expert_width": pick.randint(3, 30),
        "route_scale": pick.uniform(0.5, 3.0),
        "rope_theta": pick.choice((100.0, 10_000.0)),
        "norm_eps": pick.choice((1e-6, 1e-3)),
    }


CONFIGS = {
    "small": SMALL,
    "odd number of layers, three dense": SMALL | {"layers": 7, "dense_layers": 3},
    "attention wider than the model": SMALL | {"heads": 6, "head_dim": 16},
    "window of the token alone": SMALL | {"window": 1},
    "window longer than the sequence": SMALL | {"window": 100},
    "every expert active": SMALL | {"active_experts": 6},
    "one expert": SMALL | {"experts": 1, "active_experts": 1},
    "only dense": SMALL | {"dense_layers": 5},
    **{f"random {seed}": random_config(seed) for seed in range(6)},
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def models(request: pytest.FixtureRequest) -> tuple[Trinity, AfmoeForCausalLM]:
    """Trinity and transformers' model with the same weights."""
    return make_pair(ModelConfig(**request.param))


def make_pair(config: ModelConfig) -> tuple[Trinity, AfmoeForCausalLM]:
    model = Trinity(config)
    model.init_weights(3)
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gain"):  # all equal, a gain taken for another would not show
                parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))
        for block in model.blocks:
            if block.sparse:  # wide enough to decide many of the choices
                block.ffn.expert_bias.uniform_(-0.3, 0.3)
    hf_model = AfmoeForCausalLM(hf_config(config))
    hf_model.load_state_dict(fused(model.state_dict(), config))
    return model, hf_model


def hf_config(config: ModelConfig) -> AfmoeConfig:
    return AfmoeConfig(
        vocab_size=config.vocab_size, hidden_size=config.width, intermediate_size=config.dense_width,
        moe_intermediate_size=config.expert_width, num_hidden_layers=config.layers,
        num_dense_layers=config.dense_layers, num_attention_heads=config.heads, num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim, rms_norm_eps=config.norm_eps, sliding_window=config.window,
        num_experts=config.experts, num_experts_per_tok=config.active_experts,
        num_shared_experts=config.shared_experts, route_scale=config.route_scale,
        global_attn_every_n_layers=config.global_every, mup_enabled=True,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        attn_implementation="eager", experts_implementation="eager",
    )  # fmt: skip


def fused(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Tensors by Trinity's names → by transformers' in-memory names, where a layer's experts are two tensors."""
    renamed = {}
    for name, model, index in weight_map(config):
        if model in tensors and ".experts." not in name:
            renamed[name] = tensors[model][index]
    for layer in range(config.dense_layers, config.layers):
        experts = f"model.layers.{layer}.mlp.experts"
        renamed[f"{experts}.gate_up_proj"] = tensors[f"blocks.{layer}.ffn.experts.gate_up"].flatten(1, 2)
        renamed[f"{experts}.down_proj"] = tensors[f"blocks.{layer}.ffn.experts.down"]
    return renamed


def record_choices(model: Trinity, hf_model: AfmoeForCausalLM) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Record the experts that each MoE layer of both models chooses from now on, [T, K]."""
    records = []
    for block, layer in zip(model.blocks, hf_model.model.layers):
        if block.sparse:
            chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
            # (gates, scores, indices, counts) and (logits, gates, indices)
            block.ffn.router.register_forward_hook(lambda *call, to=chosen[0]: to.append(call[-1][2]))
            layer.mlp.router.register_forward_hook(lambda *call, to=chosen[1]: to.append(call[-1][2]))
            records.append(chosen)
    return records


def assert_same_choices(records: list[tuple[list[Tensor], list[Tensor]]]) -> None:
    for model, hf_model in records:
        assert torch.equal(torch.cat(model).sort().values, torch.cat(hf_model).sort().values)


def random_tokens(config: ModelConfig) -> Tensor:
    return torch.randint(config.vocab_size, (2, SEQUENCE), generator=torch.Generator().manual_seed(5))


def distance(actual: Tensor, reference: Tensor) -> float:
    """Largest difference, as a fraction of the largest value."""
    return ((actual - reference).abs().max() / reference.abs().max()).item()


def test_logits_and_gradients(models: tuple[Trinity, AfmoeForCausalLM]) -> None:
    """Every parameter's gradient of cross-entropy with z-loss, router, gains and experts among them."""
    model, hf_model = models
    tokens_BS, records, z = random_tokens(model.config), record_choices(model, hf_model), 0.01
    logits_BSV = hf_model(tokens_BS).logits
    assert distance(model(tokens_BS), logits_BSV) < BOUND
    assert_same_choices(records)

    targets_BS = tokens_BS.roll(-1, 1)
    model(tokens_BS, targets_BS=targets_BS, z=z).token_loss.backward()
    hf_loss = F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), reduction="sum")
    (hf_loss + z * logits_BSV.logsumexp(-1).square().sum()).backward()
    got = fused({name: parameter.grad for name, parameter in model.named_parameters()}, model.config)
    expected = {name: parameter.grad for name, parameter in hf_model.named_parameters() if parameter.requires_grad}
    assert got.keys() == expected.keys()
    # where terms cancel to 0 (queries that see one key; the gate of one active expert), rounding is all that is left
    noise = 1e-6 * max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (got[name] - gradient).abs().max() < BOUND * gradient.abs().max() + noise, name


def test_packed_documents_are_separate_documents() -> None:
    """A packed row with document ids gives the logits that transformers gives for each document alone.

    The window (7) is shorter than some documents and longer than others. Positions run on through the row, so RoPE's
    angles are other fp32 numbers than those of a document that starts at 0; their differences are the same to 1e-6.
    """
    model, hf_model = make_pair(ModelConfig(**SMALL))
    lengths = [[1, 12, 6], [9, 10]]
    tokens_BS, records = random_tokens(model.config), record_choices(model, hf_model)
    ids_BS = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])
    packed_BSV = model(tokens_BS, document_ids_BS=ids_BS)
    alone = [
        hf_model(document.unsqueeze(0)).logits[0]
        for row, row_lengths in zip(tokens_BS, lengths)
        for document in row.split(row_lengths)
    ]
    assert_same_choices(records)
    assert distance(packed_BSV.flatten(0, 1), torch.cat(alone)) < BOUND
    assert distance(model(tokens_BS).flatten(0, 1), torch.cat(alone)) > 1e-2, "without ids attention must cross"


def test_fine_tuning_loss() -> None:
    """One packed row of three examples with padding, against a batch of padded examples with transformers' own loss.

    The mean over the trained tokens to 1e-6, and every gradient. Two thirds of the labels are −100, as of a prompt.
    """
    model, hf_model = make_pair(ModelConfig(**SMALL))
    lengths, S = [7, 4, 5], SEQUENCE
    random = torch.Generator().manual_seed(6)
    documents = [torch.randint(model.config.vocab_size, (length,), generator=random) for length in lengths]
    labels = [document.where(torch.arange(len(document)) >= len(document) * 2 // 3, -100) for document in documents]
    tokens_BS = F.pad(torch.cat(documents), (0, S - sum(lengths))).unsqueeze(0)
    targets_BS = F.pad(torch.cat([F.pad(x[1:], (0, 1), value=-100) for x in labels]), (0, S - sum(lengths)), value=-100)
    ids_BS = torch.tensor([*range(3), -1]).repeat_interleave(torch.tensor([*lengths, S - sum(lengths)])).unsqueeze(0)

    pad = torch.nn.utils.rnn.pad_sequence
    hf_loss = hf_model(
        input_ids=pad(documents, batch_first=True),
        attention_mask=pad([torch.ones_like(document) for document in documents], batch_first=True),
        labels=pad(labels, batch_first=True, padding_value=-100),
    ).loss
    loss = model.loss(tokens_BS, targets_BS.unsqueeze(0), ids_BS)
    assert abs(loss.item() / hf_loss.item() - 1) < 1e-6
    loss.backward()
    hf_loss.backward()
    got = fused({name: parameter.grad for name, parameter in model.named_parameters()}, model.config)
    expected = {name: parameter.grad for name, parameter in hf_model.named_parameters() if parameter.requires_grad}
    noise = 1e-6 * max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (got[name] - gradient).abs().max() < BOUND * gradient.abs().max() + noise, name
