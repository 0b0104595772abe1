"""Needles in a haystack with several keys: MK-NIAH 1, 2 and 3 of RULER (Hsieh et al., arXiv 2404.06654), offline.

    Sentences … One of the special magic numbers for brisk-otter is: 1234567. … What is the special magic number for
    brisk-otter mentioned in the provided text? The special magic number for brisk-otter mentioned in the provided text
    is

kind   haystack                             needles   keys             values
1      sentences of a text                  4         adjective-noun   7 digits     niah_multikey_1 of RULER
2      needles with other keys              1         adjective-noun   7 digits     niah_multikey_2
3      needles with other keys              1         UUID             UUID         niah_multikey_3

The wording and the numbers are RULER's. Different on purpose: any text is the haystack and the words are in
needle_words.py, so no network is needed; keys and values are distinct, distractors included, so that a question has one
answer, and the haystack spells out none of them; the depth of the asked needle is stratified over the samples; the
haystack begins at a random sentence; a length that is too small is refused. A sample is a function of the tokenizer,
the haystack, the kind, the length, its index and the seed.

A prompt begins with BOS, if the tokenizer has it. Prompt, answer and SPARE more tokens take at most the length.
"""

import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from trinity.data.sources.source import Source
from trinity.data.stream.shuffle import random_key
from trinity.data.tokenizer.tokenizer import load_text_encoder
from trinity.errors import UserError
from trinity.evaluation.needle_words import ADJECTIVES, NOUNS
from trinity.interop.tokenizer_files import special_ids

SPARE = 16
"""Tokens that a sample leaves free after its answer, for greedy decoding. RULER leaves 128, answer included."""
STRATA = 10
"""Equal ranges of depth; sample i has its needle in range i mod STRATA. Not from RULER, whose depths are random."""
DEPTHS = [depth / 39 for depth in range(40)]
"""Of the needles that are not asked, as in RULER."""
LONGEST_SENTENCE = 40
"""Words after which a sentence is cut, for text without full stops, such as code."""

HAYSTACK_TOKENS = 1 << 20
"""Most tokens of the text, of which each sample takes a part. It is the same for all lengths."""

NEEDLE = "One of the special magic {values} for {key} is: {value}."
TASK = (
    "A special magic {value} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{value} afterwards.\n"
)
QUESTION = "\nWhat is the special magic {value} for {key} mentioned in the provided text?"
ANSWER_PREFIX = " The special magic {value} for {key} mentioned in the provided text is"


@dataclass(frozen=True)
class NeedleKind:
    """One task of RULER.

    ruler_name: its name there.
    in_text: the haystack is text; else it is needles with other keys.
    needles: needles in the text, one of which is asked.
    keys, values: "words", "numbers" or "uuids".
    separator: between the parts of the haystack.
    """

    ruler_name: str
    in_text: bool
    needles: int
    keys: str
    values: str
    separator: str

    def needle(self, key: str, value: str) -> str:
        """The sentence that hides a value."""
        return NEEDLE.format(values=self.values, key=key, value=value)

    def prompt(self, context: str, key: str) -> tuple[str, str]:
        """(task, context and question; the beginning of the answer)."""
        words = {"value": self.values.removesuffix("s"), "key": key}
        return TASK.format(**words) + context + QUESTION.format(**words), ANSWER_PREFIX.format(**words)


KINDS = {
    1: NeedleKind("niah_multikey_1", True, 4, "words", "numbers", " "),
    2: NeedleKind("niah_multikey_2", False, 1, "words", "numbers", "\n"),
    3: NeedleKind("niah_multikey_3", False, 1, "uuids", "uuids", "\n"),
}


class NeedleSample(NamedTuple):
    """One question.

    tokens: ids of the prompt, the beginning of the answer included.
    answer: ids that come next if the answer is right; its last token may hold the full stop after the value.
    value: the answer's text.
    depth: share of the haystack before the asked needle, 0 to 1.
    stratum: the range of STRATA that the depth is in.
    needle: first and last + 1 index in `tokens` of the asked needle.
    prompt, answer_prefix: the texts of `tokens`, without BOS.
    """

    tokens: list[int]
    answer: list[int]
    value: str
    depth: float
    stratum: int
    needle: tuple[int, int]
    prompt: str
    answer_prefix: str


