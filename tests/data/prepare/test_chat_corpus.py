"""The small set of conversations: real, deterministic, held out by module, readable by prepare_data."""

import json
from pathlib import Path

import pytest

from tests.data.small_files import read_folder
from trinity.data.chat.conversation import Conversation, parse_row
from trinity.data.prepare.chat_corpus import definitions, first_sentence, on_topic, write_chat_corpus
from trinity.data.prepare.corpus import held_out

MODULE = '''
"""A module, which is no definition."""

def double(x: int, *, times: int = 2) -> int:
    """Return x several times over. More text.

    And more.
    """

class Box:
    """A box that holds one thing and no other."""

    def open(self):
        "Open the box, so that the thing may be seen."

    def _hidden(self):
        """This is a method that no one should call."""

def short():
    """Too short."""
'''


def contents(row: dict) -> list[str]:
    return [message["content"] for message in row["messages"]]


def test_questions_on_definitions(tmp_path: Path) -> None:
    """Each with its answer from the docstring; a signature for functions; and the name for the summary."""
    names = [f"module{number}" for number in range(200)]
    held = next(name for name in names if held_out(name))
    shown = next(name for name in names if not held_out(name))
    for name in (held, shown):
        (tmp_path / f"{name}.py").write_text(MODULE)
    train, validation = write_chat_corpus(tmp_path / "out", tmp_path)
    lines = (tmp_path / "out" / "chat.train.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == train.documents
    rows = [json.loads(line) for line in lines]
    assert [contents(row)[-4:] for row in rows[:1]] == [[
        f"What does the function {shown}.double do?", "Return x several times over.",
        "Write its signature.", "def double(x: int, *, times: int=2)",
    ]]  # fmt: skip
    assert contents(rows[1]) == [
        "Which function of Python does this? Return x several times over.", f"{shown}.double",
    ]  # fmt: skip
    about = {content for row in rows for content in contents(row)}
    assert {f"{shown}.Box", f"{shown}.Box.open", "def open(self)"} <= about
    assert not [content for content in about if held in content or "_hidden" in content or "short" in content]
    assert held in (tmp_path / "out" / "chat.validation.jsonl").read_text(encoding="utf-8")
    assert validation.documents >= 6
    before = read_folder(tmp_path / "out")
    write_chat_corpus(tmp_path / "out", tmp_path)
    assert read_folder(tmp_path / "out") == before
    for row in rows:
        assert isinstance(parse_row(row), Conversation)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Do the thing that is asked for.  Then rest.", "Do the thing that is asked for."),
        ("Version 3.11 has\n   exceptions in groups. End.", "Version 3.11 has exceptions in groups."),
        ("No end of a sentence in this paragraph\n\nBut here.", None),
        (">>> call(1)  # an example and no sentence.", None),
        ("Too short.", None),
        ("Long " * 50 + ".", None),
        ("", None),
    ],
)
def test_first_sentence(text: str, sentence: str | None) -> None:
    assert first_sentence(text) == sentence


def test_topics() -> None:
    """The title and its line are no part of the answer."""
    text = 'The "pass" statement\n********************\n\n   pass_stmt: "pass"\n'
    assert list(on_topic("pass", text)) == []
    assert list(on_topic("pass", "Boolean operations\n*****\n\nBooleans are combined by operations.\n")) == [
        [
            {"role": "user", "content": "What does the Python documentation say on pass?"},
            {"role": "assistant", "content": "Booleans are combined by operations."},
        ]
    ]


def test_broken_module() -> None:
    assert list(definitions("m", "def f(:")) == []
