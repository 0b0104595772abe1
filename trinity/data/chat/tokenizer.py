"""Give a tokenizer a chat template, and the tokens that the template prints.

A model is not resized for that. Its embedding has rows for ids that no text uses, <|reserved_0|> and the like, or else
ids that texts hardly use: those of the last merges that the tokenizer learned. The chat tokens take their places; all
other ids stay, and texts encode as before, except for pieces that the last merges would have made.
"""

import json
import re
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from trinity.data.chat.encode import MARKER, end_of_turn
from trinity.data.chat.template import DEFAULT_TEMPLATE, TEMPLATE_FILE, TOKENIZER_CONFIG, load_template
from trinity.data.tokenizer.tokenizer import load_tokenizer, vocabulary_size
from trinity.errors import UserError
from trinity.io.json_files import read_json, to_json, write_json
from trinity.io.local import copy_atomically, make_folder, resolve_path, write_atomically

MODEL_CONFIG = "config.json"
"""Of a model in the form of Hugging Face."""
UNUSED = re.compile(r"reserved|unused", re.IGNORECASE)
TOKENIZER_FILES = (TOKENIZER_CONFIG, "special_tokens_map.json")
Places = Literal["reserved", "last"]


def make_chat_tokenizer(
    tokenizer: Path, out: Path, template: Path | None = None, places: Places = "reserved", force: bool = False
) -> list[str]:
    """Write a tokenizer's folder with a chat template and its tokens.

    Args:
        tokenizer: the folder of the base model's tokenizer.
        out: another folder: new, empty, or with the same tokenizer.
        template: its file; None: the default template, default.jinja.
        places: reserved: new tokens take ids of unused special tokens; last: those of the last learned merges.
        force: replace another tokenizer in `out`; a model's folder never is changed.
    Returns:
        The tokens that are new.
    Raises:
        UserError: the template is wrong or prints no end of turn, there are too few places, or `out` holds something
            else.
    """
    if resolve_path(out) == resolve_path(tokenizer):
        raise UserError(f"--out {out} is the tokenizer's own folder; give another, as its ids are about to change")
    found = load_template(tokenizer, template or DEFAULT_TEMPLATE)
    tok = load_tokenizer(tokenizer)
    have = {token.content for token in tok.get_added_tokens_decoder().values()}
    missing = [token for token in dict.fromkeys(MARKER.findall(found.source)) if token not in have]
    content = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    ids = _reserved_ids(content) if places == "reserved" else _last_merges(content, len(missing))
    if len(ids) < len(missing):
        mend = " or use --ids last" if places == "reserved" else ""
        raise UserError(
            f"{tokenizer} has {len(ids)} {'unused special tokens' if places == 'reserved' else 'merges'} for the "
            f"{len(missing)} new tokens of the template ({', '.join(missing)}); train one with --pad-to-multiple{mend}"
        )
    for token, place in zip(missing, ids):
        _replace(content, place, token)
    content["added_tokens"].sort(key=lambda entry: entry["id"])
    made = Tokenizer.from_str(to_json(content))
    assert vocabulary_size(made) == vocabulary_size(tok)
    end_of_turn(found, made)  # refuses a template without one
    files = {TEMPLATE_FILE: found.source, "tokenizer.json": made.to_str(pretty=True) + "\n"}
    _check_folder(out, files, force)
    make_folder(out)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            copy_atomically(tokenizer / name, out / name)
    config = read_json(out / TOKENIZER_CONFIG) or {}
    if config.pop("chat_template", None) is not None:
        write_json(out / TOKENIZER_CONFIG, config, indent=2)
    for name, text in files.items():
        write_atomically(out / name, text)
    return missing


def _check_folder(out: Path, files: dict[str, str], force: bool) -> None:
    """Refuse a folder that writing would damage.

    Args:
        out: the folder.
        files: name → text of the files that make a tokenizer what it is.
        force: another tokenizer may be replaced.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    if (out / MODEL_CONFIG).exists():
        raise UserError(f"--out {out} holds a model ({MODEL_CONFIG}), which has another tokenizer; give a new folder")
    if force or not out.exists() or not any(out.iterdir()):
        return
    texts = {name: (out / name).read_bytes() if (out / name).is_file() else b"" for name in files}
    if any(texts[name] != text.encode() for name, text in files.items()):
        raise UserError(f"--out {out} holds something else already; give a new folder, or --force to write over it")


def _reserved_ids(content: dict[str, Any]) -> list[int]:
    """Ids of special tokens that are kept for later uses."""
    return sorted(
        entry["id"] for entry in content["added_tokens"] if entry["special"] and UNUSED.search(entry["content"])
    )


def _last_merges(content: dict[str, Any], count: int) -> list[int]:
    """Remove the last merges and the tokens they make; returns the ids of these."""
    model = content["model"]
    ids: list[int] = []
    while len(ids) < count and model["merges"]:
        merge = model["merges"].pop()
        token = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        ids.append(model["vocab"].pop(token))
    return sorted(ids)


def _replace(content: dict[str, Any], place: int, token: str) -> None:
    """Let an id be a special token."""
    entries = content["added_tokens"]
    old = next((entry for entry in entries if entry["id"] == place), None)
    if old is not None:
        entries.remove(old)
    if old is None or content["model"]["vocab"].pop(old["content"], None) is not None:
        content["model"]["vocab"][token] = place  # or the library would give it the next free id
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    entries.append({"id": place, "content": token, **flags})
