"""Chat shards: the same bytes after a kill and with any workers, from lines or Parquet; refused rows and folders."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.chat.conftest import chat_tokenizer  # noqa: F401 (a fixture)
from tests.data.small_files import read_folder
from trinity.data import TokenSource
from trinity.data.chat.encode import ChatOptions
from trinity.data.prepare.prepare import prepare_data
from trinity.data.tokenizer.tokenizer import EOS, load_tokenizer
from trinity.errors import UserError

SHARD = 300


def rows(count: int = 40) -> list[dict]:
    answer = {"role": "assistant", "content": "An answer."}
    return [
        {"messages": [{"role": "user", "content": f"Question {n}? " * (1 + n % 3)}, answer] * (1 + n % 2)}
        for n in range(count)
    ]


def write(path: Path, values: list[dict]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def prepare(source: Path, tokenizer: Path, out: Path, **arguments: object) -> dict:
    values = {"shard_tokens": SHARD, "chat": ChatOptions()} | arguments
    return prepare_data([source], tokenizer, out, **values)[0]


@pytest.mark.parametrize("options", [ChatOptions(), ChatOptions(turns="split"), ChatOptions(loss="completion")])
def test_same_bytes_after_damage_and_with_workers(chat_tokenizer: Path, tmp_path: Path, options: ChatOptions) -> None:  # noqa: F811
    """A shard whose mask is missing or damaged is made again, and all after it; a row's examples stay in one shard."""
    source = write(tmp_path / "chat.jsonl", rows())
    index = prepare(source, chat_tokenizer, tmp_path / "a", chat=options)
    whole = read_folder(tmp_path / "a")
    assert len(index["shards"]) > 5
    assert index["documents"] == (60 if options.turns == "split" else 40)
    prepare(source, chat_tokenizer, tmp_path / "b", chat=options, workers=2)
    assert read_folder(tmp_path / "b") == whole
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(bytes(path.stat().st_size))):
        damage(tmp_path / "b" / "shard_00002.mask")
        with pytest.raises(UserError, match=r"shard_00002.mask (is missing|has changed)"):
            TokenSource(tmp_path / "b")
        prepare(source, chat_tokenizer, tmp_path / "b", chat=options)
        assert read_folder(tmp_path / "b") == whole


def test_parquet_gives_the_documents_of_lines(chat_tokenizer: Path, tmp_path: Path) -> None:  # noqa: F811
    """Columns that a row does not use are null there; tools are JSON text."""
    values = [*rows(5), {"prompt": "a", "completion": "b"}]
    values[0]["tools"] = json.dumps([{"name": "f"}])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values, pyarrow.schema(
        [("messages", pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))),
         ("tools", pyarrow.string()), ("prompt", pyarrow.string()), ("completion", pyarrow.string())]
    )), tmp_path / "chat.parquet")  # fmt: skip
    prepare(write(tmp_path / "chat.jsonl", values), chat_tokenizer, tmp_path / "lines")
    prepare(tmp_path / "chat.parquet", chat_tokenizer, tmp_path / "rows")
    lines, table = (read_folder(tmp_path / name) for name in ("lines", "rows"))
    assert {name: lines[name] for name in lines if name != "index.json"} == {
        name: table[name] for name in table if name != "index.json"
    }


def test_prompt_and_completion(chat_tokenizer: Path, tmp_path: Path) -> None:  # noqa: F811
    """The completion and EOS are trained; a token that the boundary cuts belongs to the side of its first character."""
    tok = load_tokenizer(chat_tokenizer)
    values = [{"prompt": "def f", "completion": "oo(x): pass"}, {"prompt": "", "completion": "text"}]
    prepare(write(tmp_path / "chat.jsonl", values), chat_tokenizer, tmp_path / "out")
    source = TokenSource(tmp_path / "out")
    for number, value in enumerate(values):
        ids = source.read(number, 0, source.length(number)).tolist()
        text = value["prompt"] + value["completion"]
        encoding = tok.encode(text, add_special_tokens=False)
        assert ids == [0, *encoding.ids, tok.token_to_id(EOS)]
        trained = [start >= len(value["prompt"]) for start, _ in encoding.offsets]
        assert source.read_mask(number, 0, len(ids)).tolist() == [False, *trained, True]


def test_rows_left_out_are_counted(chat_tokenizer: Path, tmp_path: Path) -> None:  # noqa: F811
    values = [*rows(3), {"messages": []}, {"messages": rows(3)[2]["messages"] * 9}]
    source = write(tmp_path / "chat.jsonl", values)
    with pytest.raises(UserError, match=r"chat.jsonl:4 has no list of messages"):
        prepare(source, chat_tokenizer, tmp_path / "out")
    with pytest.raises(UserError, match=r"chat.jsonl:5 has \d+ tokens, more than --max-tokens 200"):
        prepare(source, chat_tokenizer, tmp_path / "out", chat=ChatOptions(max_tokens=200), skip_bad_lines=True)
    options = ChatOptions(max_tokens=200, too_long="drop")
    index = prepare(source, chat_tokenizer, tmp_path / "out", chat=options, skip_bad_lines=True)
    assert (index["documents"], index["skipped"]) == (3, {"too long": 1, "unreadable": 1})
    doubled = write(tmp_path / "twice.jsonl", [*rows(3), *rows(3)])
    assert prepare(doubled, chat_tokenizer, tmp_path / "d", deduplicate=True)["skipped"] == {"duplicate": 3}


