"""Choice scores equal a loop over single choices in float64; accuracies are computed by hand."""

import json
import math
from pathlib import Path

import pytest
import torch

from trinity.config import RunConfig
from trinity.data.tokenizer.tokenizer import bos_id, load_text_encoder
from trinity.errors import UserError
from trinity.evaluation.multiple_choice import Item, accuracies, choice_scores, read_items
from trinity.models import Trinity

ITEMS = [
    Item("def train_step(model", [", optimizers", " and then", "): pass # " * 6], 0),
    Item("Raises:\n    User", ["Error", "Errors", " E"], 0),
    Item("", ["import torch", "torch import"], 0),
    Item("def f(sel", ["f, x):", "ection):"], 0),
    Item("the run", ["s", "ning of a run", " directory", " "], 2),
]


def test_scores_equal_a_loop_over_single_choices(exact: Trinity, config: RunConfig) -> None:
    """Within 1e-10 in float64. If the prompt's last token spans into a choice, scoring begins one token earlier."""
    tok = load_text_encoder(Path(config.data.tokenizer))
    begin = [bos_id(tok)]
    scores = choice_scores(exact, tok, ITEMS, begin=begin, window=64, batch_tokens=60)
    merged = 0
    for item, row in zip(ITEMS, scores, strict=True):
        prompt = begin + tok.encode(item.prompt, add_special_tokens=False).ids
        texts = [begin + tok.encode(item.prompt + text, add_special_tokens=False).ids for text in item.choices]
        start = 0
        while all(start < len(ids) - 1 and start < len(prompt) and ids[start] == prompt[start] for ids in texts):
            start += 1
        merged += start < len(prompt)
        for ids, score in zip(texts, row, strict=True):
            plain = 0.0
            for place in range(start, len(ids)):
                with torch.no_grad():
                    logits_V = exact(torch.tensor([ids[:place]]))[0, -1]
                plain += torch.log_softmax(logits_V, dim=-1)[ids[place]].item()
            assert abs(score - plain) < 1e-10
    assert 0 < merged < len(ITEMS), "both kinds of boundary must occur"


def test_window_cuts_the_beginning_of_a_prompt(exact: Trinity, config: RunConfig) -> None:
    tok = load_text_encoder(Path(config.data.tokenizer))
    long, short = Item("x y " * 40 + "a b c d e f", [" g", " h"], 0), Item("a b c d e f", [" g", " h"], 0)
    window = len(tok.encode("a b c d", add_special_tokens=False).ids)
    one, other = (choice_scores(exact, tok, [item], begin=[0], window=window) for item in (long, short))
    assert one == other
    with pytest.raises(UserError, match="item 1 has a choice of over 1 tokens"):
        choice_scores(exact, tok, [Item("a", [" optimizers", " b c d"], 0)], begin=[0], window=1)
    with pytest.raises(UserError, match="item 1 has no token before its choices"):
        choice_scores(exact, tok, [Item("", ["a", "b"], 0)], begin=[], window=9)


def test_accuracies() -> None:
    """The sum picks the short choice, the score per byte the long one; é is two bytes; of equal scores the first."""
    items = [Item("", ["a", "bbbb"], 1), Item("", ["é", "ab", "c"], 0), Item("", ["a", "b"], 0)]
    result = accuracies(items, [[-1.0, -2.0], [-1.0, -1.5, -3.0], [-2.0, -2.0]])
    assert result["accuracy"] == 2 / 3
    assert result["accuracy_by_byte"] == 1.0
    assert result["accuracy_error"] == math.sqrt(2 / 3 * (1 - 2 / 3) / 2)
    assert result["accuracy_by_byte_error"] == 0
    assert (result["items"], result["chance"]) == (3, (1 / 2 + 1 / 3 + 1 / 2) / 3)


def test_read_items(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    rows = [{"prompt": "a", "choices": [" b", " c"], "answer": 1, "more": 0}, {"prompt": "", "choices": ["d", "e"]}]
    path.write_text(json.dumps(rows[0]) + "\n\n" + json.dumps(rows[1] | {"answer": 0}) + "\n")
    assert read_items(path) == [Item("a", [" b", " c"], 1), Item("", ["d", "e"], 0)]
    assert len(read_items(path, limit=1)) == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "holds no items; write lines such as"),
        ("{", "line 1 is not an item; write"),
        ("[1]", "line 1 is not an item; write"),
        ('{"prompt": "a", "choices": ["b", "c"]}', "line 1 is not an item; write"),
        ('{"prompt": 1, "choices": ["b", "c"], "answer": 0}', "line 1 must have a text"),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', "at least two texts"),
        ('{"prompt": "a", "choices": ["b", ""], "answer": 0}', "none empty"),
        ('{"prompt": "a", "choices": "bc", "answer": 0}', "at least two texts"),
        ('\n{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "line 2 has answer 2; give .* 0 to 1"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": true}', "has answer True"),
        ("\xff", "is not UTF-8"),
    ],
)
def test_invalid_files_are_refused(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=sentence):
        read_items(path)
