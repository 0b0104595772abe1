"""Small sources with known tokens, and a small tokenizer."""

import argparse
import inspect
import json
import random
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from trinity.data.prepare.shard_writer import ShardWriter
from trinity.data.sources.documents import Position
from trinity.data.sources.shards import VERSION, TokenSource, token_dtype
from trinity.data.tokenizer.tokenizer import save_tokenizer, train_tokenizer

BOS_ID = 0


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Real text, with something of every script that the pre-tokenisation names."""
    modules = [inspect.getsource(module) for module in (json, textwrap, argparse)]
    return [*modules, "Zahlen 1234567 日本語のテキスト ภาษาไทย 한국어 " * 20]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A tokenizer of 700 ids, saved."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(texts, 700), folder)
    return folder


@pytest.fixture(scope="session")
def random_documents() -> Callable[[int, int, int], list[list[int]]]:
    """(count, longest, seed) → documents of 1 to `longest` tokens, BOS first, the others from 1 to 99."""

    def make(count: int, longest: int, seed: int) -> list[list[int]]:
        numbers = random.Random(seed)
        lengths = [numbers.randint(1, longest) for _ in range(count)]
        return [[BOS_ID, *(numbers.randint(1, 99) for _ in range(length - 1))] for length in lengths]

    return make


@pytest.fixture(scope="session")
def make_source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TokenSource]:
    """Documents of given ids, written as shards in a folder of their own and opened."""

    def make(name: str, documents: list[list[int]], shard_tokens: int = 100, **header: object) -> TokenSource:
        values = {"version": VERSION, "vocab_size": 100, "bos_id": BOS_ID, "tokenizer": "none", **header}
        values["dtype"] = token_dtype(values["vocab_size"]).str
        folder = tmp_path_factory.mktemp(name)
        writer = ShardWriter(folder, values, shard_tokens, [])
        for item, ids in enumerate(documents):
            writer.add(np.array(ids), 3 * len(ids), Position(0, item))
        writer.finish(Position(1, 0))
        return TokenSource(folder)

    return make
