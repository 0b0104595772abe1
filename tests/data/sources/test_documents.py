"""Documents: reading from any position, offsets, and the memory for large rows."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.small_files import TEXTS
from trinity.data.sources.documents import BEGINNING, Document, Position, read_batches, read_documents
from trinity.data.sources.inputs import expand_inputs


@pytest.mark.parametrize("start", [(0, 0), (0, 9), (1, 0), (1, 4), (2, 0), (3, 5), (4, 19), (5, 0)])
def test_reading_starts_at_any_position(folder: Path, start: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The remaining documents and their offsets are the same, for any batch size."""
    inputs = expand_inputs([folder], kind="all")
    every = list(read_documents(inputs))
    assert [document.text for document in every] == TEXTS
    for size in (1, 100, 1 << 18):
        monkeypatch.setattr("trinity.data.sources.documents.BATCH_BYTES", size)
        documents = list(read_documents(inputs, start=Position(*start)))
        assert [without_progress(d) for d in documents] == [without_progress(d) for d in every if d.position >= start]
        assert [d.bytes_read for d in documents] == sorted(d.bytes_read for d in documents)


def without_progress(document: Document) -> tuple:
    return document.text, document.position, document.offset


def test_offsets_are_the_beginnings_of_documents(folder: Path) -> None:
    """A line read alone at its offset is the document; a row's offset is its number."""
    inputs = expand_inputs([folder], kind="all")
    plain = inputs[0].read_bytes()
    packed = gzip.decompress(inputs[1].read_bytes())
    for document in read_documents(inputs):
        if document.position.file in (0, 1):
            line = (plain, packed)[document.position.file][document.offset :].partition(b"\n")[0]
            assert json.loads(line)["text"] == document.text
        elif document.position.file in (2, 4):
            assert document.offset == document.position.item


def test_large_rows_are_few_at_once(tmp_path: Path) -> None:
    """A thousand rows of a megabyte would be a gigabyte."""
    path = tmp_path / "a.parquet"
    rows = [f"{number}" + "x" * (1 << 16) for number in range(40)]
    table = pyarrow.table({"n": list(range(40)), "text": rows})
    pyarrow.parquet.write_table(table, path, use_dictionary=False, compression="none")
    assert [len(batch.items) for batch in read_batches([path], "text", BEGINNING)] == [3] * 13 + [1]
