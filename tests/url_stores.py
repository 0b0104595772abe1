"""File systems for tests of what lies elsewhere: one without rename, as object stores are, and ones that fail."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem


class NoRename(LocalFileSystem):
    """norename:///folder/file is a local file that cannot be renamed; listings are remembered until one says not to."""

    protocol = "norename"
    fail: Callable[[str, str], Exception | None] = staticmethod(lambda verb, path: None)
    """What a request ends with, given its verb and path; None: it does as it should."""

    def __init__(self, *words: Any, **more: Any) -> None:
        super().__init__(*words, **more)
        self._remembered: dict = {}

    def invalidate_cache(self, path: str | None = None) -> None:
        """Look again."""
        self._remembered = {}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("norename://"))

    def unstrip_protocol(self, name: str) -> str:
        """The URL of a path."""
        return f"norename://{self._strip_protocol(name)}"

    def info(self, path: str, **words: Any) -> dict:
        """Size and kind."""
        self._may("info", path)
        return self._once(("info", str(path)), lambda: LocalFileSystem.info(self, path, **words))

    def ls(self, path: str, detail: bool = False, **words: Any) -> list:
        """What is in a folder."""
        self._may("ls", path)
        return self._once(("ls", path, detail), lambda: LocalFileSystem.ls(self, path, detail=detail, **words))

    def rm_file(self, path: str) -> None:
        """Delete a file."""
        self._may("rm_file", path)
        super().rm_file(path)

    def rm(self, path: str, **words: Any) -> None:
        """Delete a folder."""
        self._may("rm", path)
        super().rm(path, **words)

    def open(self, path: str, mode: str = "rb", **words: Any) -> BinaryIO:
        """A file, each of whose reads and writes is a request."""
        self._may("open", path)
        return Asking(super().open(path, mode, **words), lambda verb: self._may(verb, path))

    def _once(self, what: tuple, ask: Callable[[], Any]) -> Any:
        found = self._remembered.get(what)
        if found is None:
            try:
                found = ask()
            except FileNotFoundError as error:
                found = error
            self._remembered[what] = found
        if isinstance(found, FileNotFoundError):
            raise found
        return found

    def _may(self, verb: str, path: str) -> None:
        error = type(self).fail(verb, str(path))
        if error is not None:
            raise error

    def mv(self, *_: Any, **__: Any) -> None:
        """Not here."""
        raise NotImplementedError("this store has no rename")

    mv_file = move = rename = mv


class Asking:
    """A file whose reads and writes may fail."""

    def __init__(self, file: BinaryIO, may: Callable[[str], None]) -> None:
        self._file, self._may = file, may

    def write(self, data: bytes) -> int:
        """As the file."""
        self._may("write")
        return self._file.write(data)

    def read(self, size: int = -1) -> bytes:
        """As the file."""
        self._may("read")
        return self._file.read(size)

    def close(self) -> None:
        """As the file."""
        self._may("close")
        self._file.close()

    def __enter__(self) -> "Asking":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def register() -> None:
    """Make norename:// known in this process."""
    fsspec.register_implementation("norename", NoRename, clobber=True)


@contextmanager
def failing(fail: Callable[[str, str], Exception | None]) -> Iterator[None]:
    """Requests end with what fail(verb, path) returns."""
    before, NoRename.fail = NoRename.fail, staticmethod(fail)
    try:
        yield
    finally:
        NoRename.fail = before
