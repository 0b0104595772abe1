"""The data of whole runs: document masks, phases of another length, text in place of shards, the end of the data."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.run_files import metrics, refuse, status, train
from trinity.config.load import OmegaConf, build_config
from trinity.data.sources.shards import TokenSource
from trinity.models import Trinity
from trinity.training.build_data import best_fit_notes, document_notes, length_bias_notes, open_stream


def config_of(settings: dict, *words: str) -> object:
    return build_config([("test", OmegaConf.create(settings)), ("words", OmegaConf.from_dotlist(list(words)))])


def test_packed_documents_do_not_attend_to_each_other(settings: dict) -> None:
    """Logits of each piece of a packed row, masked by the row's document ids, against the piece in a row of its own.

    In float64, to 1e-12 of logits around 1: RoPE's angles differ by a piece's position in its row, in fp32 by 1e-6.
    """
    config = config_of(settings, "precision.compute=float64")
    stream = open_stream(config, 0, 1)
    rows = stream.take(128)
    assert sum(len(pieces) > 1 for pieces in rows.pieces) > 5
    assert sum(piece.start > 0 for pieces in rows.pieces for piece in pieces) > 5
    model = Trinity(config.model).double()
    model.init_weights(1)
    with torch.no_grad():
        packed = model(rows.tokens_BS, document_ids_BS=rows.document_ids_BS)
        for row, pieces in enumerate(rows.pieces):
            begin = 0
            for piece in pieces:
                end = begin + piece.length
                ids = torch.from_numpy(stream.sources[piece.source].read(*piece[1:]).astype("int64"))
                assert torch.equal(rows.tokens_BS[row, begin:end], ids)
                torch.testing.assert_close(packed[row, begin:end], model(ids[None])[0], rtol=0, atol=1e-12)
                begin = end


def test_a_phase_of_longer_rows(settings: dict) -> None:
    """Six rows of 24 tokens a step until a step begins with 400 tokens read, then rows of 40; rates by tokens."""
    settings["data"]["phases"] = [{"tokens": 400, "sequence_length": 40, "packing": "sequential"}]
    assert train(settings, "batch.ramp=[]", "run.steps=6") == 0
    lines = metrics(Path(settings["run"]["dir"]))
    assert [line["tokens"] for line in lines] == [144, 288, 432, 672, 912, 1152]
    assert all(line["source_tokens.code"] + line["source_tokens.prose"] == line["tokens"] for line in lines)
    for name, folder in settings["data"]["train"].items():
        tokens = TokenSource(folder).tokens
        assert [line[f"epoch.{name}"] * tokens for line in lines] == pytest.approx(
            [line[f"source_tokens.{name}"] for line in lines], rel=1e-12
        )


def test_a_later_phase_may_be_edited_and_one_that_has_begun_may_not(settings: dict) -> None:
    assert train(settings, "run.steps=5") == 0
    settings["data"]["phases"].append({"tokens": 1000, "mixture": {"code": 1}})
    assert train(settings, "run.steps=7") == 0
    settings["data"]["phases"][0]["mixture"] = {"code": 1}
    sentence = refuse(settings, "run.steps=8")
    assert "data phase 1 of " in sentence
    assert "has begun and must not change (mixture was" in sentence


def test_the_same_batches_from_text(
    settings: dict, corpus: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run on the files that the shards were made of, every metric bit for bit, through a worker and a resume."""
    monkeypatch.setenv("TRINITY_CACHE", str(tmp_path / "cache"))
    assert train(settings) == 0
    expected = metrics(Path(settings["run"]["dir"]))
    settings["run"]["dir"] = str(tmp_path / "text")
    settings["data"]["train"] = {name: str(path) for name, path in corpus.texts.items() if name != "held_out"}
    assert train(settings, "run.steps=4") == 0
    assert train(settings, "run.steps=8") == 0
    assert metrics(tmp_path / "text") == expected


def test_the_data_ends(settings: dict) -> None:
    """The run stops with the last whole step, saved, evaluated and finished; more steps find nothing to do."""
    run = Path(settings["run"]["dir"])
    words = [
        "run.steps=500",
        "data.exhausted=end",
        "checkpoint.every=0",
        "evaluation.every=1000",
        "batch.ramp=[]",
        "batch.sequences=48",
        "batch.microbatch=48",
        "data.sequence_length=96",
    ]
    assert train(settings, *words) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ended = status(run)
    assert (ended["state"], ended["step"]) == ("finished", lines[-1]["step"])
    assert 2 < ended["step"] < 500
    assert "no more documents" in ended["reason"]
    assert "validation_loss.held_out" in lines[-1]
    assert max(lines[-1]["epoch.code"], lines[-1]["epoch.prose"]) <= 1
    assert train(settings, *words) == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == len(lines)


def test_changed_data_are_refused(settings: dict, corpus: object, tmp_path: Path) -> None:
    """Another source's shards under this name are refused; the same shards at another place are accepted."""
    assert train(settings, "run.steps=3") == 0
    settings["data"]["train"]["code"] = settings["data"]["train"]["prose"]
    assert "data.train.code has changed since this run read it: its content's hash was" in refuse(settings)
    moved = tmp_path / "moved"
    moved.symlink_to(corpus.folder / "code")
    settings["data"]["train"]["code"] = str(moved)
    assert train(settings, "run.steps=4") == 0


