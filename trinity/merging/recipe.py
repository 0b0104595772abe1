"""The recipe of a merge: mergekit's YAML and more, read into plain values, every word known.

    merge_method: ties            # of trinity/merging/methods.py
    base_model: MODEL             # for methods that need one; gives config and tokenizer if it is there
    models:                       # or slices: with layer ranges, or modules: {default: …}
      - {model: MODEL, parameters: {weight: 0.5, density: 0.4}}
    parameters: {normalize: true} # of all models; see parameters.py
    rules:                        # not in mergekit: another method or other parameters for tensors by name
      - {match: 'mlp\\.experts', method: linear, parameters: {weight: 1}}
      - {match: 'router', method: passthrough, model: MODEL}
    dtype: float32                # mergekit's; the type of the output if out_dtype is not given
    out_dtype: bfloat16
    tokenizer: {source: union}    # or tokenizer_source: base | union | MODEL
    chat_template: auto           # auto | MODEL | chatml | the template itself
    match_experts: false          # not in mergekit: see experts.py
    seed: 0                       # not in mergekit: of random methods

A MODEL is a Hugging Face folder, a run directory, or RUN_DIR@step. Paths are relative to the current folder.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trinity.errors import UserError
from trinity.merging.methods import METHODS
from trinity.merging.parameters import PARAMETERS, Scope, check_scope, nearest

DTYPES = ("float32", "bfloat16", "float16")
YAML_ERRORS = (yaml.YAMLError, RecursionError, ValueError, KeyError, AttributeError)
"""What PyYAML raises for texts that are not YAML; the last three for values such as 2001-99-99 and `!!bool much`."""
_MOST_VALUES, _MOST_PADDING = 1_000_000, 1 << 16
_TOP = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "rules", "dtype", "out_dtype",
    "tokenizer", "tokenizer_source", "chat_template", "match_experts", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class SliceSource:
    """A model, or a range of its layers, in one slice."""

    model: str
    layers: tuple[int, int] | None
    parameters: Scope


@dataclass(frozen=True)
class Slice:
    """Consecutive layers of the result; `models` of a recipe are one slice of all layers."""

    sources: list[SliceSource]
    parameters: Scope
    method: str


@dataclass(frozen=True)
class Rule:
    """Another method, or other parameters, for the tensors whose name the pattern is found in.

    model: of the recipe, for passthrough: the model that the tensors are copied from.
    """

    match: re.Pattern[str]
    method: str | None
    parameters: Scope
    model: str | None


@dataclass(frozen=True)
class TokenFill:
    """Where the embedding of a token comes from: a model's row of a token or of an id, or zeros.

    model: None for zeros.
    token: text or id of the row in that model.
    force: also for models that have the token.
    """

    model: str | None
    token: str | int
    force: bool


@dataclass(frozen=True)
class TokenizerRecipe:
    """Which tokenizer the result has, and where rows of tokens come from that a model lacks."""

    source: str
    tokens: dict[str, TokenFill] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `text` is the YAML that the merged folder keeps."""

    base: str | None
    slices: list[Slice]
    has_layers: bool
    parameters: Scope
    rules: list[Rule]
    out_dtype: str | None
    tokenizer: TokenizerRecipe | None
    chat_template: str | None
    match_experts: bool
    seed: int
    text: str

    @property
    def models(self) -> list[str]:
        """Every model, each once, in the order in which the recipe names them; the base last."""
        named = [source.model for part in self.slices for source in part.sources]
        return list(dict.fromkeys(named + ([self.base] if self.base else [])))


