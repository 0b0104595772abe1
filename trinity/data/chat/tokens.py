"""A rendered conversation as token ids, for training data and for prompts: both encode it here, so they cannot differ.

The text is encoded in parts, each by itself:
1. Special tokens that messages spell out are ordinary text.
2. A reply begins a part. Otherwise the tokenizer could join the end of the prompt and the beginning of the reply, such
   as two new lines, into one token, which no prompt ends with. So **the tokens before a reply are its prompt's**.

A reply begins with a generation block; without blocks, where the generation prompt ends.

Shapes: T tokens.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from trinity.data.chat.template import BEGIN_LITERAL, END_LITERAL, ChatTemplate, Message, Rendered, TemplateFailure


class PromptEncoder:
    """Encodes the beginnings of conversations, for inference.

    Args:
        template: of the tokenizer.
        tok: the tokenizer, of load_text_encoder.
    """

    def __init__(self, template: ChatTemplate, tok: Tokenizer) -> None:
        self._template, self._tok, self._special = template, tok, special_pattern(tok)

    def __call__(self, messages: Sequence[Message]) -> list[int]:
        """The ids of the messages, and of the generation prompt after them.

        Raises:
            TemplateFailure: the template does not print the messages.
        """
        messages = protected(list(messages), self._special)
        rendered = self._template.render(messages, add_generation_prompt=True)
        begins = reply_begins(self._template, messages, None, None, rendered)
        return encode_parts(self._tok, rendered, begins)[0].tolist()


def special_pattern(tok: Tokenizer) -> re.Pattern[str]:
    """Matches the special tokens of a tokenizer, the longest first."""
    special = [token.content for token in tok.get_added_tokens_decoder().values() if token.special]
    return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")


def protected(value: Any, special: re.Pattern[str]) -> Any:
    """A copy of messages in which the special tokens that they spell out are marked, so that they stay text."""
    if isinstance(value, str):
        return special.sub(lambda match: f"{BEGIN_LITERAL}{match[0]}{END_LITERAL}", value)
    if isinstance(value, dict):
        return {key: protected(inner, special) for key, inner in value.items()}
    return [protected(inner, special) for inner in value] if isinstance(value, list) else value


def reply_begins(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Mapping] | None,
    variables: Mapping[str, Any] | None,
    rendered: Rendered,
) -> list[int]:
    """The characters at which replies begin in a text that a template has printed.

    A template without blocks that prints the beginning of a conversation differently when more follows has none there.

    Args:
        template, messages, tools, variables: see ChatTemplate.render.
        rendered: what it printed of them, with or without a generation prompt.
    """
    if template.generates:
        return [begin for begin, _ in rendered.spans]
    begins = []
    for turn in (number for number, message in enumerate(messages) if message["role"] == "assistant"):
        try:
            prompt = template.render(messages[:turn], tools, variables, add_generation_prompt=True).text
        except TemplateFailure:
            continue
        begins += [len(prompt)] if rendered.text.startswith(prompt) else []
    return begins


def encode_parts(tok: Tokenizer, rendered: Rendered, begins: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
    """Encode a rendered text, whose literals hold no special token, with a new part at each of `begins`.

    Args:
        tok: the tokenizer; its `encode_special_tokens` is changed.
        rendered: the text.
        begins: characters, in any order.
    Returns:
        [T] int64 ids, and [T] int64 the first character of each, ascending.
    """
    end = len(rendered.text)
    edges = sorted({0, end, *begins, *(edge for literal in rendered.literals for edge in literal)})
    literal_begins = [begin for begin, _ in rendered.literals]
    ids: list[int] = []
    starts: list[int] = []
    for part_begin, part_end in pairwise(edges):
        at = bisect_right(literal_begins, part_begin) - 1
        tok.encode_special_tokens = at >= 0 and part_begin < rendered.literals[at][1]
        encoding = tok.encode(rendered.text[part_begin:part_end], add_special_tokens=False)
        ids += encoding.ids
        before = 0  # offsets may leave out a token's leading space
        for start, stop in encoding.offsets:
            starts.append(part_begin + min(start, before))
            before = stop
    assert len(ids) == len(starts)
    return np.array(ids, np.int64), np.array(starts, np.int64)
