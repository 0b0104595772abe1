"""From text files to packed sequences: tokenizer, token shards, and the stream that a run reads."""

from trinity.data.sources.shards import TokenSource
from trinity.data.stream.batch_schedule import BatchPlan
from trinity.data.stream.stream import SequenceStream

__all__ = ["BatchPlan", "SequenceStream", "TokenSource"]
