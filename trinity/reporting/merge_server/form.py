"""From the fields of the page's form to a recipe and to the words of the command line of tools/merge.py.

A field of a parameter holds what the recipe holds: a number, true or false, a word, a gradient or filters, in YAML. An
empty field is left out of the recipe, so that the method's default counts. `read_recipe` checks the values.
"""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from trinity.errors import UserError
from trinity.io.local import make_folder, write_atomically
from trinity.merging.methods import METHODS, REQUIRED, Method
from trinity.merging.parameters import LARGEST, PARAMETERS, Parameter
from trinity.merging.recipe import YAML_ERRORS

MARK = "# Written by the page of tools/merge.py --serve, which replaces this file; to keep it, remove this line."
"""First line of a recipe that the page wrote: such a file is replaced, another is not."""

_REFERENCE = re.compile(r" \(see `\w+`\)|`")
"""References to code in a docstring, and its marks of code."""

Form = dict[str, Any]
"""The fields of the form as JSON: texts, switches, and the list `models` of {model, parameters}."""


def methods_for_page() -> list[dict[str, Any]]:
    """METHODS for the page: name, summary, base, least and most models, and the parameters with kind and default."""
    return [
        {
            "name": name,
            "summary": _REFERENCE.sub("", (method.merge.__doc__ or "").partition("\n")[0]),
            "base": method.base,
            "least": method.models[0],
            "most": method.models[1],
            "per_model": _fields(method.per_model),
            "whole": _fields(method.whole),
        }
        for name, method in METHODS.items()
    ]


def recipe_text(form: Form) -> str:
    """The recipe in YAML, from the fields or as it was pasted.

    Raises:
        UserError: nothing was pasted, or see recipe_of.
    """
    if form.get("by") == "yaml":
        if not _text(form, "yaml"):
            raise UserError("there is no recipe; paste one, or fill in the form")
        text = form["yaml"].rstrip().removeprefix(f"{MARK}\n")
        return f"{MARK}\n{text}\n"
    content = yaml.safe_dump(recipe_of(form), sort_keys=False, allow_unicode=True)
    return f"{MARK}\n{content}"


def recipe_of(form: Form) -> dict[str, Any]:
    """The recipe that the fields describe.

    Raises:
        UserError: an unknown method, no model, or a parameter that is missing or no YAML.
    """
    name = _text(form, "method")
    if name not in METHODS:
        raise UserError(f"merge_method {name!r} is not known; choose one of {', '.join(METHODS)}")
    method = METHODS[name]
    recipe: dict[str, Any] = {"merge_method": name}
    if base := _text(form, "base_model"):
        recipe["base_model"] = base
    recipe["models"] = _models(form, method)
    if whole := _values(form.get("parameters"), method.whole, name):
        recipe["parameters"] = whole
    if dtype := _text(form, "out_dtype"):
        recipe["out_dtype"] = dtype
    if tokenizer := _text(form, "tokenizer"):
        recipe["tokenizer"] = {"source": tokenizer}
    if form.get("match_experts") is True:
        recipe["match_experts"] = True
    return recipe


def command_words(form: Form, recipe: Path) -> list[str]:
    """The words after tools/merge.py that merge as the form says.

    Args:
        recipe: the file of the recipe.
    Raises:
        UserError: no output folder, or a text that would be read as an option.
    """
    report = report_file(form)
    options: dict[str, list[str]] = {
        "--workers": [workers] if (workers := _text(form, "workers")) else [],
        "--report": [] if report is None else [_word(report)],
        "--validation": _lines(form, "validation"),
        "--recalibrate": _lines(form, "recalibrate"),
        "--window": [window] if (window := _text(form, "window")) else [],
        "--rows": [rows] if (rows := _text(form, "rows")) else [],
    }
    for value in options["--validation"] + options["--recalibrate"]:
        if value.startswith("-"):
            raise UserError(f"{value} begins with a hyphen, as an option does; write another name, or ./{value}")
    words = [_word(recipe), _word(out_dir(form)), *(["--overwrite"] if form.get("overwrite") is True else [])]
    for option, values in options.items():
        words += [option, *values] if values else []
    return words


