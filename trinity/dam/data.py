"""The rows that coefficients are learned on: the first rows of each model's text, in a seeded order.

Step k takes rows k·B … (k+1)·B − 1 of each text, B the config's `sequences`; data rank r of R takes the r-th of R equal
parts of them. So the rows of a step depend on the seed and the texts alone.

Shapes: B rows, S tokens of a row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trinity.dam.config import DamConfig
from trinity.data.stream.collate import PackedSequence
from trinity.data.stream.validation import validation_sequences
from trinity.errors import UserError
from trinity.evaluation.perplexity import open_documents
from trinity.io.checksum import new_hash
from trinity.merging.plan import Plan
from trinity_kernels.cross_entropy import IGNORE

WINDOW = 2048
"""Tokens of a row by default, where the model has as many positions."""


class TextRows(NamedTuple):
    """The rows of one text in the order in which they are used: tokens_BS int64, valid_BS bool (no padding)."""

    tokens_BS: Tensor
    valid_BS: Tensor

    def of_step(self, step: int, sequences: int) -> "TextRows":
        """The global batch of a step, counted from 0."""
        part = slice(step * sequences, (step + 1) * sequences)
        return TextRows(self.tokens_BS[part], self.valid_BS[part])

    def of_rank(self, rank: int, ranks: int) -> "TextRows":
        """One rank's part of a global batch."""
        return TextRows(self.tokens_BS.chunk(ranks)[rank], self.valid_BS.chunk(ranks)[rank])

    def checksum(self) -> str:
        """Of the tokens and where they are valid, in their order."""
        digest = new_hash()
        for tensor in self:
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def read_texts(plan: Plan, config: DamConfig) -> dict[int, TextRows]:
    """Number of the model → the rows of its text.

    Raises:
        UserError: a text is missing, was made with another tokenizer, or is too short.
    """
    tokenizer, window = plan.vocabulary.donor.tokenizer, config.window or min(WINDOW, plan.donor.config.max_positions)
    if tokenizer is None:
        raise UserError(
            f"{plan.vocabulary.donor.label} has no tokenizer.json to read texts with; add the file to the model"
        )
    if window > plan.donor.config.max_positions:
        raise UserError(
            f"window: {window} is more than the model's {plan.donor.config.max_positions} positions; write "
            f"window: {plan.donor.config.max_positions} or less"
        )
    found: dict[int, list[PackedSequence]] = {}
    for number in config.texts:
        text = config.models[number].text
        assert text is not None
        documents = open_documents(
            text, tokenizer, config.text_field, plan.vocabulary.size, option=f"models[{number}].text"
        )
        found[number] = list(validation_sequences(documents, window, config.rows))
    _check_rows(config, {number: len(sequences) for number, sequences in found.items()}, window)
    texts = {}
    for number, sequences in found.items():
        order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(config.seed))
        tokens = torch.stack([sequence.tokens for sequence in sequences])[order]
        targets = torch.stack([sequence.targets for sequence in sequences])[order]
        texts[number] = TextRows(tokens.long(), targets != IGNORE)
    return texts


def _check_rows(config: DamConfig, rows: dict[int, int], window: int) -> None:
    """Refuse texts with fewer rows than config.rows; the advice is of the shortest, so that it fits all."""
    number, count = min(rows.items(), key=lambda each: each[1])
    if count < config.rows:
        most = count // config.sequences * config.sequences
        advice = f"write rows: {most} or give more text" if most else "give more text, or fewer sequences"
        raise UserError(
            f"{config.models[number].text} has {count} rows of {window} tokens, and rows is {config.rows}; {advice}"
        )
