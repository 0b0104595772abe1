"""Cutting huge documents: the ids are those of the whole text, for any text and any cut."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from trinity.data.prepare import tokenize
from trinity.data.prepare.prepare import prepare_data
from trinity.data.prepare.tokenize import Encoder, cut
from trinity.data.sources.documents import BEGINNING, RawBatch
from trinity.data.sources.shards import TokenSource
from trinity.data.tokenizer.tokenizer import BOS, bos_id, load_tokenizer

CHARACTERS = st.sampled_from("ab Z\n\t 12,.'。日本ไ한́_\r")


@pytest.fixture(scope="module")
def tok(tokenizer_dir: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_dir)


def ids(tok: Tokenizer, text: str) -> list[int]:
    return tok.encode(text, add_special_tokens=False).ids


@settings(derandomize=True, deadline=None, max_examples=150)
@given(text=st.text(CHARACTERS, max_size=80), size=st.integers(1, 20), context=st.sampled_from([3, 16]))
def test_pieces_have_the_ids_of_the_whole(tok: Tokenizer, text: str, size: int, context: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "PIECE_CHARACTERS", size)
        patch.setattr(tokenize, "CUT_CONTEXT", context)
        pieces = list(cut(text, tok))
    assert "".join(pieces) == text
    assert [token for piece in pieces for token in ids(tok, piece)] == ids(tok, text)


def test_real_text_is_cut(tok: Tokenizer, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "PIECE_CHARACTERS", 1000)
    text = "".join(texts)
    pieces = list(cut(text, tok))
    assert max(map(len, pieces)) < 1500
    assert [token for piece in pieces for token in ids(tok, piece)] == ids(tok, text)


def test_a_pickled_encoder_is_the_same(tokenizer_dir: Path) -> None:
    """As it is sent to spawned workers: special tokens in a text are text there too."""
    encoder = Encoder(load_tokenizer(tokenizer_dir), np.dtype("<u2"), "text", skip_bad=False, hashed=True)
    batch = RawBatch("a", BEGINNING, 0, "value", [f"a {BOS} b", "", "c"], 3)
    original, unpickled = encoder([batch]), pickle.loads(pickle.dumps(encoder))([batch])
    assert original.ids.tolist().count(encoder.bos) == 2
    for value, other_value in zip(original, unpickled):
        assert np.array_equal(value, other_value)


def without_cuts() -> dict[str, Tokenizer]:
    """Tokenizers whose tokens go over white space, or whose normalizer may."""
    spaced, normalized = (Tokenizer(models.BPE()) for _ in range(2))
    spaced.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    normalized.pre_tokenizer = pre_tokenizers.ByteLevel()
    normalized.normalizer = normalizers.NFC()
    return {"no pre-tokenizer": Tokenizer(models.BPE()), "over spaces": spaced, "normalizer": normalized}


@pytest.mark.parametrize("kind", without_cuts())
def test_other_tokenizers_get_the_text_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "PIECE_CHARACTERS", 10)
    assert list(cut("some words " * 20, without_cuts()[kind])) == ["some words " * 20]


def test_a_document_longer_than_a_shard(tmp_path: Path, tok: Tokenizer, tokenizer_dir: Path) -> None:
    """Half a megabyte of words, two pieces long: one shard of its own with the ids of the whole text."""
    words = "".join(f"word{number} " for number in range(50_000))
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("before", words, "after")))
    index, _ = prepare_data([path], tokenizer_dir, tmp_path / "out", shard_tokens=100, workers=1)
    assert [entry["documents"] for entry in index["shards"]] == [1, 1, 1]
    source = TokenSource(tmp_path / "out")
    assert np.array_equal(source.read(1, 0, source.length(1)), [bos_id(tok), *ids(tok, words)])
