"""Rows of chat data: conversations with roles, and pairs of prompt and completion.

A row is one of (the names are those of TRL and of OpenAI's files)
    {"messages": [{"role", "content", "tool_calls"?, "name"?, "train"?, "weight"?}, …]}
    {"prompt": [messages], "completion": [messages]}
    {"prompt": TEXT, "completion": TEXT}
and may have "tools" (a list, or the JSON text of one) and "chat_template_kwargs" (an object, or the JSON text of one).
train: false or weight: 0 leaves an assistant's turn out of the loss. Everything is checked here, so that a template
meets one form only: content is text, and a call's arguments are an object.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from math import isfinite
from typing import Any, NamedTuple

from trinity.data.chat.template import MARKS, Message
from trinity.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
AFTER = {
    None: ("system", "developer", "user"),
    "system": ("user",),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
"""Role → the roles that may follow it; None: the beginning."""
RESERVED = ("messages", "tools", "documents", "add_generation_prompt")


class Conversation(NamedTuple):
    """A conversation, ready for a template.

    messages: role, content and what else the template may read.
    trained: the numbers of the assistant's messages that are trained, ascending.
    completion: those of them that are in the completion of a row with one, else the last of them.
    tools, variables: for the template.
    """

    messages: list[Message]
    trained: list[int]
    completion: list[int]
    tools: list[dict[str, Any]] | None
    variables: dict[str, Any]


class Pair(NamedTuple):
    """A text and its continuation."""

    prompt: str
    completion: str


def parse_row(row: Any) -> Conversation | Pair:
    """Check a row and bring it into one form.

    Raises:
        UserError: naming what is wrong with it, as a clause that follows the row's place.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"holds {type(row).__name__} where an object with messages should be; correct it")
    row = {key: value for key, value in row.items() if value is not None}  # Parquet has every column in every row
    if "messages" in row:
        return _conversation(row["messages"], None, row)
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            check_characters([prompt, completion])
            return Pair(prompt, completion)
        if isinstance(prompt, list) and isinstance(completion, list):
            return _conversation([*prompt, *completion], len(prompt), row)
        raise UserError("has a prompt and a completion of different kinds; write two texts, or two lists of messages")
    if "conversations" in row:
        raise UserError(
            "has conversations with from and value; write messages with role and content (human → user, "
            "gpt → assistant, system → system)"
        )
    raise UserError(f"has neither messages nor prompt and completion (fields: {', '.join(map(str, row)) or 'none'})")


def _conversation(messages: Any, completion_from: int | None, row: Mapping[str, Any]) -> Conversation:
    if not isinstance(messages, list) or not messages:
        raise UserError("has no list of messages; write [{role, content}, …]")
    checked = [_message(message, number) for number, message in enumerate(messages, 1)]
    _check_roles(checked)
    assistant = [number for number, message in enumerate(checked) if message["role"] == "assistant"]
    if not assistant:
        raise UserError("has no message of the assistant, so nothing to train; add one, or leave the row out")
    trained = [number for number in assistant if _is_trained(messages[number], number + 1)]
    if not trained:
        raise UserError("trains none of the assistant's messages (train: false, weight: 0); leave the row out")
    completion = trained[-1:] if completion_from is None else [n for n in trained if n >= completion_from]
    if not completion:
        raise UserError("has no message of the assistant to train in its completion; add one, or leave the row out")
    tools = _from_json(row.get("tools"), list, "tools")
    variables = _from_json(row.get("chat_template_kwargs"), dict, "chat_template_kwargs") or {}
    for name in RESERVED:
        if name in variables:
            raise UserError(f"sets {name} in chat_template_kwargs, which is a field of its own; move it there")
    if not all(isinstance(tool, Mapping) for tool in tools or []):
        raise UserError("has tools that are no objects; write [{type: function, function: {name, parameters, …}}, …]")
    values = [checked, tools, variables]  # with what was JSON text
    check_characters(values)
    if not all(isfinite(value) for value in _leaves(values) if isinstance(value, float)):
        raise UserError("holds NaN or Infinity, which JSON does not have; write a number, null or text")
    return Conversation(checked, trained, completion, tools or None, variables)


