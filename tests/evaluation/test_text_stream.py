"""Text arrives whole characters at a time, adds up to the decoded tokens, and ends before a stop string."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from trinity.data.tokenizer.tokenizer import train_tokenizer
from trinity.errors import UserError
from trinity.evaluation.text_stream import Piece, TextStream, stream_texts

TEXT = "naïve 東京 café 🙂🙃 — the end"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Almost no merges: a character outside ASCII takes several tokens."""
    return train_tokenizer(["the end of the text and the end of the day"] * 3, 264)


def pieces_of(tokenizer: Tokenizer, tokens: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(tokenizer, stop)
    return [*(stream.push(token) for token in tokens), stream.close()]


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_characters_are_whole(tokenizer: Tokenizer) -> None:
    tokens = ids_of(tokenizer, TEXT)
    pieces = pieces_of(tokenizer, tokens)
    assert "".join(pieces) == TEXT
    assert len(tokens) > len(TEXT)
    assert not any("\ufffd" in piece for piece in pieces)
    assert "🙂" in pieces, "as soon as its last byte is there"


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(0, 263), max_size=30))
def test_any_tokens_add_up(tokenizer: Tokenizer, tokens: list[int]) -> None:
    """Bytes that form no character in between are as in the decoded text; at the end they are dropped."""
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    assert "".join(pieces_of(tokenizer, tokens)).rstrip("\ufffd") == whole.rstrip("\ufffd")


@pytest.mark.parametrize("stop", [("the",), ("🙃",), ("end", "café"), ("京 ca",), ("nothing", "e end")])
def test_stop_strings(tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
    """The earliest of them ends the text; what only begins like one is printed."""
    pieces = pieces_of(tokenizer, ids_of(tokenizer, TEXT), stop)
    assert "".join(pieces) == TEXT[: min(TEXT.index(s) for s in stop if s in TEXT)]


def test_a_beginning_of_a_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    """ "en" may become "end"; when it becomes "ent", it is text; at the end of the tokens it is text as well."""
    stream = TextStream(tokenizer, ["end", "en en"])
    parts = [[*map(stream.push, ids_of(tokenizer, part))] for part in ("a ", "e", "n", "t ", "en")]
    assert ["".join(part) for part in parts] == ["a ", "", "", "ent ", ""]
    assert stream.close() == "en"
    assert not stream.stopped


def test_an_empty_stop_string_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="a stop string is empty"):
        TextStream(tokenizer, ["a", ""])


class Scripted:
    """A Generation of given tokens, a row that is finished from outside included."""

    max_new_tokens, stop_ids = 6, frozenset([1])

    def __init__(self, rows: list[list[int]]) -> None:
        self.prompts, self._rows, self._finished = [[0]] * len(rows), rows, set[int]()

    def finish(self, row: int) -> None:
        self._finished.add(row)

    def __iter__(self):
        for number in range(self.max_new_tokens):
            for row, tokens in enumerate(self._rows):
                if row not in self._finished and number < len(tokens):
                    yield row, tokens[number]


def test_rows_end_for_their_reason(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A stop token, a stop string, the number of tokens: the text ends before the first two."""
    letter = {text: ids_of(tokenizer, text)[0] for text in "abcxyz"}
    rows = [[letter["a"], 1], [letter[c] for c in "abxyzz"], [letter[c] for c in "aaaabx"]]
    pieces = list(stream_texts(Scripted(rows), tokenizer, ["xy"]))
    texts = ["".join(piece.text for piece in pieces if piece.row == row) for row in range(3)]
    assert texts == ["a", "ab", "aaaabx"]
    assert [piece for piece in pieces if piece.end] == [
        Piece(0, "", "stop token"), Piece(1, "", "stop string"), Piece(2, "x", "length"),
    ]  # fmt: skip
    assert len(pieces) == 2 + 4 + 6
