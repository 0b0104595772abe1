"""Decode generated tokens to text as they arrive, and stop at given strings.

A character of several tokens is given out whole. Text that may be the beginning of a stop string is held back until it
is certain to be none, so that no part of a stop string is printed.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from trinity.errors import UserError
from trinity.evaluation.generate import Generation


class Piece(NamedTuple):
    """Text of one row that has become certain, in order; "" for a token whose text is not certain yet.

    end: why the row ends with this piece; None: it goes on.
    """

    row: int
    text: str
    end: Literal["stop token", "stop string", "length"] | None


def stream_texts(generation: Generation, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> Iterator[Piece]:
    """The text of each row, without its stop token or stop string; one piece for each new token.

    Args:
        stop: strings that end a row.
    Raises:
        UserError: a stop string is empty.
    """
    streams = [TextStream(tokenizer, stop) for _ in generation.prompts]
    left = [generation.max_new_tokens] * len(streams)
    for row, token in generation:
        stream = streams[row]
        left[row] -= 1
        if token in generation.stop_ids:
            yield Piece(row, stream.close(), "stop token")
            continue
        text = stream.push(token)
        if stream.stopped:
            generation.finish(row)
            yield Piece(row, text, "stop string")
        elif left[row]:
            yield Piece(row, text, None)
        else:
            yield Piece(row, text + stream.close(), "length")


class TextStream:
    """The text of one row.

    Args:
        tokenizer: of the tokens; special tokens are left out.
        stop: strings that end the text, which they are not part of.
    Raises:
        UserError: a stop string is empty.

    Attributes:
        stopped: whether a stop string was found; from then on there is no text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if not all(stop):
            raise UserError("a stop string is empty; leave it out")
        self._tokenizer, self._stop, self.stopped = tokenizer, tuple(stop), False
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._held = ""

    def push(self, token: int) -> str:
        """The text that is certain with this token; "" while its bytes form no character."""
        if self.stopped:
            return ""
        text = self._held + (self._decoder.step(self._tokenizer, token) or "")
        places = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        certain = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[certain:]
        return text[:certain]

    def close(self) -> str:
        """The text held back, at the end of the row; bytes that form no character are dropped."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that is a beginning of `stop`, but not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