def test_text_needs_a_tokenizer(settings: dict, corpus: object) -> None:
    settings["data"] |= {"train": {"code": str(corpus.texts["code"])}, "mixture": {}, "phases": [], "tokenizer": None}
    assert "is text, and data.tokenizer is not given" in refuse(settings)


def test_a_note_on_fewer_documents_than_streams(settings: dict) -> None:
    """What the note advises has none; with fewer documents than ranks only more documents help."""
    assert document_notes(open_stream(config_of(settings), 0, 1)) == []
    documents = TokenSource(settings["data"]["train"]["prose"]).documents
    many = 2 * (documents + 1)
    advice = document_notes(open_stream(config_of(settings, f"data.streams={many}"), 0, 1))[-1]
    assert f"data.train.prose has {documents} documents for data.streams={many}" in advice
    assert advice.endswith(f"or start a new run with data.streams={documents}")
    assert not any(".prose" in note for note in document_notes(
        open_stream(config_of(settings, f"data.streams={documents}"), 0, 1)))  # fmt: skip
    alone = document_notes(open_stream(config_of(settings, f"data.streams={many}"), 0, many))[-1]
    assert alone.endswith("split its texts into more documents")


@pytest.mark.parametrize("text", [False, True])
def test_best_fit_checks_the_longest_document_at_the_start(settings: dict, corpus: object, text: bool) -> None:
    """Of shards without chat, and of text."""
    source = TokenSource(settings["data"]["train"]["code"])
    longest = int(source.lengths(np.arange(source.documents)).max())
    words = ["data.packing=best_fit", "data.document_mask=true", "data.phases=[]", "data.mixture={}"]
    words += [f"data.sequence_length={longest - 1}", "data.validation={}"]
    settings["data"] |= {"train": {"code": str(corpus.texts["code"] if text else settings["data"]["train"]["code"])}}
    settings["data"] |= {"mixture": {}, "validation": {}, "phases": [], "tokenizer": str(corpus.tokenizer)}
    assert f"has a document of {longest} tokens, and data.packing=best_fit splits none" in refuse(settings, *words)
    assert open_stream(config_of(settings, *words, f"data.sequence_length={longest}"), 0, 1).k == 0


def test_a_note_on_windows_longer_than_an_epoch(settings: dict) -> None:
    """The number that it names has none, divides data.streams and is a multiple of the ranks."""
    words = ["data.packing=best_fit", "data.document_mask=true", "data.phases=[]", "data.mixture.code=1"]
    words += ["data.best_fit_rows=1", "data.streams=48"]
    tokens = {name: TokenSource(settings["data"]["train"][name]).tokens for name in ("code", "prose")}
    smaller = min(tokens, key=tokens.__getitem__)
    length = tokens[smaller] // 4  # each source is half of a window: of the smaller, 8 streams have a window each

    def notes(*more: str, ranks: int = 1) -> list[str]:
        config = config_of(settings, *words, f"data.sequence_length={length}", *more)
        return best_fit_notes(open_stream(config, 0, ranks), 0)

    (note,) = (note for note in notes() if f"data.train.{smaller}" in note)
    assert note.endswith("start a new run with data.streams=8")
    assert notes("data.streams=8") == []
    assert any(note.endswith("data.streams=6") for note in notes(ranks=6))
    assert any(note.endswith("use shorter rows, or more text") for note in notes(ranks=16))
    assert notes("data.packing=sequential") == []


def test_a_note_on_long_documents(settings: dict, capfd: pytest.CaptureFixture) -> None:
    """The share of the tokens in documents longer than half a row, by a sum over all documents and both sources; a
    warning where it is small; only for phases with a length bias that are not past."""
    bias = {"tokens": 60, "floor": 0.01, "ceiling": 0.9}
    settings["data"] |= {"length_bias": bias, "sequence_length": 24}
    settings["data"]["phases"] = [{"tokens": 800, "sequence_length": 4000, "mixture": {"prose": 1}}]
    config = config_of(settings)
    sources = open_stream(config, 0, 1).sources
    share = 0.0
    for name, weight in {"code": 2 / 3, "prose": 1 / 3}.items():
        lengths = [sources[name].length(document) for document in range(sources[name].documents)]
        taken = [length * (0.01 + 0.89 * min(1, length / 60)) for length in lengths]
        share += weight * sum(tokens for tokens, length in zip(taken, lengths) if length > 12) / sum(taken)
    assert 0.5 < share < 1
    first, second = length_bias_notes(config, sources, 0)
    assert first == (
        f"note: with data.length_bias {share:.1%} of the tokens are in documents of more than 12 tokens, half a row"
    )
    assert second == (
        "warning: with data.phases[0].length_bias 0.0% of the tokens are in documents of more than 2000 tokens, half a "
        "row; add sources of longer documents, or a shorter sequence_length"
    )
    assert length_bias_notes(config, sources, 800) == [second]
    settings["data"]["length_bias"] = {}
    assert length_bias_notes(config_of(settings), sources, 0) == []
    settings["data"] |= {"length_bias": bias, "phases": []}
    assert train(settings, "run.steps=1") == 0
    assert first in capfd.readouterr().err
