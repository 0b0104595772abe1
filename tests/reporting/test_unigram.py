"""Unigram entropies of a run's data sets."""

from pathlib import Path

import pytest

from trinity.config.load import load_config
from trinity.reporting import unigram


def test_data_sets_without_an_entropy(uninterrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text, URLs and large sets have none; the training mixture has one if no phase changes it."""
    config = load_config(uninterrupted / "config.yaml")
    config.data.phases = []
    assert set(unigram.unigram_entropies(config)) == {"training", "validation held_out"}
    monkeypatch.setattr(unigram, "MAX_TOKENS", 1)
    assert unigram.unigram_entropies(config) == {}
    config.data.train, config.data.validation = {"a": "s3://bucket/shards"}, {"b": "mine.txt"}
    assert unigram.unigram_entropies(config) == {}
