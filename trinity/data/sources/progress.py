"""Progress over documents that are read: bytes of the input files, with the speed and the time left."""

from collections.abc import Iterator, Sequence

from trinity.data.sources.documents import AnyPaths, Document, read_documents
from trinity.data.sources.find_files import names, note
from trinity.io.remote import size_of
from trinity.terminal import Progress


def read_with_bar(files: AnyPaths, field: str, title: str, show: bool) -> Iterator[Document]:
    """The documents of read_documents, with progress on stderr where `show` says so."""
    with Progress(title, sum(map(size_of, files)), "B", show, scaled=True) as progress:
        for document in read_documents(files, field):
            yield document
            progress.update_to(document.bytes_read)


def noting_empty_files(documents: Iterator[Document], files: AnyPaths) -> Iterator[Document]:
    """The documents of the files; when they are through, files without text are named on stderr."""
    counts = [0] * len(files)
    for document in documents:
        counts[document.place.file] += bool(document.text)
        yield document
    say_empty_files(files, counts)


def say_empty_files(files: AnyPaths, counts: Sequence[int]) -> None:
    """Name the files without text on stderr.

    Args:
        files: that were read.
        counts: documents with text in each of the first files; those after them have none.
    """
    counts = [*counts, *[0] * (len(files) - len(counts))]
    empty = [path for path, count in zip(files, counts) if not count]
    if empty and len(empty) < len(files):  # where all are, that is an error
        note(f"files without any text: {len(empty):,} of {len(files):,} ({names(empty)})")
