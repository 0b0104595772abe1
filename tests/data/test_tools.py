"""The command lines: exit codes, one sentence on stderr, and the same command twice."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trinity import terminal
from trinity.data.prepare.corpus import write_corpus
from trinity.data.sources.shards import TokenSource
from trinity.data.tokenizer.tokenizer import load_text_encoder, load_tokenizer, save_tokenizer, train_tokenizer
from trinity.io.local import temporary_path

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """(name, arguments) → exit code, stdout, stderr of a tool in this process; each progress update is a line."""
    monkeypatch.setattr(terminal, "LINE_SECONDS", 0)

    def run(name: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__main__")
        output = capsys.readouterr()
        return end.value.code, output.out, output.err

    return run


def sentences(stderr: str) -> list[str]:
    """The lines of stderr without progress; in a pipe there is no bar."""
    assert "\r" not in stderr
    return [line for line in stderr.splitlines() if " left" not in line]


def lines(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"text": f"text number {number} " * 9}) + "\n" for number in range(count)))
    return path


def test_a_mistake_is_one_sentence_and_code_2(fresh_command: Callable, tmp_path: Path, tokenizer_dir: Path) -> None:
    words = ["--input", tmp_path / "no.txt", "--tokenizer", tokenizer_dir, "--out", tmp_path / "out"]
    process = fresh_command("tools/prepare_data.py", *words)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (2, "")
    assert errors == f"error: --input {tmp_path / 'no.txt'} does not exist; check the path\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_code_1_and_costs_one_shard(
    tool: Callable, run_command: Callable, tmp_path: Path, tokenizer_dir: Path
) -> None:
    """The second shard is written to a full device; the first stays, and the same command resumes after it."""
    out, source = tmp_path / "out", lines(tmp_path / "a.jsonl", 300)
    arguments = ["--input", source, "--tokenizer", tokenizer_dir, "--shard-tokens", 9000, "--out"]
    assert tool("prepare_data", *arguments, tmp_path / "whole")[0] == 0
    out.mkdir()
    full = temporary_path(out / "shard_00001.tokens")
    full.symlink_to("/dev/full")
    ended = run_command("tools/prepare_data.py", *arguments, out)
    assert ended.code == 1
    assert sentences(ended.errors) == ["error: the disk is full; free some space and run the same command again"]
    full.unlink()
    first = (out / "shard_00000.tokens").stat().st_ino
    assert tool("prepare_data", *arguments, out)[0] == 0
    assert (out / "shard_00000.tokens").stat().st_ino == first
    content = {path.name: path.read_bytes() for path in out.iterdir()}
    assert content == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}


def test_prepare_data_twice(tool: Callable, tmp_path: Path, tokenizer_dir: Path) -> None:
    source, out = lines(tmp_path / "a.jsonl", 40), tmp_path / "out"
    arguments = ["--input", source, "--tokenizer", tokenizer_dir, "--out", out]
    code, printed, shown = tool("prepare_data", *arguments)
    assert code == 0
    assert printed.startswith(f"{out}: 40 documents, {TokenSource(out).tokens:,} tokens, ")
    assert "tokens/s" in shown
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert tool("prepare_data", *arguments) == (0, printed.replace(f"{out}:", f"{out} was already done:"), "")
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_train_tokenizer_twice(tool: Callable, tmp_path: Path) -> None:
    source, out = lines(tmp_path / "a.jsonl", 40), tmp_path / "out"
    arguments = ["--input", source, "--out", out, "--vocab-size"]
    assert tool("train_tokenizer", *arguments, 270)[:2] == (0, f"{out}: 270 ids\n")
    assert load_tokenizer(out).get_vocab_size() == 270
    modified = (out / "tokenizer.json").stat().st_mtime_ns
    # A setting that is not given is as good as one that this version does not know.
    made_from = json.loads((out / "made_from.json").read_text())
    (out / "made_from.json").write_text(json.dumps({**made_from, "another_setting": None}))
    assert tool("train_tokenizer", *arguments, 270) == (0, f"{out}: 270 ids, already there\n", "")
    assert (out / "tokenizer.json").stat().st_mtime_ns == modified
    code, _, error = tool("train_tokenizer", *arguments, 271)
    assert code == 2
    assert error == f"error: --out {out} holds something else already; give a new folder, or --force to write over it\n"
    assert tool("train_tokenizer", *arguments, 271, "--force")[0] == 0
    assert load_tokenizer(out).get_vocab_size() == 271


def test_train_tokenizer_from_a_sample(tool: Callable, tmp_path: Path) -> None:
    """Padded, and from a pattern; another sample is another tokenizer."""
    source, out = lines(tmp_path / "a.jsonl", 40), tmp_path / "out"
    arguments = ["train_tokenizer", "--input", tmp_path / "*.jsonl", "--vocab-size", 264, "--pad-to-multiple", 64]
    code, printed, shown = tool(*arguments, "--sample-bytes", "2e3", "--out", out)
    assert (code, printed) == (0, f"{out}: 320 ids\n")
    assert "measuring" in shown
    assert "reading the sample" in shown
    assert tool(*arguments, "--sample-bytes", 2000, "--out", out) == (0, f"{out}: 320 ids, already there\n", "")
    for changed in (["--sample-bytes", 2001], ["--sample-bytes", 2000, "--seed", 1], []):
        assert tool(*arguments, *changed, "--out", out)[0] == 2
    assert tool(*arguments, "--sample-bytes", "2.5", "--out", out)[0] == 2
    with open(source, "a") as file:
        file.write("not json\n")
    code, _, error = tool(*arguments, "--out", tmp_path / "other")
    assert code == 2
    assert sentences(error)[-1].startswith(f"error: {source}:41 is not valid JSON")


@pytest.fixture
def report_inputs(tmp_path: Path) -> list[Path]:
    """Two languages in one file, one of them also in a text file."""
    rows = [("en", "the words of a text"), ("de", "die Wörter eines Textes"), ("en", ""), ("en", "1234567 <|pad|>")]
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(json.dumps({"language": label, "text": text}) + "\n" for label, text in rows) + "\n")
    (tmp_path / "plain.txt").write_text("die Wörter")
    return [mixed, tmp_path / "plain.txt"]


@pytest.fixture
def small_tokenizer(tmp_path: Path) -> Path:
    """Bytes and five merges; its file asks for truncation, which a report must ignore."""
    tok = train_tokenizer(["the words the words"], 264)
    tok.enable_truncation(3)
    save_tokenizer(tok, tmp_path / "small")
    return tmp_path / "small"


def test_tokenizer_report(
    tool: Callable, tmp_path: Path, tokenizer_dir: Path, small_tokenizer: Path, report_inputs: list[Path]
) -> None:
    """Counts against the library's, one text at a time."""
    texts = {
        "en": ["the words of a text", "1234567 <|pad|>"],
        "de": ["die Wörter eines Textes"],
        "plain.txt": ["die Wörter"],
    }
    by_file = {"mixed.jsonl": texts["en"] + texts["de"], "plain.txt": texts["plain.txt"]}
    toks = [load_text_encoder(folder) for folder in (tokenizer_dir, small_tokenizer)]

    def expected(label: str, group: list[str]) -> dict:
        size = sum(len(text.encode()) for text in group)
        tokens = [sum(len(tok.encode(text, add_special_tokens=False)) for text in group) for tok in toks]
        per_token = [size / count for count in tokens]
        return {
            "label": label, "documents": len(group), "text_bytes": size, "tokens": tokens,
            "bytes_per_token": per_token, "ratios": [pytest.approx(per_token[0] / per_token[1], rel=1e-12)],
        }  # fmt: skip

    arguments = ["--tokenizer", tokenizer_dir, "--against", small_tokenizer, "--json", tmp_path / "r.json"]
    for groups, option in ((by_file, []), (texts, ["--group-by", "language"])):
        code, printed, shown = tool("tokenizer_report", *arguments, *option, *report_inputs)
        assert code == 0
        assert "counting" in shown
        rows = [expected(label, group) for label, group in groups.items()]
        rows.append(expected("all", [text for group in groups.values() for text in group]))
        values = json.loads((tmp_path / "r.json").read_text())
        assert values == {"tokenizers": [str(tokenizer_dir), str(small_tokenizer)], "rows": rows}
        table = [line.split() for line in printed.splitlines()[1:]]
        assert table == [
            [row["label"], str(row["documents"]), str(row["text_bytes"]),
             *(f"{number:.3f}" for number in (*row["bytes_per_token"], values["rows"][at]["ratios"][0]))]
            for at, row in enumerate(rows)
        ]  # fmt: skip


