"""Rows are brought into one form, and everything odd is refused by one sentence that names it."""

import pytest

from trinity.data.chat.conversation import Conversation, Pair, parse_row
from trinity.errors import UserError

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CALL = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}


def parsed(row: dict) -> Conversation:
    conversation = parse_row(row)
    assert isinstance(conversation, Conversation)
    return conversation


def test_one_form() -> None:
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": None},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "7", "function": {"name": "f"}}]},
            {"role": "tool", "content": "c", "tool_call_id": "7", "tool_calls": None},
            {"role": "assistant", "content": "d", "reasoning_content": "e", "train": None},
        ],
        "tools": '[{"name": "f"}]',
        "chat_template_kwargs": {"date_string": "today"},
        "prompt": None,
    }
    call = {"id": "7", "type": "function", "function": {"name": "f", "arguments": {}}}
    assert parsed(row) == Conversation(
        [
            {"role": "user", "content": "ab"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "c", "tool_call_id": "7"},
            {"role": "assistant", "content": "d", "reasoning_content": "e"},
        ],
        [1, 3],
        [3],
        [{"name": "f"}],
        {"date_string": "today"},
    )


def test_which_turns_are_trained() -> None:
    talk = [
        USER,
        ANSWER,
        USER,
        {**ANSWER, "train": False},
        USER,
        {**ANSWER, "weight": 1},
        USER,
        {**ANSWER, "weight": 0},
    ]
    assert (parsed({"messages": talk}).trained, parsed({"messages": talk}).completion) == ([1, 5], [5])
    split = parsed({"prompt": talk[:3], "completion": [ANSWER, USER, ANSWER]})
    assert (split.trained, split.completion) == ([1, 3, 5], [3, 5])
    assert parse_row({"prompt": "a ", "completion": "b"}) == Pair("a ", "b")


REFUSED = {
    "has neither messages nor prompt and completion (fields: text)": {"text": "a"},
    "has conversations with from and value; write messages with role and content (human → user": {"conversations": []},
    "has a prompt and a completion of different kinds": {"prompt": "a", "completion": [ANSWER]},
    "has no list of messages": {"messages": "a"},
    "has no message of the assistant, so nothing to train": {"messages": [USER]},
    "trains none of the assistant's messages": {"messages": [USER, {**ANSWER, "train": False}]},
    "has no message of the assistant to train in its completion": {
        "prompt": [USER, ANSWER],
        "completion": [USER],
    },
    "has role assistant at the beginning (message 1); allowed there: system, developer, user": {"messages": [ANSWER]},
    "has role user after user (message 2); allowed there: assistant": {"messages": [USER, USER, ANSWER]},
    "has role assistant after assistant (message 3)": {"messages": [USER, ANSWER, ANSWER]},
    "has role system after assistant (message 3)": {"messages": [USER, ANSWER, {"role": "system", "content": ""}]},
    "has the result of a tool in message 3, and message 2 calls none": {
        "messages": [USER, ANSWER, {"role": "tool", "content": ""}]
    },
    "has role None in message 1; write role and content in place of from and value": {
        "messages": [{"from": "human", "value": "a"}]
    },
    "has role 'bot' in message 1; use system, developer": {"messages": [{"role": "bot", "content": "a"}]},
    "has content that is no text in message 1; write text (images": {
        "messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]
    },
    "has tool_calls of another form than a list in an assistant's message (message 1)": {
        "messages": [{**USER, "tool_calls": [1]}, ANSWER]
    },
    "has a tool call without a function's name in message 2": {
        "messages": [USER, {"role": "assistant", "tool_calls": [{"arguments": {}}]}]
    },
    "calls f in message 2 with arguments that are no object; write {name: value}, or the JSON text": {
        "messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "x=1"}]}]
    },
    "has weight: 0.5 in message 2; use train: true or false, or weight: 0 or 1": {
        "messages": [USER, {**ANSWER, "weight": 0.5}]
    },
    "has train: True and weight: 0 in message 2; keep one": {
        "messages": [USER, {**ANSWER, "train": True, "weight": 0}]
    },
    "has tools that are not valid JSON": {"messages": [USER, CALL], "tools": "["},
    "has tools of type dict; write a list": {"messages": [USER, CALL], "tools": {"f": 1}},
    "has tools that are no objects; write [{type": {"messages": [USER, CALL], "tools": [1, 2]},
    "holds NaN or Infinity, which JSON does not have": {
        "messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"x": [NaN]}'}]}]
    },
    "holds NaN or Infinity": {"messages": [USER, CALL], "tools": [{"name": "f", "least": float("-inf")}]},
    "holds half a surrogate": {
        "messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"x": "\\ud800"}'}]}]
    },
    "sets messages in chat_template_kwargs": {"messages": [USER, ANSWER], "chat_template_kwargs": {"messages": 1}},
    "holds half a surrogate pair": {"messages": [USER, {"role": "assistant", "content": "\ud800"}]},
    "holds one of U+FDD0 to U+FDD3": {"messages": [USER, {"role": "assistant", "content": "\ufdd1"}]},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_refused(sentence: str) -> None:
    with pytest.raises(UserError) as error:
        parse_row(REFUSED[sentence])
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("row", [None, "a", 3, ["messages"]])
def test_no_object(row: object) -> None:
    with pytest.raises(UserError, match="where an object with messages should be"):
        parse_row(row)
