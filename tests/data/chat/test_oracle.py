"""Ids and masks equal those of transformers for eight shapes of template, with and without generation blocks."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.data.chat.templates import CALLS, TALK, TEMPLATES, without_blocks
from trinity.data.chat.encode import ChatEncoder
from trinity.data.chat.template import DEFAULT_TEMPLATE
from trinity.errors import UserError

WEATHER = [{"type": "function", "function": {"name": "weather", "description": "of <a> city", "parameters": {}}}]
CONVERSATIONS = {
    "one turn": {"messages": TALK[1:3]},
    "two turns": {"messages": TALK[1:]},
    "system": {"messages": TALK},
    "empty answer": {"messages": [TALK[1], {"role": "assistant", "content": ""}]},
}
ALL = TEMPLATES | {"default": DEFAULT_TEMPLATE.read_text(encoding="utf-8")}


@pytest.fixture(scope="module")
def peer(chat_tokenizer: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(chat_tokenizer)


def of_transformers(peer: PreTrainedTokenizerFast, template: str, row: dict) -> tuple[list[int], list[bool]]:
    found = peer.apply_chat_template(
        [message | {"content": message["content"] or ""} for message in row["messages"]],
        tools=row.get("tools"),
        chat_template=template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return found["input_ids"], [bool(bit) for bit in found["assistant_masks"]]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("shape", ALL)
def test_blocks_as_transformers(
    make_encoder: Callable[..., ChatEncoder], peer: PreTrainedTokenizerFast, shape: str, conversation: str
) -> None:
    row = CONVERSATIONS[conversation]
    (example,) = make_encoder(ALL[shape]).examples(row, "x:1")
    ids, mask = of_transformers(peer, ALL[shape], row)
    assert example.ids.tolist() == ids
    assert example.mask.tolist() == mask
    assert any(mask)


@pytest.mark.parametrize("shape", ["tools", "default"])
def test_tool_calls_as_transformers(
    make_encoder: Callable[..., ChatEncoder], peer: PreTrainedTokenizerFast, shape: str
) -> None:
    row = {"messages": CALLS, "tools": WEATHER}
    (example,) = make_encoder(ALL[shape]).examples(row, "x:1")
    assert (example.ids.tolist(), example.mask.tolist()) == of_transformers(peer, ALL[shape], row)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("shape", [shape for shape in ALL if shape != "thinking"])
def test_prefixes_find_the_same_tokens_as_blocks(
    make_encoder: Callable[..., ChatEncoder], shape: str, conversation: str
) -> None:
    """Without blocks the spans come from rendering the beginnings of the conversation."""
    row = CONVERSATIONS[conversation]
    (example,) = make_encoder(ALL[shape]).examples(row, "x:1")
    (by_prefix,) = make_encoder(without_blocks(ALL[shape])).examples(row, "x:1")
    assert by_prefix.ids.tolist() == example.ids.tolist()
    assert by_prefix.mask.tolist() == example.mask.tolist()


def test_thinking_without_blocks(make_encoder: Callable[..., ChatEncoder]) -> None:
    """Earlier turns are printed without their thinking, so the whole is refused and single turns are found."""
    template = without_blocks(TEMPLATES["thinking"])
    with pytest.raises(UserError, match=r"differently when more follow.*--turns split"):
        list(make_encoder(template).examples({"messages": TALK}, "x:1"))
    split = list(make_encoder(template, turns="split").examples({"messages": TALK}, "x:1"))
    with_blocks = list(make_encoder(TEMPLATES["thinking"], turns="split").examples({"messages": TALK}, "x:1"))
    assert [example.mask.tolist() for example in split] == [example.mask.tolist() for example in with_blocks]
    assert len(split) == 2


def test_inference_renders_the_beginning_of_training(
    make_encoder: Callable[..., ChatEncoder], peer: PreTrainedTokenizerFast
) -> None:
    """The prompt that transformers makes for the last answer is the training example up to its first trained token."""
    (example,) = make_encoder(turns="split").examples({"messages": TALK[1:3]}, "x:1")
    prompt = peer.apply_chat_template(TALK[1:2], add_generation_prompt=True)["input_ids"]
    assert example.ids[: example.mask.argmax()].tolist() == prompt
