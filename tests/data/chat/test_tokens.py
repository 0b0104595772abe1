"""The tokens before each reply of a training example are those of the prompt that a chat makes."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.data.chat.templates import TEMPLATES, without_blocks
from tests.data.chat.test_oracle import of_transformers
from trinity.data.chat.encode import ChatEncoder
from trinity.data.chat.template import DEFAULT_TEMPLATE
from trinity.data.chat.tokens import PromptEncoder
from trinity.evaluation.chat import ChatTemplate

ALL = TEMPLATES | {"default": DEFAULT_TEMPLATE.read_text(encoding="utf-8")}
BLOCKLESS = {f"{shape}, no blocks": without_blocks(text) for shape, text in ALL.items() if shape != "thinking"}
PIECES = [
    "\n",
    "\n\n",
    " ",
    "  ",
    "\t",
    "a",
    "It is",
    " 5",
    "日",
    "<|im_end|>",
    "<|endoftext|>",
    "<|end|>",
    "\r\n",
    ".",
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=5).map("".join)
ONCE = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def talk(texts: list[str]) -> list[dict]:
    return [{"role": "assistant" if number % 2 else "user", "content": text} for number, text in enumerate(texts)]


@pytest.mark.parametrize("shape", [*ALL, *BLOCKLESS])
@settings(max_examples=25, **ONCE)
@given(texts=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
def test_training_up_to_a_reply_is_the_prompt(
    make_encoder: Callable[..., ChatEncoder], shape: str, texts: list[tuple[str, str]]
) -> None:
    """Of each reply; where a template prints earlier turns differently, of the last.

    A template that trims has to find text that its user's part ends with: here, "x".
    """
    encoder = make_encoder((ALL | BLOCKLESS)[shape])
    messages = talk([text for question, reply in texts for text in (f"{question}x", reply)])
    prompt_of = PromptEncoder(encoder.template, encoder.tok)
    turns = range(len(texts) - 1 if shape == "thinking" else 0, len(texts))
    for turn in turns:
        beginning = messages[: 2 * turn + 2]
        untrained = [message | {"train": number == 2 * turn + 1} for number, message in enumerate(beginning)]
        (example,) = encoder.examples({"messages": untrained}, "x:1")
        prompt = prompt_of(messages[: 2 * turn + 1])
        assert example.ids[: example.mask.argmax()].tolist() == prompt
        (whole,) = encoder.examples({"messages": messages}, "x:1")
        assert whole.ids[: len(prompt)].tolist() == prompt
        assert whole.mask[len(prompt)]


def test_generate_makes_these_prompts(make_encoder: Callable[..., ChatEncoder], chat_tokenizer: Path) -> None:
    """Special tokens that a user spells out are text in both."""
    messages = talk(["say <|im_end|> and <|endoftext|>", "\n\nok", "again\n"])
    (example,) = make_encoder().examples({"messages": [*messages, {"role": "assistant", "content": "\n"}]}, "x:1")
    prompt = ChatTemplate(chat_tokenizer).token_ids(messages)
    assert example.ids[: len(prompt)].tolist() == prompt
    end = make_encoder().turn_end
    assert prompt.count(end) == 3 == sum(token == end for token in example.ids) - 1
    assert not example.mask[len(prompt) - 1]
    assert example.mask[len(prompt)]


@pytest.mark.parametrize("shape", ALL)
@settings(max_examples=15, **ONCE)
@given(texts=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
def test_as_transformers_where_a_reply_begins_with_no_white_space(
    make_encoder: Callable[..., ChatEncoder], chat_tokenizer: Path, shape: str, texts: list[tuple[str, str]]
) -> None:
    """transformers encodes the whole text at once; a reply's white space then joins that of the prompt, and special
    tokens of a message are special."""
    plain = [text.replace("<|", "<").replace("|>", ">") for pair in texts for text in pair]
    row = {"messages": talk([f"x{text}" for text in plain])}
    (example,) = make_encoder(ALL[shape]).examples(row, "x:1")
    peer = AutoTokenizer.from_pretrained(chat_tokenizer)
    assert (example.ids.tolist(), example.mask.tolist()) == of_transformers(peer, ALL[shape], row)


def test_a_completion_begins_anew(make_encoder: Callable[..., ChatEncoder]) -> None:
    """The ids of a prompt and its completion are those of each by itself."""
    encoder = make_encoder()
    (example,) = encoder.examples({"prompt": "Q: 1\n", "completion": "\nA: <|im_end|> 2"}, "x:1")
    encoder.tok.encode_special_tokens = True
    parts = [encoder.tok.encode(text, add_special_tokens=False).ids for text in ("Q: 1\n", "\nA: <|im_end|> 2")]
    assert example.ids[1:-1].tolist() == [*parts[0], *parts[1]]
    assert example.mask.argmax() == 1 + len(parts[0])
