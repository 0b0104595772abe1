"""The vocabulary of the merged model: its tokenizer, and which row of each model belongs to which token.

Without `tokenizer` in the recipe, all models must have the same tokens at the same ids. With it, rows of embedding and
head are put in the order of the chosen tokenizer before they are merged; a row that a model lacks comes from the
recipe's `tokens`, else from the base, else it is the mean of the rows of the models that have the token.

Shapes: V tokens of the merged model, D model width.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trinity.errors import UserError
from trinity.io.checksum import content_hash
from trinity.io.json_files import read_json, to_json
from trinity.merging.recipe import TokenFill, TokenizerRecipe
from trinity.merging.sources import Source

_MISSING = -1


@dataclass(frozen=True)
class Vocabulary:
    """Rows of the merged model's embedding and head.

    size: V.
    rows: label of a model → its row for each of the V rows, -1 where it has none; None: every model's rows as they are.
    fills: row → where the recipe takes it from.
    base: label of the base, whose rows models that lack a token get.
    donor: the model that gives tokenizer files, special ids and generation config.
    tokenizer_json: content of a new tokenizer.json; None: the donor's file.
    notes: remarks for the user.
    """

    size: int
    rows: dict[str, Tensor] | None
    fills: dict[int, TokenFill]
    base: str | None
    donor: Source
    tokenizer_json: dict[str, Any] | None
    notes: list[str]


def plan_vocabulary(
    recipe: TokenizerRecipe | None, sources: dict[str, Source], donor: Source, base: Source | None
) -> Vocabulary:
    """Choose the tokenizer and map the rows of every model.

    Args:
        recipe: the recipe's tokenizer; None: keep the common one.
        sources: every model by its label.
        donor: the model that gives the config.
        base: the recipe's base.
    Raises:
        UserError: the tokenizers differ and the recipe does not say what to do; or naming what it gets wrong.
    """
    origin = None if base is None else base.label
    if recipe is None:
        notes = _check_same(list(sources.values()))
        chosen = donor if donor.tokenizer else next((each for each in sources.values() if each.tokenizer), donor)
        return Vocabulary(donor.config.vocab_size, None, {}, origin, chosen, None, notes)
    without = [source.label for source in sources.values() if source.tokenizer is None]
    if without:
        raise UserError(f"{', '.join(without)} has no tokenizer.json, which the recipe's tokenizer needs; add the file")
    tokens = {label: source.token_ids for label, source in sources.items()}
    chosen, new = _chosen(recipe.source, sources, donor, base)
    ids = chosen.token_ids if new is None else _ids(new)
    size = max(max(ids.values(), default=0) + 1, chosen.config.vocab_size)
    if recipe.pad_to_multiple_of:
        size = math.ceil(size / recipe.pad_to_multiple_of) * recipe.pad_to_multiple_of
    rows = {label: _row_map(ids, tokens[label], size, source) for label, source in sources.items()}
    fills = _fills(recipe, ids, sources, tokens)
    notes = [
        f"{len(lost)} tokens of {label} are not in the tokenizer of {chosen.label}, so their rows are not used"
        for label, of_model in tokens.items()
        if (lost := of_model.keys() - ids.keys())
    ]
    return Vocabulary(size, rows, fills, origin, chosen, new, notes)


class EmbeddingRows:
    """Embedding and head of the models in the order of the merged vocabulary.

    Args:
        vocabulary: with a row map.
        sources: every model by its label.
    """

    def __init__(self, vocabulary: Vocabulary, sources: dict[str, Source]) -> None:
        self._vocabulary, self._sources = vocabulary, sources

    def read(self, label: str, name: str) -> Tensor:
        """[V, D] in fp32; the rows that a model lacks are filled.

        Args:
            label: of the model.
            name: of the embedding or the head.
        """
        vocabulary, source = self._vocabulary, self._sources[label]
        assert vocabulary.rows is not None
        own = source.read(name, 0, source.rows(name)).float()
        rows = vocabulary.rows[label]
        result = own[rows.clamp_min(0)]
        mean = own.mean(0)
        for row in (rows == _MISSING).nonzero().view(-1).tolist():
            result[row] = self._default(row, name, mean)
        for row, fill in vocabulary.fills.items():
            if fill.force or rows[row] == _MISSING:
                result[row] = self._filled(fill, name)
        return result

    def _default(self, row: int, name: str, mean: Tensor) -> Tensor:
        """The base's row, else the mean of those that there are, else the mean of all rows of this model."""
        maps = self._vocabulary.rows or {}
        having = {label: int(rows[row]) for label, rows in maps.items() if rows[row] != _MISSING}
        if self._vocabulary.base in having:
            having = {self._vocabulary.base: having[self._vocabulary.base]}
        if not having:
            return mean
        return torch.stack([self._row(label, name, at) for label, at in having.items()]).mean(0)

    def _filled(self, fill: TokenFill, name: str) -> Tensor:
        if fill.model is None:
            return torch.zeros(next(iter(self._sources.values())).config.width)
        assert isinstance(fill.token, int)  # _fills looked tokens up
        return self._row(fill.model, name, fill.token)

    def _row(self, label: str, name: str, row: int) -> Tensor:
        return self._sources[label].read(name, row, row + 1)[0].float()


