"""A chat tokenizer has the template's tokens in the place of unused ids, and encodes texts as before."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from trinity.data.chat.template import DEFAULT_TEMPLATE, load_template, template_hash
from trinity.data.chat.tokenizer import make_chat_tokenizer
from trinity.data.tokenizer.tokenizer import load_tokenizer, pad_vocabulary, save_tokenizer, vocabulary_size
from trinity.errors import UserError
from trinity.interop.tokenizer_files import special_ids

MARKERS = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture
def padded(tokenizer_dir: Path, tmp_path: Path) -> Path:
    """The small tokenizer with 4 reserved ids: 700 … 703."""
    tok = load_tokenizer(tokenizer_dir)
    pad_vocabulary(tok, 64)
    save_tokenizer(tok, tmp_path / "padded")
    return tmp_path / "padded"


@pytest.mark.parametrize("places", ["reserved", "last"])
def test_new_tokens_take_unused_ids(
    padded: Path, tokenizer_dir: Path, tmp_path: Path, places: str, texts: list[str]
) -> None:
    base = padded if places == "reserved" else tokenizer_dir
    assert make_chat_tokenizer(base, tmp_path / "chat", places=places) == MARKERS
    before, tok = load_tokenizer(base), load_tokenizer(tmp_path / "chat")
    ids = [tok.token_to_id(marker) for marker in MARKERS]
    assert ids == ([700, 701] if places == "reserved" else [698, 699])
    assert vocabulary_size(tok) == vocabulary_size(before)
    old, new = before.get_vocab(), tok.get_vocab()
    assert {token for token in old if old[token] != new.get(token)} == {before.id_to_token(index) for index in ids}
    assert tok.encode("<|im_start|>user", add_special_tokens=False).ids[0] == ids[0]
    for text in texts:  # tokens that the last merges made are spelled by their parts, all others stay
        assert tok.decode(tok.encode(text).ids) == text
        if places == "reserved":
            assert tok.encode(text).ids == before.encode(text).ids
    peer = AutoTokenizer.from_pretrained(tmp_path / "chat")
    assert peer.convert_tokens_to_ids(MARKERS) == ids
    assert peer.encode(texts[0]) == tok.encode(texts[0]).ids
    again = tmp_path / "again"
    assert make_chat_tokenizer(tmp_path / "chat", again) == []
    assert load_tokenizer(again).to_str() == tok.to_str()


def test_end_of_turn_stops_generation(tokenizer_dir: Path, tmp_path: Path) -> None:
    make_chat_tokenizer(tokenizer_dir, tmp_path / "chat", places="last")
    assert special_ids(tokenizer_dir, 700).stop == [1, 0]
    assert special_ids(tmp_path / "chat", 700).stop == [699, 1, 0]
    (tmp_path / "chat" / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    assert special_ids(tmp_path / "chat", 700).stop == [1, 0]


def test_template_in_the_config(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Older folders have the template in tokenizer_config.json, alone or as one of several."""
    make_chat_tokenizer(tokenizer_dir, tmp_path / "chat", places="last")
    expected = template_hash(tmp_path / "chat")
    source = (tmp_path / "chat" / "chat_template.jinja").read_text(encoding="utf-8")
    (tmp_path / "chat" / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "chat" / "tokenizer_config.json").read_text())
    for value in (source, [{"name": "rag", "template": ""}, {"name": "default", "template": source}]):
        (tmp_path / "chat" / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": value}))
        assert template_hash(tmp_path / "chat") == expected
        assert load_template(tmp_path / "chat").source == source


def test_other_contents_of_the_folder_stay(padded: Path, tmp_path: Path) -> None:
    """The same tokenizer is written again; another one only by force; a model's folder never."""
    out = tmp_path / "out"
    make_chat_tokenizer(padded, out)
    made = {path.name: path.read_bytes() for path in out.iterdir()}
    make_chat_tokenizer(padded, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == made
    template = tmp_path / "t.jinja"
    template.write_text(DEFAULT_TEMPLATE.read_text(encoding="utf-8") + " ", encoding="utf-8")
    with pytest.raises(UserError, match=r"holds something else already; give a new folder, or --force"):
        make_chat_tokenizer(padded, out, template)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == made
    make_chat_tokenizer(padded, out, template, force=True)
    assert (out / "chat_template.jinja").read_text(encoding="utf-8").endswith(" ")
    (out / "config.json").write_text("{}")
    for arguments in ({}, {"force": True}):
        with pytest.raises(UserError, match=r"holds a model \(config.json\)"):
            make_chat_tokenizer(padded, out, template, **arguments)
    with pytest.raises(UserError, match=r"t.jinja is a file; give a folder"):
        make_chat_tokenizer(padded, template)


def test_refused(tokenizer_dir: Path, padded: Path, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    with pytest.raises(
        UserError, match=r"0 unused special tokens for the 2 new tokens.*--pad-to-multiple or use --ids last"
    ):
        make_chat_tokenizer(tokenizer_dir, tmp_path / "out")
    with pytest.raises(UserError, match="is the tokenizer's own folder; give another"):
        make_chat_tokenizer(padded, padded)
    with pytest.raises(
        UserError, match=r"no chat_template.jinja; make a tokenizer with one by tools/chat_tokenizer.py"
    ):
        load_template(padded)
    for text, sentence in {
        "{% for": "is not a valid template",
        "{{ bos_token }}": "does not print the assistant's content",
        "{% for m in messages %}{{ m.content }} ### {% endfor %}": "holds no token of the tokenizer to end a turn with",
        "{{ raise_exception('no tools here') }}": r"message of the user and one of the assistant \(no tools",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}": r"one of the assistant \(it calls itself.*; correct it",
        "{{ user_name.first }}": r"t.jinja does not print .*'user_name' is undefined",
        "{{ messages.append(1) }}": "does not print one message",
        "{{ ''.__class__.__mro__ }}": "does not print one message",
    }.items():
        template.write_text(text)
        with pytest.raises(UserError, match=sentence) as error:
            make_chat_tokenizer(padded, tmp_path / "out", template)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
