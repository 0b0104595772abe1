"""The interface of a source: documents as token ids, in any storage format."""

from typing import Protocol

import numpy as np


class Source(Protocol):
    """Documents as token ids: prepared shards (shards.TokenSource), or text tokenised on demand (text.TextSource).

    Attributes:
        documents, tokens: how many; BOS counts as a token.
        lookahead: documents whose lengths are requested at once.
        vocab_size, bos_id, tokenizer_fingerprint: of the tokenizer.
        fingerprint: hash of the content, 32 hexadecimal digits.
        masked: whether the documents have a loss mask (tools/prepare_data.py --chat).
        template: hash of the chat template that the documents were rendered with; None without one.

    Optional method `keep_lengths(documents, lengths)`: the loader calls it with lengths that a worker has asked for.
    """

    lookahead: int
    documents: int
    vocab_size: int
    bos_id: int
    tokenizer_fingerprint: str
    fingerprint: str
    masked: bool
    template: str | None

    @property
    def tokens(self) -> int: ...

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        """[n] int64: tokens of each of the documents [n], BOS counted."""

    def length(self, document: int) -> int:
        """Tokens of one document, BOS counted."""

    def longer_than(self, tokens: int) -> int | None:
        """Tokens of a document with more than `tokens`, as far as that is cheap to know; None if none is known."""

    def read(self, document: int, start: int, length: int) -> np.ndarray:
        """[length] ids of a document, from token `start` on."""

    def read_mask(self, document: int, start: int, length: int) -> np.ndarray:
        """[length] bool: whether each of a document's tokens from `start` on is a target of the loss; if masked."""
