"""The tokenizer against the report's cuts, Unicode at large, and transformers."""

import gzip
import hashlib
import json
import re
import unicodedata
from collections.abc import Callable
from itertools import accumulate, takewhile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from trinity.data.tokenizer import train as training
from trinity.data.tokenizer.tokenizer import (
    BOS,
    EOS,
    PAD,
    RESERVED,
    bos_id,
    fingerprint,
    load_text_encoder,
    load_tokenizer,
    pad_vocabulary,
    save_tokenizer,
    token_byte_lengths,
    train_tokenizer,
    vocabulary_size,
)
from trinity.data.tokenizer.train import train_from_files
from trinity.errors import UserError

# Any text that UTF-8 can hold, with digits, scripts without spaces and white space more often than by chance.
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.text(st.sampled_from("0123456789 \r\n\tab.,!語テภາကᄀ한é́²½٣")),
)
SPECIAL = [BOS, EOS, PAD, RESERVED.format(0), RESERVED.format(67)]

# Blocks that are isolated, each with a word of its script. The report names all but the last two.
BLOCKS = {
    "CJK ideographs": (0x4E00, 0x9FFF, "漢字"),
    "CJK extension A": (0x3400, 0x4DBF, "㐀䶵"),
    "CJK compatibility": (0xF900, 0xFAFF, "\uf900\uf901"),
    "hiragana": (0x3040, 0x309F, "ひらがな"),
    "katakana": (0x30A0, 0x30FF, "カタカナ"),
    "half-width katakana": (0xFF65, 0xFF9F, "ｶﾀｶﾅ"),
    "Thai": (0x0E00, 0x0E7F, "ภาษา"),
    "Lao": (0x0E80, 0x0EFF, "ພາສາ"),
    "Khmer": (0x1780, 0x17FF, "ភាសា"),
    "Myanmar": (0x1000, 0x109F, "ဘာသာ"),
    "Myanmar extension A": (0xAA60, 0xAA7F, "ꩠꩡ"),
    "Myanmar extension B": (0xA9E0, 0xA9FF, "ꧠꧡ"),
    "Hangul syllables": (0xAC00, 0xD7AF, "한국어"),
    "Hangul jamo": (0x1100, 0x11FF, "\u1112\u1161\u11ab"),
    "CJK extensions B to F": (0x20000, 0x2FFFF, "𠮷𪚥"),
    "CJK extensions G, H": (0x30000, 0x3FFFF, "𰻝𱁬"),
}


def cuts(tok: Tokenizer, text: str) -> list[str]:
    """The pieces that BPE sees."""
    return [text[begin:end] for _, (begin, end) in tok.pre_tokenizer.pre_tokenize_str(text)]


@pytest.fixture(scope="module")
def tok(tokenizer_dir: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_dir)


