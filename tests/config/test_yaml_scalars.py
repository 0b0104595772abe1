"""Texts stay as typed, in files and overrides; numbers and switches are read as YAML."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.config import load_config, save_config
from trinity.config.load import flatten, to_yaml
from trinity.errors import UserError

Write = Callable[[str], Path]

TYPED = ["0010", "12e4567", "3.10", "yes", "on", "1_000", "0x10", "1:30", "2020-01-01", "1e3", "-5", ".inf", "True"]
"""Texts that plain YAML reads as another type, and a date."""
BARE = ["exp #3", "a: b", "[a", "{x}", "- a", "a, b", "*a", "&a", "!x", "|", "%x", "@x", " a ", "a\tb", "ünï", "=a"]
"""Texts that need quotes in a file but not on the command line."""


@pytest.mark.parametrize("text", TYPED)
def test_a_text_in_a_file(write: Write, text: str) -> None:
    """Required and optional texts, names and values of maps, entries of lists; in blocks and in braces."""
    content = (
        f"run: {{steps: 1, name: {text}}}\nlog:\n  wandb: {text}\nevaluation: {{prompts: [{text}, a, {text}]}}\n"
        f"data:\n  tokenizer: {text}\n  train:\n    {text}: {text}\n  mixture: {{{text}: 010}}\n"
    )
    if ":" not in text:  # in braces a colon would be YAML's
        content += f"  validation: {{a: {text}}}\n"
    config = load_config(write(content))
    assert (config.run.name, config.log.wandb, config.data.tokenizer) == (text, text, text)
    assert (config.data.train, config.data.mixture) == ({text: text}, {text: 10.0})
    assert config.data.validation == ({} if ":" in text else {"a": text})
    assert config.evaluation.prompts == [text, "a", text]


@pytest.mark.parametrize("text", TYPED + BARE)
def test_a_text_on_the_command_line(write: Write, text: str) -> None:
    words = [f"run.name={text}", f"log.wandb={text}", f"data.train.a={text}"]
    if text in TYPED:
        words += ["data.tokenizer=x", f"evaluation.prompts=[{text}, a]", f"data.validation={{b: {text}}}"]
    config = load_config(write("run: {steps: 1}"), words)
    assert (config.run.name, config.log.wandb, config.data.train) == (text, text, {"a": text})
    if text in TYPED:
        assert config.evaluation.prompts == [text, "a"]
        assert config.data.validation == {"b": text}


@pytest.mark.parametrize("text", ["<<", "="])
def test_merge_keys_as_values(write: Write, tmp_path: Path, text: str) -> None:
    """<< and = are texts as values; `<<: *a` still merges, in a file and in an override."""
    content = f"run: {{steps: 1, name: {text}}}\nevaluation: {{prompts: [{text}, a]}}\n"
    content += f"data: {{tokenizer: x, train: {{a: {text}}}}}\n"
    words = [f"evaluation.prompts=[{text}, a]", f"data.train={{a: {text}}}", f"run.name={text}", "data.tokenizer=x"]
    for config in (load_config(write(content)), load_config(write("run: {steps: 1}"), words)):
        assert (config.run.name, config.evaluation.prompts, config.data.train) == (text, [text, "a"], {"a": text})
        save_config(config, tmp_path / "saved.yaml")
        assert load_config(tmp_path / "saved.yaml") == config
    merged = load_config(write("run: {steps: 1}\ndata:\n  train: &x {a: b}\n  validation: {<<: *x, c: d}\n"))
    assert merged.data.validation == {"a": "b", "c": "d"}
    assert load_config(write("run: {steps: 1}"), ["data.train={<<: {a: b}, c: d}"]).data.train == {"a": "b", "c": "d"}


def test_quotes_and_null(write: Write) -> None:
    """Quotes are YAML's; null unsets an optional text and is refused for a required one."""
    path = write("run: {steps: 1, name: '0010'}\nlog: {wandb: p}\ninit: {run: ~}\n")
    config = load_config(path, ["data.tokenizer='null'", 'data.text_field="a #b"', "log.wandb=null"])
    assert (config.run.name, config.data.tokenizer, config.data.text_field) == ("0010", "null", "a #b")
    assert (config.log.wandb, config.init.run, load_config(path, ["log.wandb="]).log.wandb) == (None, None, None)
    for word in ("run.name=null", "run.name=", "data.train.a=~", "data.train={a: null}", "evaluation.prompts=[null]"):
        with pytest.raises(UserError, match=r" in the command line is empty; write a text, in quotes where it is null"):
            load_config(path, [word])