def _message(message: Any, number: int) -> Message:
    """A message as templates get it: without empty fields, its content as text, its calls' arguments as objects."""
    if not isinstance(message, Mapping):
        raise UserError(f"has {type(message).__name__} as message {number}; write {{role, content}}")
    kept = {key: value for key, value in message.items() if value is not None and key not in ("train", "weight")}
    role = kept.get("role")
    if role not in ROLES:
        mend = "; write role and content in place of from and value" if "from" in kept else f"; use {', '.join(ROLES)}"
        raise UserError(f"has role {role!r} in message {number}{mend}")
    kept["content"] = _text(kept.get("content", ""), number)
    calls = kept.pop("tool_calls", None)
    if calls:
        if role != "assistant" or not isinstance(calls, list):
            raise UserError(f"has tool_calls of another form than a list in an assistant's message (message {number})")
        kept["tool_calls"] = [_call(call, number) for call in calls]
    return kept


def _text(content: Any, number: int) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    raise UserError(f"has content that is no text in message {number}; write text (images and audio are not read)")


def _call(call: Any, number: int) -> dict[str, Any]:
    """One call of a function as {"type": "function", "function": {"name", "arguments"}}, and its id if it has one."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(f"has a tool call without a function's name in message {number}; write {{name, arguments}}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):  # text that is not JSON is refused below
            arguments = json.loads(arguments)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise UserError(
            f"calls {function['name']} in message {number} with arguments that are no object; write {{name: value}}, "
            "or the JSON text of it"
        )
    identity = {"id": call["id"]} if call.get("id") is not None else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def _check_roles(messages: list[Message]) -> None:
    last = None
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role not in AFTER[last]:
            after = "at the beginning" if last is None else f"after {last}"
            raise UserError(f"has role {role} {after} (message {number}); allowed there: {', '.join(AFTER[last])}")
        if role == "tool" and last == "assistant" and not messages[number - 2].get("tool_calls"):
            raise UserError(
                f"has the result of a tool in message {number}, and message {number - 1} calls none; add tool_calls"
            )
        last = role


def _is_trained(message: Mapping[str, Any], number: int) -> bool:
    train, weight = message.get("train"), message.get("weight")
    if train not in (None, True, False) or weight not in (None, 0, 1):
        given = f"train: {train!r}" if train not in (None, True, False) else f"weight: {weight!r}"
        raise UserError(f"has {given} in message {number}; use train: true or false, or weight: 0 or 1")
    if train is not None and weight is not None and bool(train) != bool(weight):
        raise UserError(f"has train: {train!r} and weight: {weight!r} in message {number}; keep one")
    return train is not False and weight != 0


def _from_json(value: Any, kind: type, name: str) -> Any:
    """A value that may be given as JSON text, as in a column of Parquet."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise UserError(
                f"has {name} that are not valid JSON; write a {kind.__name__}, or the JSON text of one"
            ) from None
    if value is not None and not isinstance(value, kind):
        raise UserError(f"has {name} of type {type(value).__name__}; write a {kind.__name__}, or the JSON text of one")
    return value


def check_characters(value: Any) -> None:
    """Refuse half a surrogate pair, which has no UTF-8, and the marks that rendering uses, in any text within a value.

    Raises:
        UserError: as a clause that follows the value's place.
    """
    for text in (leaf for leaf in _leaves(value) if isinstance(leaf, str)):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError("holds half a surrogate pair; correct it") from None
        if any(mark in text for mark in MARKS):
            raise UserError("holds one of U+FDD0 to U+FDD3, which are no characters; remove it")


def _leaves(value: Any) -> Iterable[Any]:
    """The values within a value that contain no others, and the keys of objects."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value