def test_tokenizer_report_of_files_of_one_name(tool: Callable, tmp_path: Path, tokenizer_dir: Path) -> None:
    """Then the whole path tells them apart; without another tokenizer there is no ratio."""
    files = [tmp_path / folder / "a.txt" for folder in ("one", "two")]
    for path in files:
        path.parent.mkdir()
        path.write_text("12")
    per_token = f"{2 / len(load_text_encoder(tokenizer_dir).encode('12', add_special_tokens=False)):.3f}"
    code, printed, _ = tool("tokenizer_report", "--tokenizer", tokenizer_dir, *files)
    assert code == 0
    assert [line.split() for line in printed.splitlines()[1:]] == [
        [str(files[0]), "1", "2", per_token],
        [str(files[1]), "1", "2", per_token],
        ["all", "2", "4", per_token],
    ]


def test_tokenizer_report_refuses(tool: Callable, tmp_path: Path, tokenizer_dir: Path) -> None:
    source = lines(tmp_path / "a.jsonl", 2)
    for arguments, sentence in (
        (["--group-by", "lang", source], f"error: --group-by lang: {source}:1 has no field lang"),
        ([tmp_path / "no.txt"], f"error: FILES {tmp_path / 'no.txt'} does not exist"),
        (["--against", tmp_path, source], f"error: {tmp_path} holds no tokenizer.json"),
    ):
        code, printed, error = tool("tokenizer_report", "--tokenizer", tokenizer_dir, *arguments)
        assert (code, printed) == (2, "")
        assert sentences(error)[-1].startswith(sentence)


def test_prepare_corpus(tool: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a library of two modules: the standard library takes seconds."""
    library = tmp_path / "library"
    library.mkdir()
    (library / "a.py").write_text("a = 1\n")
    (library / "b.py").write_text("b = 1\n")
    monkeypatch.setattr("trinity.data.prepare.corpus.write_corpus", lambda out: write_corpus(out, library))
    code, printed, error = tool("prepare_corpus", "--out", tmp_path / "out")
    assert (code, error) == (0, "")
    rows = [row.split() for row in printed.splitlines()]
    assert [row[0] for row in rows] == [
        "file", "code.train.jsonl", "code.validation.jsonl", "prose.train.jsonl", "prose.validation.jsonl"
    ]  # fmt: skip
    assert int(rows[1][1]) + int(rows[2][1]) == 2
    sizes = [int(row[2].replace(",", "")) for row in rows[1:]]
    assert sizes == [(tmp_path / "out" / row[0]).stat().st_size for row in rows[1:]]
