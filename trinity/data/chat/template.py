"""Chat templates: a conversation as text, and which characters of it the assistant wrote.

A template is Jinja, as transformers keeps it in a tokenizer's folder (chat_template.jinja). Its blocks
{% generation %} … {% endgeneration %} hold what the model is to write; they are the spans that are trained. The same
file renders training data and prompts, here and in transformers, so that the two cannot differ.

Not defined here, though transformers defines it: strftime_now, because shards must not depend on the day they are made.
Templates that print a date have a fixed one for where it is missing, or take it from chat_template_kwargs.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trinity.errors import UserError
from trinity.io.checksum import new_hash
from trinity.io.json_files import read_json, to_json

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
DEFAULT_TEMPLATE = Path(__file__).with_name("default.jinja")
BEGIN, END, BEGIN_LITERAL, END_LITERAL = MARKS = "\ufdd0\ufdd1\ufdd2\ufdd3"
"""Characters that mark a generation block, and text of the user that is to be no special token, while a template is
rendered. Unicode keeps them out of texts for such uses."""
FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RuntimeError,
)
"""What a template may raise."""
PROBE_PROMPT, PROBE_REPLY = "probe of a prompt", "probe of a reply"

Message = dict[str, Any]
Span = tuple[int, int]


class Rendered(NamedTuple):
    """A conversation as text.

    text: of the whole conversation, without marks.
    spans: its generation blocks, [begin, end) in characters, in order; empty ones are left out.
    literals: text between BEGIN_LITERAL and END_LITERAL, in the same form.
    """

    text: str
    spans: list[Span]
    literals: list[Span]


class TemplateFailure(UserError):
    """A template did not print messages.

    Attributes:
        name: of the template.
        reason: what it or Jinja says, on one line.
        refused: it refused them by raise_exception, and did not fail.
    """

    def __init__(self, name: str, reason: str, refused: bool) -> None:
        self.name, self.reason, self.refused = name, reason, refused
        super().__init__(
            f"{name} does not take these messages ({reason}); correct them"
            if refused
            else f"{name} fails on these messages ({reason}); correct it, or the messages if they lack what it reads"
        )

    def __reduce__(self) -> tuple:
        """How to make it again in the process that started a worker."""
        return type(self), (self.name, self.reason, self.refused)


class ChatTemplate:
    """A chat template with the special tokens of its tokenizer.

    Attributes:
        source: the text of the template.
        generates: whether it has generation blocks.
        special: name → text of the special tokens that templates use, such as bos_token.
        name: of the template in messages.
    """

    def __init__(self, source: str, special: Mapping[str, str], name: str = "the chat template") -> None:
        """
        Raises:
            UserError: it is not valid Jinja.
        """
        self.source, self.special, self.name = source, dict(special), name
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
            self._blocks: Any = environment.extensions[_GenerationBlock.identifier]
        except (jinja2.TemplateError, RecursionError) as error:
            raise UserError(f"{name} is not a valid template ({_one_line(error)}); correct it") from None
        calls = [call.node for call in tree.find_all(nodes.Call) if isinstance(call.node, nodes.ExtensionAttribute)]
        self.generates = any(call.name == _GenerationBlock.MARK for call in calls)

    def __getstate__(self) -> dict:
        """What makes the template again in a worker process: compiled code is not pickled."""
        return {"source": self.source, "special": self.special, "name": self.name}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["source"], state["special"], state["name"])  # type: ignore[misc]

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping] | None = None,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> Rendered:
        """Render messages.

        Args:
            messages: with role and content, and what else the template reads.
            tools: descriptions of functions that the model may call.
            variables: chat_template_kwargs, for this template's own switches.
            add_generation_prompt: end with what comes before the assistant's text, for inference.
        Raises:
            TemplateFailure: the template refuses the messages, or fails.
            UserError: something around a generation block changes its text.
        """
        values = {
            **self.special,
            **(variables or {}),
            "messages": list(messages),
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._rendered(values, marks=True)
            plain = self._rendered(values, marks=False) if self.generates else None
        except RecursionError:
            reason = "it calls itself without end, or a message holds objects within hundreds of others"
            raise TemplateFailure(self.name, reason, refused=False) from None
        except FAILURES as error:
            raise TemplateFailure(self.name, _one_line(error), isinstance(error, _Refusal)) from None
        rendered = _without_marks(text)
        if plain is not None and _without_marks(plain).text != rendered.text:
            raise UserError(
                f"{self.name} changes what its generation blocks have printed, as a filter around them does; move such "
                "a filter into the blocks"
            )
        return rendered

    def _rendered(self, values: Mapping[str, Any], marks: bool) -> str:
        self._blocks.marks = marks
        return self._template.render(values)


def load_template(folder: Path, file: Path | None = None) -> ChatTemplate:
    """The chat template of a tokenizer, or another file's for that tokenizer.

    Args:
        folder: the tokenizer's.
        file: the template; None: the tokenizer's own, chat_template.jinja, or the one in tokenizer_config.json.
    Raises:
        UserError: there is none, or it is not valid.
    """
    source = _read(file) if file is not None else _own_template(folder)
    if source is None:
        raise UserError(
            f"{folder} has no {TEMPLATE_FILE}; make a tokenizer with one by tools/chat_tokenizer.py, or give the file "
            "of a template"
        )
    return ChatTemplate(source, special_tokens(folder), str(file or folder / TEMPLATE_FILE))


def special_tokens(folder: Path) -> dict[str, str]:
    """Name → text of the special tokens that tokenizer_config.json names: bos_token, eos_token, …"""
    config = _config(folder)
    return {name: _content(config[name]) for name in SPECIAL if config.get(name)}


def template_hash(folder: Path) -> str | None:
    """Hash of the chat template of a tokenizer's folder; None without one."""
    source = _own_template(folder)
    return None if source is None else source_hash(source)


