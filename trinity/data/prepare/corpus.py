"""A small real corpus that every machine has: Python's standard library.

Two sources: `code`, its modules, and `prose`, their docstrings and pydoc's chapters on the language. The docstrings are
part of the code too, so a module is held out from both sources or from neither: by the hash of its name, about 3 %.
"""

import ast
import hashlib
import io
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from trinity.io.json_files import to_json
from trinity.io.local import make_folder, write_atomically

HELD_OUT = 0.03
SHORTEST_DOCSTRING = 40
# Tests, a copy of a parser for an older Python, tables of character sets, and pydoc's chapters, which are prose.
LEFT_OUT = {"test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data"}


class CorpusFile(NamedTuple):
    """One file that was written: its name, the documents in it, and its size in bytes."""

    name: str
    documents: int
    bytes: int


def write_corpus(out: Path, library: Path | None = None) -> list[CorpusFile]:
    """Write code and prose, each as .train.jsonl and .validation.jsonl; each line {"text": …, "name": …}.

    The same Python gives the same bytes.

    Args:
        out: created if missing; existing files of these names are replaced.
        library: folder of modules; this Python's standard library by default.
    """
    modules = list(read_modules(library or Path(sysconfig.get_path("stdlib"))))
    sources = {
        "code": [(name, name, text) for name, text in modules],
        "prose": [
            *((name, path, text) for name, source in modules for path, text in docstrings(name, source)),
            *((f"topic:{topic}", f"topic:{topic}", text) for topic, text in topics()),
        ],
    }
    make_folder(out)
    files = []
    for source, documents in sources.items():
        for side, held in (("train", False), ("validation", True)):
            lines = [_line(name, text) for key, name, text in documents if held_out(key) == held]
            name = f"{source}.{side}.jsonl"
            files.append(CorpusFile(name, len(lines), write_atomically(out / name, lines)))
    return files


def held_out(name: str) -> bool:
    """Whether a module or topic is for validation; depends on its name alone."""
    number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())
    return number < HELD_OUT * 2**64


def read_modules(library: Path) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, source) of the modules under a folder, sorted by name; undecodable files are left out."""
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        # A name with a dash or a dot is not a package: site-packages, lib-dynload, this machine's build configuration.
        if LEFT_OUT.intersection(parts) or not all(part.isidentifier() for part in parts):
            continue
        if parts[-1].startswith("_sysconfigdata"):
            continue
        source = _decoded(path.read_bytes())
        if source is not None and source.strip():
            yield ".".join(parts).removesuffix(".__init__"), source


def docstrings(module: str, source: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, docstring) of a module, its classes and functions, in order; short ones are left out."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated escapes in strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    waiting: list[tuple[str, ast.AST]] = [(module, tree)]
    while waiting:
        name, node = waiting.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = name if isinstance(node, ast.Module) else f"{name}.{node.name}"
            text = ast.get_docstring(node)
            if text and len(text) >= SHORTEST_DOCSTRING and _encodable(text):
                yield name, text
        waiting.extend((name, child) for child in reversed(list(ast.iter_child_nodes(node))))


def topics() -> Iterator[tuple[str, str]]:
    """Yield (name, text) of pydoc's chapters on the language, sorted by name; none if Python lacks them."""
    try:
        from pydoc_data.topics import topics as chapters
    except ImportError:
        return
    yield from sorted(chapters.items())


def _decoded(raw: bytes) -> str | None:
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        return io.TextIOWrapper(io.BytesIO(raw), encoding).read()
    except (SyntaxError, UnicodeDecodeError, LookupError):
        return None


def _encodable(text: str) -> bool:
    # An escape in a docstring can give half a surrogate pair, which has no UTF-8 encoding.
    return not any(0xD800 <= ord(character) <= 0xDFFF for character in text)


def _line(name: str, text: str) -> str:
    return to_json({"text": text, "name": name}, ensure_ascii=False) + "\n"
