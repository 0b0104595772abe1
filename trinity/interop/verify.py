"""Compare the logits of Trinity with those of transformers on the same folder, both in fp32.

fp32, because transformers computes the router in the model's data type: in bf16 it would choose other experts.

Shapes: B batch, S sequence.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from trinity.errors import UserError
from trinity.interop.load import load_hf
from trinity.models.trinity import Trinity
from trinity.terminal import terminal_width


class Agreement(NamedTuple):
    """Agreement of the logits of two models.

    difference: the largest |difference| of two logits.
    largest: the largest |logit|, as the scale of the difference.
    """

    difference: float
    largest: float


def largest_logit_difference(model: Trinity | str | Path, hf_dir: str | Path, tokens_BS: Tensor) -> Agreement:
    """Compare the logits of a Trinity model with those of transformers.

    Args:
        model: a Trinity model on the CPU, in fp32; or a Hugging Face folder to load it from.
        hf_dir: the folder that transformers loads.
        tokens_BS: [B, S] int64.
    Raises:
        UserError: transformers is not installed, or the folder does not hold a Trinity model.
    """
    if not isinstance(model, Trinity):
        model = load_hf(model)
    hf_model = _transformers_model(Path(hf_dir))
    with torch.no_grad():
        logits_BSV = model(tokens_BS)
        hf_logits_BSV = hf_model(tokens_BS).logits
    return Agreement((logits_BSV - hf_logits_BSV).abs().max().item(), hf_logits_BSV.abs().max().item())


def _transformers_model(directory: Path) -> torch.nn.Module:
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar
    except ImportError:
        raise UserError('comparing needs transformers; run `pip install "trinity-moe[hf]"`') from None
    if not terminal_width():
        disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