def source_hash(source: str) -> str:
    """Hash of the text of a template."""
    content = new_hash()
    content.update(source.encode())
    return content.hexdigest()


def reply_ending(template: ChatTemplate) -> str:
    """What the template prints after an assistant's content at the end of a conversation.

    Raises:
        UserError: the template does not take one message of the user and one of the assistant, or leaves the text out.
    """
    messages = [{"role": "user", "content": PROBE_PROMPT}, {"role": "assistant", "content": PROBE_REPLY}]
    text = _probed(template, messages)
    _, found, after = text.rpartition(PROBE_REPLY)
    if not found:
        raise UserError(f"{template.name} does not print the assistant's content; correct it")
    return after


def probe_prompt(template: ChatTemplate) -> str:
    """What the template prints of a user's message, and the generation prompt.

    Raises:
        UserError: it does not take one message of the user.
    """
    return _probed(template, [{"role": "user", "content": PROBE_PROMPT}], add_generation_prompt=True)


def _probed(template: ChatTemplate, messages: list[Message], add_generation_prompt: bool = False) -> str:
    try:
        return template.render(messages, add_generation_prompt=add_generation_prompt).text
    except TemplateFailure as error:
        roles = " and one of the ".join(message["role"] for message in messages)
        raise UserError(
            f"{template.name} does not print one message of the {roles} ({error.reason}); correct it"
        ) from None


def _config(folder: Path) -> dict[str, Any]:
    return read_json(folder / TOKENIZER_CONFIG, "fetch the folder or make the tokenizer again") or {}


def _own_template(folder: Path) -> str | None:
    path = folder / TEMPLATE_FILE
    if path.is_file():
        return _read(path)
    inside = _config(folder).get("chat_template")
    if isinstance(inside, list):  # several, by name
        inside = {entry["name"]: entry["template"] for entry in inside}.get("default")
    if inside is not None and not isinstance(inside, str):
        raise UserError(f"chat_template in {folder / TOKENIZER_CONFIG} is {inside!r}, no text; fetch the folder again")
    return inside


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a chat template ({_one_line(error)}); give another file") from None


def _content(token: str | Mapping[str, str]) -> str:
    return token if isinstance(token, str) else token["content"]  # transformers writes either


def _without_marks(marked: str) -> Rendered:
    """Remove the marks, and say where they were."""
    parts = re.split(f"([{MARKS}])", marked)
    texts, marks = parts[::2], parts[1::2]
    found: dict[str, list[Span]] = {END: [], END_LITERAL: []}
    begin = {END: 0, END_LITERAL: 0}
    length = 0
    for text, mark in zip(texts, marks):
        length += len(text)
        if mark in found:
            found[mark] += [(begin[mark], length)] if begin[mark] < length else []
        else:
            begin[END if mark == BEGIN else END_LITERAL] = length
    return Rendered("".join(texts), found[END], found[END_LITERAL])


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter tojson as transformers has it: Jinja's own escapes < and >."""
    return to_json(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Refusal(jinja2.TemplateError):
    """Raised by a template's call of raise_exception."""


def _raise(message: str) -> None:
    raise _Refusal(message)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class _GenerationBlock(Extension):
    """The block {% generation %} … {% endgeneration %}: its text between two marks."""

    MARK = "_mark"
    tags = {"generation"}
    marks = True

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method(self.MARK), [], [], body).set_lineno(line)

    def _mark(self, caller: Macro) -> str:
        return f"{BEGIN}{caller()}{END}" if self.marks else caller()