class Haystack:
    """Sentences of a text.

    Args:
        text: at least one word; white space is normalised.
        name: for messages and results.

    Attributes:
        sentences: without the white space between them.
        text: the sentences joined by spaces.
    """

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self.sentences = list(split_sentences(text))
        if not self.sentences:
            raise UserError(f"{name} holds no text to hide needles in; name one with more text")
        self.text = " ".join(self.sentences)
        self._tokens: dict[Path, np.ndarray] = {}

    def sentence_tokens(self, folder: Path, tokenizer: Tokenizer) -> np.ndarray:
        """[N] tokens of each sentence after a space, by itself; computed once for each tokenizer folder."""
        if folder not in self._tokens:
            self._tokens[folder] = _tokens_of([f" {sentence}" for sentence in self.sentences], tokenizer)
        return self._tokens[folder]

    @classmethod
    def of_source(cls, source: Source, tokenizer: Tokenizer, name: str) -> "Haystack":
        """The text of a source's first HAYSTACK_TOKENS tokens, or of all of them; a longer sample repeats it."""
        texts, read = [], 0
        for document in range(source.documents):
            if read >= HAYSTACK_TOKENS:
                break
            length = min(source.length(document), HAYSTACK_TOKENS - read)
            texts.append(tokenizer.decode(source.read(document, 0, length).tolist(), skip_special_tokens=True))
            read += length
        return cls("\n".join(texts), name)

    @property
    def fingerprint(self) -> str:
        """Hash of the text."""
        return f"{random_key(self.text):016x}"


def split_sentences(text: str) -> Iterator[str]:
    """The sentences of a text, each at most LONGEST_SENTENCE words, joined by single spaces."""
    for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())):
        words = sentence.split(" ")
        for start in range(0, len(words), LONGEST_SENTENCE):
            if part := " ".join(words[start : start + LONGEST_SENTENCE]):
                yield part


