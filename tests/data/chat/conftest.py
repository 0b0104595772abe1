"""A tokenizer with a chat template and with the markers of all templates of `templates.py`, and encoders for it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.data.chat.templates import TEMPLATES
from trinity.data.chat.encode import ChatEncoder, ChatOptions
from trinity.data.chat.template import DEFAULT_TEMPLATE, ChatTemplate, load_template, special_tokens
from trinity.data.chat.tokenizer import make_chat_tokenizer
from trinity.data.tokenizer.tokenizer import EOS, load_text_encoder


@pytest.fixture(scope="session")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """The small tokenizer with Trinity's template and every marker in the place of its last merges."""
    folder = tmp_path_factory.mktemp("chat")
    markers = "{# " + " ".join(TEMPLATES.values()).replace("#}", "").replace("{#", "") + " #}"
    (folder / "all.jinja").write_text(markers + DEFAULT_TEMPLATE.read_text(encoding="utf-8"), encoding="utf-8")
    make_chat_tokenizer(tokenizer_dir, folder / "tokenizer", folder / "all.jinja", "last")
    (folder / "tokenizer" / "chat_template.jinja").write_bytes(DEFAULT_TEMPLATE.read_bytes())
    return folder / "tokenizer"


@pytest.fixture(scope="session")
def make_encoder(chat_tokenizer: Path) -> Callable[..., ChatEncoder]:
    """(template's text or None for the tokenizer's own, options of ChatOptions) → an encoder that raises."""

    def make(template: str | None = None, **options: object) -> ChatEncoder:
        tok = load_text_encoder(chat_tokenizer)
        found = load_template(chat_tokenizer)
        if template is not None:
            found = ChatTemplate(template, special_tokens(chat_tokenizer), "my.jinja")
        end_id = tok.token_to_id(EOS)
        return ChatEncoder(tok, np.dtype("<u2"), found, end_id, ChatOptions(**options), skip_bad=False, hashed=False)

    return make
