"""The tokenizer against the report's cuts, Unicode at large, and transformers."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from trinity.data.tokenizer import (
    BOS,
    EOS,
    PAD,
    bos_id,
    fingerprint,
    load_tokenizer,
    save_tokenizer,
    token_byte_lengths,
    train_tokenizer,
)
from trinity.errors import UserError

# Any text that UTF-8 can hold, with digits, scripts without spaces and white space more often than by chance.
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.text(st.sampled_from("0123456789 \r\n\tab.,!語テภາကᄀ한é́²½٣")),
)


def cuts(tok: Tokenizer, text: str) -> list[str]:
    """The pieces that BPE sees."""
    return [text[begin:end] for _, (begin, end) in tok.pre_tokenizer.pre_tokenize_str(text)]


@pytest.fixture(scope="module")
def tok(tokenizer_dir: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_dir)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("1234567", ["1", "234", "567"]),
        ("12345678", ["12", "345", "678"]),
        ("123456", ["123", "456"]),
        ("x1234 5", ["x", "1", "234", " ", "5"]),
        ("日本語 text", ["日本語", " text"]),
        ("abc日本カナdef", ["abc", "日本カナ", "def"]),
        ("ภาษาไทย한국어", ["ภาษาไทย한국어"]),
        ("x.append(y)", ["x", ".append", "(y", ")"]),
        ("a  b\n\n  c", ["a", " ", " b", "\n\n", " ", " c"]),
        ("Hello, wörld!\n", ["Hello", ",", " wörld", "!\n"]),
    ],
)
def test_cuts(tok: Tokenizer, text: str, pieces: list[str]) -> None:
    assert cuts(tok, text) == pieces


@settings(deadline=None, max_examples=200)
@given(digits=st.text(st.sampled_from("0123456789"), min_size=1, max_size=50))
def test_digits_in_threes_from_the_right(tok: Tokenizer, digits: str) -> None:
    """Python's own thousands separator cuts a number at the same places; the leading 1 keeps its zeros."""
    assert cuts(tok, "1" + digits) == f"{int('1' + digits):,}".split(",")


def test_many_digits_are_cut_in_linear_time(tok: Tokenizer) -> None:
    """Quadratic work would take minutes, so finishing is the test."""
    assert [len(piece) for piece in cuts(tok, "7" * 400_000)] == [1] + [3] * 133_333


@settings(deadline=None, max_examples=300)
@given(text=TEXTS)
def test_round_trip_and_byte_lengths(tok: Tokenizer, text: str) -> None:
    ids = tok.encode(text, add_special_tokens=False).ids
    assert tok.decode(ids) == text
    assert int(token_byte_lengths(tok)[ids].sum()) == len(text.encode())


def test_transformers_reads_the_same(tokenizer_dir: Path, tok: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(tokenizer_dir)
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == (BOS, EOS, PAD)
    assert theirs.bos_token_id == bos_id(tok)

    @settings(deadline=None, max_examples=200)
    @given(text=TEXTS)
    def same(text: str) -> None:
        plain = tok.encode(text, add_special_tokens=False).ids
        assert theirs(text)["input_ids"] == [bos_id(tok), *plain]
        assert theirs(text, add_special_tokens=False)["input_ids"] == plain
        assert theirs.decode(plain) == text

    same()


def test_special_tokens_stand_for_no_bytes(tok: Tokenizer) -> None:
    lengths_V = token_byte_lengths(tok)
    assert lengths_V.shape == (700,)
    assert (lengths_V == 0).nonzero().flatten().tolist() == [tok.token_to_id(token) for token in (BOS, EOS, PAD)]


def test_training_is_deterministic_and_exact(texts: list[str], tokenizer_dir: Path, tmp_path: Path) -> None:
    again = train_tokenizer(iter(texts), 700)
    assert again.get_vocab_size() == 700
    save_tokenizer(again, tmp_path)
    assert fingerprint(tmp_path) == fingerprint(tokenizer_dir)
    save_tokenizer(train_tokenizer(texts, 701), tmp_path)
    assert fingerprint(tmp_path) != fingerprint(tokenizer_dir)


def test_too_little_text_names_the_size_reached() -> None:
    """ "ab" and " ab" repeat: two merges and 259 ids to begin with."""
    with pytest.raises(UserError, match=r"--vocab-size 300 .* at 261; use 261 or less"):
        train_tokenizer(["ab ab ab"], 300)
    assert train_tokenizer(["ab ab ab"], 261).get_vocab_size() == 261


def test_too_small_a_vocabulary() -> None:
    with pytest.raises(UserError, match=r"--vocab-size 258 .* use 259 or more"):
        train_tokenizer(["text"], 258)


def test_missing_and_broken_folders(tmp_path: Path) -> None:
    for function in (load_tokenizer, fingerprint):
        with pytest.raises(UserError, match=re.escape(f"{tmp_path} holds no tokenizer.json")):
            function(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(UserError, match="cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)


def test_tokenizers_that_do_not_fit() -> None:
    words = Tokenizer(models.WordLevel({"日本": 0, "[UNK]": 1}, "[UNK]"))
    with pytest.raises(UserError, match=re.escape(BOS)):
        bos_id(words)
    with pytest.raises(UserError, match="not byte-level"):
        token_byte_lengths(words)
