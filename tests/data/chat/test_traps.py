"""Known traps of chat data, each by name: what went wrong elsewhere, and that it cannot here."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.data.chat.templates import CALLS, CHATML, TALK, TEMPLATES, without_blocks
from tests.data.small_files import read_folder
from trinity.config.check import check_run
from trinity.config.run import DataConfig, RunConfig, RunSection
from trinity.data import BatchPlan, SequenceStream, TokenSource
from trinity.data.chat.encode import ChatEncoder, ChatOptions, in_spans
from trinity.data.prepare.prepare import prepare_data
from trinity.data.stream.collate import PADDING_ID
from trinity.data.stream.mixture import Phase
from trinity.data.tokenizer.tokenizer import BOS, EOS, load_tokenizer
from trinity.errors import UserError
from trinity_kernels.cross_entropy import IGNORE

Make = Callable[..., ChatEncoder]


def one(encoder: ChatEncoder, row: dict) -> tuple[list[int], list[bool]]:
    (example,) = encoder.examples(row, "x:1")
    return example.ids.tolist(), example.mask.tolist()


def text_of(encoder: ChatEncoder, ids: list[int]) -> str:
    return encoder.tok.decode(ids, skip_special_tokens=False)


def trained_text(encoder: ChatEncoder, row: dict) -> str:
    ids, mask = one(encoder, row)
    return text_of(encoder, [token for token, bit in zip(ids, mask) if bit])


@pytest.fixture(scope="module")
def shards(chat_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 conversations of different lengths in shards."""
    folder = tmp_path_factory.mktemp("shards")
    rows = [{"messages": conversation(number)} for number in range(60)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prepare_data([folder / "chat.jsonl"], chat_tokenizer, folder / "out", chat=ChatOptions(), shard_tokens=999)
    return folder / "out"


def conversation(number: int) -> list[dict]:
    question = {"role": "user", "content": f"Count to {number % 7}, {EOS} or {number}."}
    answer = {"role": "assistant", "content": "".join(f"{n}, " for n in range(number % 7)) + f"and {number}."}
    return [question, answer] * (1 + number % 3)


def stream_of(source: TokenSource, length: int = 240, **arguments: object) -> SequenceStream:
    values = {"streams": 2, "seed": 1, "bos_id": source.bos_id, "plan": BatchPlan(2, [], length), "masked": True}
    return SequenceStream({"chat": source}, [Phase((1.0,), best_fit_rows=8)], **values | arguments)


def test_1_template_without_markers_is_refused_not_masked_to_zero(make_encoder: Make) -> None:
    with pytest.raises(UserError, match="no generation blocks and prints the first 2 messages differently") as error:
        one(make_encoder(without_blocks(TEMPLATES["thinking"])), {"messages": TALK[1:]})
    assert "\n" not in str(error.value)


def test_2_span_that_ends_at_token_0() -> None:
    """transformers 5.23 then trains the whole row (issue 47325)."""
    assert in_spans(np.array([0, 4, 9]), [(0, 3)]).tolist() == [True, False, False]
    assert in_spans(np.array([0, 4, 9]), [(0, 4), (9, 12)]).tolist() == [True, False, True]


def test_2_span_that_ends_in_stripped_white_space(make_encoder: Make) -> None:
    """The characters of blocks would then be those of other text: refused."""
    template = CHATML.replace("{{ '\\n' }}", "").replace("m.content + '<|im_end|>' }}", "m.content + '<|im_end|> ' }}")
    assert trained_text(make_encoder(template), {"messages": TALK[1:3]}) == f"{TALK[2]['content']}<|im_end|> "
    with pytest.raises(UserError, match="changes what its generation blocks have printed"):
        one(make_encoder("{% set t %}" + template + "{% endset %}{{ t | trim }}"), {"messages": TALK[1:]})


def test_3_end_of_turn_outside_the_span(make_encoder: Make) -> None:
    template = CHATML.replace("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}<|im_end|>")
    with pytest.raises(UserError, match=r"trains 0 ends of turn for 2 trained turns.*end with <.im_end.>"):
        one(make_encoder(template), {"messages": TALK})


@pytest.mark.parametrize("shape", TEMPLATES)
def test_3_end_of_turn_is_trained_once_a_turn(make_encoder: Make, shape: str) -> None:
    encoder = make_encoder(TEMPLATES[shape])
    ids, mask = one(encoder, {"messages": TALK})
    assert sum(bit for token, bit in zip(ids, mask) if token == encoder.turn_end) == 2


THINK_AND_ANSWER = """{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.last %}
{%- generation %}{{ '<think>' + (m.reasoning_content or '') + '</think>' }}{% endgeneration %}{{ '\\n' }}
{%- generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("reason", ["because", "I write <|im_end|>"])
def test_3_two_blocks_of_the_last_turn_are_as_many_as_two_turns(make_encoder: Make, turns: int, reason: str) -> None:
    """With as many blocks as turns, each block is a turn's only if it ends one."""
    messages = []
    for turn in range(turns):
        answer = {"role": "assistant", "content": f"a{turn}", "reasoning_content": reason}
        messages += [{"role": "user", "content": f"q{turn}"}, answer]
    expected = f"<think>{reason}</think>a{turns - 1}<|im_end|>"
    assert trained_text(make_encoder(THINK_AND_ANSWER, loss="completion"), {"messages": messages}) == expected
    untrained = [message | {"train": number == 2 * turns - 1} for number, message in enumerate(messages)]
    assert trained_text(make_encoder(THINK_AND_ANSWER), {"messages": untrained}) == expected


def test_4_eos_is_trained_where_padding_is_eos(make_encoder: Make) -> None:
    """Masks go by place. The text ends in EOS, spells it out, and a padding token would be EOS too."""
    encoder = make_encoder(TEMPLATES["plain words"])
    row = {"messages": [{"role": "user", "content": f"Say {EOS}"}, {"role": "assistant", "content": f"{EOS}!"}]}
    ids, mask = one(encoder, row)
    eos = encoder.tok.token_to_id(EOS)
    assert ids.count(eos) == 1
    assert (ids[-1], mask[-1]) == (eos, True)
    assert text_of(encoder, ids) == f"{BOS}USER: Say {EOS} ASSISTANT: {EOS}!{EOS}"
    assert trained_text(encoder, row) == f" {EOS}!{EOS}"


def test_5_beginning_of_text_once(make_encoder: Make) -> None:
    ids, _ = one(make_encoder(), {"messages": TALK})
    assert [ids[0], ids.count(ids[0])] == [make_encoder().bos, 1]
    for template in (
        CHATML.replace("{{ bos_token }}", "{{ bos_token + bos_token }}"),
        CHATML[len("{{ bos_token }}") :],
    ):
        with pytest.raises(UserError, match=r"does not print <.begin_of_text.> once.*\{\{ bos_token \}\}"):
            one(make_encoder(template), {"messages": TALK})


def test_6_as_many_bits_as_tokens(make_encoder: Make, shards: Path) -> None:
    """In shards of several documents, where no document begins at a byte of the mask."""
    source, encoder = TokenSource(shards), make_encoder()
    assert source.documents == 60
    assert len(source._shards) > 3
    for number in range(60):
        ids, mask = one(encoder, {"messages": conversation(number)})
        assert source.read(number, 0, len(ids)).tolist() == ids
        assert source.read_mask(number, 0, len(ids)).tolist() == mask
        assert source.read_mask(number, 3, 5).tolist() == mask[3:8]
        with pytest.raises(AssertionError):
            source.read_mask(number, 1, len(ids))


@pytest.mark.parametrize("phase", [Phase((1.0,), best_fit_rows=8), Phase((1.0,)), Phase((1.0,), rsdb_size=3)])
def test_7_packing_keeps_the_mask(make_encoder: Make, shards: Path, phase: Phase) -> None:
    """Each target of each row is that of its example alone, wherever the example lies."""
    encoder, trained = make_encoder(), 0
    stream = SequenceStream(
        {"chat": TokenSource(shards)}, [phase], streams=2, seed=1, bos_id=0, plan=BatchPlan(2, [], 240), masked=True
    )
    for row in [next(stream) for _ in range(40)]:
        begin = 0
        for piece in row.pieces:
            ids, mask = one(encoder, {"messages": conversation(piece.document)})
            next_tokens = [token if bit else IGNORE for token, bit in zip(ids, mask)][1:]
            next_tokens.append(IGNORE)
            targets = row.values_3S[1, begin : begin + piece.length].tolist()
            assert targets == next_tokens[piece.start : piece.start + piece.length]
            begin += piece.length
        assert (row.values_3S[1, begin:] == IGNORE).all()
        trained += int((row.values_3S[1] != IGNORE).sum())
    assert trained > 500


def test_8_examples_do_not_see_each_other(shards: Path) -> None:
    """Each example has an id of its own, padding has PADDING_ID, and best fit cannot be had without the mask."""
    batch = stream_of(TokenSource(shards)).take(8)
    for row, pieces in enumerate(batch.pieces):
        runs = [(document, piece.length) for document, piece in enumerate(pieces)]
        padding = batch.tokens_BS.shape[1] - sum(piece.length for piece in pieces)
        expected = [document for document, length in runs for _ in range(length)] + [PADDING_ID] * padding
        assert batch.document_ids_BS[row].tolist() == expected
    assert (batch.document_ids_BS == PADDING_ID).any()
    with pytest.raises(UserError, match=r"set data.document_mask=true"):
        check_run(RunConfig(run=RunSection(steps=1), data=DataConfig(packing="best_fit")))


def test_9_tool_calls(make_encoder: Make) -> None:
    """Arguments as an object or as its JSON text give equal tokens; results are not trained; calls may be parallel."""
    calls = [
        {"id": "1", "function": {"name": "weather", "arguments": '{"city": "Rome", "days": 2}'}},
        {"name": "weather", "arguments": {"city": "Oslo"}},
    ]
    with_text = [CALLS[0], {"role": "assistant", "tool_calls": calls}, *CALLS[2:]]
    for template in (None, TEMPLATES["tools"]):
        encoder = make_encoder(template)
        assert one(encoder, {"messages": with_text}) == one(encoder, {"messages": CALLS})
        trained = trained_text(encoder, {"messages": CALLS})
        assert "sun" not in trained
        assert trained.count("weather") == 2
        assert trained.endswith("Sun in Rome, snow in Oslo." + encoder.tok.id_to_token(encoder.turn_end))
    for arguments in ("[1]", "city=Rome", [1], 3):
        odd = [CALLS[0], {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": arguments}]}]
        with pytest.raises(UserError, match="x:1 calls weather in message 2 with arguments that are no object; write"):
            one(make_encoder(), {"messages": odd})


def test_10_truncation_leaves_every_trained_token(make_encoder: Make) -> None:
    row = {"messages": TALK[1:]}
    ids, mask = one(make_encoder(), row)
    first = mask.index(True)
    (example,) = make_encoder().examples(row, "x:1")
    cut = make_encoder(max_tokens=len(ids) - 5, too_long="truncate-prompt")._fitted(example, "x:1")
    assert cut.ids.tolist() == [ids[0], *ids[6:]]
    assert cut.mask.tolist() == [mask[0], *mask[6:]]
    least = len(ids) - first + 1
    assert (
        make_encoder(max_tokens=least, too_long="truncate-prompt")._fitted(example, "x:1").mask[1:].tolist()
        == mask[first:]
    )
    assert make_encoder(max_tokens=least - 1, too_long="truncate-prompt")._fitted(example, "x:1") is None
    assert make_encoder(max_tokens=len(ids) - 1, too_long="drop")._fitted(example, "x:1") is None
    with pytest.raises(
        UserError, match=f"x:1 has {len(ids)} tokens, more than --max-tokens 9; use a larger number, or"
    ):
        make_encoder(max_tokens=9)._fitted(example, "x:1")


def test_11_thinking_in_the_last_turn_only(make_encoder: Make) -> None:
    """With blocks the earlier turns are trained as the template prints them; single turns all have their thinking."""
    encoder = make_encoder(TEMPLATES["thinking"], turns="split")
    examples = list(encoder.examples({"messages": TALK}, "x:1"))
    texts = [text_of(encoder, example.ids[example.mask].tolist()) for example in examples]
    assert texts == [f"<think>\n\n</think>\n\n{TALK[at]['content']}<|im_end|>" for at in (2, 4)]
    assert trained_text(make_encoder(TEMPLATES["thinking"]), {"messages": TALK}).count("<think>") == 1


def test_12_end_of_turn_cuts_no_conversation(shards: Path, chat_tokenizer: Path) -> None:
    source, tok = TokenSource(shards), load_tokenizer(chat_tokenizer)
    ids = source.read(2, 0, source.length(2)).tolist()
    assert ids.count(tok.token_to_id("<|im_end|>")) == 6
    assert source.documents == 60


def test_13_no_packing_is_kept_on_disk(shards: Path) -> None:
    """Another length packs anew from the same files, which do not change."""
    before = read_folder(shards)
    rows = {length: stream_of(TokenSource(shards), length).take(10) for length in (240, 300)}
    assert read_folder(shards) == before
    assert [rows[length].tokens_BS.shape[1] for length in rows] == [240, 300]
    counts = {
        length: Counter(piece.document for row in batch.pieces for piece in row) for length, batch in rows.items()
    }
    assert max(counts[240].values()) == 1
    assert counts[240] != counts[300]
