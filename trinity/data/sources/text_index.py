"""An index of where each document of text files begins, so that any document can be read without those before it.

It is built once by reading all inputs, and kept in a cache folder, where the next start maps it into memory: no cost
for 10⁷ documents, and no Python object per document. It depends on the files and the field, not on the tokenizer.

    index.json   format, hash of the content, documents and bytes of text, checksums of both arrays; written last
    offsets      int64 [documents]: the beginning of each document: byte in a file, row in a Parquet file
    first        int64 [files + 1]: the first document of each file, then the number of documents

Documents without text are left out, as in shards: document i of the index is document i of the shards.
"""

from array import array
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from trinity.data.sources.documents import Document, read_with_progress
from trinity.data.sources.shards import AUTO_VERIFY_BYTES
from trinity.errors import UserError
from trinity.io.checksum import content_hash, identity, new_hash
from trinity.io.json_files import read_json, to_json, write_json
from trinity.io.local import atomic_file, file_lock, make_folder

VERSION = 2
OFFSET = np.dtype("<i8")
KEYS = {"version", "documents", "text_bytes", "content", "checksums"}
ARRAYS = ("offsets", "first")


class TextIndex:
    """The index of some files; arrays are mapped on first use, and again after pickling.

    Attributes:
        files: in the order of their documents.
        stamps: size and time of each when it was indexed (see stamp).
        documents: how many have text.
        text_bytes: bytes of the text in UTF-8.
        content: hash of the files' identities and the field, independent of their folder.
    """

    def __init__(self, folder: Path, files: list[Path], stamps: list[tuple[int, int]], header: dict) -> None:
        """Called by open_index for a complete folder."""
        self.folder, self.files, self.stamps = folder, files, stamps
        self.documents, self.text_bytes = header["documents"], header["text_bytes"]
        self.content = header["content"]

    @cached_property
    def offsets(self) -> np.ndarray:
        """[documents] int64, read-only."""
        return np.memmap(self.folder / "offsets", OFFSET, mode="r")

    @cached_property
    def first(self) -> np.ndarray:
        """[files + 1] int64, read-only."""
        return np.memmap(self.folder / "first", OFFSET, mode="r")

    def locate(self, document: int) -> tuple[int, int]:
        """(number of the file, beginning of the document in it)."""
        assert 0 <= document < self.documents
        return int(np.searchsorted(self.first, document, side="right")) - 1, int(self.offsets[document])

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ARRAYS}


def open_index(files: list[Path], field: str, cache: Path, progress: bool = False) -> TextIndex:
    """The index of the files from the cache folder; built first if it is missing or damaged.

    Of several processes that open it at once, one builds it and the others wait.

    Args:
        files: existing files.
        field: name of the text in a JSON line or Parquet row.
        cache: folder for indexes of any files, created if missing.
        progress: draw a bar on stderr while it is built.
    Raises:
        UserError: bad files (see read_documents), no document with text, or a file that is being written.
    """
    stamps = [stamp(path) for path in files]
    names = [str(path.resolve()) for path in files]
    folder = cache / "text" / _hash([VERSION, field, names, stamps])
    header = _complete_header(folder, len(files))
    if header is None:
        make_folder(folder)
        with file_lock(folder / "lock"):
            header = _complete_header(folder, len(files)) or _build(folder, files, stamps, field, progress)
    return TextIndex(folder, files, stamps, header)


def stamp(path: Path) -> tuple[int, int]:
    """Detects a change of a file: its size and modification time in nanoseconds."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _complete_header(folder: Path, files: int) -> dict | None:
    """The content of index.json, or None if it or one of the arrays is missing or damaged."""
    try:
        header = read_json(folder / "index.json")
    except UserError:
        return None
    if header is None or header.keys() != KEYS or any(not (folder / name).is_file() for name in ARRAYS):
        return None
    sizes = {"offsets": OFFSET.itemsize * header["documents"], "first": OFFSET.itemsize * (files + 1)}
    if any((folder / name).stat().st_size != sizes[name] for name in ARRAYS):
        return None
    small = sum(sizes.values()) < AUTO_VERIFY_BYTES
    if small and any(content_hash(folder / name) != header["checksums"].get(name) for name in ARRAYS):
        return None
    return header


def _build(folder: Path, files: list[Path], stamps: list[tuple[int, int]], field: str, progress: bool) -> dict:
    (folder / "index.json").unlink(missing_ok=True)
    offsets, first, text_bytes = _scan(read_with_progress(files, field, "indexing text", progress), len(files))
    if not offsets:
        raise UserError(f"{', '.join(map(str, files))}: no document with text; give a file that holds one")
    content = _hash([field, [identity(path) for path in files]])
    for path, before in zip(files, stamps):
        if stamp(path) != before:
            raise UserError(f"{path} was written to while it was read; start again when it is finished")
    header = {
        "version": VERSION,
        "documents": len(offsets),
        "text_bytes": text_bytes,
        "content": content,
        "checksums": {name: _write(folder / name, values) for name, values in zip(ARRAYS, (offsets, first))},
    }
    write_json(folder / "index.json", header)
    return header


def _scan(documents: Iterator[Document], files: int) -> tuple[array, array, int]:
    """(offsets, first, bytes of text) of the documents with text."""
    offsets, text_bytes = array("q"), 0
    counts = np.zeros(files, np.int64)
    for document in documents:
        if document.text:
            offsets.append(document.offset)
            text_bytes += len(document.text.encode())
            counts[document.position.file] += 1
    return offsets, array("q", [0, *np.cumsum(counts).tolist()]), text_bytes


def _write(path: Path, values: array) -> str:
    """Write an array atomically; returns its checksum."""
    with atomic_file(path) as file:
        file.write(np.frombuffer(values, np.int64).astype(OFFSET, copy=False).data)
    return content_hash(path)


def _hash(value: object) -> str:
    digest = new_hash()
    digest.update(to_json(value).encode())
    return digest.hexdigest()
