"""A folder loads bit for bit as written, on any sharding; an invalid folder is refused by name."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.interop.small_model import make_model
from trinity.checkpoint.directory import CheckpointDirectory
from trinity.checkpoint.load import model_state
from trinity.checkpoint.save import save
from trinity.config.load import save_config
from trinity.config.run import RunConfig, RunSection
from trinity.errors import UserError
from trinity.interop import export_hf, load_hf
from trinity.models import Trinity, parameter_roles
from trinity.models import trinity as trinity_module
from trinity.parallel.mesh import Ranks
from trinity.training.load_run import load_model


def expected_state(model: Trinity) -> dict[str, torch.Tensor]:
    """The model's state, with expert_momentum 0: a folder does not hold it."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return state | {name: torch.zeros_like(t) for name, t in state.items() if name.endswith("expert_momentum")}


def assert_equal(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


def test_fp32_comes_back_bit_for_bit(model: Trinity, exported: Path) -> None:
    loaded = load_hf(exported)
    assert loaded.config == model.config
    assert_equal(loaded.state_dict(), expected_state(model))


def test_bf16_comes_back_rounded_once(model: Trinity, tmp_path: Path) -> None:
    """Gains, routers and bias come back exactly; a model in bf16 keeps them in fp32 too."""
    folder = export_hf(model, tmp_path / "bf16", dtype=torch.bfloat16)
    rounded = [role.name for role in parameter_roles(model) if role.kind not in ("gain", "router")]
    exact = expected_state(model)
    assert len(rounded) > 20
    in_bf16 = exact | {name: exact[name].bfloat16() for name in rounded}
    assert_equal(load_hf(folder, dtype=torch.bfloat16).state_dict(), in_bf16)
    assert_equal(load_hf(folder).state_dict(), {name: tensor.float() for name, tensor in in_bf16.items()})


def test_a_model_that_is_loaded_is_not_initialised(
    model: Trinity, exported: Path, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a folder or a run's checkpoint: initialising would take a minute for each billion parameters."""
    save_config(RunConfig(run=RunSection(steps=1), model=model.config), tmp_path / "config.yaml")
    save(model_state(model), CheckpointDirectory.at(tmp_path), 1, keep=1)
    monkeypatch.setattr(trinity_module, "initialize", lambda *_: pytest.fail("initialised, to be loaded next"))
    assert_equal(load_hf(exported).state_dict(), expected_state(model))
    assert_equal(load_model(tmp_path)[0].state_dict(), dict(model.state_dict()))


def test_into_an_existing_model(model: Trinity, exported: Path) -> None:
    other = Trinity(model.config)
    other.init_weights(9)
    for buffer in other.buffers():
        buffer.fill_(7)
    assert load_hf(exported, into=other) is other
    assert_equal(other.state_dict(), expected_state(model))


def test_into_a_sharded_model_of_one_process(ranks: Ranks, model: Trinity, exported: Path) -> None:
    """Also after a forward, when FSDP2 still shows gathered parameters; the next forward uses the new ones."""
    sharded = make_model()
    sharded.init_weights(9)
    fully_shard(sharded, mesh=ranks.dense)
    tokens = torch.arange(10).unsqueeze(0)
    with torch.no_grad():
        sharded(tokens)
        assert not isinstance(sharded.head.weight, DTensor)
        load_hf(exported, into=sharded)
        assert torch.equal(sharded(tokens), model(tokens))
    state = {name: getattr(t, "full_tensor", lambda t=t: t)() for name, t in sharded.state_dict().items()}
    assert_equal(state, expected_state(model))


def test_into_another_architecture(exported: Path) -> None:
    with pytest.raises(UserError, match=r"model\.window=7, not 9; model\.rope_theta=500\.0, not 10000\.0"):
        load_hf(exported, into=make_model(window=9, rope_theta=10_000.0))
    load_hf(exported, into=make_model(max_positions=512))  # max_positions is no part of the architecture


def rewrite_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a folder's first file that holds layers."""
    path = sorted(folder.glob("*.safetensors"))[1]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def rename_file(folder: Path, to: str) -> str:
    """Give the first file another name in the index; return the file's real name."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    index["weight_map"] = {name: to if file == first else file for name, file in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    return first


NORM = "model.layers.0.input_layernorm.weight"


def test_missing_tensors(exported: Path) -> None:
    rewrite_tensors(exported, lambda tensors: tensors.pop(NORM))
    with pytest.raises(UserError, match=f"lacks tensors that its config.json asks for: {NORM}$"):
        load_hf(exported)


def test_a_config_of_endless_layers_does_not_hang(exported: Path) -> None:
    """The tensors' names are checked before memory for the config's sizes is allocated."""
    path = exported / "config.json"
    raw = json.loads(path.read_text()) | {"num_experts": 10**12, "vocab_size": 10**12, "hidden_size": 10**12}
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"lacks tensors .*experts\.6\..* and more"):
        load_hf(exported)


def test_unexpected_tensors(exported: Path) -> None:
    rewrite_tensors(exported, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(3)}))
    with pytest.raises(UserError, match=r"has no place for: model\.layers\.0\.self_attn\.q_proj\.bias$"):
        load_hf(exported)


def test_wrong_shape(exported: Path) -> None:
    rewrite_tensors(exported, lambda tensors: tensors.update({NORM: torch.zeros(25)}))
    with pytest.raises(UserError, match=rf"{NORM} has shape \(25,\), not \(24,\)"):
        load_hf(exported)


@pytest.mark.parametrize(("dtype", "name"), [(torch.int32, "I32"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_unsupported_dtypes(exported: Path, dtype: torch.dtype, name: str) -> None:
    """fp8 too: without its scales it is not the weight."""
    rewrite_tensors(exported, lambda tensors: tensors.update({NORM: torch.zeros(24).to(dtype)}))
    with pytest.raises(UserError, match=f"{NORM} is {name}"):
        load_hf(exported)


def test_nothing_is_written_into_a_model_before_all_is_checked(exported: Path) -> None:
    rewrite_tensors(exported, lambda tensors: tensors.update({NORM: torch.zeros(25)}))
    other = make_model(max_positions=512)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(UserError):
        load_hf(exported, into=other)
    assert_equal(other.state_dict(), before)


def test_a_tensor_in_two_files(exported: Path) -> None:
    rewrite_tensors(exported, lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(300, 24)}))
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight in two files"):
        load_hf(exported)


def test_pickles_are_not_read(exported: Path) -> None:
    for path in exported.glob("*.safetensors*"):
        path.unlink()
    (exported / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UserError, match="pickled weights are not read"):
        load_hf(exported)


@pytest.mark.parametrize("kind", ["../{}", "{parent}/{}", "./{}", "..", "model.bin"])
def test_names_in_the_index_are_plain(exported: Path, kind: str) -> None:
    """The named file exists, so that only the name can be refused."""
    first = sorted(exported.glob("*.safetensors"))[0].name
    rename_file(exported, kind.format(first, parent=exported.parent))
    (exported.parent / first).write_bytes((exported / first).read_bytes())
    (exported / "model.bin").write_bytes((exported / first).read_bytes())
    with pytest.raises(UserError, match="only names of safetensors files in the folder are read"):
        load_hf(exported)


def test_links_out_of_the_folder(exported: Path) -> None:
    first = sorted(exported.glob("*.safetensors"))[0]
    first.rename(exported.parent / first.name)
    first.symlink_to(exported.parent / first.name)
    with pytest.raises(UserError, match="is a link out of the folder") as refused:
        load_hf(exported)
    advice = str(refused.value).partition("in its place: ")[2]
    subprocess.run(advice, shell=True, check=True)
    load_hf(exported)
    assert not first.is_symlink()


@pytest.mark.parametrize("through_a_link", [False, True])
def test_a_model_in_the_hugging_face_cache(exported: Path, tmp_path: Path, through_a_link: bool) -> None:
    """snapshots/REVISION/NAME → ../../blobs/HASH; the same numbers, by either path of the snapshot."""
    expected = {name: tensor.clone() for name, tensor in load_hf(exported).state_dict().items()}
    snapshot = move_into_cache(exported, tmp_path / "hub/models--an--model")
    if through_a_link:
        (tmp_path / "short").symlink_to(snapshot)
    loaded = load_hf(tmp_path / "short" if through_a_link else snapshot).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("to", ["../../../models--another/blobs", "../../refs", "../other", "../../blobs/below"])
def test_links_to_other_places_in_the_cache(exported: Path, tmp_path: Path, to: str) -> None:
    """Another model's blobs, another folder of this one's, another revision, a folder below the blobs."""
    snapshot = move_into_cache(exported, tmp_path / "hub/models--an--model")
    file = sorted(snapshot.glob("*.safetensors"))[0]
    target = (snapshot / to).resolve()
    target.mkdir(parents=True)
    moved = file.resolve().rename(target / "hash")
    file.unlink()
    file.symlink_to(moved)
    with pytest.raises(UserError, match="is a link out of the folder"):
        load_hf(snapshot)


def move_into_cache(folder: Path, model: Path) -> Path:
    """Move a folder into a cache as huggingface_hub lays it out; returns the snapshot."""
    snapshot, blobs = model / "snapshots/0123abcd", model / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_a_file_that_is_missing(exported: Path) -> None:
    rename_file(exported, "model-00099-of-00099.safetensors")
    with pytest.raises(UserError, match=r"model-00099-of-00099\.safetensors is missing"):
        load_hf(exported)


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_truncated_files(exported: Path, left: int) -> None:
    path = sorted(exported.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(UserError, match=r"00001-of-\d+\.safetensors is not a whole safetensors file"):
        load_hf(exported)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, r"config\.json does not exist"),
        ("{", r"config\.json is not JSON"),
        ("[1]", r"config\.json holds no JSON object but a list"),
        ("\udcff", r"config\.json is not JSON"),
        ('{"model_type": "llama"}', r"model_type='llama' is not supported"),
    ],
)
def test_invalid_config(exported: Path, text: str | None, sentence: str) -> None:
    path = exported / "config.json"
    path.unlink()
    if text is not None:
        path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=sentence):
        load_hf(exported)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', "nonsense"])
def test_invalid_index(exported: Path, text: str) -> None:
    (exported / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json (has no weight_map|is not JSON)"):
        load_hf(exported)
