"""The tokenizer: byte-level BPE with the report's pre-tokenisation (section Tokenizer).

The pre-tokenizer cuts a text in four steps, and no token crosses a cut:
1. separate runs of digits, in threes counted from the right: 1234567 → 1, 234, 567;
2. separate runs of scripts that are written without spaces;
3. DeepSeek-V3's main expression: punctuation with letters, words, punctuation, white space;
4. bytes: each byte is one of 256 printable characters, so that every text has tokens and none is unknown.

A document is `<|begin_of_text|>` and its tokens. Encoding with add_special_tokens=True (the default of transformers)
adds that BOS; prepare_data encodes without special tokens and adds BOS itself.

Shapes: V vocabulary.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from trinity.errors import UserError
from trinity.io.checksum import content_hash
from trinity.io.json_files import write_json
from trinity.io.local import make_folder, write_atomically

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
RESERVED = "<|reserved_{}|>"
MIN_VOCAB_SIZE = 256 + 3

DIGITS = r"\p{N}+"

# The second alternative ends the first group where a multiple of three digits is left; the first alternative then needs
# no lookahead, so that a million digits take a million steps. The atomic group keeps the lookahead from backtracking.
THREES = r"(?<=\p{N})\p{N}{3}|\p{N}{1,3}(?=(?>(?:\p{N}{3})*)\z)"

NO_SPACES = (
    "["
    "\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff"  # CJK ideographs, extension A, compatibility
    "\U00020000-\U0003ffff"  # planes of the later extensions, ideographs only; the report has only A
    "\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f"  # hiragana, katakana, half-width katakana
    "\u2e80-\u2eff\u2f00-\u2fdf"  # CJK and Kangxi radicals
    "\u0e00-\u0e7f\u0e80-\u0eff\u1780-\u17ff"  # Thai, Lao, Khmer
    "\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff"  # Myanmar, extensions A and B
    "\uac00-\ud7af\u1100-\u11ff"  # Hangul syllables, jamo
    "]+"
)

MAIN = "|".join(
    (
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+",  # ASCII punctuation followed by letters
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",  # a word, with the space before it
        r" ?[\p{P}\p{S}]+[\r\n]*",  # punctuation and symbols, with the newlines after them
        r"\s*[\r\n]+",
        r"\s+(?!\S)",  # white space, except the last one before a word
        r"\s+",
    )
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, show_progress: bool = False) -> Tokenizer:
    """Learn the most frequent merges. The same texts give the same tokenizer.

    Args:
        texts: documents, read once.
        vocab_size: V, the number of ids exactly: 3 special tokens, 256 bytes, and merges.
        show_progress: draw the library's progress bars on stderr.
    Raises:
        UserError: V is below 259, or too few pairs occur twice in the texts for that many merges.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"--vocab-size {vocab_size} is too small for 256 bytes and 3 special tokens; use {MIN_VOCAB_SIZE} or more"
        )
    tok = Tokenizer(models.BPE())
    cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in (DIGITS, THREES, NO_SPACES, MAIN)]
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([*cuts, in_bytes])
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=show_progress,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in (BOS, EOS, PAD)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tok.train_from_iterator(texts, trainer)
    size = vocabulary_size(tok)
    if size != vocab_size:
        raise UserError(
            f"--vocab-size {vocab_size} is more than the text gives: it ran out of pairs at {size}; "
            f"use {size} or less, or more text"
        )
    bos = (BOS, tok.token_to_id(BOS))
    tok.post_processor = processors.TemplateProcessing(f"{BOS} $A", f"{BOS} $A {BOS} $B:1", special_tokens=[bos])
    return tok


def pad_vocabulary(tok: Tokenizer, multiple: int) -> None:
    """Pad the vocabulary with unused special tokens <|reserved_0|>, … to a multiple of `multiple`.

    The embedding and the head have one row per id: a padded size gives every rank an equal share of rows, and their
    GEMMs whole tiles. 200,000 ids become 200,192 = 391·512, as in the report's models. Learned tokens keep their ids;
    the new ones are free for later uses, such as chat markers, without resizing a model.

    Args:
        tok: its ids are 0 … V − 1.
        multiple: V is rounded up to a multiple of it, which is at least 1.
    """
    missing = -vocabulary_size(tok) % multiple
    texts = [RESERVED.format(number) for number in range(missing)]
    tok.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in texts])


def save_tokenizer(tok: Tokenizer, directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json, as AutoTokenizer reads them."""
    make_folder(directory)
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    config = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    write_json(directory / "special_tokens_map.json", special, indent=2)
    write_json(directory / "tokenizer_config.json", config, indent=2)
    write_atomically(directory / "tokenizer.json", [tok.to_str(pretty=True), "\n"])


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer in a folder: from tools/train_tokenizer.py, or any byte-level one of Hugging Face.

    Raises:
        UserError: there is no tokenizer.json, or it cannot be read.
    """
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{directory} holds no tokenizer.json; make a tokenizer with tools/train_tokenizer.py")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for any damage
        raise UserError(f"{path} cannot be read as a tokenizer ({error}); make it again") from None


def load_text_encoder(directory: Path) -> Tokenizer:
    """The tokenizer in a folder, set to encode documents: without truncation or padding, and with special tokens that
    a document spells out encoded as ordinary text.

    Raises:
        UserError: there is no tokenizer.json, or it cannot be read.
    """
    tok = load_tokenizer(directory)
    tok.encode_special_tokens = True
    tok.no_truncation()
    tok.no_padding()
    return tok


def vocabulary_size(tok: Tokenizer) -> int:
    """V, the rows that a model needs: the largest id plus one, special tokens included."""
    return max(tok.get_vocab(with_added_tokens=True).values()) + 1


def bos_id(tok: Tokenizer) -> int:
    """The id that every document begins with.

    Raises:
        UserError: the tokenizer has no <|begin_of_text|>.
    """
    token = tok.token_to_id(BOS)
    if token is None:
        raise UserError(f"the tokenizer has no {BOS}; use one made with tools/train_tokenizer.py, or add that token")
    return token


def fingerprint(directory: Path) -> str:
    """Hash of tokenizer.json: equal fingerprints give the same ids.

    Raises:
        UserError: there is no tokenizer.json.
    """
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{directory} holds no tokenizer.json; make a tokenizer with tools/train_tokenizer.py")
    return content_hash(path)


def token_byte_lengths(tok: Tokenizer) -> Tensor:
    """[V] int64: bytes of text of each id, 0 for special tokens.

    The lengths over a text's ids sum to len(text.encode()), unless the text spells out a special token.

    Raises:
        UserError: the tokenizer is not byte-level.
    """
    added = tok.get_added_tokens_decoder()
    vocabulary = tok.get_vocab(with_added_tokens=True)
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    lengths_V = torch.zeros(vocabulary_size(tok), dtype=torch.int64)
    for token, index in vocabulary.items():
        if index in added:
            lengths_V[index] = 0 if added[index].special else len(token.encode())
        elif alphabet.issuperset(token):
            lengths_V[index] = len(token)
        else:
            raise UserError(f"the tokenizer is not byte-level: token {index} is {token!r}; use a byte-level BPE")
    return lengths_V
