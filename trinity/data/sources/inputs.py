"""Inputs of documents: files, folders, glob patterns and URLs, or a data set of the Hugging Face hub.

FileInputs and DatasetInput have the same members for prepare_data: `header` identifies the input in index.json,
`batches` reads it from a position on, `total` and `unit` are for the progress bar, and `end` is the position after it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from trinity.data.sources.documents import FIELD, Position, RawBatch, read_batches
from trinity.data.sources.file_formats import READ, file_kind
from trinity.data.sources.find_files import (
    MAGIC,
    Listing,
    Paths,
    choose,
    counted,
    list_folder,
    list_pattern,
    names,
    note,
)
from trinity.errors import UserError
from trinity.io.checksum import identity
from trinity.io.remote import cache_folder_of, file_size, filesystem, local_or_url, remote_errors, remote_fingerprint


class FileInputs:
    """Local and remote files as input."""

    unit = "B"

    def __init__(self, files: Paths) -> None:
        """`files` exist; expand_inputs returns them."""
        self.files = files
        self.header = {"inputs": [_identity(path) for path in files]}
        self.total = sum(int(entry["bytes"]) for entry in self.header["inputs"])
        self.end = Position(len(files), 0)

    def batches(self, field: str | None, start: Position) -> Iterator[RawBatch]:
        """See read_batches."""
        return read_batches(self.files, field, start)

    def __str__(self) -> str:
        return "--input " + ", ".join(map(str, self.files))


class Dataset(NamedTuple):
    """A data set's name on the Hugging Face hub or its folder, its configuration and its split."""

    name: str
    config: str | None = None
    split: str = "train"


class DatasetInput:
    """A data set as input, streamed without storing it."""

    unit = "documents"
    ROWS = 64

    def __init__(self, dataset: Dataset) -> None:
        """Open the data set.

        Raises:
            UserError: it cannot be found or has no such split.
        """
        from datasets import load_dataset_builder

        self.dataset = dataset
        try:
            builder = load_dataset_builder(dataset.name, dataset.config)
            self._rows = builder.as_streaming_dataset(split=dataset.split)
        except Exception as error:  # of any class: no network, no such name, unknown file formats
            reason = " ".join(str(error).split())
            raise UserError(
                f"{self} cannot be opened ({reason}); check --dataset, --config and --split, and the network"
            ) from error
        # The hash changes with the commit on the hub, and with the modification times of local files.
        self.header = {"dataset": {**dataset._asdict(), "version": builder.hash}}
        split = (builder.info.splits or {}).get(dataset.split)
        self.total = split.num_examples if split is not None else None
        self.end = Position(1, 0)

    def batches(self, field: str | None, start: Position) -> Iterator[RawBatch]:
        """The values of the column `field`, or whole rows as dictionaries, from a position on.

        Raises:
            UserError: the data set has no such column.
        """
        with remote_errors(str(self)):
            columns = self._rows.column_names or list(next(iter(self._rows), {field: None}))
            if field is not None and field not in columns:
                raise UserError(f"{self} has no column {field}; set {FIELD} to one of: {', '.join(columns)}")
            item = start.item
            table = self._rows if field is None else self._rows.select_columns([field])
            for rows in table.skip(item).iter(self.ROWS):
                values = [dict(zip(rows, row)) for row in zip(*rows.values())] if field is None else rows[field]
                yield RawBatch(str(self), Position(0, item), item, "value", values, item + len(values))
                item += len(values)

    def __str__(self) -> str:
        config = f" --config {self.dataset.config}" if self.dataset.config else ""
        return f"--dataset {self.dataset.name}{config} --split {self.dataset.split}"


def expand_inputs(inputs: list[Path | str], option: str = "--input", kind: str | None = None) -> Paths:
    """Expand paths, folders, glob patterns and URLs of them to files, each once, in the order of its first mention.

    A folder gives the files in it and below, a pattern its matches, both in the order of their names and of one kind
    (see choose). Files that are left out, and files that are named twice, are reported on stderr.

    Args:
        inputs: paths, patterns and URLs.
        option: their name in messages.
        kind: of files in folders and of patterns: text, jsonl, parquet, or all; None: the only kind of data.
    Raises:
        UserError: a missing file or a link to one, a folder without a file, a pattern without a match, or a folder or
            pattern with two kinds of data.
    """
    files: list[Path | str] = []
    for path in map(local_or_url, inputs):
        files += _expand_local(path, option, kind) if isinstance(path, Path) else _expand_url(path, option, kind)
    return _deduplicated(files, option)


def holds_text(source: Path | str) -> bool:
    """Whether a source is files of text, in the sense of expand_inputs; otherwise it is a folder of token shards."""
    path = local_or_url(source)
    if isinstance(path, str):
        return _url_holds_text(path)
    if path.is_dir():
        return not _has_shards(path) and any(map(file_kind, list_folder(path).files))
    return path.is_file() or _is_text_name(path)


