"""The reference of config keys, made of the schema: docs/config.md and `launch/pretrain.py --help-config`.

    python -m trinity.config.reference > docs/config.md      (make docs)

Of each key: type and bounds, default, whether the default is the report's, what happens when it changes on resume, and
the docstring that stands below the field.
"""

import ast
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Literal

from trinity.config.changes import rule_of
from trinity.config.check import BOUNDS
from trinity.config.model import ZOO, ModelConfig
from trinity.config.run import RunConfig
from trinity.config.scalars import fields_of, kind_of
from trinity.config.suggest import nearest_keys
from trinity.errors import UserError

WIDTH = 120
HEAD = """\
# Config keys

Made from the docstrings in `trinity/config/run.py` and `model.py` by `make docs`; do not edit it here. The same text is
printed by `python launch/pretrain.py --help-config [PREFIX …]`, for example `--help-config optim.muon`.

In a YAML file keys nest (`optim: {muon: {lr: 1e-3}}`); on the command line they are dotted (`optim.muon.lr=1e-3`) and
win over the file. Numbers may be written 17e12. A text is taken as it is typed; `null` leaves an optional one out. A
leading `~` in a path is the home folder.

**From the report** says whether the default is a value of the Trinity Large report. **On resume** says what happens
when a run goes on with another value: *free*, it changes; *accept*, it needs `--accept-change KEY`; *fixed*, it is
refused.
"""
_KINDS = {str: "text", int: "integer", float: "number", bool: "true or false", Any: "integer, text or list"}


def page() -> str:
    """docs/config.md."""
    return f"{HEAD}\n{reference()}"


def reference(*prefixes: str) -> str:
    """The keys that begin with one of the prefixes, or all, by section, as Markdown.

    Args:
        prefixes: sections, keys, or entries of maps such as data.train.mine, which show their map.
    Raises:
        UserError: no key begins with one of them; naming the nearest ones.
    """
    wanted = [_without_entry(prefix.strip(".")) for prefix in prefixes] or [""]
    keys = [_joined(section, name) for section, kind in sections() for name in fields_of(kind)]
    for prefix, known in zip(prefixes, wanted, strict=False):
        if not any(_begins(key, known) for key in keys):
            raise UserError(f"no config key begins with {prefix}; {_instead(known)}")
    parts = []
    for section, kind in sections():
        entries = [key for key in fields_of(kind) if not is_dataclass(fields_of(kind)[key])]
        shown = [name for name in entries if any(_begins(_joined(section, name), prefix) for prefix in wanted)]
        if shown:
            parts.append("\n".join([*_heading(section, kind), *(_entry(section, kind, name) for name in shown)]))
    return "\n\n".join(parts) + "\n"


def sections() -> Iterator[tuple[str, type]]:
    """(dotted name, dataclass) of every section and of the entries of lists, such as batch.ramp[]; RunConfig last."""
    yield from _below("", RunConfig)
    yield "", RunConfig


def from_the_report(doc: str) -> bool:
    """Whether a field's docstring says that its default is the report's."""
    return "From the report" in doc


@cache
def docstrings(section: type) -> dict[str, str]:
    """Field → the docstring below it, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0].body
    return {
        ast.unparse(field.target): " ".join(ast.literal_eval(below.value).split())
        for field, below in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr)
    }


def _below(prefix: str, section: type) -> Iterator[tuple[str, type]]:
    for name, kind in fields_of(section).items():
        key = _joined(prefix, name)
        inner = typing.get_args(kind)[0] if typing.get_origin(kind) is list else kind
        if is_dataclass(inner):
            key = key if inner is kind else f"{key}[]"
            yield key, inner
            yield from _below(key, inner)


def _heading(section: str, kind: type) -> list[str]:
    lines = [f"## `{section}`" if section else "## Keys without a section", ""]
    text = inspect.cleandoc(kind.__doc__ or "") if section else ""
    return [*lines, *(line for part in text.split("\n\n") if part for line in (*_wrapped(part, ""), ""))]


def _entry(section: str, kind: type, name: str) -> str:
    key, doc = _joined(section, name), docstrings(kind)[name]
    default = next(field for field in fields(kind) if field.name == name)
    report = "yes" if from_the_report(doc) else "no"
    if kind is ModelConfig and name != "name":
        report = "table 1, but for smoke"
    facts = [
        f"{_kind(fields_of(kind)[name])}{_bounds(key)}",
        _default(kind, default),
        f"from the report: {report}",
        f"on resume: {rule_of(key.replace('[]', ''))}",
    ]
    return "\n".join([*_wrapped(f"- `{key}`: {'; '.join(facts)}.", "  "), *_wrapped(f"  {doc}", "  ")])


def _kind(kind: Any) -> str:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return f"{_kind(arguments[0])} or null"
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(f"`{word}`" for word in arguments)
    if typing.get_origin(kind) is dict:
        return f"map of names to {_kind(arguments[1])}s"
    if typing.get_origin(kind) is list:
        inner = arguments[0]
        return f"list of {{{', '.join(fields_of(inner))}}}" if is_dataclass(inner) else f"list of {_kind(inner)}s"
    if typing.get_origin(kind) is tuple:
        return " and ".join(map(_kind, arguments)) + ", as a list"
    return f"{{{', '.join(fields_of(kind))}}}" if is_dataclass(kind) else _KINDS[kind]


def _bounds(key: str) -> str:
    least, most = BOUNDS.get(key, (None, None))
    low = f", at least {least}" if least is not None else ""
    return f"{low}, at most {most}" if most is not None else low


def _default(kind: type, field: Field) -> str:
    if kind is ModelConfig and field.name != "name":
        return "default by model.name: " + ", ".join(f"{name} `{getattr(m, field.name)}`" for name, m in ZOO.items())
    if field.default is MISSING and field.default_factory is MISSING:
        return "no default"
    value = field.default if field.default is not MISSING else field.default_factory()
    if isinstance(value, bool) or value is None:
        return f"default `{str(value).lower() if value is not None else 'null'}`"
    return f"default `{list(value) if isinstance(value, tuple) else value}`"


def _instead(prefix: str) -> str:
    names = [name for name, _ in sections() if name]
    keys = [_joined(name, key) for name, kind in sections() for key in fields_of(kind)]
    near = nearest_keys(prefix, list(dict.fromkeys(names + keys)))
    return f"did you mean {' or '.join(near)}?" if near else f"the sections are {', '.join(names)}"


def _without_entry(key: str) -> str:
    """The map that an entry such as data.train.mine belongs to; another key as it is."""
    parent, _, name = key.rpartition(".")
    return parent if parent and name and typing.get_origin(kind_of(parent, RunConfig)) is dict else key


def _begins(key: str, prefix: str) -> bool:
    return not prefix or key == prefix or key.startswith((f"{prefix}.", f"{prefix}["))


def _joined(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    print(page(), end="")
