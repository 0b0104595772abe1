"""tools/export_hf.py and tools/generate.py as a user calls them, on a run directory and on a Hugging Face folder."""

import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from tests.interop.small_model import CONFIG, make_model
from trinity.checkpoint.directory import CheckpointDirectory
from trinity.checkpoint.load import model_state
from trinity.checkpoint.save import save
from trinity.config.load import save_config
from trinity.config.run import DataConfig, RunConfig, RunSection
from trinity.evaluation.generate import generate
from trinity.interop import export_hf, load_hf

TOOLS = Path(__file__).parents[2] / "tools"
TEXT = "the rain"
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A run with checkpoints of steps 3 and 5, the second of another model."""
    folder = tmp_path_factory.mktemp("run")
    config = RunConfig(run=RunSection(steps=5), model=CONFIG, data=DataConfig(tokenizer=str(tokenizer_folder)))
    save_config(config, folder / "config.yaml")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for step in (3, 5):
        save(model_state(model_of(step)), CheckpointDirectory.at(folder), step, keep=2)
    dist.destroy_process_group()
    return folder


def model_of(step: int) -> torch.nn.Module:
    model = make_model()
    model.init_weights(step)
    return model


def call(tool: str, *words: object) -> int:
    """Run a tool in this process; its exit code."""
    before = sys.argv
    sys.argv = [tool, *map(str, words)]
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOLS / tool), run_name="__main__")
    finally:
        sys.argv = before
    return ended.value.code


def test_export_as_a_command(run_directory: Path, tmp_path: Path, tokens: torch.Tensor) -> None:
    """The newest step, in bf16, compared with transformers, in a process of its own."""
    words = [sys.executable, TOOLS / "export_hf.py", run_directory, tmp_path / "hf", "--verify"]
    result = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert f"step 5 of {run_directory} is in {tmp_path / 'hf'} (bfloat16)" in result.stdout
    assert "logits differ by at most" in result.stdout
    expected = export_hf(model_of(5), tmp_path / "expected")
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


def test_export_of_a_step_in_fp32(run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "hf"
    assert call("export_hf.py", run_directory, out, "--step", 3, "--dtype", "float32") == 0
    assert torch.equal(load_hf(out).head.weight, model_of(3).head.weight)
    assert call("export_hf.py", run_directory, out) == 2
    assert f"error: {out} holds an earlier export" in capsys.readouterr().err
    assert call("export_hf.py", run_directory, out, "--overwrite") == 0
    assert torch.equal(load_hf(out).head.weight, model_of(5).head.weight.bfloat16().float())


@pytest.mark.parametrize("kind", ["run", "folder"])
def test_generate(
    kind: str, run_directory: Path, tmp_path: Path, tokenizer_folder: Path, capfd: pytest.CaptureFixture
) -> None:
    """The prompt, and the text of the tokens that follow the document's beginning and the prompt."""
    folder = run_directory
    if kind == "folder":
        folder = export_hf(model_of(5), tmp_path / "hf", tokenizer_folder, torch.float32)
    words = ("--prompt", TEXT, "--max-new-tokens", 12, "--temperature", 0.9, "--top-p", 0.8, "--seed", 4)
    assert call("generate.py", folder, *words) == 0
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    prompt = [0, *tokenizer.encode(TEXT, add_special_tokens=False).ids]
    expected = generate(model_of(5), prompt, 12, 0.9, 0.8, 4, stop_ids=[0, 1])
    assert capfd.readouterr().out.rstrip("\n") == TEXT + tokenizer.decode(expected).rstrip("\ufffd\n")


def exported_step(folder: Path, tokenizer_folder: Path) -> Path:
    """The model of step 5 as a Hugging Face folder, with a chat template."""
    export_hf(model_of(5), folder, tokenizer_folder, torch.float32)
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}<{{ m.content }}>{% endfor %}")
    return folder