def _has_shards(folder: Path) -> bool:
    indexes = [folder / name for name in ("index.json", "progress.json")]
    return any(folder.glob("shard_*.*")) or any(b'"shards"' in path.read_bytes() for path in indexes if path.is_file())


def _is_text_name(path: Path | str) -> bool:
    """Whether the name alone shows that it is text: by its ending, or because it is a pattern."""
    kind = file_kind(path)
    has_records = kind is not None and kind.name != "text"
    return has_records or bool(MAGIC & set(str(path))) or str(path).lower().endswith(".txt")


def _url_holds_text(url: str) -> bool:
    if _is_text_name(url):
        return True
    if url.startswith("http") or (cache_folder_of(url) / "index.json").exists():
        return False  # a web server would send the page to tell whether it is a folder; cached shards need no network
    files, name = filesystem(url)
    with remote_errors(url):
        return files.isfile(name) or (files.isdir(name) and not files.exists(f"{name.rstrip('/')}/index.json"))


def _expand_local(path: Path, option: str, kind: str | None) -> Paths:
    where = f"{option} {path}"
    if path.is_dir():
        return _chosen(list_folder(path), kind, where, f"holds no file that is read; give {READ}", str(path))
    if not path.exists() and MAGIC & set(str(path)):
        return _chosen(list_pattern(str(path)), kind, where, "matches no file; check the pattern")
    check_inputs([path], option)
    return [path]


def _expand_url(url: str, option: str, kind: str | None) -> Paths:
    files, name = filesystem(url)
    protocol = url.partition("://")[0]
    with remote_errors(url):
        # A web address with ? is one file, no pattern.
        if MAGIC & set(name) and not protocol.startswith("http"):
            listing = Listing(sorted(path for path in files.glob(name) if files.isfile(path)), [], [])
            paths = _chosen(listing, kind, f"{option} {url}", "matches no file; check the pattern")
        elif files.isfile(name):  # before isdir, for which a web server sends the page
            return [url]
        elif files.isdir(name):
            listing = _remote_listing(files.find(name), name)
            paths = _chosen(listing, kind, f"{option} {url}", f"holds no file that is read; give {READ}", name)
        else:
            raise UserError(f"{option} {url} does not exist; check the address")
        return [path if "://" in str(path) else f"{protocol}://{path}" for path in paths]


def _remote_listing(paths: list[str], folder: str) -> Listing:
    hidden = [path for path in paths if "/." in "/" + path.removeprefix(folder).strip("/")]
    return Listing(sorted(set(paths) - set(hidden)), sorted(hidden), [])


def _chosen(listing: Listing, kind: str | None, where: str, otherwise: str, folder: str = "") -> Paths:
    """The files of one kind; the files left out are reported on stderr.

    Raises:
        UserError: there is no file of the kind (`otherwise` ends the sentence), or one is a link to a missing file.
    """
    chosen, left = choose(listing.files, kind, where)
    left |= {"hidden": listing.hidden, "pipe or device": listing.special}
    if not chosen:
        others = counted(left, folder)
        raise UserError(f"{where} {otherwise}" + (f" (found {others})" if others else ""))
    for path in chosen:
        if isinstance(path, Path) and not path.exists():
            raise UserError(f"{where}: {path} is a link to a file that does not exist; mend the link, or remove it")
    if any(left.values()):
        note(f"{where}: files that are read: {len(chosen):,}; left out: {counted(left, folder)}")
    return list(chosen)


def _deduplicated(files: Paths, option: str) -> Paths:
    first: dict[Path | str, Path | str] = {}
    repeated = []
    for path in files:
        if first.setdefault(_resolved(path), path) is not path:
            repeated.append(path)
    if repeated:
        note(f"{option}: named more than once and read once: {len(repeated):,} ({names(repeated)})")
    return list(first.values())


def _resolved(path: Path | str) -> Path | str:
    if isinstance(path, Path):
        return path.resolve()
    return path.partition("://")[0] + "://" + filesystem(path)[1].lstrip("/")


def _identity(path: Path | str) -> dict[str, str | int]:
    """The values that identify a file when a command is run again (see identity)."""
    if isinstance(path, Path):
        return identity(path)
    return {"name": path.rpartition("/")[2], "bytes": file_size(path), "sample": remote_fingerprint(path)}


def check_inputs(inputs: list[Path], option: str = "--input") -> None:
    """Raise UserError for an input that is missing or no file."""
    for path in inputs:
        if path.is_dir():
            raise UserError(f"{option} {path} is a folder; name the files in it")
        if not path.exists():
            raise UserError(f"{option} {path} does not exist; check the path")
