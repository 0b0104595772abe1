"""Encode conversations as token ids with a loss mask: the part of chat preparation that runs in worker processes.

Which tokens are trained is decided in characters and carried to tokens by their offsets: **a token is trained if and
only if its first character lies in a trained span.** The spans of an assistant's turn are
1. the template's generation blocks, if it has any;
2. else what the template adds to the conversation before the turn, generation prompt included, up to its end of turn.
   For that the template must keep what it has printed: each beginning of a conversation must be printed as the
   beginning of the whole. Other templates are refused.
Each trained turn must hold one trained end of turn, or the model would not learn to stop. How text becomes tokens is in
tokens.py.

Shapes: n rows of the input and examples made of them, T tokens.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from trinity.data.chat.conversation import Conversation, Pair, parse_row
from trinity.data.chat.template import ChatTemplate, Rendered, Span, probe_prompt, reply_ending
from trinity.data.chat.tokens import encode_parts, protected, reply_begins, special_pattern
from trinity.data.prepare.shard_writer import EMPTY, KEPT, TOO_LONG, UNREADABLE, Encoded
from trinity.data.prepare.tokenize import hashes_of
from trinity.data.sources.documents import RawBatch, parse_text
from trinity.data.tokenizer.tokenizer import BOS, bos_id
from trinity.errors import UserError

Loss = Literal["assistant", "completion", "all"]
Turns = Literal["whole", "split"]
TooLong = Literal["refuse", "drop", "truncate-prompt"]

MARKER = re.compile(r"<\|[^<>|\s]{1,64}\|>")
"""The usual form of a special token: a template that prints one expects it to be one token."""


NESTED = "holds objects within hundreds of others; write them with fewer levels, or leave the row out"


class ChatOptions(NamedTuple):
    """How rows become examples.

    loss: assistant: all turns of the assistant, and completions; completion: completions, and of a conversation without
        one its last turn; all: every token.
    turns: whole: a conversation is one example; split: one for each trained turn, with the conversation before it.
    too_long: what to do with an example of more than max_tokens: stop, leave it out, or leave out the beginning of what
        comes before its first trained token.
    max_tokens: None: any length.
    """

    loss: Loss = "assistant"
    turns: Turns = "whole"
    too_long: TooLong = "refuse"
    max_tokens: int | None = None


class Example(NamedTuple):
    """One example: its text (for sizes), its ids [T], and which of them are trained [T]."""

    text: str
    ids: np.ndarray
    mask: np.ndarray


class ChatEncoder:
    """Parses, renders and encodes batches of rows; worker processes call it."""

    field = None  # whole rows are read

    def __init__(
        self,
        tok: Tokenizer,
        dtype: np.dtype,
        template: ChatTemplate | None,
        end_id: int | None,
        options: ChatOptions,
        skip_bad: bool,
        hashed: bool,
    ) -> None:
        """
        Args:
            tok: the tokenizer.
            dtype: type of the ids.
            template: for conversations; None: only pairs of texts can be read.
            end_id: EOS, which ends a completion that is a text.
            options: how rows become examples.
            skip_bad: mark rows that cannot be read, instead of raising.
            hashed: compute the hash of each example (see trained_content).
        Raises:
            UserError: the tokenizer lacks a token that the template prints.
        """
        self.tok, self.dtype, self.template, self.end_id = tok, dtype, template, end_id
        self.options, self.skip_bad, self.hashed = options, skip_bad, hashed
        self.bos = bos_id(tok)
        self.turn_end = -1 if template is None else end_of_turn(template, tok)
        self._turn_end_text = "" if template is None else str(tok.id_to_token(self.turn_end))
        self._special = special_pattern(tok)

    def __call__(self, batches: list[RawBatch]) -> Encoded:
        """Encode the rows of one or more consecutive batches.

        Raises:
            UserError: a row that cannot be read or encoded, unless skip_bad; an example that is too long, if refused.
        """
        rows = [row for batch in batches for row in self._rows(batch)]
        examples = [example for _, _, _, example in rows if example is not None]
        none = Example("", np.empty(0, self.dtype), np.empty(0, bool))
        return Encoded(
            ids=np.concatenate([part.ids for part in [none, *examples]]),
            status=np.array([status for _, _, status, _ in rows], np.uint8),
            files=np.array([file for file, _, _, _ in rows], np.int64),
            items=np.array([item for _, item, _, _ in rows], np.int64),
            lengths=np.array([len(part.ids) for part in examples], np.int64),
            text_bytes=np.array([len(part.text.encode()) for part in examples], np.int64),
            hashes=hashes_of(map(trained_content, examples)) if self.hashed else None,
            done=batches[-1].done,
            mask=np.concatenate([part.mask for part in [none, *examples]]),
        )

    def _rows(self, batch: RawBatch) -> Iterator[tuple[int, int, int, Example | None]]:
        """(file, item, status, example) of each example, and of each row that gives none."""
        for item, raw in enumerate(batch.items, batch.position.item):
            where = f"{batch.name}:{item + 1}"
            try:
                row = _parse(raw, batch, item + 1)
                examples = [] if row is None else list(self.examples(row, where))
                status = EMPTY
            except UserError:
                if not self.skip_bad:
                    raise
                examples, status = [], UNREADABLE
            for example in examples:
                cut = self._fitted(example, where)
                yield batch.position.file, item, TOO_LONG if cut is None else KEPT, cut
            if not examples:
                yield batch.position.file, item, status, None

    def examples(self, row: Any, where: str) -> Iterator[Example]:
        """The examples of one row, of any length.

        Args:
            row: see conversation.parse_row.
            where: its place, for messages.
        Raises:
            UserError: the row or what the template makes of it cannot be trained.
        """
        try:
            parsed = parse_row(row)
        except UserError as error:
            raise UserError(f"{where} {error}") from None
        except RecursionError:
            raise UserError(f"{where} {NESTED}") from None
        if isinstance(parsed, Pair):
            yield self._pair(parsed)
            return
        if self.template is None:
            raise UserError(
                f"{where} has messages and the tokenizer has no chat template; make a tokenizer with one by "
                "tools/chat_tokenizer.py, or give --template FILE"
            )
        trained = parsed.completion if self.options.loss == "completion" else parsed.trained
        if self.options.turns == "whole":
            yield self._conversation(parsed, trained, where)
        else:
            for turn in trained:
                yield self._conversation(parsed._replace(messages=parsed.messages[: turn + 1]), [turn], where)

    def _conversation(self, conversation: Conversation, trained: list[int], where: str) -> Example:
        assert self.template is not None
        try:
            conversation = conversation._replace(messages=protected(conversation.messages, self._special))
            messages, tools, variables = conversation.messages, conversation.tools, conversation.variables
            rendered = self._render(conversation, len(messages))
            whole = self.options.loss == "all"
            spans = [(0, len(rendered.text))] if whole else self._spans(conversation, trained, rendered)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        except RecursionError:
            raise UserError(f"{where} {NESTED}") from None
        ids, starts = encode_parts(
            self.tok, rendered, reply_begins(self.template, messages, tools, variables, rendered)
        )
        if len(ids) == 0 or ids[0] != self.bos or (ids == self.bos).sum() != 1:
            raise UserError(
                f"{where}: {self._name} does not print {BOS} once, at the beginning, as every document of this model "
                "has it; write {{ bos_token }} there, and nowhere else"
            )
        mask = in_spans(starts, spans)
        mask[0] = False
        ends = int((mask & (ids == self.turn_end)).sum())
        if not whole and ends != len(trained):
            raise UserError(
                f"{where}: {self._name} trains {ends} ends of turn for {len(trained)} trained turns, so the model "
                f"would not learn to stop; let each turn's generation block end with {self._turn_end_text}"
            )
        return Example(rendered.text, ids.astype(self.dtype), mask)

    def _pair(self, pair: Pair) -> Example:
        """BOS, the prompt, the completion, and EOS as its end."""
        text = pair.prompt + pair.completion
        begin = len(pair.prompt)
        ids, starts = encode_parts(self.tok, Rendered(text, [], [(0, len(text))]), [begin])
        mask = in_spans(starts, [(0 if self.options.loss == "all" else begin, len(text))])
        if self.end_id is None:
            raise UserError("tokenizer_config.json names no eos_token, which ends a completion; add it")
        ids = np.concatenate([[self.bos], ids, [self.end_id]]).astype(self.dtype)
        return Example(text, ids, np.concatenate([[False], mask, [True]]))

    def _spans(self, conversation: Conversation, trained: list[int], rendered: Rendered) -> list[Span]:
        """The trained characters of a rendered conversation."""
        assert self.template is not None
        if not self.template.generates:
            return [self._turn(conversation, turn, rendered.text) for turn in trained]
        turns = [number for number, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        if trained == turns:
            return rendered.spans
        if len(rendered.spans) == len(turns) and all(self._ends_turn(rendered, span) for span in rendered.spans):
            return [span for span, turn in zip(rendered.spans, turns) if turn in trained]
        spans = []
        for turn in trained:  # several blocks a turn: those that begin within it
            begin, end = (self._beginning(conversation, count, rendered.text) for count in (turn, turn + 1))
            spans += [span for span in rendered.spans if begin <= span[0] < end]
        return spans

    def _ends_turn(self, rendered: Rendered, span: Span) -> bool:
        """Whether a generation block holds an end of turn that no message spells out."""
        begin, end = span
        literals = [literal for literal in rendered.literals if begin <= literal[0] < end]
        for literal_begin, literal_end in [*literals, (end, end)]:
            if self._turn_end_text in rendered.text[begin:literal_begin]:
                return True
            begin = literal_end
        return False

    def _beginning(self, conversation: Conversation, count: int, text: str, prompt: bool = False) -> int:
        """The length of what the template prints of the first `count` messages, which must begin `text`."""
        beginning = self._render(conversation, count, prompt).text
        if not text.startswith(beginning):
            marks = "" if self.template is not None and self.template.generates else "has no generation blocks and "
            split = "" if self.options.turns == "split" else ", or use --turns split"
            raise UserError(
                f"{self._name} {marks}prints the first {count} messages differently when more follow, so that the "
                "assistant's tokens cannot be found; put {% generation %} … {% endgeneration %} around its text"
                f"{split}"
            )
        return len(beginning)

    def _turn(self, conversation: Conversation, turn: int, text: str) -> Span:
        """The characters of a turn without generation blocks: after the generation prompt, up to the end of turn."""
        begin = self._beginning(conversation, turn, text, prompt=True)
        end = self._beginning(conversation, turn + 1, text)
        last = text.rfind(self._turn_end_text, begin, end)
        return begin, last + len(self._turn_end_text) if last >= 0 else end

    def _render(self, conversation: Conversation, count: int, prompt: bool = False) -> Rendered:
        assert self.template is not None
        messages = conversation.messages[:count]
        return self.template.render(messages, conversation.tools, conversation.variables, prompt)

    def _fitted(self, example: Example, where: str) -> Example | None:
        """The example within max_tokens; None if it is left out."""
        most = self.options.max_tokens
        excess = 0 if most is None else len(example.ids) - most
        if excess <= 0:
            return example
        if self.options.too_long == "refuse":
            raise UserError(
                f"{where} has {len(example.ids)} tokens, more than --max-tokens {most}; use a larger number, or "
                "--too-long drop or truncate-prompt"
            )
        before = int(example.mask.argmax()) - 1  # tokens between BOS and the first trained one
        if self.options.too_long == "drop" or excess > before:
            return None
        kept = np.r_[0, 1 + excess : len(example.ids)]
        return Example(example.text, example.ids[kept], example.mask[kept])

    @property
    def _name(self) -> str:
        return "the chat template" if self.template is None else self.template.name


def end_of_turn(template: ChatTemplate, tok: Tokenizer) -> int:
    """The id of the token that a template prints after the assistant's text.

    Raises:
        UserError: the tokenizer does not have a token that the template prints, or the template prints none there.
    """
    ending = reply_ending(template)
    added = {token.content: number for number, token in tok.get_added_tokens_decoder().items()}
    for marker in MARKER.findall(probe_prompt(template) + ending):
        if marker not in added:
            raise UserError(
                f"{template.name} prints {marker}, which the tokenizer does not have as a token; make one that does by "
                "tools/chat_tokenizer.py"
            )
    found = [(ending.find(text), -len(text), number) for text, number in added.items() if text in ending]
    if not found:
        raise UserError(
            f"{template.name} prints {ending[:40]!r} after the assistant's text, which holds no token of the tokenizer "
            "to end a turn with; print one, such as {{ eos_token }}"
        )
    return min(found)[-1]


def in_spans(starts: np.ndarray, spans: list[Span]) -> np.ndarray:
    """[T] bool: whether each token's first character, ascending in `starts` [T], lies in a span [begin, end)."""
    mask = np.zeros(len(starts), bool)
    for begin, end in spans:
        mask[np.searchsorted(starts, begin) : np.searchsorted(starts, end)] = True
    return mask


def trained_content(example: Example) -> bytes:
    """What training sees of an example: its ids, and which are trained. Examples with equal content are duplicates.

    The same text gives others if another part of it is trained, or if a special token in it is spelled out.
    """
    return example.ids.tobytes() + np.packbits(example.mask).tobytes()


def _parse(raw: Any, batch: RawBatch, number: int) -> Any:
    """A row of the input as an object; None for an empty line."""
    if batch.kind == "value":
        return raw
    if batch.kind == "text":
        raise UserError(f"{batch.name} is plain text, and --chat reads lines of JSON or Parquet; give such a file")
    text = parse_text(raw, batch.name, number, 0, "messages")
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{batch.name}:{number} is not valid JSON ({error}); fix it, or prepare shards with --skip-bad-lines"
        ) from None
