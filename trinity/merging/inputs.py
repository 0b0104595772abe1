"""The tensors that are merged into one, read in blocks of whole rows, so that no tensor need fit into memory.

A method sees an `Inputs`. It may pass over the blocks as often as it likes, for norms or for a cut, and returns a
function that merges one block. Arithmetic is in fp32; blocks have a fixed size, so that the result depends neither on
the number of workers nor on the size of shards.

Shapes: R rows of a block, C columns. A vector is one row.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1 << 20
"""Most elements of a block; a longer row is a block of its own."""

Reader = Callable[[int, int], Tensor]
"""reader(start, stop) is rows start..stop of an input, [stop - start, C], in any floating-point type."""
Combine = Callable[["Block"], Tensor]
"""Merges one block: fp32 [R, C]."""
Values = Callable[[], Iterable[tuple[int, Tensor]]]
"""A function that gives, block by block, (flat index of the first element, numbers ≥ 0 in fp32)."""


@dataclass(frozen=True)
class Block:
    """The same rows of all inputs, fp32 [R, C].

    first: flat index of the block's first element in the tensor.
    seed: of the tensor; see `generator`.
    """

    first: int
    base: Tensor | None
    models: list[Tensor]
    seed: str

    @property
    def origin(self) -> Tensor:
        """The base, for methods that need one."""
        assert self.base is not None
        return self.base

    def delta(self, model: int) -> Tensor:
        """The difference of a model from the base."""
        return self.models[model] - self.origin

    def deltas(self) -> list[Tensor]:
        """The difference of every model from the base."""
        return [model - self.origin for model in self.models]

    def generator(self, model: int) -> torch.Generator:
        """Random numbers that depend on the tensor's name, the model's number and the block, and on nothing else."""
        digest = hashlib.blake2b(f"{self.seed}/{model}/{self.first}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)


class Inputs:
    """The inputs of one output tensor. Iterating gives its blocks, in order, as often as wanted.

    Args:
        shape: of every input and of the result.
        base: reader of the base's tensor, or None.
        models: readers of the other tensors.
        seed: text from which random methods draw; the tensor's name belongs to it.
        block: most elements of a block.
    """

    def __init__(
        self, shape: tuple[int, ...], base: Reader | None, models: list[Reader], seed: str = "", block: int = BLOCK
    ) -> None:
        self.rows, self.columns = (shape[0], shape[1]) if len(shape) == 2 else (1, shape[0])
        self.count = self.rows * self.columns
        self.models, self.has_base = len(models), base is not None
        self._base, self._readers, self._seed = base, models, seed
        self._step = max(1, block // max(1, self.columns))
        self._kept: Block | None = None

    @property
    def is_one_block(self) -> bool:
        """Whether the whole tensor is a single block, which is then read once."""
        return self.rows <= self._step

    def __iter__(self) -> Iterator[Block]:
        if self.is_one_block:
            if self._kept is None:
                self._kept = self._read(0, self.rows)
            yield self._kept
            return
        for start in range(0, self.rows, self._step):
            yield self._read(start, min(start + self._step, self.rows))

    def _read(self, start: int, stop: int) -> Block:
        base = None if self._base is None else self._base(start, stop).float()
        models = [read(start, stop).float() for read in self._readers]
        return Block(start * self.columns, base, models, self._seed)

    def magnitudes(self, model: int) -> Values:
        """|W - B| of a model."""
        return lambda: ((block.first, block.delta(model).abs_()) for block in self)


def whole(tensors: list[Tensor], base: Tensor | None = None, seed: str = "", block: int = BLOCK) -> Inputs:
    """Inputs of tensors in memory, all of one shape: for tests and for merging in memory."""

    def reader(tensor: Tensor) -> Reader:
        rows = tensor if tensor.dim() == 2 else tensor.unsqueeze(0)
        return lambda start, stop: rows[start:stop]

    shape = tuple(tensors[0].shape)
    return Inputs(shape, None if base is None else reader(base), [reader(each) for each in tensors], seed, block)


def combined(inputs: Inputs, combine: Combine) -> Tensor:
    """The result of a method over all blocks, [rows, columns] in fp32."""
    return torch.cat([combine(block) for block in inputs])
