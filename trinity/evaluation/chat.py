"""Chats: render messages with the tokenizer's chat template, and continue one conversation with its key-value cache.

Messages become tokens by the code that prepares training data (data/chat/tokens.py), so that a model meets in a chat
what it was trained on. A turn ends at a token of generation_config.json, or at the tokenizer's EOS or BOS.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from trinity.data.chat.conversation import check_characters
from trinity.data.chat.template import TemplateFailure, load_template, template_hash
from trinity.data.chat.tokens import PromptEncoder
from trinity.data.tokenizer.tokenizer import load_text_encoder
from trinity.errors import UserError
from trinity.evaluation.generate import PREFILL_CHUNK, Generation
from trinity.evaluation.sampling import Sampling
from trinity.evaluation.text_stream import Piece, stream_texts
from trinity.interop.tokenizer_files import special_ids
from trinity.io.json_files import read_json
from trinity.models.kv_cache import KVCache
from trinity.models.trinity import Trinity

Message = dict[str, str]
"""{"role": "system", "user" or "assistant", "content": text}."""


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        folder: with the tokenizer's files.
    Raises:
        UserError: it has no tokenizer or no chat template, or one of them is damaged.

    Attributes:
        tokenizer: for decoding.
    """

    tokenizer: Tokenizer

    def __init__(self, folder: Path) -> None:
        self.tokenizer = load_text_encoder(folder)
        if template_hash(folder) is None:
            advice = "fine-tune the model to chat (docs/fine_tune.md), or leave --chat out"
            raise UserError(f"{folder} has no chat template; {advice}")
        self._encode = PromptEncoder(load_template(folder), self.tokenizer)

    def token_ids(self, messages: list[Message]) -> list[int]:
        """The conversation, and the beginning of the assistant's next turn: the tokens before it in training.

        Special tokens that messages spell out are ordinary text.

        Raises:
            UserError: a message holds what is no character, or the template refuses the messages or fails.
        """
        try:
            check_characters(messages)
        except UserError as error:
            raise UserError(f"the conversation {error}") from None
        try:
            return self._encode(messages)
        except TemplateFailure as error:
            does, mend = ("refuses", ", or leave --system out") if error.refused else ("fails on", "")
            raise UserError(
                f"{error.name} {does} the messages ({error.reason}); correct it{mend}, or continue texts without --chat"
            ) from None


def end_of_turn_ids(folder: Path, vocab_size: int) -> list[int]:
    """The tokens that end a generated text: eos_token_id of generation_config.json, and the tokenizer's EOS and BOS.

    Args:
        folder: with the tokenizer's files, and with or without a generation_config.json.
    Raises:
        UserError: a file is damaged, or names no tokens of the model.
    """
    path = folder / "generation_config.json"
    named = (read_json(path, "fetch or export the folder again") or {}).get("eos_token_id")
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if not all(isinstance(token, int) and 0 <= token < vocab_size for token in ids):
        raise UserError(f"{path}: eos_token_id={named} is no token of the model, which has ids below {vocab_size}")
    return sorted({*ids, *special_ids(folder, vocab_size).stop})


def first_messages(system: str | None, text: str) -> list[Message]:
    """The messages of a conversation that begins with a user's text; system: None or "" for none."""
    begin = [{"role": "system", "content": system}] if system else []
    return [*begin, {"role": "user", "content": text}]


@dataclass(frozen=True)
class AnswerSettings:
    """How the answers of a conversation are generated; see Generation and stream_texts."""

    max_new_tokens: int
    sampling: Sampling
    seed: int = 0
    stop_ids: Collection[int] = ()
    stop: Sequence[str] = ()
    chunk: int = PREFILL_CHUNK


class Conversation:
    """One conversation. Its tokens stay in a key-value cache for as long as the template only adds to them.

    Args:
        model: on any device; not sharded.
        template: of its tokenizer.
        settings: of each answer.
        system: the system's message; None or "": none.
    """

    def __init__(
        self, model: Trinity, template: ChatTemplate, settings: AnswerSettings, system: str | None = None
    ) -> None:
        self._model, self._template, self._settings, self._system = model, template, settings, system
        self.messages: list[Message] = []
        self._cache, self._tokens = KVCache(model.config), list[int]()

    def answer(self, text: str) -> Iterator[Piece]:
        """Add a user's message, and then the answer, whose text is yielded as it is generated."""
        self.messages += [{"role": "user", "content": text}] if self.messages else first_messages(self._system, text)
        tokens, settings = self._template.token_ids(self.messages), self._settings
        reused = self._reusable(tokens)
        generation = Generation(
            self._model,
            [tokens[reused:]],
            settings.max_new_tokens,
            settings.sampling,
            [settings.seed],
            settings.stop_ids,
            settings.chunk,
            self._cache,
        )
        parts = []
        for piece in stream_texts(generation, self._template.tokenizer, settings.stop):
            parts.append(piece.text)
            yield piece
        self._tokens = tokens[:reused] + generation.texts[0]
        self.messages.append({"role": "assistant", "content": "".join(parts)})

    def _reusable(self, tokens: list[int]) -> int:
        """How many tokens the cache has already; if it has others than these, it is replaced by an empty one."""
        cached = self._tokens[: self._cache.length]
        if len(cached) < len(tokens) and tokens[: len(cached)] == cached:
            return len(cached)
        self._cache = KVCache(self._model.config, capacity=len(tokens) + self._settings.max_new_tokens)
        return 0