def _check_same(sources: list[Source]) -> list[str]:
    """Refuse different vocabularies; returns remarks on tokenizers that merely differ otherwise."""
    first, notes = sources[0], []
    for other in sources[1:]:
        if other.config.vocab_size != first.config.vocab_size:
            raise UserError(
                f"vocab_size is {first.config.vocab_size} in {first.label} and {other.config.vocab_size} in "
                f"{other.label}; write tokenizer: {{source: union}}, or source: base"
            )
    having = [source for source in sources if source.tokenizer is not None]
    hashes = {source.label: content_hash(source.tokenizer / "tokenizer.json") for source in having if source.tokenizer}
    for other in having[1:]:
        if hashes[other.label] == hashes[having[0].label]:
            continue
        first, ids, other_ids = having[0], having[0].token_ids, other.token_ids
        if ids != other_ids:
            token = min(each for each in ids.keys() | other_ids.keys() if ids.get(each) != other_ids.get(each))
            raise UserError(
                f"the tokenizers of {first.label} and {other.label} differ: the token {token!r} has id "
                f"{ids.get(token, 'none')} and {other_ids.get(token, 'none')}; write tokenizer: {{source: union}}, or "
                f"{{source: {other.label}}} to keep that one's"
            )
        notes.append(f"the tokenizers of {first.label} and {other.label} have the same tokens, but differ otherwise")
    return notes


def _chosen(
    named: str, sources: dict[str, Source], donor: Source, base: Source | None
) -> tuple[Source, dict[str, Any] | None]:
    """(the model that gives the files, content of a new tokenizer.json if it is not that model's)."""
    if named == "base":
        if base is None:
            raise UserError("tokenizer source is base, but the recipe has no base_model; name a model, or union")
        return base, None
    if named == "union":
        content, ids = donor.tokenizer_json, donor.token_ids
        for source in sources.values():
            if source.token_ids.keys() - ids.keys():
                content = _union(content, ids, donor, source)
                ids = _ids(content)
        return donor, None if content is donor.tokenizer_json else content
    if named not in sources:
        raise UserError(
            f"tokenizer source {named!r} is none of base, union and the recipe's models {', '.join(sources)}"
        )
    return sources[named], None


def _union(first: dict[str, Any], ids: dict[str, int], donor: Source, source: Source) -> dict[str, Any]:
    """A tokenizer with the tokens of another: new tokens get new ids, new merges come last.

    Args:
        first: content of the tokenizer.
        ids: its tokens.
        donor: the model that it began with, for messages.
        source: the model whose tokens are added.
    """
    second = source.tokenizer_json
    new = [token for token, _ in sorted(source.token_ids.items(), key=lambda item: item[1]) if token not in ids]
    added = {entry["content"]: entry for entry in second.get("added_tokens") or []}
    inner = [token for token in new if token not in added]
    if inner and not all(each["model"].get("type") == "BPE" for each in (first, second)):
        raise UserError(
            f"the tokenizers of {donor.label} and {source.label} are not both BPE, so they have no union; "
            "write tokenizer: {source: MODEL}"
        )
    number = max(ids.values(), default=-1) + 1
    numbers = {token: number + offset for offset, token in enumerate(inner + [each for each in new if each in added])}
    model = dict(first["model"])
    model["vocab"] = model["vocab"] | {token: numbers[token] for token in inner}
    if inner:
        have = {tuple(_pair(merge)) for merge in model["merges"]}
        more = [merge for merge in map(_pair, second["model"]["merges"]) if tuple(merge) not in have]
        as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
        model["merges"] = model["merges"] + [" ".join(merge) if as_text else merge for merge in more]
    entries = [added[token] | {"id": numbers[token]} for token in new if token in added]
    return first | {"model": model, "added_tokens": (first.get("added_tokens") or []) + entries}


def _pair(merge: Any) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else list(merge)