def test_generate_a_batch(
    run_directory: Path, tmp_path: Path, tokenizer_folder: Path, capfd: pytest.CaptureFixture
) -> None:
    """Prompts of the command line and of a file, two at a time; the second "the rain" has a seed of its own."""
    file = tmp_path / "prompts.jsonl"
    file.write_text('"Spain"\n\n{"prompt": "the rain"}\n')
    words = ("--prompt", TEXT, "--prompts", file, "--batch", 2, "--max-new-tokens", 8, "--seed", 4, "--top-k", 50)
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    expected = []
    for text, seed in ((TEXT, 4), ("Spain", 4), ("the rain", 5)):
        prompt = [0, *tokenizer.encode(text, add_special_tokens=False).ids]
        expected.append(generate(model_of(5), prompt, 8, 0.8, 0.95, seed, stop_ids=[0, 1], top_k=50))
    assert call("generate.py", run_directory, *words, "--json") == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == [TEXT, "Spain", "the rain"]
    assert [line["tokens"] for line in lines] == list(map(len, expected))
    texts = [tokenizer.decode(tokens) for tokens in expected]
    assert [line["text"].rstrip("\ufffd") for line in lines] == [text.rstrip("\ufffd") for text in texts]
    assert call("generate.py", run_directory, *words) == 0
    printed = "".join(f"{line['prompt']}{line['text']}\n" for line in lines)
    assert capfd.readouterr().out == printed


def test_chat_with_given_turns_and_from_a_file(
    tmp_path: Path, tokenizer_folder: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first answer is the same in a conversation, in a batch of single turns, and typed."""
    folder = exported_step(tmp_path / "hf", tokenizer_folder)
    words = ("--chat", "--max-new-tokens", 6, "--temperature", 0)
    assert call("generate.py", folder, *words, "--prompt", TEXT, "--prompt", "Spain", "--json") == 0
    answers = [json.loads(line)["text"] for line in capfd.readouterr().out.splitlines()]
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    prompt = [0, *tokenizer.encode(f"<{TEXT}>", add_special_tokens=False).ids]
    tokens = generate(model_of(5), prompt, 6, temperature=0, stop_ids=[0, 1])
    assert answers[0].rstrip("\ufffd") == tokenizer.decode(tokens).rstrip("\ufffd")
    assert len(answers) == 2
    (tmp_path / "prompts.txt").write_text(f"{TEXT}\n")
    assert call("generate.py", folder, *words, "--prompts", tmp_path / "prompts.txt") == 0
    assert capfd.readouterr().out == f"> {TEXT}\n{answers[0]}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{TEXT}\n\nSpain\n"))
    assert call("generate.py", folder, *words) == 0
    assert capfd.readouterr().out == "".join(f"{answer}\n" for answer in answers)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("generate.py", "{run}"), "there is nothing to continue; give --prompt TEXT, --prompts FILE or --chat"),
        (("generate.py", "{run}", "--prompt", "x", "--system", "y"), "--system is the first message of a chat"),
        (("generate.py", "{run}", "--prompt", "x", "--batch", "0"), "--batch 0 must be at least 1"),
        (("generate.py", "{run}", "--prompt", "x", "--seed", "-1"), "--seed -1 is not between"),
        (("generate.py", "{run}", "--prompt", "x", "--top-k", "-1"), "top_k=-1 is negative"),
        (("generate.py", "{run}", "--prompt", "x", "--stop", ""), "a stop string is empty"),
        (("generate.py", "{run}", "--prompt", "x", "--device", "cuda:99"), "--device cuda:99 is not available"),
        (("generate.py", "{run}", "--prompts", "{}/none"), "No such file"),
        (("generate.py", "{run}", "--prompt", "x", "--chat", "--prompts", "{run}"), "give one"),
        (("generate.py", "{run}", "--prompt", "x", "--chat"), "has no chat template"),
        (("generate.py", "{}", "--prompt", "x"), "has neither a config.json nor a config.yaml"),
        (("generate.py", "{}/nowhere", "--prompt", "x"), "has neither a config.json nor a config.yaml"),
        (("export_hf.py", "{}", "{}/out"), "is not a run directory"),
        (("export_hf.py", "{run}", "{}/out", "--step", "4"), "no complete checkpoint of step 4"),
    ],
)
def test_user_errors_are_one_sentence(
    words: tuple[str, ...], sentence: str, run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert call(*(word.format(tmp_path, run=run_directory) for word in words)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert sentence in error
    assert error.count("\n") == 1