@pytest.mark.parametrize("word", ["a\0", "a\udcff", "a\x07"])
def test_unprintable_characters_are_refused(write: Write, word: str) -> None:
    sentence = rf"^run\.name in the command line holds the character U\+{ord(word[1]):04X}; write plain text in UTF-8$"
    with pytest.raises(UserError, match=sentence):
        load_config(write("run: {steps: 1}"), [f"run.name={word}"])


@pytest.mark.parametrize(("text", "number"), [("0010", 10), ("0090", 90), ("17e12", 17 * 10**12), ("1_0", 10)])
def test_numbers_are_decimal(write: Write, text: str, number: int) -> None:
    """0010 is ten, not octal 8; 1:30 is not 90."""
    for config in (load_config(write(f"run: {{tokens: {text}}}")), load_config(write("{}"), [f"run.tokens={text}"])):
        assert config.run.tokens == number
    assert load_config(write("run: {steps: 1}"), [f"optim.muon.lr={text}"]).optim.muon.lr == number
    with pytest.raises(UserError, match=r"run\.steps in the command line: '1:30' is not a whole number"):
        load_config(write("{}"), ["run.steps=1:30"])


def test_switches_and_fixed_words(write: Write) -> None:
    words = ["log.tensorboard=yes", "data.document_mask=on", "parallel.defer_reduce=off", "precision.fp8=none"]
    config = load_config(write("run: {steps: 1}\noptim: {muon: {share: on}}"), words)
    assert (config.log.tensorboard, config.data.document_mask) == (True, True)
    assert (config.parallel.defer_reduce, config.optim.muon.share, config.precision.fp8) == ("off", "on", "none")


def test_references_are_resolved_or_refused(write: Write) -> None:
    """${run.seed} is that setting's value, \\${x} the characters; a reference to no setting is refused."""
    path = write("run: {steps: 1, seed: 7}\n")
    assert load_config(path, ["run.name=seed-${run.seed}"]).run.name == "seed-7"
    assert load_config(path, [r"run.name=\${x}"]).run.name == "${x}"
    for word in ("run.name=${x}", "run.name=${x"):
        with pytest.raises(UserError, match=r"write \\\$\{ for the characters themselves"):
            load_config(path, [word])


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
TRICKY = st.text(alphabet="$\\{}x.:#'\" 01e-~\n\t?!&*[]", min_size=1)


@settings(max_examples=8, deadline=None)
@given(texts=st.lists((TEXT | TRICKY | st.sampled_from(TYPED + BARE)).filter(lambda text: text != "???"), min_size=30))
def test_texts_survive_saving(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    """A saved config with any texts loads to the same config; ??? alone is OmegaConf's missing value."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "run.yaml").write_text("run: {steps: 1}\ndata: {tokenizer: x}\n")
    config = load_config(folder / "run.yaml")
    config.evaluation.prompts, config.data.validation = texts, dict.fromkeys(texts, "x")
    config.run.name = f"n{texts[0]}"
    save_config(config, folder / "saved.yaml")
    again = load_config(folder / "saved.yaml")
    assert again == config
    assert to_yaml(again) == to_yaml(config)
    assert flatten(again) == flatten(config)