def _row_map(ids: dict[str, int], own: dict[str, int], size: int, source: Source) -> Tensor:
    """Row of a model for each of `size` rows. Rows that no tokenizer names belong to each other by number."""
    rows = torch.full((size,), _MISSING)
    named_here, named_there = set(own.values()), set(ids.values())
    for row in range(min(size, source.config.vocab_size)):
        if row not in named_there and row not in named_here:
            rows[row] = row
    for token, row in ids.items():
        rows[row] = own.get(token, _MISSING)
    if bool((rows >= source.config.vocab_size).any()):
        raise UserError(f"the tokenizer of {source.label} has more tokens than the {source.config.vocab_size} rows of "
                        "its embedding; give it the tokenizer that it was trained with")  # fmt: skip
    return rows


def _fills(
    recipe: TokenizerRecipe, ids: dict[str, int], sources: dict[str, Source], tokens: dict[str, dict[str, int]]
) -> dict[int, TokenFill]:
    """Row → fill, with the token of the fill looked up in its model."""
    found = {}
    for token, fill in recipe.tokens.items():
        where = f"tokenizer.tokens.{token}"
        if token not in ids:
            raise UserError(
                f"{where}: the merged tokenizer has no token {token!r}; add it to a model's tokenizer first"
            )
        if fill.model is None:
            found[ids[token]] = fill
            continue
        if fill.model not in sources:
            raise UserError(f"{where}: {fill.model!r} is none of the recipe's models {', '.join(sources)}")
        row = tokens[fill.model].get(fill.token) if isinstance(fill.token, str) else fill.token
        if row is None or not 0 <= row < sources[fill.model].config.vocab_size:
            raise UserError(f"{where}: {fill.model} has no token {fill.token!r}; name one that it has")
        found[ids[token]] = TokenFill(fill.model, row, fill.force)
    return found


def _ids(content: dict[str, Any]) -> dict[str, int]:
    """Token → id of a new tokenizer.json, as the tokenizers library reads it."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(to_json(content, ensure_ascii=False)).get_vocab()


def with_added_tokens(config: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json with the added tokens of a new tokenizer.json, where it lists them."""
    if not isinstance(config.get("added_tokens_decoder"), dict):
        return config
    listed = {
        str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
        for entry in content.get("added_tokens") or []
    }
    return config | {"added_tokens_decoder": listed | config["added_tokens_decoder"]}


def chat_template(recipe: str | None, sources: Iterable[Source], donor: Source) -> str | None:
    """The merged model's chat template; None for none.

    Args:
        recipe: the recipe's word: None or auto, a model's label, chatml, or the template itself.
        sources: every model.
        donor: the model that gives the tokenizer; None keeps its template.
    Raises:
        UserError: a model without a template, or a word that is none of these.
    """
    templates = {source.label: _template(source) for source in sources}
    if recipe is None:
        return templates.get(donor.label) or _template(donor)
    if recipe == "auto":
        given = [text for text in templates.values() if text]
        return max(given, key=given.count, default=None)
    if recipe in templates:
        if not templates[recipe]:
            raise UserError(f"chat_template is {recipe}, which has none; name another model, or write a template")
        return templates[recipe]
    if recipe == "chatml":
        return CHATML
    if "{%" in recipe or "{{" in recipe:
        return recipe
    raise UserError(f"chat_template is {recipe!r}; write auto, chatml, a model of the recipe, or a Jinja template")


def template_notes(recipe: str | None, sources: Iterable[Source], donor: Source) -> list[str]:
    """A remark if the merged model's chat template is not valid, or if it has none and a model has one."""
    sources = list(sources)
    template = chat_template(recipe, sources, donor)
    if template is not None:
        return _faults_of(template)
    having = [source.label for source in sources if _template(source)]
    return [
        f"{label} has a chat template and the merged model has none; to keep it, write chat_template: {label}"
        for label in having[:1]
    ]


def _faults_of(template: str) -> list[str]:
    """A remark if a chat template is not valid Jinja with the tags that transformers knows."""
    from trinity.data.chat.template import ChatTemplate  # imports trinity.data, for which a plain merge does not wait

    try:
        ChatTemplate(template, {}, "the merged model's chat template")
    except UserError as error:
        return [str(error)]
    return []


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The ChatML format as a Jinja template."""


def _template(source: Source) -> str | None:
    folder = source.tokenizer
    if folder is None:
        return None
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{path} is not UTF-8; fetch the folder again") from None
    template = (read_json(folder / "tokenizer_config.json") or {}).get("chat_template")
    return template if isinstance(template, str) else None


def is_tokenizer_file(path: Path) -> bool:
    """Whether a file beside tokenizer.json belongs to the tokenizer."""
    return path.name in _TOKENIZER_FILES


_TOKENIZER_FILES = {
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
}  # fmt: skip
