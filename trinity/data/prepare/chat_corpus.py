"""A small real set of conversations that every machine has: questions on Python's standard library and their answers.

The questions are made from docstrings and signatures (what a function does, its signature, which function does this)
and from pydoc's chapters on the language. A module is held out by the hash of its name, as in the corpus (corpus.py): a
model that was trained on the corpus has not seen the modules of the validation set.
"""

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from trinity.data.prepare.corpus import CorpusFile, held_out, read_modules, topics
from trinity.io.json_files import to_json
from trinity.io.local import make_folder, write_atomically

SHORTEST, LONGEST = 25, 200
"""Characters of an answer: one sentence, so that an example is some dozens of tokens."""
LONGEST_SIGNATURE = 120
SYSTEM = "You answer questions on Python's standard library."
SENTENCE = re.compile(r".*?[.!?](?=\s|$)", re.DOTALL)


class Definition(NamedTuple):
    """A function or class: its dotted name, its signature (of a function) and the first sentence of its docstring."""

    name: str
    kind: str
    signature: str | None
    summary: str


def write_chat_corpus(out: Path, library: Path | None = None) -> list[CorpusFile]:
    """Write chat.train.jsonl and chat.validation.jsonl: a conversation a line, {"messages": …}.

    The same Python gives the same bytes.

    Args:
        out: created if missing; existing files of these names are replaced.
        library: folder of modules; this Python's standard library by default.
    """
    examples = [
        *(
            (module, messages)
            for module, source in read_modules(library or Path(sysconfig.get_path("stdlib")))
            for definition in definitions(module, source)
            for messages in conversations(definition)
        ),
        *((f"topic:{topic}", messages) for topic, text in topics() for messages in on_topic(topic, text)),
    ]
    make_folder(out)
    files = []
    for side, held in (("train", False), ("validation", True)):
        rows = [{"messages": messages} for key, messages in examples if held_out(key) == held]
        lines = [to_json(row, ensure_ascii=False) + "\n" for row in rows]
        name = f"chat.{side}.jsonl"
        files.append(CorpusFile(name, len(lines), write_atomically(out / name, lines)))
    return files


def definitions(module: str, source: str) -> Iterator[Definition]:
    """Public functions, classes and methods of a module whose docstrings begin with a sentence of fitting length."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated escapes in strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    waiting: list[tuple[str, ast.AST]] = [(module, node) for node in reversed(tree.body)]
    while waiting:
        owner, node = waiting.pop()
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        name = f"{owner}.{node.name}"
        summary = first_sentence(ast.get_docstring(node) or "")
        if summary is not None and all(not part.startswith("_") for part in name.split(".")):
            is_class = isinstance(node, ast.ClassDef)
            signature = None if isinstance(node, ast.ClassDef) else f"def {node.name}({ast.unparse(node.args)})"
            yield Definition(name, "class" if is_class else "function", signature, summary)
        if isinstance(node, ast.ClassDef):
            waiting.extend((name, child) for child in reversed(node.body))


def conversations(definition: Definition) -> Iterator[list[dict[str, str]]]:
    """The conversations on one definition: what it does, then its signature; and which one does that."""
    name, kind, signature, summary = definition
    what = [("user", f"What does the {kind} {name} do?"), ("assistant", summary)]
    if signature is not None and len(signature) <= LONGEST_SIGNATURE:
        what += [("user", "Write its signature."), ("assistant", signature)]
    yield _messages(("system", SYSTEM), *what)
    yield _messages(("user", f"Which {kind} of Python does this? {summary}"), ("assistant", name))


def on_topic(topic: str, text: str) -> Iterator[list[dict[str, str]]]:
    """The conversation on one of pydoc's chapters: its first sentence."""
    lines = text.splitlines()
    ruled = [at for at, line in enumerate(lines) if line and not line.strip("*=-~^")]  # below, and maybe above, a title
    body = "\n".join(lines[ruled[0] + 1 :]) if ruled else text
    summary = first_sentence(body.strip())
    if summary is not None:
        words = topic.replace("-", " ").lower()
        yield _messages(("user", f"What does the Python documentation say on {words}?"), ("assistant", summary))


def first_sentence(text: str) -> str | None:
    """The first sentence of a text, on one line; None if it is too short, too long, or no sentence."""
    paragraph = text.strip().split("\n\n")[0]
    found = SENTENCE.match(paragraph)
    sentence = " ".join((found[0] if found else "").split())
    fits = SHORTEST <= len(sentence) <= LONGEST and sentence[0].isalpha() and sentence.isprintable()
    return sentence if fits else None


def _messages(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]