def read_recipe(recipe: str | Path | dict[str, Any], text: str | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        recipe: a YAML file, or its content as a mapping.
        text: of a mapping, what the merged folder keeps; None: the mapping as YAML.
    Raises:
        UserError: the file cannot be read, or naming the wrong word or value.
    """
    if isinstance(recipe, dict):
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) if text is None else text
        return _Reader(recipe, text).recipe()
    content, text = read_yaml(recipe, "the recipe")
    return _Reader(content, text).recipe()


def read_yaml(path: str | Path, what: str) -> tuple[dict[str, Any], str]:
    """(content, text) of a YAML file that holds a mapping, none of whose keys is written twice.

    Args:
        what: name of the file's kind for messages, such as "the recipe".
    Raises:
        UserError: it cannot be read.
    """
    try:
        text = Path(path).read_text()
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
        reason = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else "does not exist or is a folder"
        raise UserError(f"{what} {path} {reason}; give a YAML file, such as those in recipes/") from None
    try:
        content = yaml.load(text, _Loader)
    except YAML_ERRORS as error:
        raise UserError(f"{what} {path} is not YAML: {error}") from None
    if _size(content, {}) > _MOST_VALUES:
        raise UserError(f"{what} {path} has aliases that repeat values {_MOST_VALUES:,} times; write them out")
    if not isinstance(content, dict):
        raise UserError(f"{what} {path} is no mapping; see the examples in recipes/")
    return content, text


def _size(value: Any, known: dict[int, int]) -> int:
    """Values in a recipe with its aliases written out; more than _MOST_VALUES for one that holds itself.

    known: id of a list or mapping → its size, so that aliases of aliases take no more time than the text is long.
    """
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = _MOST_VALUES + 1  # while it is open
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(each, known) for each in inner)
    return known[id(value)]


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which refuses a key that is written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, count in Counter(keys).items():
            if count > 1 and key != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"{key} is written twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Reader:
    """Reads one recipe; its methods raise UserError at the first wrong word."""

    def __init__(self, content: dict[str, Any], text: str) -> None:
        self._content, self._text = content, text
        self._known: list[str] = []

    def recipe(self) -> Recipe:
        content = self._content
        _check_keys(content, _TOP, "the recipe")
        method = self._method(content.get("merge_method"), "merge_method")
        base = None if content.get("base_model") is None else _model(content["base_model"], "base_model")
        rules = self._entries("rules") if "rules" in content else []
        self._known = self._parameter_names(method, rules)
        slices, has_layers = self._slices(method)
        dtype = content.get("out_dtype") or content.get("dtype")
        for key in ("dtype", "out_dtype"):
            if content.get(key) not in (None, *DTYPES):
                raise UserError(f"{key} is {content[key]!r}; write one of {', '.join(DTYPES)}")
        seed = content.get("seed", 0)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise UserError(f"seed is {seed!r}; write a whole number")
        match_experts = content.get("match_experts", False)
        if not isinstance(match_experts, bool):
            raise UserError(f"match_experts is {match_experts!r}; write true or false")
        template = content.get("chat_template")
        if template is not None and not isinstance(template, str):
            raise UserError(f"chat_template is {template!r}; write auto, a model of the recipe, chatml or a template")
        return Recipe(
            base=base,
            slices=slices,
            has_layers=has_layers,
            parameters=check_scope(content.get("parameters"), self._known, "parameters"),
            rules=[self._rule(rule, f"rules[{number}]") for number, rule in enumerate(rules)],
            out_dtype=dtype,
            tokenizer=self._tokenizer(),
            chat_template=template,
            match_experts=match_experts,
            seed=seed,
            text=self._text,
        )

    def _slices(self, method: str) -> tuple[list[Slice], bool]:
        """(slices, whether they have layer ranges) from exactly one of models, slices and modules."""
        content, where = self._content, ""
        given = [key for key in ("models", "slices", "modules") if content.get(key) is not None]
        if len(given) != 1:
            raise UserError(f"the recipe has {' and '.join(given) or 'none'} of models, slices and modules; write one")
        if given == ["modules"]:
            modules = content["modules"]
            if not isinstance(modules, dict) or list(modules) != ["default"]:
                raise UserError(
                    f"modules is {modules!r}; a Trinity model has one module, so write modules: {{default: …}}"
                )
            content, where = modules["default"], "modules.default."
            if not isinstance(content, dict):
                raise UserError(f"modules.default is {content!r}; write models or slices below it")
            _check_keys(content, ("models", "slices"), "modules.default")
            given = [key for key in ("models", "slices") if content.get(key) is not None]
            if len(given) != 1:
                raise UserError("modules.default must have exactly one of models and slices")
        entries = _list(content[given[0]], where + given[0])
        if given == ["models"]:
            sources = [self._source(each, f"{where}models[{n}]", layers=False) for n, each in enumerate(entries)]
            names = [source.model for source in sources]
            for name in names:
                if names.count(name) > 1:
                    raise UserError(f"{where}models names {name} twice; write it once, with the sum of its weights")
            return [Slice(sources, {}, method)], False
        return [self._slice(each, f"{where}slices[{n}]", method) for n, each in enumerate(entries)], True

    def _slice(self, raw: Any, where: str, method: str) -> Slice:
        if not isinstance(raw, dict):
            raise UserError(f"{where} is {raw!r}; write sources: with models and layer ranges")
        _check_keys(raw, ("sources", "parameters"), where)
        entries = _list(raw.get("sources"), f"{where}.sources")
        sources = [self._source(each, f"{where}.sources[{n}]", layers=True) for n, each in enumerate(entries)]
        lengths = {source.layers[1] - source.layers[0] for source in sources if source.layers}
        if len(lengths) > 1:
            raise UserError(f"{where}: the layer ranges have {sorted(lengths)} layers; they must be equally long")
        return Slice(sources, check_scope(raw.get("parameters"), self._known, f"{where}.parameters"), method)

    def _source(self, raw: Any, where: str, layers: bool) -> SliceSource:
        if not isinstance(raw, dict):
            raise UserError(f"{where} is {raw!r}; write model: and its parameters")
        _check_keys(raw, ("model", "parameters", *(["layer_range"] if layers else [])), where)
        model = _model(raw.get("model"), f"{where}.model")
        scope = check_scope(raw.get("parameters"), self._known, f"{where}.parameters")
        for name in scope:
            if not any(name in METHODS[method].per_model for method in self._methods):
                raise UserError(
                    f"{where}.parameters.{name} is a parameter of the whole merge; write it below parameters:"
                )
        return SliceSource(model, _layer_range(raw.get("layer_range"), where) if layers else None, scope)

    def _rule(self, raw: Any, where: str) -> Rule:
        if not isinstance(raw, dict) or not isinstance(raw.get("match"), str):
            raise UserError(f"{where} is {raw!r}; write match: with a regular expression for tensor names")
        _check_keys(raw, ("match", "method", "parameters", "model"), where)
        if "method" not in raw and "parameters" not in raw:
            raise UserError(f"{where} changes nothing; give it a method or parameters")
        if (raw.get("method") == "passthrough") != ("model" in raw):
            raise UserError(f"{where}: method: passthrough and model: MODEL belong together; write both or neither")
        try:
            pattern = re.compile(raw["match"])
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"{where}.match is no regular expression ({error}): {raw['match']}") from None
        method = None if raw.get("method") is None else self._method(raw["method"], f"{where}.method")
        scope = check_scope(raw.get("parameters"), self._known, f"{where}.parameters")
        return Rule(pattern, method, scope, _model(raw["model"], f"{where}.model") if "model" in raw else None)

    def _tokenizer(self) -> TokenizerRecipe | None:
        raw, source = self._content.get("tokenizer"), self._content.get("tokenizer_source")
        if raw is not None and source is not None:
            raise UserError("the recipe has tokenizer and tokenizer_source; keep tokenizer: {source: …}")
        if raw is None:
            return None if source is None else TokenizerRecipe(_text(source, "tokenizer_source"))
        if not isinstance(raw, dict):
            raise UserError(f"tokenizer is {raw!r}; write tokenizer: {{source: base | union | MODEL}}")
        _check_keys(raw, ("source", "tokens", "pad_to_multiple_of"), "tokenizer")
        multiple = raw.get("pad_to_multiple_of")
        if multiple is not None and (type(multiple) is not int or not 1 <= multiple <= _MOST_PADDING):
            raise UserError(
                f"tokenizer.pad_to_multiple_of is {multiple!r}; write a whole number of at least 1 and at most "
                f"{_MOST_PADDING}"
            )
        tokens = raw.get("tokens") or {}
        if not isinstance(tokens, dict):
            raise UserError(f"tokenizer.tokens is {tokens!r}; write a mapping from tokens to their source")
        fills = {str(token): _token_fill(each, f"tokenizer.tokens.{token}", token) for token, each in tokens.items()}
        return TokenizerRecipe(_text(raw.get("source", "union"), "tokenizer.source"), fills, multiple)

    def _parameter_names(self, method: str, rules: list[Any]) -> list[str]:
        named = [rule.get("method") for rule in rules if isinstance(rule, dict)]
        self._methods = [method] + [name for name in named if isinstance(name, str) and name in METHODS]
        names = {name for each in self._methods for name in (*METHODS[each].per_model, *METHODS[each].whole)}
        return sorted(names | ({"int8_mask"} if METHODS[method].smooth else set()))

    def _entries(self, key: str) -> list[Any]:
        return _list(self._content[key], key)

    def _method(self, name: Any, where: str) -> str:
        if name is None:
            raise UserError(f"the recipe has no {where}; write one of {', '.join(METHODS)}")
        if not isinstance(name, str) or name not in METHODS:
            raise UserError(f"{where} {name!r} is unknown; {nearest(name, METHODS)}")
        return name


def _check_keys(raw: dict[Any, Any], known: tuple[str, ...], where: str) -> None:
    for key in raw:
        if key not in known:
            if key in PARAMETERS:
                raise UserError(f"{where} has {key} in a place of its own; write it below parameters:")
            raise UserError(f"{where} has the unknown key {key!r}; {nearest(key, known)}")


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where} is {value!r}; write a list with at least one entry")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{where} is {value!r}; write a text")
    return value


def _model(raw: Any, where: str) -> str:
    """A model's name; also mergekit's mapping {path: …} or {model: {path: …}}."""
    if isinstance(raw, dict) and "model" in raw and not set(raw) - {"model", "lora"}:
        if raw.get("lora"):
            raise UserError(f"{where} has a lora; merge the adapter into its model first (peft: merge_and_unload)")
        raw = raw["model"]
    if isinstance(raw, dict):
        _check_keys(raw, ("path",), where)
        raw = raw.get("path")
    if not isinstance(raw, str) or not raw:
        raise UserError(f"{where} is {raw!r}; write a Hugging Face folder, a run directory or RUN_DIR@step")
    return raw


def _layer_range(raw: Any, where: str) -> tuple[int, int]:
    whole = isinstance(raw, list) and len(raw) == 2 and all(type(each) is int for each in raw)
    if not whole or not 0 <= raw[0] < raw[1]:
        raise UserError(f"{where}.layer_range is {raw!r}; write [first, end], the end not included")
    return raw[0], raw[1]


def _token_fill(raw: Any, where: str, token: Any) -> TokenFill:
    if not isinstance(raw, dict):
        raise UserError(f"{where} is {raw!r}; write source: MODEL, or source: {{kind: zero}}")
    _check_keys(raw, ("source", "force"), where)
    source, force = raw.get("source"), raw.get("force", False)
    if not isinstance(force, bool):
        raise UserError(f"{where}.force is {force!r}; write true or false")
    if isinstance(source, str):
        return TokenFill(source, str(token), force)
    if not isinstance(source, dict):
        raise UserError(f"{where}.source is {source!r}; write a MODEL, {{kind: zero}} or {{kind: model_token, …}}")
    _check_keys(source, ("kind", "model", "token", "token_id"), f"{where}.source")
    if source.get("kind") == "zero":
        return TokenFill(None, str(token), force)
    rows = [source[key] for key in ("token", "token_id") if key in source]
    if source.get("kind") != "model_token" or len(rows) != 1 or "model" not in source:
        raise UserError(
            f"{where}.source must be {{kind: zero}} or {{kind: model_token, model: MODEL, token or token_id}}"
        )
    if type(rows[0]) is not (str if "token" in source else int):
        raise UserError(f"{where}.source has {rows[0]!r}; write token: TEXT in quotes, or token_id: WHOLE_NUMBER")
    return TokenFill(_model(source["model"], f"{where}.source.model"), rows[0], force)


def rule_for(rules: list[Rule], tensor: str) -> Rule | None:
    """The first rule whose pattern is found in the tensor's name."""
    return next((rule for rule in rules if rule.match.search(tensor)), None)
