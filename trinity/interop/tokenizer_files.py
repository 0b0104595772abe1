"""The tokenizer of a Hugging Face folder: its files, and the ids of its special tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from trinity.data.tokenizer.tokenizer import load_tokenizer, vocabulary_size
from trinity.errors import UserError
from trinity.io.json_files import read_json
from trinity.io.local import copy_atomically

CONFIG = "tokenizer_config.json"
FILES = ("tokenizer.json", CONFIG, "special_tokens_map.json", "chat_template.jinja")
"""Files that transformers writes for a fast tokenizer; only the first is required."""


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the special tokens; None for a token that the tokenizer does not have."""

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None

    @property
    def stop(self) -> list[int]:
        """The tokens that end a text: EOS, and BOS, the beginning of the next document.

        In pretraining only BOS separates documents.
        """
        return [token for token in (self.eos, self.bos) if token is not None]


def special_ids(folder: Path, vocab_size: int) -> SpecialIds:
    """The special tokens that tokenizer_config.json names.

    Args:
        folder: the tokenizer's.
        vocab_size: rows of the model's embedding.
    Raises:
        UserError: there is no tokenizer; it has an id beyond vocab_size; or it names a token that it does not have.
    """
    tokenizer = load_tokenizer(folder)
    if vocabulary_size(tokenizer) > vocab_size:
        raise UserError(
            f"{folder} has token ids up to {vocabulary_size(tokenizer) - 1}, but model.vocab_size is {vocab_size}; "
            "give the tokenizer that the model was trained with"
        )
    config = read_json(folder / CONFIG, "fetch the folder or make the tokenizer again") or {}
    return SpecialIds(
        *(_token_id(tokenizer, config.get(f"{kind}_token"), folder / CONFIG) for kind in ("bos", "eos", "pad"))
    )


def _token_id(tokenizer: Tokenizer, token: str | dict[str, str] | None, path: Path) -> int | None:
    if token is None:
        return None
    text = token.get("content") if isinstance(token, dict) else token  # transformers writes either
    token_id = tokenizer.token_to_id(str(text))
    if token_id is None:
        raise UserError(f"{path} names the token {text!r}, which tokenizer.json does not have")
    return token_id


def generation_config(ids: SpecialIds) -> dict[str, Any]:
    """The content of generation_config.json for a model with these tokens."""
    tokens = {"bos_token_id": ids.bos, "eos_token_id": ids.stop or None, "pad_token_id": ids.pad}
    return {"_from_model_config": True, **{key: value for key, value in tokens.items() if value is not None}}


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files into a folder."""
    for name in FILES:
        if (source / name).is_file():
            copy_atomically(source / name, target / name)
