"""Small input files for prepare_data, and readers of its output."""

import json
from pathlib import Path

import pyarrow

from trinity.data.sources.shards import TokenSource
from trinity.data.tokenizer.tokenizer import bos_id, load_tokenizer

TEXTS = [f"Text number {number}, " + "日本 and more. " * (number % 5) for number in range(50)]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    """Write a line for each text; returns the path."""
    path.write_text("".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def compress_zstd(raw: bytes) -> bytes:
    """Compress as one zstd frame."""
    return pyarrow.compress(raw, codec="zstd", asbytes=True)


def tokenizer_with_gap(tokenizer: Path, folder: Path, largest: int) -> Path:
    """A tokenizer with one more token, <|gap|>, whose id leaves a gap after the others."""
    folder.mkdir()
    value = json.loads((tokenizer / "tokenizer.json").read_text())
    value["model"]["vocab"]["<|gap|>"] = largest
    value["added_tokens"].append(value["added_tokens"][0] | {"id": largest, "content": "<|gap|>"})
    (folder / "tokenizer.json").write_text(json.dumps(value))
    return folder


def read_folder(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def decode_documents(out: Path, tokenizer: Path) -> list[str]:
    """The documents' texts, each checked to begin with BOS and to hold no other."""
    tok, source = load_tokenizer(tokenizer), TokenSource(out)
    texts = []
    for document in range(source.documents):
        ids = source.read(document, 0, source.length(document)).tolist()
        assert ids[0] == bos_id(tok)
        assert bos_id(tok) not in ids[1:]
        texts.append(tok.decode(ids[1:], skip_special_tokens=False))
    return texts
