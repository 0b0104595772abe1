"""What documents are made from: files, folders, globs and URLs, or a data set of the Hugging Face hub.

Both kinds answer the same five questions for prepare_data: what they are (for the header), their batches from a place
on, how much there is and in which unit (for the progress bar), and where they end.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from trinity.data.sources.documents import AnyPaths, Position, RawBatch, read_batches
from trinity.data.sources.file_kinds import READ, file_kind
from trinity.data.sources.find_files import MAGIC, Listing, choose, counted, list_folder, list_pattern, names, note
from trinity.errors import UserError
from trinity.io.checksum import identity
from trinity.io.remote import cached_folder, filesystem, located, mark_of, reached, size_of


class FileInputs:
    """Files as input, here or elsewhere."""

    unit = "B"

    def __init__(self, files: AnyPaths) -> None:
        """Files that exist, as expand_inputs finds them."""
        self.files = files
        self.header = {"inputs": [_identity(path) for path in files]}
        self.total = sum(entry["bytes"] for entry in self.header["inputs"])
        self.end = Position(len(files), 0)

    def batches(self, field: str, start: Position) -> Iterator[RawBatch]:
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
        self.end = Position(1, 0)

    def batches(self, field: str, start: Position) -> Iterator[RawBatch]:
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
                yield RawBatch(str(self), Position(0, item), item, "value", values, item + len(values))
                item += len(values)

    def __str__(self) -> str:
        config = f" --config {self.dataset.config}" if self.dataset.config else ""
        return f"--dataset {self.dataset.name}{config} --split {self.dataset.split}"


def expand_inputs(inputs: list[Path | str], option: str = "--input", kind: str | None = None) -> AnyPaths:
    """The files that paths, folders, glob patterns and URLs of them name, each once, in the order of its first mention.

    A folder gives the files in it and below, a pattern those that match, both in the order of their names and of one
    kind (see choose). What is left out of them is named on stderr, as is a file that is named twice.

    Args:
        inputs: what is named.
        option: what messages call them.
        kind: of files in folders and of patterns: text, jsonl, parquet, or all; None: the one there is.
    Raises:
        UserError: a file that does not exist or a link to none, a folder without a file, a pattern that matches
            nothing, or one that holds two kinds of data.
    """
    files: AnyPaths = []
    for given in map(located, inputs):
        files += _local(given, option, kind) if isinstance(given, Path) else _elsewhere(given, option, kind)
    return _each_once(files, option)


def holds_text(given: Path | str) -> bool:
    """Whether a source is files of text, in the sense of expand_inputs; otherwise it is, or is to be, token shards."""
    place = located(given)
    if isinstance(place, str):
        return _text_elsewhere(place)
    if place.is_dir():
        return not _begins_shards(place) and any(map(file_kind, list_folder(place).files))
    return place.is_file() or _names_text(place)


def _begins_shards(folder: Path) -> bool:
    indexes = [folder / name for name in ("index.json", "progress.json")]
    return any(folder.glob("shard_*.*")) or any(b'"shards"' in path.read_bytes() for path in indexes if path.is_file())


def _names_text(place: Path | str) -> bool:
    """Whether a name alone says that it is text, wherever it is and whether it is there."""
    kind = file_kind(place)
    data = kind is not None and kind.name != "text"
    return data or bool(MAGIC & set(str(place))) or str(place).lower().endswith(".txt")


def _text_elsewhere(url: str) -> bool:
    if _names_text(url):
        return True
    if url.startswith("http") or (cached_folder(url) / "index.json").exists():
        return False  # whether a page is a folder means to load it; and shards that are here need no network
    files, name = filesystem(url)
    with reached(url):
        return files.isfile(name) or (files.isdir(name) and not files.exists(f"{name.rstrip('/')}/index.json"))


def _local(path: Path, option: str, kind: str | None) -> list[Path]:
    where = f"{option} {path}"
    if path.is_dir():
        return _chosen(list_folder(path), kind, where, f"holds no file that is read; give {READ}", str(path))
    if not path.exists() and MAGIC & set(str(path)):
        return _chosen(list_pattern(str(path)), kind, where, "matches no file; check the pattern")
    check_inputs([path], option)
    return [path]


def _elsewhere(url: str, option: str, kind: str | None) -> list[str]:
    files, name = filesystem(url)
    protocol = url.partition("://")[0]
    with reached(url):
        # An address with ? is one file for a web server.
        if MAGIC & set(name) and not protocol.startswith("http"):
            listing = Listing(sorted(path for path in files.glob(name) if files.isfile(path)), [], [])
            found = _chosen(listing, kind, f"{option} {url}", "matches no file; check the pattern")
        elif files.isfile(name):  # asked first: of a web server, whether a page is a folder means to load it
            return [url]
        elif files.isdir(name):
            listing = _remote_listing(files.find(name), name)
            found = _chosen(listing, kind, f"{option} {url}", f"holds no file that is read; give {READ}", name)
        else:
            raise UserError(f"{option} {url} does not exist; check the address")
        return [path if "://" in path else f"{protocol}://{path}" for path in found]


def _remote_listing(paths: list[str], folder: str) -> Listing:
    hidden = [path for path in paths if "/." in "/" + path.removeprefix(folder).strip("/")]
    return Listing(sorted(set(paths) - set(hidden)), sorted(hidden), [])


def _chosen(listing: Listing, kind: str | None, where: str, otherwise: str, folder: str = "") -> list:
    """The files of one kind; says what is left out.

    Raises:
        UserError: none is left, with the words of `otherwise`; one that is taken is a link to nothing.
    """
    taken, left = choose(listing.files, kind, where)
    left |= {"hidden": listing.hidden, "pipe or device": listing.other}
    if not taken:
        found = counted(left, folder)
        raise UserError(f"{where} {otherwise}" + (f" (found {found})" if found else ""))
    for path in taken:
        if isinstance(path, Path) and not path.exists():
            raise UserError(f"{where}: {path} is a link to a file that does not exist; mend the link, or remove it")
    if any(left.values()):
        note(f"{where}: files that are read: {len(taken):,}; left out: {counted(left, folder)}")
    return taken


def _each_once(files: AnyPaths, option: str) -> AnyPaths:
    first: dict[Path | str, Path | str] = {}
    twice = []
    for path in files:
        if first.setdefault(_resolved(path), path) is not path:
            twice.append(path)
    if twice:
        note(f"{option}: named more than once and read once: {len(twice):,} ({names(twice)})")
    return list(first.values())


def _resolved(path: Path | str) -> Path | str:
    if isinstance(path, Path):
        return path.resolve()
    return path.partition("://")[0] + "://" + filesystem(path)[1].lstrip("/")


def _identity(path: Path | str) -> dict[str, str | int]:
    """What a file is recognised by when a command is run again (see identity)."""
    if isinstance(path, Path):
        return identity(path)
    return {"name": path.rpartition("/")[2], "bytes": size_of(path), "sample": mark_of(path)}


def check_inputs(inputs: list[Path], option: str = "--input") -> None:
    """Raises UserError for an input that is missing or is no file."""
    for path in inputs:
        if path.is_dir():
            raise UserError(f"{option} {path} is a folder; name the files in it")
        if not path.exists():
            raise UserError(f"{option} {path} does not exist; check the path")
