"""What documents are made from: files, folders, globs and URLs, or a data set of the Hugging Face hub.

Both kinds answer the same five questions for prepare_data: what they are (for the header), their batches from a place
on, how much there is and in which unit (for the progress bar), and where they end.
"""

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from trinity.data.documents import NOT_TEXT, READ, Batch, Files, Place, read_batches
from trinity.data.files import check_inputs
from trinity.data.remote import filesystem, located, mark_of, reached, size_of
from trinity.errors import UserError
from trinity.io.checksum import identity
from trinity.io.local import SUFFIX

GLOB = set("*?[")


class FileInputs:
    """Files as input, here or elsewhere."""

    unit = "B"

    def __init__(self, files: Files) -> None:
        """Files that exist, as expand_inputs finds them."""
        self.files = files
        self.header = {"inputs": [_identity(path) for path in files]}
        self.total = sum(entry["bytes"] for entry in self.header["inputs"])
        self.end = Place(len(files), 0)

    def batches(self, field: str, start: Place) -> Iterator[Batch]:
        """See read_batches."""
        return read_batches(self.files, field, start)

    def __str__(self) -> str:
        return "--input " + ", ".join(map(str, self.files))


class Dataset(NamedTuple):
    """A data set's name on the Hugging Face hub or its folder, its configuration, and which part of it."""

    name: str
    config: str | None = None
    split: str = "train"


class DatasetInput:
    """A data set as input, streamed: one row at a time, nothing is stored."""

    unit = "documents"
    ROWS = 64

    def __init__(self, dataset: Dataset) -> None:
        """Look the data set up.

        Raises:
            UserError: it cannot be found or has no such part.
        """
        from datasets import load_dataset_builder

        self.dataset = dataset
        try:
            builder = load_dataset_builder(dataset.name, dataset.config)
            self._rows = builder.as_streaming_dataset(split=dataset.split)
        except Exception as error:  # of any kind: no network, no such name, files of unknown kinds
            reason = " ".join(str(error).split())
            raise UserError(
                f"{self} cannot be opened ({reason}); check --dataset, --config and --split, and the network"
            ) from error
        # The hash changes with the commit on the hub, and with the times of local files.
        self.header = {"dataset": {**dataset._asdict(), "version": builder.hash}}
        split = (builder.info.splits or {}).get(dataset.split)
        self.total = split.num_examples if split is not None else None
        self.end = Place(1, 0)

    def batches(self, field: str, start: Place) -> Iterator[Batch]:
        """The values of the column `field`, from an item on.

        Raises:
            UserError: there is no such column.
        """
        with reached(str(self)):
            columns = self._rows.column_names or list(next(iter(self._rows), {field: None}))
            if field not in columns:
                raise UserError(f"{self} has no column {field}; set --field to one of: {', '.join(columns)}")
            item = start.item
            for rows in self._rows.select_columns([field]).skip(item).iter(self.ROWS):
                values = rows[field]
                yield Batch(str(self), Place(0, item), item, "value", values, item + len(values))
                item += len(values)

    def __str__(self) -> str:
        config = f" --config {self.dataset.config}" if self.dataset.config else ""
        return f"--dataset {self.dataset.name}{config} --split {self.dataset.split}"


def expand_inputs(inputs: list[Path | str], option: str = "--input") -> Files:
    """The files that paths, folders, glob patterns and URLs of them name.

    A folder gives all files in it and below whose kind is read, but no hidden ones; folders and patterns in the order
    of the names.

    Raises:
        UserError: a file that does not exist, a folder without a file, a pattern that matches nothing.
    """
    files: Files = []
    for given in map(located, inputs):
        files += _local(given, option) if isinstance(given, Path) else _elsewhere(given, option)
    return files


def _local(path: Path, option: str) -> list[Path]:
    if path.is_dir():
        below = sorted(file for file in path.rglob("*") if file.is_file() and _wanted(str(file.relative_to(path))))
        return _some(below, f"{option} {path} holds no file that is read; give {READ}")
    if not path.exists() and GLOB & set(str(path)):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        return _some(found, f"{option} {path} matches no file; check the pattern")
    check_inputs([path], option)
    return [path]


def _elsewhere(url: str, option: str) -> list[str]:
    files, name = filesystem(url)
    protocol = url.partition("://")[0]
    with reached(url):
        # An address with ? is one file for a web server.
        if GLOB & set(name) and not protocol.startswith("http"):
            found = sorted(path for path in files.glob(name) if files.isfile(path))
            found = _some(found, f"{option} {url} matches no file; check the pattern")
        elif files.isfile(name):  # asked first: of a web server, whether a page is a folder means to load it
            return [url]
        elif files.isdir(name):
            inside = files.find(name)
            found = sorted(path for path in inside if _wanted(path.removeprefix(name).strip("/")))
            found = _some(found, f"{option} {url} holds no file that is read; give {READ}")
        else:
            raise UserError(f"{option} {url} does not exist; check the address")
        return [path if "://" in path else f"{protocol}://{path}" for path in found]


def _wanted(name: str) -> bool:
    """Whether a file in a folder is taken, by its path in it."""
    hidden = any(part.startswith(".") for part in Path(name).parts)
    read = name.endswith((".jsonl.gz", ".jsonl.zst")) or not name.endswith((*NOT_TEXT, SUFFIX))
    return read and not hidden


def _some(files: list, otherwise: str) -> list:
    if not files:
        raise UserError(otherwise)
    return files


def _identity(path: Path | str) -> dict[str, str | int]:
    """What a file is recognised by when a command is run again (see identity)."""
    if isinstance(path, Path):
        return identity(path)
    return {"name": path.rpartition("/")[2], "bytes": size_of(path), "sample": mark_of(path)}
