"""Samples of MK-NIAH: RULER's wording, sizes under any tokenizer, distinct keys and values, stratified depths."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trinity.data.sources.shards import TokenSource
from trinity.data.tokenizer.tokenizer import load_text_encoder, load_tokenizer
from trinity.errors import UserError
from trinity.evaluation import needle
from trinity.evaluation.needle import KINDS, SPARE, STRATA, Haystack, NeedleTask, split_sentences
from trinity.evaluation.needle_words import ADJECTIVES, NOUNS

ROOT = Path(__file__).parents[2]
TEXT = "\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
LENGTHS = (384, 500, 768, 1024, 2000)


@pytest.fixture(scope="module")
def haystack() -> Haystack:
    return Haystack(TEXT, "docs")


@pytest.fixture(scope="module")
def tokenizers(corpus: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three kinds: byte-level BPE with digits in threes; a unigram model with spaces as characters and no BOS; a BPE
    whose tokens join a value's last digits and the full stop after it."""
    unigram, bpe = Tokenizer(models.Unigram()), Tokenizer(models.BPE())
    numbers = " ".join(f"is: {number}." for number in range(1_000_000, 9_999_999, 5003))
    for name, tok in {"unigram": unigram, "bpe": bpe}.items():
        tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        options = {"vocab_size": 900, "show_progress": False}
        if name == "unigram":
            trainer = trainers.UnigramTrainer(unk_token="<unk>", special_tokens=["<unk>"], **options)
        else:
            trainer = trainers.BpeTrainer(special_tokens=["<s>"], **options)
        tok.train_from_iterator([TEXT, numbers, "0123456789abcdef-" * 100], trainer)
    assert any(token[0].isdigit() and token.endswith(".") for token in bpe.get_vocab()), "a digit with a full stop"
    folders = {"byte level": corpus.tokenizer}
    for name, tok in {"unigram": unigram, "bpe": bpe}.items():
        folders[name] = tmp_path_factory.mktemp(name)
        tok.save(str(folders[name] / "tokenizer.json"))
        bos = {"bos_token": "<s>"} if name == "bpe" else {}
        (folders[name] / "tokenizer_config.json").write_text(json.dumps(bos))
    return folders


def compact(text: str) -> str:
    """Text without white space: decoders differ in the spaces at the ends."""
    return "".join(text.split())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["byte level", "unigram", "bpe"])
def test_size(tokenizers: dict[str, Path], haystack: Haystack, name: str, kind: int) -> None:
    """Prompt, answer and SPARE take at most L tokens, and one more piece of the haystack would take more.

    The tokens are those of the whole text, the answer's those of the value in its place, and the span the needle's.
    """
    folder = tokenizers[name]
    tok = load_text_encoder(folder)
    bos = {"byte level": "<|begin_of_text|>", "bpe": "<s>"}.get(name)
    longest = max(len(tok.encode(f" {piece} ", add_special_tokens=False).ids) for piece in haystack.sentences)
    for length in LENGTHS:
        task = NeedleTask(folder, 2000, kind, length, haystack)
        sample = task.sample(2)
        used = len(sample.tokens) + len(sample.answer) + SPARE
        piece = longest if kind == 1 else 2 + max(
            len(tok.encode(line, add_special_tokens=False).ids) for line in sample.prompt.split("\n")[1:-1]
        )  # fmt: skip
        assert length - piece <= used <= length
        begin = [] if bos is None else [tok.token_to_id(bos)]
        text = f"{sample.prompt}{sample.answer_prefix} {sample.value}."
        ids = [*begin, *tok.encode(text, add_special_tokens=False).ids]
        assert [*sample.tokens, *sample.answer] == ids[: len(sample.tokens) + len(sample.answer)]
        assert compact(tok.decode(sample.answer)) in (sample.value, f"{sample.value}.")
        hidden = compact(tok.decode(sample.tokens[slice(*sample.needle)]))
        assert hidden.startswith("Oneofthespecialmagic")
        assert sample.value in hidden


