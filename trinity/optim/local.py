"""The one place where the optimizer looks through a DTensor."""

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(x: Tensor) -> Tensor:
    """x's own storage on this rank: of a DTensor its local tensor (call it under no_grad), of any other x itself.

    Raises:
        AssertionError: this rank holds only a part of x. Sharded matrices are not supported yet.
    """
    if not isinstance(x, DTensor):
        return x
    part = x.to_local()
    assert part.numel() == x.numel(), f"a shard of {part.numel()} of {x.numel()} elements; only whole tensors work yet"
    return part
