"""JSON objects in files, as a Hugging Face folder has them."""

import json
from pathlib import Path
from typing import Any

from trinity.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        UserError: there is no such file, or it holds no JSON object.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a folder written by transformers or by tools/export_hf.py")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object but a {type(content).__name__}")
    return content


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write an object for people to read, keys in their own order."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
