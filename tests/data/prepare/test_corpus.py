"""The corpus of a made-up library; and no held-out text of the standard library is in the training files."""

import json
from pathlib import Path

import pytest

from trinity.data.prepare.corpus import docstrings, held_out, write_corpus

MODULE = '''"""A module's docstring, which is long enough to be taken."""
class Outer:
    """A class's docstring, which is long enough to be taken."""
    def short(self):
        """Too short."""
    async def method(self):
        """A method's docstring, which is long enough to be taken."""
        def inner():
            """An inner docstring, which is long enough to be taken."""
'''


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Eighty good modules, and every kind of file that must be left out."""
    files: dict[str, str | bytes] = {f"package/module{number}.py": MODULE for number in range(80)}
    files |= {
        "package/__init__.py": "x = 1\n",
        "empty.py": "\n",
        "latin.py": "# -*- coding: latin-1 -*-\n# é\n".encode("latin-1"),
        "broken_bytes.py": b"# \xff\xfe\n",
        "unknown_encoding.py": b"# -*- coding: none-such -*-\n",
        "old.py": "print 'python 2'\n",
        "surrogate.py": 'def f():\n    "\\ud800 is half a pair, and this docstring is long enough"\n',
        "test/module.py": MODULE,
        "package/tests/module.py": MODULE,
        "site-packages/module.py": MODULE,
        "_sysconfigdata_here.py": MODULE,
    }
    for name, content in files.items():
        path = tmp_path / "library" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return tmp_path / "library"


def test_the_files_of_the_corpus(library: Path, tmp_path: Path) -> None:
    files = write_corpus(tmp_path / "out", library)
    documents = {file.name: read(tmp_path / "out" / file.name) for file in files}
    for file in files:
        assert file.documents == len(documents[file.name])
        assert file.bytes == (tmp_path / "out" / file.name).stat().st_size
    code = documents["code.train.jsonl"] + documents["code.validation.jsonl"]
    names = {document["name"] for document in code}
    assert names == {f"package.module{number}" for number in range(80)} | {"package", "latin", "old", "surrogate"}
    assert [document["text"] for document in code if document["name"] == "latin"] == [
        "# -*- coding: latin-1 -*-\n# é\n"
    ]
    prose = [document["name"] for document in documents["prose.train.jsonl"] + documents["prose.validation.jsonl"]]
    assert sum(name.startswith("package.") for name in prose) == 4 * 80
    assert not any("surrogate" in name for name in prose)
    assert sum(name.startswith("topic:") for name in prose) > 50


def test_the_same_python_gives_the_same_bytes(library: Path, tmp_path: Path) -> None:
    names = [file.name for file in write_corpus(tmp_path / "a", library)]
    write_corpus(tmp_path / "b", library)
    write_corpus(tmp_path / "b", library)
    assert [(tmp_path / "a" / name).read_bytes() for name in names] == [
        (tmp_path / "b" / name).read_bytes() for name in names
    ]
    assert {path.name for path in (tmp_path / "b").iterdir()} == set(names)


def test_a_module_is_in_one_split(library: Path, tmp_path: Path) -> None:
    """A docstring of a held-out module is also in that module's code, so neither may be in the training files."""
    write_corpus(tmp_path / "out", library)
    sides = {}
    for side in ("train", "validation"):
        code = {document["name"] for document in read(tmp_path / "out" / f"code.{side}.jsonl")}
        prose = {document["name"] for document in read(tmp_path / "out" / f"prose.{side}.jsonl")}
        sides[side] = code | {".".join(name.split(".")[:2]) for name in prose}
    assert not sides["train"] & sides["validation"]
    assert any(name.startswith("package.") for name in sides["validation"])


def test_about_three_percent_are_held_out() -> None:
    """10,000 names: mean 300, standard deviation 17; six of them bound the chance of a miss by 1e-8."""
    assert abs(sum(held_out(f"name{number}") for number in range(10_000)) - 300) < 6 * 17


def test_docstrings_have_dotted_names_in_order() -> None:
    assert [name for name, _ in docstrings("m", MODULE)] == ["m", "m.Outer", "m.Outer.method", "m.Outer.method.inner"]
    assert dict(docstrings("m", MODULE))["m.Outer"] == "A class's docstring, which is long enough to be taken."
    assert list(docstrings("m", "not python ?")) == []