def test_equal_texts_with_other_trained_parts_are_no_duplicates(chat_tokenizer: Path, tmp_path: Path) -> None:  # noqa: F811
    """Of turns that are trained, of the end of the prompt, and of special tokens that are spelled out."""
    twice = [{**message} for message in rows(2)[1]["messages"]]
    values = [
        {"messages": twice},
        {"messages": [*twice[:1], {**twice[1], "train": False}, *twice[2:]]},
        {"prompt": "a b", "completion": " c"},
        {"prompt": "a", "completion": " b c"},
        {"messages": [{"role": "user", "content": "a<|im_end|>\n<|im_start|>user\nb"}, twice[1]]},
    ]
    source = write(tmp_path / "chat.jsonl", [*values, *values[::-1]])
    index = prepare(source, chat_tokenizer, tmp_path / "d", deduplicate=True)
    assert (index["documents"], index["skipped"]) == (5, {"duplicate": 5})


@pytest.mark.parametrize("too_long", ["drop", "truncate-prompt"])
def test_all_examples_are_too_long(chat_tokenizer: Path, tmp_path: Path, too_long: str) -> None:  # noqa: F811
    source = write(tmp_path / "chat.jsonl", rows(3))
    with pytest.raises(
        UserError, match=r"no other than 3 examples of more than --max-tokens 4.*larger number"
    ) as error:
        prepare(source, chat_tokenizer, tmp_path / "out", chat=ChatOptions(max_tokens=4, too_long=too_long))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_deeply_nested_arguments(chat_tokenizer: Path, tmp_path: Path, workers: int) -> None:  # noqa: F811
    """Python's own JSON reads 700 levels, and its recursion ends within some hundreds more."""

    def nested(depth: int) -> Path:
        arguments = '{"a": ' * depth + "1" + "}" * depth
        call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": arguments}]}
        return write(tmp_path / f"{depth}.jsonl", [{"messages": [rows(1)[0]["messages"][0], call]}])

    assert prepare(nested(50), chat_tokenizer, tmp_path / "out", workers=workers)["documents"] == 1
    with pytest.raises(UserError, match=r"700.jsonl:1:? .*objects within hundreds of others") as error:
        prepare(nested(700), chat_tokenizer, tmp_path / "refused", workers=workers)
    assert "\n" not in str(error.value)


def test_other_templates_and_folders(chat_tokenizer: Path, tokenizer_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    source = write(tmp_path / "chat.jsonl", rows(2))
    other = tmp_path / "t.jinja"
    other.write_text("{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    with pytest.raises(UserError, match=r"differs from .*chat_template.jinja, which inference would use"):
        prepare(source, chat_tokenizer, tmp_path / "out", template=other)
    with pytest.raises(UserError, match=r"chat.jsonl:1 has messages and the tokenizer has no chat template"):
        prepare(source, tokenizer_dir, tmp_path / "out")
    prepare(source, tokenizer_dir, tmp_path / "with_file", template=other)
    assert (tmp_path / "with_file" / "chat_template.jinja").read_text() == other.read_text()
    prepare(source, chat_tokenizer, tmp_path / "chat")
    for arguments in ({"chat": ChatOptions(loss="all")}, {"chat": None, "field": "messages"}):
        with pytest.raises(UserError, match=r"holds shards whose .*chat.* differ"):
            prepare(source, chat_tokenizer, tmp_path / "chat", **arguments)
    (tmp_path / "plain.txt").write_text("text")
    with pytest.raises(UserError, match=r"plain.txt is plain text, and --chat reads lines of JSON or Parquet"):
        prepare(tmp_path / "plain.txt", chat_tokenizer, tmp_path / "plain")


def test_index_is_checked(chat_tokenizer: Path, tmp_path: Path) -> None:  # noqa: F811
    prepare(write(tmp_path / "chat.jsonl", rows(2)), chat_tokenizer, tmp_path / "out")
    path = tmp_path / "out" / "index.json"
    good = json.loads(path.read_text())
    assert good["version"] == 2
    for wrong, sentence in (
        ({"version": 1}, "has shard format 1, this reads 2"),
        ({"chat": {"template": 1}}, "chat is "),
        ({"chat": None}, "has shard format 2, this reads 1"),
    ):
        path.write_text(json.dumps(good | wrong))
        with pytest.raises(UserError, match=sentence):
            TokenSource(tmp_path / "out")
