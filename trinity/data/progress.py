"""A progress bar over documents that are read: bytes of the input files, with the speed and the time left."""

import sys
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from trinity.data.documents import Document, Files, read_documents
from trinity.data.find_files import names, say
from trinity.data.remote import size_of


def read_with_bar(files: Files, field: str, title: str, show: bool) -> Iterator[Document]:
    """The documents of read_documents, with a bar on stderr where `show` says so."""
    total = sum(map(size_of, files))
    # Into a log file a line now and then is enough.
    every = 0.5 if sys.stderr.isatty() else 30
    with tqdm(desc=title, total=total, unit="B", unit_scale=True, mininterval=every, disable=not show) as bar:
        for document in read_documents(files, field):
            yield document
            bar.update(document.bytes_read - bar.n)


def noting_empty_files(documents: Iterator[Document], files: Files) -> Iterator[Document]:
    """The documents of the files; when they are through, files without text are named on stderr."""
    counts = [0] * len(files)
    for document in documents:
        counts[document.place.file] += bool(document.text)
        yield document
    say_empty_files(files, counts)


def say_empty_files(files: Files, counts: Sequence[int]) -> None:
    """Name the files without text on stderr.

    Args:
        files: that were read.
        counts: documents with text in each of the first files; those after them have none.
    """
    counts = [*counts, *[0] * (len(files) - len(counts))]
    empty = [path for path, count in zip(files, counts) if not count]
    if empty and len(empty) < len(files):  # where all are, that is an error
        say(f"files without any text: {len(empty):,} of {len(files):,} ({names(empty)})")
