"""Merged vocabularies: rows by token, filled as the recipe says; tokenizers that transformers reads; chat templates."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.interop.small_model import CONFIG
from tests.merging.conftest import TEXT, edit_json, recipe, tensors_of
from trinity.data.chat.tokenizer import make_chat_tokenizer
from trinity.data.tokenizer.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from trinity.interop import load_hf
from trinity.merging import merge
from trinity.merging.plan import make_plan
from trinity.merging.recipe import read_recipe

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CHAT = "<|im_start|>"


def add_token(folder: Path, token: str, row: int) -> None:
    """Give a model's tokenizer one more special token."""
    content = json.loads((folder / "tokenizer.json").read_text())
    entry = dict(content["added_tokens"][0]) | {"id": row, "content": token}
    content["added_tokens"].append(entry)
    (folder / "tokenizer.json").write_text(json.dumps(content))


def ids(folder: Path) -> dict[str, int]:
    return load_tokenizer(folder).get_vocab()


@pytest.fixture
def chat(family: Path) -> Path:
    """Model a has a chat token in row 280, model b two others in rows 280 and 281."""
    add_token(family / "a", CHAT, 280)
    add_token(family / "b", "<|b|>", 280)
    add_token(family / "b", "<|c|>", 281)
    return family


def union(**tokens: dict) -> dict:
    return recipe("linear", tokenizer={"source": "union", "tokens": tokens})