class NeedleTask:
    """The samples of one kind and length.

    Args:
        tokenizer: folder of the model's tokenizer.
        vocab_size: V of the model.
        kind: a key of KINDS.
        length: L, the most tokens of a sample: BOS, prompt, answer and SPARE.
        haystack: for the kinds that hide their needles in text; None for the others.
        seed: of keys, values and places.
        option: the option or config key that gives the length, for messages.
    Raises:
        UserError: the tokenizer does not fit the model or cannot spell a value, or L is too small.
    """

    def __init__(
        self,
        tokenizer: Path,
        vocab_size: int,
        kind: int,
        length: int,
        haystack: Haystack | None,
        seed: int = 0,
        option: str = "--lengths",
    ) -> None:
        self.kind, self.length, self._number, self._seed, self._option = KINDS[kind], length, kind, seed, option
        assert haystack is not None or not self.kind.in_text
        self._haystack = haystack if self.kind.in_text else None
        self._tokenizer = load_text_encoder(tokenizer)
        bos = special_ids(tokenizer, vocab_size).bos
        self._begin = [] if bos is None else [bos]
        if self._haystack is not None:
            self._piece_tokens = self._haystack.sentence_tokens(tokenizer, self._tokenizer)
        else:  # all needles have about as many
            needle = self.kind.needle(*_Facts(self.kind, np.random.default_rng(0), None)(0))
            self._piece_tokens = _tokens_of([f"{needle}\n"], self._tokenizer)

    def sample(self, index: int) -> NeedleSample:
        """Sample number `index`, from 0."""
        random = np.random.default_rng(random_key("needle", self._seed, self._number, self.length, index))
        stratum = index % STRATA
        depths = [(stratum + random.random()) / STRATA, *random.choice(DEPTHS, self.kind.needles - 1, replace=False)]
        first = int(random.integers(len(self._haystack.sentences))) if self._haystack else 0
        facts = _Facts(self.kind, random, self._haystack)
        return self._with_answer(*self._fill(facts, depths, first), *facts(0), stratum)

    def _fill(self, facts: "_Facts", depths: list[float], first: int) -> tuple[str, Encoding]:
        """The prompt with the longest haystack that leaves the sample room, and the encoding of prompt and answer.

        The whole text is encoded in each round, because tokens may merge where pieces meet. `fits` pieces fit and
        `too_many` do not; each round narrows the two, so this ends for every length.
        """
        key, value = facts(0)
        room = self.length - SPARE - len(self._begin)
        fits, too_many, pieces = -1, None, 0
        best: tuple[str, Encoding] | None = None
        sizes = self._sizes(first)
        while too_many is None or too_many - fits > 1:
            text, encoding = self._encoded(self._context(facts, depths, first, pieces), key, value)
            used = _value_end(encoding, text, value)
            if used <= room:
                fits, best = pieces, (text, encoding)
            elif pieces:
                too_many = pieces
            else:
                raise UserError(self._no_room(used + self.length - room))
            guess = sizes.pieces(sizes.tokens(pieces) + room - used)
            pieces = max(fits + 1, guess if too_many is None else min(guess, too_many - 1))
        assert best is not None
        return best

    def _context(self, facts: "_Facts", depths: list[float], first: int, pieces: int) -> str:
        """The haystack, in `pieces` pieces from sentence `first` on, with the needles at their depths in it."""
        if self._haystack is not None:
            sentences = self._haystack.sentences
            parts = [sentences[(first + number) % len(sentences)] for number in range(pieces)]
        else:
            parts = [self.kind.needle(*facts(len(depths) + number)) for number in range(pieces)]
        sizes = self._sizes(first)
        places = [sizes.pieces(int(depth * sizes.tokens(pieces))) for depth in depths]
        # from the last place on, so that those before stay
        for place, number in sorted(zip(places, range(len(places))), reverse=True):
            parts.insert(place, self.kind.needle(*facts(number)))
        return self.kind.separator.join(parts)

    def _sizes(self, first: int) -> "_Sizes":
        """About how many tokens the haystack has, from piece `first` on."""
        return _Sizes(np.roll(self._piece_tokens, -first).cumsum())

    def _encoded(self, context: str, key: str, value: str) -> tuple[str, Encoding]:
        """The whole prompt, and the encoding of prompt, answer and a full stop."""
        text = "".join(self.kind.prompt(context, key))
        return text, self._tokenizer.encode(f"{text} {value}.", add_special_tokens=False)

    def _no_room(self, used: int) -> str:
        least = -(-(used + 64) // 64) * 64  # keys of other samples have some tokens more
        return (
            f"{self._option} {self.length} has no room for the needles and the question of kind {self._number}, which "
            f"take {used} tokens; give {least} or more"
        )

    def _with_answer(self, text: str, encoding: Encoding, key: str, value: str, stratum: int) -> NeedleSample:
        """The sample of a prompt: the answer begins where the encodings with and without it part."""
        alone = self._tokenizer.encode(text, add_special_tokens=False).ids
        same = next((i for i, (a, b) in enumerate(zip(alone, encoding.ids)) if a != b), len(alone))
        answer = encoding.ids[same : _value_end(encoding, text, value)]
        if value not in self._tokenizer.decode(answer, skip_special_tokens=False).replace(" ", ""):
            raise UserError(f"the tokenizer cannot spell {value}, so no answer can be right; use another tokenizer")
        needle, prefix = self.kind.needle(key, value), self.kind.prompt("", key)[1]
        start = text.index(needle)
        tokens = [_token_of(encoding, character) for character in (start, start + len(needle) - 1)]
        begin, end = text.index("\n") + 1, text.rindex("\n")
        return NeedleSample(
            [*self._begin, *encoding.ids[:same]],
            answer,
            value,
            (start - begin) / max(1, end - begin - len(needle)),
            stratum,
            (tokens[0] + len(self._begin), tokens[1] + 1 + len(self._begin)),
            text.removesuffix(prefix),
            prefix,
        )


class _Facts:
    """Keys and values: number → (key, value), all distinct, none in the haystack. Number 0 is the asked one."""

    def __init__(self, kind: NeedleKind, random: np.random.Generator, haystack: Haystack | None) -> None:
        self._kind, self._random = kind, random
        self._text = "" if haystack is None else haystack.text
        self._words = random.permutation(len(ADJECTIVES) * len(NOUNS)) if kind.keys == "words" else None
        self._next_word = 0
        self._made: list[tuple[str, str]] = []
        self._seen: set[str] = set()

    def __call__(self, number: int) -> tuple[str, str]:
        while len(self._made) <= number:
            self._made.append((self._new(self._kind.keys), self._new(self._kind.values)))
        return self._made[number]

    def _new(self, kind: str) -> str:
        while True:
            text = self._draw(kind)
            if text not in self._seen and text not in self._text:
                self._seen.add(text)
                return text

    def _draw(self, kind: str) -> str:
        if kind == "numbers":
            return str(self._random.integers(10**6, 10**7))
        if kind == "uuids":
            return str(uuid.UUID(bytes=self._random.bytes(16), version=4))
        assert self._words is not None
        if self._next_word == len(self._words):
            raise UserError(f"there are {len(self._words)} keys of words, too few for this length; use kinds 1 and 3")
        adjective, noun = divmod(int(self._words[self._next_word]), len(NOUNS))
        self._next_word += 1
        return f"{ADJECTIVES[adjective]}-{NOUNS[noun]}"


class _Sizes(NamedTuple):
    """Tokens of pieces that repeat without end.

    sums: [N] tokens of the first 1, 2, …, N pieces.
    """

    sums: np.ndarray

    def tokens(self, pieces: int) -> int:
        """Tokens of the first `pieces` pieces."""
        cycles, rest = divmod(pieces, len(self.sums))
        return cycles * int(self.sums[-1]) + (int(self.sums[rest - 1]) if rest else 0)

    def pieces(self, tokens: int) -> int:
        """The most pieces with at most `tokens` tokens."""
        cycles, rest = divmod(max(0, tokens), int(self.sums[-1]))
        return cycles * len(self.sums) + int(np.searchsorted(self.sums, rest, side="right"))


def _tokens_of(texts: list[str], tokenizer: Tokenizer) -> np.ndarray:
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    return np.array([max(1, len(encoding.ids)) for encoding in encodings])


def _value_end(encoding: Encoding, text: str, value: str) -> int:
    """Number of tokens of the prompt `text` and the value, which comes after a space."""
    return _token_of(encoding, len(text) + len(value)) + 1


def _token_of(encoding: Encoding, character: int) -> int:
    token: int | None = encoding.char_to_token(character)
    assert token is not None  # a character of the text is in a token, unless the normalizer drops it
    return token
