"""From text files to packed sequences: tokenizer, token shards, and the stream that a run reads."""

from trinity.data.batches import BatchPlan
from trinity.data.shards import TokenSource
from trinity.data.stream import SequenceStream

__all__ = ["BatchPlan", "SequenceStream", "TokenSource"]