def test_union(chat: Path) -> None:
    """Rows of known tokens are merged; a new token has the row of the one model that knows it, in both."""
    merge(union(), chat / "out")
    a, b, out = (tensors_of(chat / name) for name in ("a", "b", "out"))
    vocabulary = ids(chat / "out")
    assert vocabulary == ids(chat / "a") | {"<|b|>": 281, "<|c|>": 282}
    for name in (EMBED, HEAD):
        known = 0.625 * a[name] + 0.375 * b[name]
        torch.testing.assert_close(out[name][:280], known[:280], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(out[name][283:], known[283:], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(out[name][280], a[name][280], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(out[name][281:283], b[name][280:282], rtol=1e-6, atol=1e-7)
    others = [name for name in out if name not in (EMBED, HEAD)]
    merge(recipe("linear", tokenizer_source="a"), chat / "plain")
    plain = tensors_of(chat / "plain")
    assert all(torch.equal(out[name], plain[name]) for name in others)
    assert load_hf(chat / "out").config.vocab_size == 300
    from transformers import AutoTokenizer

    text = f"the rain{CHAT}stays<|c|>"
    assert AutoTokenizer.from_pretrained(chat / "out").encode(text) == [
        *load_tokenizer(chat / "a").encode(f"the rain{CHAT}stays").ids, 282,
    ]  # fmt: skip


def test_fills(chat: Path) -> None:
    """Zeros, another token's row, an id's row, and force for a model that has the token."""
    fills = {
        CHAT: {"source": {"kind": "zero"}},
        "<|b|>": {"source": {"kind": "model_token", "model": "a", "token": CHAT}},
        "<|c|>": {"source": {"kind": "model_token", "model": "a", "token_id": 7}, "force": True},
    }
    merge(union(**fills), chat / "out")
    a, b, out = (tensors_of(chat / name)[HEAD] for name in ("a", "b", "out"))
    torch.testing.assert_close(out[280], 0.625 * a[280], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(out[281], 0.625 * a[280] + 0.375 * b[280], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(out[282], a[7], rtol=1e-6, atol=1e-7)


def test_the_base_has_the_row(chat: Path) -> None:
    """A token of the base that the others lack has δ = 0; one that only models have comes from them."""
    add_token(chat / "base", CHAT, 280)
    content = recipe("task_arithmetic", "bc", True, tokenizer={"source": "union"})
    merge(content, chat / "out")
    base, b, out = (tensors_of(chat / name)[HEAD] for name in ("base", "b", "out"))
    assert torch.equal(out[280], base[280])
    new = ids(chat / "out")["<|b|>"]
    assert new == 281
    # 0.5 · (b - b) + 0.3 · (b - b), as base and c get the row of the only model that has it
    torch.testing.assert_close(out[new], b[280])


def test_tokenizer_of_one_model(chat: Path) -> None:
    """Its ids and rows; tokens of the other are left out, and its padding is filled with the row of the same number."""
    merge(recipe("linear", tokenizer={"source": "b"}), chat / "out")
    a, b, out = (tensors_of(chat / name)[EMBED] for name in ("a", "b", "out"))
    assert (chat / "out" / "tokenizer.json").read_bytes() == (chat / "b" / "tokenizer.json").read_bytes()
    torch.testing.assert_close(out[280:282], b[280:282], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(out[290], 0.625 * a[290] + 0.375 * b[290], rtol=1e-6, atol=1e-7)


def test_padding(chat: Path) -> None:
    """More rows than tokens: each model's mean row, merged."""
    merge(recipe("linear", tokenizer={"source": "union", "pad_to_multiple_of": 64}), chat / "out")
    a, b, out = (tensors_of(chat / name)[HEAD] for name in ("a", "b", "out"))
    assert out.shape[0] == json.loads((chat / "out" / "config.json").read_text())["vocab_size"] == 320
    torch.testing.assert_close(out[310], 0.625 * a.mean(0) + 0.375 * b.mean(0), rtol=1e-5, atol=1e-7)
    assert load_hf(chat / "out").config.vocab_size == 320


def test_union_of_two_byte_pair_vocabularies(family: Path, tokenizer: Path) -> None:
    """Merges of the second come last: every token of it can be made, and text of the first is cut as before."""
    save_tokenizer(
        train_tokenizer(["a thousand horses; a thousand riders on a thousand horses"] * 2, 280), family / "b"
    )
    merge(recipe("linear", tokenizer={"source": "union"}), family / "out")
    first, second, both = (load_tokenizer(family / name) for name in ("a", "b", "out"))
    assert both.get_vocab().keys() == first.get_vocab().keys() | second.get_vocab().keys()
    assert all(both.get_vocab()[token] == row for token, row in first.get_vocab().items())
    assert both.encode(TEXT[0]).tokens == first.encode(TEXT[0]).tokens
    assert both.encode(" thousand").tokens == second.encode(" thousand").tokens
    assert tensors_of(family / "out")[EMBED].shape[0] == max(len(both.get_vocab()), CONFIG.vocab_size)


@pytest.mark.parametrize(("word", "expected"), [
    (None, "{{ A }}"), ("auto", "{{ B }}"), ("b", "{{ B }}"), ("{{ own }}", "{{ own }}"), ("chatml", "<|im_start|>"),
])  # fmt: skip
def test_chat_templates(family: Path, word: str | None, expected: str) -> None:
    """The donor's, the most frequent, a model's, the recipe's, ChatML."""
    for name, text in (("a", "{{ A }}"), ("b", "{{ B }}"), ("c", "{{ B }}")):
        (family / name / "chat_template.jinja").write_text(text)
    edit_json(family / "a" / "tokenizer_config.json", chat_template="{{ old }}")
    merge(recipe("linear", "abc", **({} if word is None else {"chat_template": word})), family / "out")
    assert expected in (family / "out" / "chat_template.jinja").read_text()
    config = json.loads((family / "out" / "tokenizer_config.json").read_text())
    assert config.get("chat_template") == ("{{ old }}" if word is None else None)


def test_a_broken_template_is_noted(family: Path) -> None:
    """A model's, kept as it is, or the recipe's; one with transformers' own tags is none."""
    place = family / "a" / "chat_template.jinja"
    text = "{% for message in messages %}{% generation %}{{ message }}{% endgeneration %}{% break %}{% endfor %}"
    place.write_text(text)
    assert not [note for note in make_plan(read_recipe(recipe())).notes if "template" in note]
    place.write_text("{% for message in messages %}{{ message }}")
    (note,) = [note for note in make_plan(read_recipe(recipe())).notes if "template" in note]
    assert note.startswith("the merged model's chat template is not a valid template (")
    assert "\n" not in note
    merge(recipe(), family / "out")
    assert (family / "out" / "chat_template.jinja").read_bytes() == place.read_bytes()
    (note,) = [note for note in make_plan(read_recipe(recipe(chat_template="{{ a"))).notes if "template" in note]
    assert "not a valid template" in note


def test_chatml_renders(family: Path) -> None:
    from transformers import AutoTokenizer

    merge(recipe(chat_template="chatml"), family / "out")
    messages = [{"role": "user", "content": "rain?"}]
    text = AutoTokenizer.from_pretrained(family / "out").apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nrain?<|im_end|>\n<|im_start|>assistant\n"


def test_a_merged_chat_ends_its_turns(family: Path) -> None:
    """The tokenizer is the base's, the template the chat model's: its end of turn ends a text in transformers too."""
    chat = make_chat_tokenizer(family / "b", family / "chat", places="last") and family / "chat"
    for path in chat.iterdir():
        shutil.copy(path, family / "b")
    before = json.loads((family / "a" / "generation_config.json").read_text())
    content = recipe("linear", tokenizer={"source": "union"})
    (note,) = [note for note in make_plan(read_recipe(content)).notes if "chat template" in note]
    assert note == "b has a chat template and the merged model has none; to keep it, write chat_template: b"
    content |= {"chat_template": "b"}
    assert not [note for note in make_plan(read_recipe(content)).notes if "chat template" in note]
    merge(content, family / "out")
    end = ids(family / "out")["<|im_end|>"]
    assert end != ids(family / "b")["<|im_end|>"], "the union gives it another id"
    named = before["eos_token_id"] if isinstance(before["eos_token_id"], list) else [before["eos_token_id"]]
    after = json.loads((family / "out" / "generation_config.json").read_text())
    assert after == before | {"eos_token_id": [end, *named]}
