"""Merge models, and average the checkpoints of a run."""

from typing import TYPE_CHECKING, Any

from trinity.merging.merge_models import merge

if TYPE_CHECKING:
    from trinity.merging.average_run import average

__all__ = ["average", "merge"]


def __getattr__(name: str) -> Any:
    """Import average when it is first used: it needs torch.distributed, for which a merge of folders does not wait."""
    if name == "average":
        from trinity.merging.average_run import average

        return average
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
