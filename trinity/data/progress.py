"""A progress bar over documents that are read: bytes of the input files, with the speed and the time left."""

import sys
from collections.abc import Iterator

from tqdm import tqdm

from trinity.data.documents import Document, Files, read_documents
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
