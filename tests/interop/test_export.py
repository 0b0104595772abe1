"""An exported folder equals what transformers writes, and transformers computes the same logits from it."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.interop.small_model import make_model
from trinity.config.run import PrecisionConfig
from trinity.errors import UserError
from trinity.evaluation.lm_eval import _check_tokenizer
from trinity.evaluation.samples import Sampler
from trinity.interop import export_hf
from trinity.interop.verify import largest_logit_difference
from trinity.interop.weight_map import weight_map
from trinity.models import Trinity
from trinity.parallel.fsdp import shard_model
from trinity.parallel.mesh import Ranks
from trinity.terminal import Progress


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder by name."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    return tensors


def forms_in(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors_in(folder).items()}


def test_table_of_names_covers_every_number_once(model: Trinity) -> None:
    counted = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    for _, parameter, index in weight_map(model.config):
        counted[parameter][index] += 1
    for name, count in counted.items():
        assert (count == (0 if name.endswith("expert_momentum") else 1)).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_computes_the_same(model: Trinity, tmp_path: Path, tokens: Tensor, dtype: torch.dtype) -> None:
    """Both in fp32, also with weights rounded to bf16; bound as in test_transformers_equality."""
    folder = export_hf(model, tmp_path / "out", dtype=dtype)
    agreement = largest_logit_difference(folder, folder, tokens)
    assert agreement.difference < 3e-5 * agreement.largest
    with torch.no_grad():
        expected = model(tokens).abs().max().item()
    assert agreement.largest == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 0.05)


def test_progress_counts_every_byte(model: Trinity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One update per tensor, up to the bytes in the files without their headers."""
    updates: list[float] = []
    update = Progress.update_to
    monkeypatch.setattr(Progress, "update_to", lambda self, done: (updates.append(done), update(self, done)))
    tensors = tensors_in(export_hf(model, tmp_path / "out", dtype=torch.float32, progress=True))
    assert len(updates) == len(tensors)
    assert updates[-1] == sum(tensor.nbytes for tensor in tensors.values())


def test_several_files_and_one_hold_the_same(model: Trinity, exported: Path, tmp_path: Path, tokens: Tensor) -> None:
    one = export_hf(model, tmp_path / "one", dtype=torch.float32)
    assert [path.name for path in one.glob("*.safetensors*")] == ["model.safetensors"]
    several, single = tensors_in(exported), tensors_in(one)
    assert several.keys() == single.keys()
    assert all(torch.equal(several[name], single[name]) for name in single)
    assert largest_logit_difference(model, exported, tokens).difference < 3e-5


def test_files_and_index(exported: Path) -> None:
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in exported.glob("*.safetensors"))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) > 5
    parts = {name: tensors_in_file(exported / name) for name in files}
    assert index["weight_map"] == {tensor: name for name, content in parts.items() for tensor in content}
    file_bytes = [sum(tensor.nbytes for tensor in content.values()) for content in parts.values()]
    assert all(size <= 20_000 or len(content) == 1 for size, content in zip(file_bytes, parts.values()))
    assert all(some + more > 20_000 for some, more in pairwise(file_bytes)), "no two files fit into one"
    assert max(file_bytes) > 20_000, "the embedding is larger than a file may be, and has one of its own"
    count = sum(tensor.numel() for content in parts.values() for tensor in content.values())
    assert index["metadata"] == {"total_parameters": count, "total_size": sum(file_bytes)}


def tensors_in_file(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)


def test_names_shapes_and_formats_are_those_of_transformers(exported: Path, tmp_path: Path) -> None:
    hf_model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    hf_model.save_pretrained(tmp_path / "transformers")
    assert forms_in(tmp_path / "transformers") == forms_in(exported)
    saved, original = tensors_in(tmp_path / "transformers"), tensors_in(exported)
    assert all(torch.equal(saved[name], original[name]) for name in saved)


def test_router_gains_and_bias_stay_in_fp32(model: Trinity, exported: Path, tmp_path: Path) -> None:
    """In a bf16 export they are bit-equal to fp32; matrices are rounded once."""
    rounded, exact = tensors_in(export_hf(model, tmp_path / "bf16")), tensors_in(exported)
    wide = {name for name in exact if name.endswith(("norm.weight", "router.gate.weight", "expert_bias"))}
    expected = {name: tensor if name in wide else tensor.bfloat16() for name, tensor in exact.items()}
    assert expected.keys() == rounded.keys()
    for name, tensor in expected.items():
        assert rounded[name].dtype == tensor.dtype, name
        assert torch.equal(rounded[name], tensor), name