def out_dir(form: Form) -> Path:
    """The folder to make.

    Raises:
        UserError: none is given.
    """
    text = _text(form, "out_dir")
    if not text:
        raise UserError("there is no output folder; write the name of the folder to make")
    folder = Path(os.path.expanduser(text))
    if not folder.name:
        raise UserError(f"{text} cannot be made; write the name of a new folder")
    return folder


def report_file(form: Form) -> Path | None:
    """The report to write; None for none."""
    text = _text(form, "report")
    return Path(os.path.expanduser(text)) if text else None


def recipe_file(form: Form) -> Path:
    """The file that keeps the recipe: OUT_DIR.yaml.

    Raises:
        UserError: no output folder, or the file exists and the page did not write it.
    """
    folder = out_dir(form)
    path = folder.with_name(f"{folder.name}.yaml")
    if path.exists():
        try:
            written = path.read_text(encoding="utf-8").startswith(MARK)
        except (UnicodeDecodeError, IsADirectoryError):
            written = False
        if not written:
            raise UserError(f"{path} exists and was not written by this page; give another output folder, or move it")
    return path


def write_recipe(form: Form) -> Path:
    """Write the recipe beside the output folder; returns the file.

    Raises:
        UserError: see recipe_text and recipe_file.
    """
    path, text = recipe_file(form), recipe_text(form)
    make_folder(path.parent)
    write_atomically(path, text)
    return path


def _fields(defaults: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"name": name, **_kind(PARAMETERS[name]), "default": _default(default)} for name, default in defaults.items()
    ]


def _kind(parameter: Parameter) -> dict[str, Any]:
    """Kind of a parameter, and its choices or, in words, its bounds."""
    if parameter.words:
        return {"kind": "choice", "words": [_plain(written) for written, _ in parameter.words]}
    if parameter.kind is bool:
        return {"kind": "choice", "words": ["true", "false"]}
    low, high = parameter.low, parameter.high
    bounds = "" if low == -LARGEST else f"at least {low:g}" if high == LARGEST else f"{low:g} to {high:g}"
    return {"kind": "number", "hint": f"whole number, {bounds}" if parameter.kind is int else bounds}


def _default(value: Any) -> str | None:
    return None if value is REQUIRED else _plain(value)


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _models(form: Form, method: Method) -> list[dict[str, Any]]:
    models = []
    for number, each in enumerate(form.get("models") or [], 1):
        if not isinstance(each, dict) or not (model := _text(each, "model")):
            continue
        values = _values(each.get("parameters"), method.per_model, f"model {number}")
        models.append({"model": model} | ({"parameters": values} if values else {}))
    if not models:
        raise UserError("there is no model; write a Hugging Face folder, a run directory, or RUN_DIR@step")
    return models


def _values(fields: Any, known: dict[str, Any], where: str) -> dict[str, Any]:
    """The filled fields of a method's parameters, read as YAML.

    Raises:
        UserError: a field is no YAML, or is empty and has no default.
    """
    found = {}
    for name in known:
        text = _text(fields or {}, name)
        if not text and known[name] is REQUIRED:
            raise UserError(f"{name} of {where} has no default; fill it in")
        if not text:
            continue
        try:
            found[name] = yaml.safe_load(text)
        except YAML_ERRORS:
            raise UserError(f"{name} of {where} is {text}; write a number, or a list such as [0, 0.5, 1]") from None
    return found


def _word(path: Path) -> str:
    """A path as a word that no program takes for an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def _lines(form: Form, name: str) -> list[str]:
    """The lines of a field that are not blank."""
    return [line.strip() for line in _text(form, name).splitlines() if line.strip()]


def _text(fields: Any, name: str) -> str:
    value = fields.get(name) if isinstance(fields, dict) else None
    return value.strip() if isinstance(value, str) else ""
