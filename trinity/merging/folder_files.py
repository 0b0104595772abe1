"""The files of a merged folder besides weights: config, generation config, tokenizer, chat template, code, recipe."""

from pathlib import Path
from typing import Any

from trinity.config.hf_config import GLOBAL, LOCAL
from trinity.interop.output_folder import write_hf_json
from trinity.interop.tokenizer_files import SpecialIds, generation_config, special_ids
from trinity.io.json_files import read_json
from trinity.io.local import copy_atomically, write_atomically
from trinity.merging.plan import Plan
from trinity.merging.vocabulary import chat_template, is_tokenizer_file, with_added_tokens

RECIPE = "merge_recipe.yaml"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_TOKENIZER_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


def write_companions(plan: Plan, folder: Path) -> None:
    """Write every file but the weights.

    config.json and code (*.py) come from the config's donor, generation_config.json and tokenizer from the tokenizer's.

    Raises:
        UserError: the chat template that the recipe names does not exist.
    """
    template = chat_template(plan.recipe.chat_template, plan.sources.values(), plan.vocabulary.donor)
    write_hf_json(folder / "config.json", merged_config(plan))
    if plan.donor.files is not None:
        for path in sorted(plan.donor.files.glob("*.py")):
            if path.is_file():
                copy_atomically(path, folder / path.name)
    _write_tokenizer(plan, folder, template)
    _write_generation_config(plan, folder)
    write_atomically(folder / RECIPE, plan.recipe.text)


def merged_config(plan: Plan) -> dict[str, Any]:
    """config.json of the result: the donor's, with the sizes that the merge changes."""
    raw = dict(plan.donor.raw_config)
    dtype = str(plan.dtype).removeprefix("torch.")
    raw["dtype"] = dtype
    if "torch_dtype" in raw:
        raw["torch_dtype"] = dtype
    raw["vocab_size"] = plan.vocabulary.size
    raw["num_hidden_layers"] = len(plan.dense)
    raw["num_dense_layers"] = sum(plan.dense)
    raw["layer_types"] = [GLOBAL if each else LOCAL for each in plan.is_global]
    if plan.vocabulary.donor is not plan.donor:
        ids = plan.vocabulary.donor.raw_config
        raw |= {key: ids.get(key) for key in _IDS}
    return raw


def _write_generation_config(plan: Plan, folder: Path) -> None:
    """The donor's, with the end of turn of the merged chat template among the tokens that end a text."""
    content = plan.vocabulary.donor.generation_config
    ids = special_ids(folder, plan.vocabulary.size) if plan.vocabulary.donor.tokenizer is not None else SpecialIds()
    named = (content or {}).get("eos_token_id")
    known = named if isinstance(named, list) else [named]
    if ids.turn_end is not None and ids.turn_end not in known:
        content = generation_config(ids) if content is None else content | {
            "eos_token_id": [ids.turn_end, *(token for token in known if token is not None)]
        }  # fmt: skip
    if content is not None:
        write_hf_json(folder / "generation_config.json", content)


def _write_tokenizer(plan: Plan, folder: Path, template: str | None) -> None:
    source, new = plan.vocabulary.donor.tokenizer, plan.vocabulary.tokenizer_json
    if source is None:
        return
    own = chat_template(None, [], plan.vocabulary.donor)
    for path in sorted(source.iterdir()):
        if path.is_file() and is_tokenizer_file(path):
            copy_atomically(path, folder / path.name)
    if new is not None:
        write_hf_json(folder / "tokenizer.json", new)
        for name in ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"):
            (folder / name).unlink(missing_ok=True)  # they describe the donor's tokens only
        if (config := read_json(folder / _TOKENIZER_CONFIG)) is not None:
            write_hf_json(folder / _TOKENIZER_CONFIG, with_added_tokens(config, new))
    if template is not None and template != own:
        write_atomically(folder / _TEMPLATE, template)
        if (config := read_json(folder / _TOKENIZER_CONFIG)) is not None and "chat_template" in config:
            write_hf_json(folder / _TOKENIZER_CONFIG, {k: v for k, v in config.items() if k != "chat_template"})