RULER = {
    1: (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\n"
        "One. One of the special magic numbers for k1 is: v1. Two. One of the special magic numbers for k0 is: v0. "
        "One of the special magic numbers for k2 is: v2. Three. Four. One of the special magic numbers for k3 is: v3.\n"
        "What is the special magic number for k0 mentioned in the provided text?"
        " The special magic number for k0 mentioned in the provided text is"
    ),
    2: (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\n"
        "One of the special magic numbers for k1 is: v1.\n"
        "One of the special magic numbers for k2 is: v2.\n"
        "One of the special magic numbers for k0 is: v0.\n"
        "One of the special magic numbers for k3 is: v3.\n"
        "One of the special magic numbers for k4 is: v4.\n"
        "What is the special magic number for k0 mentioned in the provided text?"
        " The special magic number for k0 mentioned in the provided text is"
    ),
    3: (
        "A special magic uuid is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the uuid afterwards.\n"
        "One of the special magic uuids for k1 is: v1.\n"
        "One of the special magic uuids for k2 is: v2.\n"
        "One of the special magic uuids for k0 is: v0.\n"
        "One of the special magic uuids for k3 is: v3.\n"
        "One of the special magic uuids for k4 is: v4.\n"
        "What is the special magic uuid for k0 mentioned in the provided text?"
        " The special magic uuid for k0 mentioned in the provided text is"
    ),
}
"""What RULER's niah.py (commit c3f5e3b) writes, followed by its answer prefix: for the haystack "One. Two. Three.
Four." with needles at depths of 50, 25, 50 and 100 %, and for four other needles with the asked one at 50 %."""


@pytest.mark.parametrize("kind", KINDS)
def test_wording_is_that_of_ruler(corpus: SimpleNamespace, kind: int) -> None:
    task = NeedleTask(corpus.tokenizer, 512, kind, 2000, Haystack("One. Two.  Three.\nFour.", "numbers"))
    depths = [0.5, 0.25, 0.5, 1.0] if kind == 1 else [0.5]
    task._piece_tokens = np.ones(4, int)
    context = task._context(lambda number: (f"k{number}", f"v{number}"), depths, 0, 4)
    assert "".join(task.kind.prompt(context, "k0")) == RULER[kind]


def test_samples_depend_on_their_arguments_alone(corpus: SimpleNamespace, haystack: Haystack) -> None:
    """The same in another order, in another task object; another index, length, kind or seed gives another sample."""

    def make(kind: int = 2, length: int = 600, seed: int = 0) -> Callable:
        return NeedleTask(corpus.tokenizer, 512, kind, length, haystack, seed).sample

    forward, backward = make(), make()
    samples = [forward(index) for index in range(4)]
    assert samples == [backward(index) for index in (3, 2, 1, 0)][::-1]
    others = [*samples, make(kind=1)(0), make(kind=3)(0), make(length=601)(0), make(seed=1)(0)]
    assert len({sample.value for sample in others}) == len(others)


@pytest.mark.parametrize("kind", KINDS)
def test_one_answer(corpus: SimpleNamespace, haystack: Haystack, kind: int) -> None:
    """Keys and values are distinct, those of distractors included; no value is in another, nor spelled by the text."""
    sample = NeedleTask(corpus.tokenizer, 512, kind, 8000, haystack).sample(7)
    facts = [part.split(" is: ") for part in sample.prompt.replace("\n", " ").split("One of the special magic ")[1:]]
    facts = [(head.split(" for ")[1], tail.split(".")[0]) for head, tail in facts]
    keys, values = zip(*facts)
    assert len(facts) == 4 if kind == 1 else len(facts) > 50
    assert len(set(keys)) == len(set(values)) == len(facts)
    assert len({len(value) for value in values}) == 1, "equally long, so that none is part of another"
    for value in values:
        assert sample.prompt.count(value) == 1
        assert value not in haystack.text
    assert sample.prompt.count(sample.value) == 1
    ((key, value),) = (fact for fact in facts if fact[1] == sample.value)
    assert f"for {key} mentioned" in sample.prompt.rsplit("\n", 1)[1]


def test_a_value_in_the_haystack_is_drawn_again(corpus: SimpleNamespace) -> None:
    """The first value of a seed, put into the haystack, is no needle's value then."""
    plain = NeedleTask(corpus.tokenizer, 512, 1, 500, Haystack("Some words. " * 50, "words"))
    spelled = Haystack(f"Some words {plain.sample(0).value}. " * 50, "words")
    assert NeedleTask(corpus.tokenizer, 512, 1, 500, spelled).sample(0).value not in spelled.text


