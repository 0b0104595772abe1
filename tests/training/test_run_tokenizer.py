"""The tokenizer of a run: a copy in its directory, compared by content, wherever the folder that it came from is."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.training.run_files import refuse, train
from trinity.checkpoint.directory import CheckpointDirectory
from trinity.config import RunConfig, load_config, save_config
from trinity.data.tokenizer.tokenizer import fingerprint, load_tokenizer
from trinity.errors import UserError
from trinity.training.run_tokenizer import (
    keep_tokenizer,
    on_this_node,
    run_tokenizer,
    tokenizer_at_start,
    tokenizer_to_read,
)

ROOT = Path(__file__).parents[2]


def make(folder: Path, text: str = "{}") -> Path:
    """A folder with the file names of a tokenizer, enough to compare and copy it."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(text)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def config_with(tokenizer: Path | None = None, **init: str) -> RunConfig:
    config = RunConfig()
    config.run.steps = 1
    config.data.tokenizer = None if tokenizer is None else str(tokenizer)
    for name, value in init.items():
        setattr(config.init, name, value)
    return config


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of a run from before there were copies: its config names the tokenizer."""
    (tmp_path / "run").mkdir()
    save_config(config_with(make(tmp_path / "first")), tmp_path / "run/config.yaml")
    return tmp_path / "run"


def test_a_new_run_takes_what_its_config_names(run: Path, tmp_path: Path) -> None:
    """data.tokenizer, then init.hf, then the tokenizer of init.run: its copy, or what its config names."""
    other, hf = make(tmp_path / "other", "1"), make(tmp_path / "hf", "2")
    new = tmp_path / "new"
    assert tokenizer_at_start(config_with(), new, resumes=False) is None
    assert tokenizer_at_start(config_with(other, hf=str(hf)), new, resumes=False) == other
    assert tokenizer_at_start(config_with(hf=str(hf)), new, resumes=False) == hf
    assert tokenizer_at_start(config_with(run=str(run)), new, resumes=False) == tmp_path / "first"
    keep_tokenizer(other, run, replace_copy=True)
    assert tokenizer_at_start(config_with(run=str(run)), new, resumes=False) == run / "tokenizer"
    assert tokenizer_at_start(config_with(hf=str(hf)), run, resumes=False) == hf  # and not the copy of an earlier try


def test_a_resumed_run_keeps_its_own(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The same content is accepted from anywhere, another is refused; without data.tokenizer its own is used."""
    first, moved, other = tmp_path / "first", tmp_path / "moved", make(tmp_path / "other", "1")
    shutil.copytree(first, moved)
    for own in (first, run / "tokenizer"):  # as an old run directory has it, and with a copy
        for named in (None, first, moved):
            assert tokenizer_at_start(config_with(named), run, resumes=True) == own
        assert tokenizer_at_start(config_with(hf=str(other)), run, resumes=True) == own  # init is read once
        with pytest.raises(UserError) as refused:
            tokenizer_at_start(config_with(other), run, resumes=True)
        assert str(refused.value).startswith(f"{run} was begun with another tokenizer than data.tokenizer={other}; ")
        assert keep_tokenizer(first, run, replace_copy=False) == run / "tokenizer"
    shutil.rmtree(first)
    assert capsys.readouterr().err == ""
    assert tokenizer_at_start(config_with(first), run, resumes=True) == run / "tokenizer"
    assert "does not exist; the run continues with its copy" in capsys.readouterr().err
    shutil.rmtree(run / "tokenizer")
    assert tokenizer_at_start(config_with(moved), run, resumes=True) == moved  # compared with the sources


def test_the_copy_is_that_of_the_start(run: Path, tmp_path: Path) -> None:
    """A run without a checkpoint starts afresh, with other files too; one with a checkpoint keeps what it has."""
    first, other = tmp_path / "first", make(tmp_path / "other", "1")
    (first / "chat_template.jinja").write_text("a template")
    copy = keep_tokenizer(first, run, replace_copy=True)
    files = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {path.name: path.read_text() for path in copy.iterdir()} == {
        name: (first / name).read_text() for name in files
    }
    keep_tokenizer(other, run, replace_copy=False)
    assert fingerprint(copy) == fingerprint(first)
    keep_tokenizer(other, run, replace_copy=True)
    assert {path.name for path in copy.iterdir()} == files - {"chat_template.jinja"}
    assert fingerprint(copy) == fingerprint(other)
    assert keep_tokenizer(copy, run, replace_copy=True) == copy  # onto itself
    assert fingerprint(copy) == fingerprint(other)


def test_the_tokenizer_that_tools_read(run: Path, tmp_path: Path) -> None:
    first, config = tmp_path / "first", config_with(tmp_path / "first")
    assert run_tokenizer(run, config) == first
    assert run_tokenizer(run, config_with()) is None
    copy = keep_tokenizer(first, run, replace_copy=True)
    shutil.rmtree(first)
    assert run_tokenizer(run, config) == run_tokenizer(run, config_with()) == copy
    assert tokenizer_to_read(config, run) == copy
    assert on_this_node(copy, config) == copy
    assert on_this_node(tmp_path / "elsewhere", config) == first  # a node that does not share the run directory


def test_prompts_need_one(run: Path, tmp_path: Path) -> None:
    config = config_with(run=str(run))
    config.evaluation.prompts = ["a text"]
    assert tokenizer_at_start(config, tmp_path / "new", resumes=False) == tmp_path / "first"
    save_config(config_with(), run / "config.yaml")
    with pytest.raises(UserError, match="there is no tokenizer; set"):
        tokenizer_at_start(config, tmp_path / "new", resumes=False)


def test_a_run_whose_tokenizer_moves(
    settings: dict, corpus: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started with relative paths; then the folder is deleted; resume, samples, export and tools work without it."""
    monkeypatch.chdir(corpus.folder)
    shutil.copytree(corpus.tokenizer, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    settings["run"]["dir"], settings["data"]["tokenizer"] = "run", "mine"
    settings["data"]["workers"] = 0
    settings["evaluation"] |= {"prompts": ["def "], "sample_tokens": 2, "every": 2}
    assert train(settings, "run.steps=2", "checkpoint.every=0") == 0
    saved = load_config(run / "config.yaml")
    assert (saved.run.dir, saved.data.tokenizer) == (str(run), str(tmp_path / "mine"))
    assert fingerprint(run / "tokenizer") == fingerprint(corpus.tokenizer)
    shutil.rmtree(tmp_path / "mine")
    monkeypatch.chdir("/")
    settings["run"]["dir"], settings["data"]["tokenizer"] = str(run), None
    assert train(settings, "run.steps=4", "checkpoint.every=0", "export.every=4") == 0
    assert fingerprint(run / "hf/step_00000004") == fingerprint(corpus.tokenizer)
    assert len((run / "samples.jsonl").read_text().splitlines()) == 2
    monkeypatch.syspath_prepend(ROOT / "tools")
    sys.modules.pop("generate", None)
    import generate

    model, folder = generate.load(SimpleNamespace(folder=run, device="cpu"))
    assert (folder, model.config.vocab_size) == (run / "tokenizer", 512)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "status.json"}
    settings["data"]["tokenizer"] = str(make(tmp_path / "other", load_tokenizer(corpus.tokenizer).to_str()))
    assert "was begun with another tokenizer" in refuse(settings, "run.steps=6")
    assert CheckpointDirectory.at(run).complete_steps() == [2, 4]
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "status.json"}
    assert {path.name for path in after if before.get(path) != after[path]} <= {"lock"}
