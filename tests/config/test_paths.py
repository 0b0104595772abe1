"""Paths of a config: ~ is expanded, and a missing path is reported with the nearest existing one."""

from collections.abc import Callable
from pathlib import Path

import pytest

from trinity.config import RunConfig, load_config, run_directory, tokenizer_folder
from trinity.config.paths import check_paths, missing_path_hint, nearest_path
from trinity.errors import UserError

Write = Callable[[str], Path]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_home_folder(write: Write, home: Path) -> None:
    """In every path key, in files and overrides, and for the config's own path; in other keys ~ is a character."""
    path = write("run: {steps: 1, dir: ~/run}\ndata: {train: {a: ~/a}, tokenizer: ~/t}\nevaluation: {prompts: [~/x]}\n")
    words = ["data.train.b=~/b", "data.validation={c: ~/c*.txt}", "checkpoint.url=~/u"]
    config = load_config(f"~/{path.name}", words)
    assert (config.run.dir, config.data.tokenizer, config.checkpoint.url) == (f"{home}/run", f"{home}/t", f"{home}/u")
    assert config.data.train == {"a": f"{home}/a", "b": f"{home}/b"}
    assert config.data.validation == {"c": f"{home}/c*.txt"}
    assert config.evaluation.prompts == ["~/x"]
    assert (run_directory(config), tokenizer_folder(config)) == (home / "run", home / "t")
    assert load_config(path, ["run.dir=./~"]).run.dir == "./~"


@pytest.mark.parametrize("word", ["run.dir", "data.train.a", "data.tokenizer", "init.run", "checkpoint.url"])
def test_no_such_user(write: Write, word: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(write("run: {steps: 1}"), [f"{word}=~nobody-at-all/x"])
    assert str(caught.value) == (
        f"{word}=~nobody-at-all/x: ~nobody-at-all is no user's home folder here; write the whole path, or "
        "./~nobody-at-all/x"
    )


def test_run_name_is_not_a_path(write: Write, home: Path) -> None:
    with pytest.raises(UserError, match=r"^run\.name=~/x is a name below runs/; for a folder write run\.dir=~/x$"):
        load_config(write("run: {steps: 1}"), ["run.name=~/x"])


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("shard", "shards"), ("shard/train", "shards/train"), ("shards/trian", "shards/train"),
        ("shards/zzz", None), ("sharsd/zzz", "shards"), ("qqq", None), ("shards/train/x/y", None),
        ("text.jso", "text.json"),
    ],
)  # fmt: skip
def test_the_nearest_path(tmp_path: Path, path: str, near: str | None) -> None:
    (tmp_path / "shards/train").mkdir(parents=True)
    (tmp_path / "text.json").touch()
    assert nearest_path(tmp_path / path) == (tmp_path / near if near else None)
    sentence = missing_path_hint(tmp_path / path)
    assert sentence.startswith(f"{tmp_path / path} does not exist; ")
    assert sentence.endswith(f"did you mean {tmp_path / near}?" if near else (
        f"{tmp_path / 'shards'} holds train" if path == "shards/zzz" else
        f"{tmp_path} holds shards, text.json" if path == "qqq" else f"{tmp_path / 'shards/train'} holds nothing"
    ))  # fmt: skip


def test_check_paths(tmp_path: Path) -> None:
    """The key is named. Patterns and URLs are not checked; init and the tokenizer only at the first start."""
    (tmp_path / "there").mkdir()

    def refused(fresh: bool = True, **data: object) -> str:
        config = RunConfig()
        for name, value in data.items():
            section = config.init if name in ("hf", "run") else config.data
            setattr(section, name, value)
        try:
            check_paths(config, fresh)
        except UserError as error:
            return str(error)
        return ""

    missing = str(tmp_path / "ther")
    for name in ("tokenizer", "hf", "run"):
        key = f"data.{name}" if name == "tokenizer" else f"init.{name}"
        assert refused(**{name: missing}) == f"{key}={missing} does not exist; did you mean {tmp_path / 'there'}?"
        assert refused(fresh=False, **{name: missing}) == ""
    for name in ("train", "validation"):
        for fresh in (True, False):
            sentence = f"data.{name}.b={missing} does not exist; did you mean {tmp_path / 'there'}?"
            assert refused(fresh, **{name: {"a": str(tmp_path / "there"), "b": missing}}) == sentence
        assert refused(**{name: {"a": f"{missing}/*.txt", "b": "s3://bucket/x", "c": "memory://y"}}) == ""