def test_tokenizer_is_copied(model: Trinity, tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = export_hf(model, tmp_path / "out", tokenizer_folder)
    text = "the rain 1234567"
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(tokenizer_folder)(text)["input_ids"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, 1, 2)
    assert config["bos_token_id"] == ids[0]
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.bos_token_id == 0
    assert generation.eos_token_id == [1, 0], "the next document's beginning ends a text too"


def test_a_token_id_beyond_the_vocabulary(tmp_path: Path, tokenizer_folder: Path) -> None:
    """281 tokens with the largest id 300 do not fit 300 rows but 301. Sampling and lm-eval refuse them too."""
    value = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    value["model"]["vocab"]["<|gap|>"] = 300
    value["added_tokens"].append(value["added_tokens"][0] | {"id": 300, "content": "<|gap|>"})
    gap = tmp_path / "gap"
    gap.mkdir()
    (gap / "tokenizer.json").write_text(json.dumps(value))
    words = r"token ids up to 300, but model\.vocab_size is 300"
    with pytest.raises(UserError, match=words):
        export_hf(make_model(vocab_size=300), tmp_path / "out", gap)
    with pytest.raises(UserError, match=words):
        Sampler(["a"], 1, gap, 300)
    export_hf(make_model(vocab_size=301), tmp_path / "out", gap)
    _check_tokenizer(tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 300}))
    with pytest.raises(UserError, match=words):
        _check_tokenizer(tmp_path / "out")


def test_tokenizer_that_does_not_fit(tmp_path: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(UserError, match=r"ids up to 279, but model\.vocab_size is 270"):
        export_hf(make_model(vocab_size=270), tmp_path / "out", tokenizer_folder)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        export_hf(make_model(), tmp_path / "out", tmp_path)
    assert not any(tmp_path.iterdir()), "nothing was begun"


def test_an_earlier_export_is_replaced_on_demand_only(exported: Path) -> None:
    other = make_model(layers=3)
    before = tensors_in(exported)
    with pytest.raises(UserError, match="holds an earlier export"):
        export_hf(other, exported)
    assert tensors_in(exported).keys() == before.keys()
    export_hf(other, exported, overwrite=True)
    assert {name.split(".")[2] for name in tensors_in(exported) if ".layers." in name} == {"0", "1", "2"}
    assert [path.name for path in exported.parent.iterdir()] == [exported.name], "nothing is left beside it"


@pytest.mark.parametrize("content", ["something.txt", "config.json", "a folder in an export", "a file"])
def test_anything_else_is_never_replaced(model: Trinity, exported: Path, content: str) -> None:
    folder = exported.parent / "taken"
    if content == "a folder in an export":
        exported.rename(folder)
        (folder / "mine").mkdir()
    elif content == "a file":
        folder.write_text("mine")
    else:
        folder.mkdir()
        (folder / content).write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="is not an earlier export"):
        export_hf(model, folder, overwrite=True)
    assert folder.is_file() or {path.name for path in folder.iterdir()} & {content, "mine"}


def test_an_interrupted_export_is_replaced(model: Trinity, tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model-00001-of-00009.safetensors").write_text("half")
    (tmp_path / "out").mkdir()  # an empty folder holds nothing to lose
    export_hf(model, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors"
    }  # fmt: skip


@pytest.mark.parametrize("as_in_training", [True, False])
def test_sharded_model_after_a_forward(ranks: Ranks, exported: Path, tokens: Tensor, as_in_training: bool) -> None:
    """Bit-equal to the fp32 weights, although after a forward FSDP2 shows gathered ones in bf16."""
    sharded = make_model()
    if as_in_training:
        shard_model(sharded, ranks, PrecisionConfig(compute="bfloat16"))
    else:
        fully_shard(sharded, mesh=ranks.dense, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with torch.no_grad():
        sharded(tokens)
    assert sharded.head.weight.dtype == torch.bfloat16
    export_hf(sharded, exported.parent / "sharded", dtype=torch.float32)
    tensors, expected = tensors_in(exported.parent / "sharded"), tensors_in(exported)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