@pytest.mark.parametrize("kind", KINDS)
def test_depth_is_stratified(corpus: SimpleNamespace, kind: int) -> None:
    """Over 20 samples each tenth of the depth has two. 0.02: a sentence of this text has up to 1 %, and other needles
    move the place."""
    haystack = Haystack(
        " ".join(f"Stone {number} of the wall is {number % 9} feet wide." for number in range(900)), "a"
    )
    assert max(haystack.sentence_tokens(corpus.tokenizer, load_text_encoder(corpus.tokenizer))) < 60
    task = NeedleTask(corpus.tokenizer, 512, kind, 6000, haystack)
    samples = [task.sample(index) for index in range(2 * STRATA)]
    assert [sample.stratum for sample in samples] == [*range(STRATA)] * 2
    for sample in samples:
        low, high = sample.stratum / STRATA, (sample.stratum + 1) / STRATA
        assert low - 0.02 < sample.depth < high + 0.02
        assert sample.needle[0] / len(sample.tokens) == pytest.approx(sample.depth, abs=0.1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 60, 150])
def test_small_lengths(corpus: SimpleNamespace, haystack: Haystack, kind: int, length: int) -> None:
    """A length without room for the question ends, in one sentence, and its advice works for other samples too."""
    with pytest.raises(UserError) as refused:
        NeedleTask(corpus.tokenizer, 512, kind, length, haystack).sample(0)
    sentence = str(refused.value)
    assert "\n" not in sentence
    assert f"--lengths {length} has no room for the needles and the question of kind {kind}" in sentence
    advised = int(sentence.split("give ")[1].split()[0])
    task = NeedleTask(corpus.tokenizer, 512, kind, advised, haystack)
    assert all(len(task.sample(index).tokens) < advised for index in range(10))


def test_unspellable_values_are_refused(tmp_path: Path, haystack: Haystack) -> None:
    """A tokenizer without digits."""
    tok = Tokenizer(models.WordLevel({"<unk>": 0, "is": 1}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tok.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"the tokenizer cannot spell [0-9]{7}, so no answer can be right"):
        NeedleTask(tmp_path, 10, 1, 2000, haystack).sample(0)


def test_sentences() -> None:
    words = " ".join(map(str, range(95)))
    assert list(split_sentences("A b.  C?\n\nD e")) == ["A b.", "C?", "D e"]
    assert [len(part.split()) for part in split_sentences(words)] == [40, 40, 15]
    assert " ".join(split_sentences(words)) == words
    with pytest.raises(UserError, match="nothing holds no text to hide needles in"):
        Haystack(" \n", "nothing")


def test_haystack_of_shards(corpus: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text of the first documents, to the most tokens."""
    source, tok = TokenSource(corpus.folder / "held_out"), load_tokenizer(corpus.tokenizer)
    texts = [json.loads(line)["text"] for line in corpus.texts["held_out"].read_text().splitlines()]
    everything = Haystack.of_source(source, tok, "held out")
    assert everything.text == " ".join("\n".join(texts).split())
    monkeypatch.setattr(needle, "HAYSTACK_TOKENS", 500)
    part = Haystack.of_source(source, tok, "held out")
    assert everything.text.startswith(part.text)
    assert len(tok.encode(part.text, add_special_tokens=False).ids) == pytest.approx(500, rel=0.2)


def test_words() -> None:
    """Each once, plain letters: a key has one hyphen."""
    for words in (ADJECTIVES, NOUNS):
        assert len(set(words)) == len(words) > 200
        assert all(word.isascii() and word.isalpha() and word.islower() for word in words)


def test_keys_run_out() -> None:
    """More keys than two words can make are refused, not repeated."""
    facts = needle._Facts(KINDS[2], np.random.default_rng(0), None)
    count = len(ADJECTIVES) * len(NOUNS)
    assert len({facts(number)[0] for number in range(count)}) == count
    with pytest.raises(UserError, match="use kinds 1 and 3"):
        facts(count)
