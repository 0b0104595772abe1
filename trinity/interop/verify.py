"""Does transformers compute the same of a folder as we do? Both read it, both run in fp32, and logits are compared.

In fp32 because transformers multiplies the router in the model's format: in bf16 it would choose other experts.

Shapes: B batch, S sequence.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from trinity.errors import UserError
from trinity.interop.load import load_hf
from trinity.models.trinity import Trinity
from trinity.terminal import width


class Agreement(NamedTuple):
    """How far two models' logits are apart.

    difference: the largest |difference| of two logits.
    largest: the largest |logit|, to measure the difference by.
    """

    difference: float
    largest: float


def largest_logit_difference(model: Trinity | str | Path, hf_dir: str | Path, tokens_BS: Tensor) -> Agreement:
    """Compare the logits of our model with those of transformers.

    Args:
        model: ours on the CPU, in fp32; or a Hugging Face folder to read it from.
        hf_dir: the folder that transformers reads.
        tokens_BS: [B, S] int64.
    Raises:
        UserError: transformers is not installed, or the folder is not a model of ours.
    """
    if not isinstance(model, Trinity):
        model = load_hf(model)
    theirs = _transformers_model(Path(hf_dir))
    with torch.no_grad():
        ours_BSV = model(tokens_BS)
        theirs_BSV = theirs(tokens_BS).logits
    return Agreement((ours_BSV - theirs_BSV).abs().max().item(), theirs_BSV.abs().max().item())


def _transformers_model(directory: Path) -> torch.nn.Module:
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar
    except ImportError:
        raise UserError('comparing needs transformers; run `pip install "trinity-moe[hf]"`') from None
    if not width():
        disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
