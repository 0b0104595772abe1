"""Token shards to be read from a remote store: the fixtures of tests/data."""

from tests.data.conftest import make_source, random_documents

__all__ = ["make_source", "random_documents"]