@pytest.fixture(scope="module")
def padded_dir(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer with 68 reserved tokens, which make 768 ids."""
    padded = load_tokenizer(tokenizer_dir)
    pad_vocabulary(padded, 128)
    folder = tmp_path_factory.mktemp("padded")
    save_tokenizer(padded, folder)
    return folder


@pytest.fixture
def many_files(tmp_path: Path) -> tuple[list[Path], list[tuple[str, str]]]:
    """Three files, one compressed and one with empty lines, and their documents as (position, text)."""
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", tmp_path / "c.jsonl"]
    documents = []
    for number, (path, opener) in enumerate(zip(files, (open, gzip.open, open))):
        texts = [f"é{number} text {line} " * (1 + line * 7 % 13) for line in range(100)]
        with opener(path, "wt") as file:
            for line, text in enumerate(texts):
                file.write(json.dumps({"text": text}) + "\n\n")
                documents.append((f"{number}/{2 * line}", text))
    return files, documents


@pytest.fixture
def training_texts(monkeypatch: pytest.MonkeyPatch, tok: Tokenizer) -> Callable[..., list[str]]:
    """(files, bytes, seed) → the texts that the trainer gets, without empty ones."""

    def train(files: list[Path], sample_bytes: int, seed: int = 0) -> list[str]:
        received: list[str] = []
        monkeypatch.setattr(training, "train_tokenizer", lambda texts, *_: received.extend(texts) or tok)
        train_from_files(files, 700, files[0].parent / f"{sample_bytes}.{seed}", sample_bytes=sample_bytes, seed=seed)
        return [text for text in received if text]

    return train


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("1234567", ["1", "234", "567"]),
        ("12345678", ["12", "345", "678"]),
        ("123456", ["123", "456"]),
        ("x1234 5", ["x", "1", "234", " ", "5"]),
        ("日本語 text", ["日本語", " text"]),
        ("abc日本カナdef", ["abc", "日本カナ", "def"]),
        ("ภาษาไทย한국어", ["ภาษาไทย한국어"]),
        ("x.append(y)", ["x", ".append", "(y", ")"]),
        ("a  b\n\n  c", ["a", " ", " b", "\n\n", " ", " c"]),
        ("Hello, wörld!\n", ["Hello", ",", " wörld", "!\n"]),
        ("1", ["1"]),
        ("1,234.50", ["1", ",", "234", ".", "50"]),
        ("v10000b", ["v", "10", "000", "b"]),
        (" 1000\n1000", [" ", "1", "000", "\n", "1", "000"]),
        ("日本2024年", ["日本", "2", "024", "年"]),
        # Whatever Unicode calls a number is a digit: other scripts', mixed ones, powers, fractions, Roman numerals.
        ("١٢٣٤٥٦٧", ["١", "٢٣٤", "٥٦٧"]),
        ("12٣٤", ["1", "2٣٤"]),
        ("ราคา๑๒๓๔บาท", ["ราคา", "๑", "๒๓๔", "บาท"]),
        ("x²½Ⅷ〇", ["x", "²", "½Ⅷ〇"]),
        # Radicals are symbols to Unicode, so the main expression keeps them together.
        ("a\u2e80\u2ef3\u2f00\u2fd5b", ["a", "\u2e80\u2ef3\u2f00\u2fd5", "b"]),
        ("カナ・カナ", ["カナ", "・", "カナ"]),
        # Scripts that write spaces are words like any other.
        ("abпривет", ["abпривет"]),
        (" हिन्दी العربية", [" हिन्दी", " العربية"]),
        ("_name don't", ["_name", " don", "'t"]),
        ("x ==  y\r\n\r\n", ["x", " ==", " ", " y", "\r\n\r\n"]),
        ("", []),
    ],
)
def test_cuts(tok: Tokenizer, text: str, pieces: list[str]) -> None:
    assert cuts(tok, text) == pieces


@pytest.mark.parametrize("block", BLOCKS)
def test_scripts_without_spaces_are_alone(tok: Tokenizer, block: str) -> None:
    """At both ends, between words, beside spaces and digits; and all letters and marks of the block in one run."""
    first, last, word = BLOCKS[block]
    assert all(first <= ord(character) <= last for character in word)
    assert cuts(tok, word) == [word]
    assert cuts(tok, f"{word}ab{word}") == [word, "ab", word]
    assert cuts(tok, f"ab{word}cd {word} ef") == ["ab", word, "cd", " ", word, " ef"]
    assert cuts(tok, f"12{word}1234") == ["12", word, "1", "234"]
    assert cuts(tok, f"漢{word}ไ") == [f"漢{word}ไ"]
    every = "".join(map(chr, filter(lambda code: unicodedata.category(chr(code))[0] in "LM", range(first, last + 1))))
    assert cuts(tok, f"a{every}a") == ["a", every, "a"]


@settings(deadline=None, max_examples=200, derandomize=True)
@given(digits=st.text(st.sampled_from("0123456789"), min_size=1, max_size=50))
def test_digits_in_threes_from_the_right(tok: Tokenizer, digits: str) -> None:
    """Python's own thousands separator cuts a number at the same places; the leading 1 keeps its zeros."""
    assert cuts(tok, "1" + digits) == f"{int('1' + digits):,}".split(",")


def test_many_digits_are_cut_in_linear_time(tok: Tokenizer) -> None:
    """Quadratic work would take minutes, so finishing is the test."""
    assert [len(piece) for piece in cuts(tok, "7" * 400_000)] == [1] + [3] * 133_333


@settings(deadline=None, max_examples=300, derandomize=True)
@given(text=TEXTS)
def test_round_trip_and_byte_lengths(tok: Tokenizer, text: str) -> None:
    ids = tok.encode(text, add_special_tokens=False).ids
    assert tok.decode(ids) == text
    assert int(token_byte_lengths(tok)[ids].sum()) == len(text.encode())


@settings(deadline=None, max_examples=200, derandomize=True)
@given(parts=st.lists(st.one_of(st.sampled_from(SPECIAL), TEXTS)))
def test_special_tokens_in_a_document_are_text(padded_dir: Path, parts: list[str]) -> None:
    tok, text = load_text_encoder(padded_dir), "".join(parts)
    ids = tok.encode(text, add_special_tokens=False).ids
    assert tok.decode(ids) == text
    assert not {tok.token_to_id(token) for token in SPECIAL} & set(ids)
    assert int(token_byte_lengths(tok)[ids].sum()) == len(text.encode())


def test_documents_are_not_cut_or_padded(tok: Tokenizer, tokenizer_dir: Path, tmp_path: Path) -> None:
    """A tokenizer.json may ask for both, as those of encoders do."""
    other = load_tokenizer(tokenizer_dir)
    other.enable_truncation(4)
    other.enable_padding(length=4)
    save_tokenizer(other, tmp_path)
    for text in ("a", "a longer text of many tokens"):
        assert len(load_tokenizer(tmp_path).encode(text)) == 4
        assert load_text_encoder(tmp_path).encode(text).ids == tok.encode(text).ids


def test_transformers_reads_the_same(tokenizer_dir: Path, tok: Tokenizer) -> None:
    hf_tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    assert (hf_tokenizer.bos_token, hf_tokenizer.eos_token, hf_tokenizer.pad_token) == (BOS, EOS, PAD)
    assert hf_tokenizer.bos_token_id == bos_id(tok)

    @settings(deadline=None, max_examples=200, derandomize=True)
    @given(text=TEXTS)
    def same(text: str) -> None:
        plain = tok.encode(text, add_special_tokens=False).ids
        assert hf_tokenizer(text)["input_ids"] == [bos_id(tok), *plain]
        assert hf_tokenizer(text, add_special_tokens=False)["input_ids"] == plain
        assert hf_tokenizer.decode(plain) == text

    same()


def test_padding_keeps_the_learned_tokens(tok: Tokenizer, padded_dir: Path) -> None:
    padded, hf_tokenizer = load_tokenizer(padded_dir), AutoTokenizer.from_pretrained(padded_dir)
    added = [RESERVED.format(number) for number in range(68)]
    assert vocabulary_size(padded) == padded.get_vocab_size() == len(hf_tokenizer) == 768
    assert padded.get_vocab() == {**tok.get_vocab(), **{text: 700 + number for number, text in enumerate(added)}}
    text = "def f(x): return 1234567 日本"
    assert padded.encode(text).ids == tok.encode(text).ids == hf_tokenizer(text)["input_ids"]
    assert hf_tokenizer.convert_tokens_to_ids(added) == list(range(700, 768))
    assert hf_tokenizer.decode([700, *hf_tokenizer(text)["input_ids"], 767], skip_special_tokens=True) == text
    assert token_byte_lengths(padded)[700:].tolist() == [0] * 68


@pytest.mark.parametrize(("multiple", "size"), [(1, 700), (7, 700), (512, 1024)])
def test_padding_to_a_multiple(tokenizer_dir: Path, multiple: int, size: int) -> None:
    tok = load_tokenizer(tokenizer_dir)
    for _ in range(2):
        pad_vocabulary(tok, multiple)
        assert tok.get_vocab_size() == size


def test_special_tokens_have_no_bytes(tok: Tokenizer) -> None:
    lengths_V = token_byte_lengths(tok)
    assert lengths_V.shape == (700,)
    assert (lengths_V == 0).nonzero().flatten().tolist() == [tok.token_to_id(token) for token in (BOS, EOS, PAD)]


def test_training_is_deterministic_and_exact(texts: list[str], tokenizer_dir: Path, tmp_path: Path) -> None:
    again = train_tokenizer(iter(texts), 700)
    assert again.get_vocab_size() == 700
    save_tokenizer(again, tmp_path)
    assert fingerprint(tmp_path) == fingerprint(tokenizer_dir)
    save_tokenizer(train_tokenizer(texts, 701), tmp_path)
    assert fingerprint(tmp_path) != fingerprint(tokenizer_dir)


@pytest.mark.parametrize("sample_bytes", [1, 500, 5_000, 20_000, 10**9])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_sample_is_the_documents_of_the_smallest_hashes(
    many_files: tuple, training_texts: Callable, sample_bytes: int, seed: int
) -> None:
    """As many documents as fit, at least one; in the order of the files."""
    files, documents = many_files

    def bucket(document: tuple[str, str]) -> int:
        hashed = hashlib.blake2b(f"{seed}/{document[0]}".encode(), digest_size=8).digest()
        return int.from_bytes(hashed, "little") % 2**20

    by_hash = sorted(documents, key=bucket)
    sizes = list(accumulate(len(text.encode()) for _, text in by_hash))
    fitting = len(list(takewhile(lambda size: size <= sample_bytes, sizes)))
    chosen = by_hash[: max(1, fitting)]
    assert training_texts(files, sample_bytes, seed) == [text for place, text in documents if (place, text) in chosen]
    assert len(training_texts(files, sizes[4], seed)) == 5


def test_a_sample_is_spread_over_all_inputs(many_files: tuple, training_texts: Callable) -> None:
    """Every third of each file, and in about its share: 60 of 300 documents, 6.7 ± 2.3 of each."""
    files, documents = many_files
    total = sum(len(text.encode()) for _, text in documents)
    taken = set(training_texts(files, total // 5))
    for third in range(9):
        here = [text for _, text in documents[third * 100 // 3 : (third + 1) * 100 // 3]]
        assert 1 <= len(taken.intersection(here)) <= 15


def test_a_sample_gives_the_same_bytes_again(many_files: tuple, tmp_path: Path) -> None:
    files, _ = many_files
    for out in ("one", "two", "other"):
        train_from_files(files, 280, tmp_path / out, sample_bytes=4000, seed=out == "other", pad_to_multiple=64)
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == (tmp_path / "two" / "tokenizer.json").read_bytes()
    assert load_tokenizer(tmp_path / "one").get_vocab_size() == 320
    made_from = [json.loads((tmp_path / out / "made_from.json").read_text()) for out in ("one", "other")]
    assert [(made["sample_bytes"], made["seed"]) for made in made_from] == [(4000, 0), (4000, 1)]


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for options, sentence in (
        ({"sample_bytes": 0}, "--sample-bytes 0 must be at least 1"),
        ({"pad_to_multiple": 0}, "--pad-to-multiple 0 must be at least 1"),
        ({"out": tmp_path / "a.txt", "force": True}, "a.txt is a file; give a folder"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            train_from_files([tmp_path / "a.txt"], 259, **{"out": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()


def test_a_kill_during_replacement_leaves_no_stale_made_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--force replaces a tokenizer of 259 ids by one of 260, and is killed before made_from.json is written."""
    source, out = tmp_path / "a.txt", tmp_path / "out"
    source.write_text("text text")
    train_from_files([source], 259, out)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            train_from_files([source], 260, out, force=True)
    assert load_tokenizer(out).get_vocab_size() == 260
    with pytest.raises(UserError, match="holds something else already"):
        train_from_files([source], 259, out)


def test_too_little_text_names_the_size_reached() -> None:
    """ "ab" and " ab" repeat: two merges and 259 ids to begin with."""
    with pytest.raises(UserError, match=r"--vocab-size 300 .* at 261; use 261 or less"):
        train_tokenizer(["ab ab ab"], 300)
    assert train_tokenizer(["ab ab ab"], 261).get_vocab_size() == 261


def test_too_small_a_vocabulary() -> None:
    with pytest.raises(UserError, match=r"--vocab-size 258 .* use 259 or more"):
        train_tokenizer(["text"], 258)


def test_missing_and_broken_folders(tmp_path: Path) -> None:
    for function in (load_tokenizer, fingerprint):
        with pytest.raises(UserError, match=re.escape(f"{tmp_path} holds no tokenizer.json")):
            function(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(UserError, match="cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)


def test_tokenizers_that_do_not_fit() -> None:
    words = Tokenizer(models.WordLevel({"日本": 0, "[UNK]": 1}, "[UNK]"))
    with pytest.raises(UserError, match=re.escape(BOS)):
        bos_id(words)
    with pytest.raises(UserError, match="not byte-level"):
        token_byte_lengths(words)
