"""Progress over documents that are read: bytes of the input files, with the speed and the time left."""

from collections.abc import Iterator

from trinity.data.documents import Document, Files, read_documents
from trinity.data.remote import size_of
from trinity.terminal import Progress


def read_with_bar(files: Files, field: str, title: str, show: bool) -> Iterator[Document]:
    """The documents of read_documents, with progress on stderr where `show` says so."""
    with Progress(title, sum(map(size_of, files)), "B", show, scaled=True) as progress:
        for document in read_documents(files, field):
            yield document
            progress.update_to(document.bytes_read)
