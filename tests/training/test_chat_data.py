"""Runs on chat data: masks and padding reach the loss, a resume is exact, exports have the template."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests.training.run_files import metrics, refuse, state, train
from trinity.config.load import OmegaConf, build_config
from trinity.data.chat.encode import ChatOptions
from trinity.data.chat.tokenizer import make_chat_tokenizer
from trinity.data.prepare.prepare import prepare_data
from trinity.data.sources.shards import TokenSource
from trinity.data.stream.collate import PADDING_ID
from trinity.data.tokenizer.tokenizer import BOS, EOS, load_tokenizer
from trinity.training.build_data import open_stream
from trinity_kernels.cross_entropy import IGNORE

ROOT = Path(__file__).parents[2]
S = 96


@pytest.fixture(scope="session")
def chat(corpus: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 80 conversations, and of 20 for validation, with their tokenizer."""
    folder = tmp_path_factory.mktemp("chat_data")
    make_chat_tokenizer(corpus.tokenizer, folder / "tokenizer", places="last")
    for name, count in (("train", 80), ("held_out", 20)):
        rows = [
            {
                "prompt": [{"role": "user", "content": f"Say {n}."}],
                "completion": [{"role": "assistant", "content": f"{n} " * (1 + n % 9)}],
            }
            for n in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        prepare_data([folder / f"{name}.jsonl"], folder / "tokenizer", folder / name, chat=ChatOptions())
    return folder


@pytest.fixture
def tuned(settings: dict, chat: Path) -> dict:
    """The small run on chat data, with everything that fine-tuning switches on."""
    settings["data"] |= {
        "train": {"chat": str(chat / "train")}, "validation": {"held_out": str(chat / "held_out")}, "mixture": {},
        "tokenizer": str(chat / "tokenizer"), "sequence_length": S, "packing": "best_fit", "best_fit_rows": 3,
        "loss": "masked", "phases": [],
    }  # fmt: skip
    settings["loss"]["per"] = "example"
    settings["batch"].pop("ramp")
    return settings


def config_of(settings: dict) -> object:
    return build_config([("test", OmegaConf.create(settings))])


def test_batches_and_padding_share(tuned: dict) -> None:
    """Targets are the masks of the shards, weights sum to the examples; the share of padding is that of step 3."""
    assert train(tuned, "run.steps=3") == 0
    stream = open_stream(config_of(tuned), 0, 1)
    batch = stream.batch(2)
    source = stream.sources["chat"]
    trained = 0
    for row, pieces in enumerate(batch.pieces):
        for piece in pieces:
            trained += int(source.read_mask(piece.document, 0, piece.length).sum())
        assert batch.weights_BS[row].sum().item() == pytest.approx(len(pieces), rel=1e-6)  # sums of fp32
    assert int((batch.targets_BS != IGNORE).sum()) == trained
    padding = int((batch.document_ids_BS == PADDING_ID).sum())
    assert padding > 0
    last = metrics(Path(tuned["run"]["dir"]))[-1]
    assert last["padding_share"] == padding / (6 * S)
    assert last["source_tokens.chat"] == sum(
        piece.length for step in range(3) for row in stream.batch(step).pieces for piece in row
    )


def test_resume_is_exact(tuned: dict, tmp_path: Path) -> None:
    """In the middle of a window of best fit: all fields and tensors equal those of a run without a stop."""
    assert train(tuned, "run.steps=5") == 0
    other = json.loads(json.dumps(tuned))
    other["run"]["dir"] = str(tmp_path / "other")
    assert train(other, "run.steps=4") == 0
    assert train(other, "run.steps=5", "data.workers=0") == 0
    assert metrics(Path(tuned["run"]["dir"])) == metrics(tmp_path / "other")
    expected, resumed = state(Path(tuned["run"]["dir"]), 5), state(tmp_path / "other", 5)
    for name, tensor in expected.items():
        assert tensor.equal(resumed[name]), name
    assert expected.keys() == resumed.keys()


def test_export_has_the_template(tuned: dict, chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train(tuned, "run.steps=1") == 0
    monkeypatch.setattr(sys, "argv", ["export_hf", tuned["run"]["dir"], str(tmp_path / "hf")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "tools" / "export_hf.py"), run_name="__main__")
    assert end.value.code in (0, None)
    name = "chat_template.jinja"
    assert (tmp_path / "hf" / name).read_bytes() == (chat / "tokenizer" / name).read_bytes()
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    tok = load_tokenizer(chat / "tokenizer")
    assert generation["eos_token_id"] == [tok.token_to_id(token) for token in ("<|im_end|>", EOS, BOS)]


def test_evaluate_packed_is_the_validation_loss(
    tuned: dict, chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the trained tokens, in the run's best-fit rows; and of all tokens with data.loss=all.

    Both compute in fp32 with rows in other microbatches: 1e-5 nats, as in tests/evaluation/test_evaluate_tool.py.
    """
    found = {}
    for loss, words in {"masked": [], "all": ["--all-tokens"]}.items():
        run, out = tmp_path / loss, tmp_path / f"{loss}.json"
        settings = ["run.steps=2", "evaluation.every=2", "evaluation.sequences=3", "data.best_fit_rows=2"]
        assert train(tuned, *settings, f"run.dir={run}", f"data.loss={loss}", "loss.per=token") == 0
        evaluate = ["evaluate", str(tmp_path / f"{loss}_hf"), "--text", str(chat / "held_out"), "--packed", "--window"]
        evaluate += [str(S), "--limit", "3", "--document-mask", "--best-fit-rows", "2", "--json", str(out), *words]
        for name, arguments in {
            "export_hf": ["export_hf", str(run), str(tmp_path / f"{loss}_hf"), "--dtype", "float32"],
            "evaluate": evaluate,
        }.items():
            monkeypatch.setattr(sys, "argv", arguments)
            with pytest.raises(SystemExit) as end:
                runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
            assert end.value.code in (0, None)
        (results,) = json.loads(out.read_text())["results"].values()
        expected = metrics(run)[-1]
        assert abs(results["loss"] - expected["validation_loss.held_out"]) < 1e-5
        assert abs(results["bits_per_byte"] - expected["validation_bits_per_byte.held_out"]) < 1e-5
        found[loss] = results["loss"]
    assert abs(found["masked"] - found["all"]) > 1e-3


def test_show_batch_refuses_steps_after_the_end(
    tuned: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tuned))
    for step, code in ((tuned["run"]["steps"], 0), (tuned["run"]["steps"] + 1, 2), (99999999, 2)):
        monkeypatch.setattr(sys, "argv", ["show_batch", str(tmp_path / "run.yaml"), "--step", str(step), "--rows", "1"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "tools" / "show_batch.py"), run_name="__main__")
        assert (end.value.code or 0) == code
        if code:
            assert f"--step {step} is after the run's end; use a step from 1 to" in capsys.readouterr().err


def test_show_batch_marks_what_is_trained(
    tuned: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tuned))
    monkeypatch.setattr(sys, "argv", ["show_batch", str(tmp_path / "run.yaml"), "--step", "1", "--rows", "1"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "tools" / "show_batch.py"), run_name="__main__")
    shown = capsys.readouterr().out
    row = open_stream(config_of(tuned), 0, 1).batch(0).pieces[0]
    for piece in row:
        n = piece.document
        assert f"user\nSay {n}.<|im_end|>\n<|im_start|>assistant\n⟦{f'{n} ' * (1 + n % 9)}<|im_end|>⟧\n" in shown
    assert shown.count("⟦") == len(row)
    assert f"--- padding: {S - sum(piece.length for piece in row)} tokens\n" in shown


def test_mistakes(tuned: dict, corpus: SimpleNamespace, chat: Path, tmp_path: Path) -> None:
    longest = TokenSource(chat / "train").longest
    assert f"has a document of {longest} tokens, and data.packing=best_fit splits none" in refuse(
        tuned, f"data.sequence_length={longest - 1}"
    )
    place = chat / "train.jsonl"
    assert f"data.train.chat={place} is text, which has no loss mask, and data.loss=masked; prepare it" in refuse(
        tuned, f"data.train.chat={place}"
    )
    assert "has no loss mask, and data.loss=masked; prepare it with tools/prepare_data.py --chat" in refuse(
        tuned, f"data.train.chat={corpus.folder / 'code'}", f"data.tokenizer={corpus.tokenizer}"
    )
    assert "loss.per=example is a mean over whole examples, and data.packing=rsdb splits them" in refuse(
        tuned, "data.packing=rsdb"
    )
    assert "set data.document_mask=true" in refuse(tuned, "data.document_mask=false")
    assert "use best_fit in all phases or in none" in refuse(tuned, "data.phases=[{tokens: 9, packing: rsdb}]")
    make_chat_tokenizer(chat / "tokenizer", tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_text("{{ bos_token }}")
    assert "rendered with another chat template than" in refuse(tuned, f"data.tokenizer={tmp_path / 'other'}")
