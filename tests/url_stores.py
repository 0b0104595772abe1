"""fsspec file systems for tests of remote paths: without rename, as object stores are, and with failing requests."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem


class NoRename(LocalFileSystem):
    """norename:///folder/file is a local file that cannot be renamed. Listings are cached until invalidate_cache."""

    protocol = "norename"
    fail: Callable[[str, str], Exception | None] = staticmethod(lambda verb, path: None)
    """(verb, path) → the exception that a request raises; None: the request succeeds."""

    def __init__(self, *words: Any, **more: Any) -> None:
        super().__init__(*words, **more)
        self._listings: dict = {}

    def invalidate_cache(self, path: str | None = None) -> None:
        """Drop the cached listings."""
        self._listings = {}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("norename://"))

    def unstrip_protocol(self, name: str) -> str:
        """The URL of a path."""
        return f"norename://{self._strip_protocol(name)}"

    def info(self, path: str, **words: Any) -> dict:
        """Size and type of a path."""
        self._raise_if_failing("info", path)
        return self._listing(("info", str(path)), lambda: LocalFileSystem.info(self, path, **words))

    def ls(self, path: str, detail: bool = False, **words: Any) -> list:
        """List a folder."""
        self._raise_if_failing("ls", path)
        return self._listing(("ls", path, detail), lambda: LocalFileSystem.ls(self, path, detail=detail, **words))

    def rm_file(self, path: str) -> None:
        """Delete a file."""
        self._raise_if_failing("rm_file", path)
        super().rm_file(path)

    def rm(self, path: str, **words: Any) -> None:
        """Delete a folder."""
        self._raise_if_failing("rm", path)
        super().rm(path, **words)

    def open(self, path: str, mode: str = "rb", **words: Any) -> BinaryIO:
        """Open a file; each read and write is a request that may fail."""
        self._raise_if_failing("open", path)
        return FailingFile(super().open(path, mode, **words), lambda verb: self._raise_if_failing(verb, path))

    def _listing(self, key: tuple, request: Callable[[], Any]) -> Any:
        result = self._listings.get(key)
        if result is None:
            try:
                result = request()
            except FileNotFoundError as error:
                result = error
            self._listings[key] = result
        if isinstance(result, FileNotFoundError):
            raise result
        return result

    def _raise_if_failing(self, verb: str, path: str) -> None:
        error = type(self).fail(verb, str(path))
        if error is not None:
            raise error

    def mv(self, *_: Any, **__: Any) -> None:
        """Refused, as in an object store."""
        raise NotImplementedError("this store has no rename")

    mv_file = move = rename = mv


class FailingFile:
    """A file whose reads and writes may fail."""

    def __init__(self, file: BinaryIO, raise_if_failing: Callable[[str], None]) -> None:
        self._file, self._raise_if_failing = file, raise_if_failing

    def write(self, data: bytes) -> int:
        """As in the file, unless the request fails."""
        self._raise_if_failing("write")
        return self._file.write(data)

    def read(self, size: int = -1) -> bytes:
        """As in the file, unless the request fails."""
        self._raise_if_failing("read")
        return self._file.read(size)

    def close(self) -> None:
        """As in the file, unless the request fails."""
        self._raise_if_failing("close")
        self._file.close()

    def __enter__(self) -> "FailingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def register() -> None:
    """Register norename:// with fsspec in this process."""
    fsspec.register_implementation("norename", NoRename, clobber=True)


@contextmanager
def failing(fail: Callable[[str, str], Exception | None]) -> Iterator[None]:
    """Context manager: requests raise what fail(verb, path) returns, if not None."""
    before, NoRename.fail = NoRename.fail, staticmethod(fail)
    try:
        yield
    finally:
        NoRename.fail = before
