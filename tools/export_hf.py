"""Export a run's checkpoint as a Hugging Face folder that transformers, vLLM and llama.cpp read.
For a model too large for one process, use torchrun: each process loads a part of it.

Example: python tools/export_hf.py runs/smoke out/smoke-hf --dtype bfloat16 --verify
"""

import argparse
import sys
from pathlib import Path

import trinity  # noqa: F401  # before torch, for the policy of its threads

# isort: split
import torch
import torch.distributed as dist

from trinity.command_line import HelpFormatter, local_path
from trinity.config.model import ModelConfig
from trinity.errors import FAILURE, run_main
from trinity.interop import export_hf
from trinity.interop.verify import largest_logit_difference
from trinity.parallel.mesh import stop, world_size
from trinity.training.load_run import load_model, load_sharded_model
from trinity.training.run_tokenizer import run_tokenizer

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
VERIFY_BOUND = 1e-4
"""Largest difference, relative to the largest |logit|. Another order of fp32 sums differs by about 1e-6 per layer,
another expert by 1e-2."""


def main() -> int:
    """Export the checkpoint and, with --verify, compare it with transformers."""
    options = parse()
    load = load_sharded_model if world_size() > 1 else load_model
    model, config, step = load(options.run_dir, options.step)
    dtype = DTYPES[options.dtype]
    tokenizer = run_tokenizer(options.run_dir, config)
    export_hf(model, options.out_dir, tokenizer, dtype, overwrite=options.overwrite, progress=True)
    first = world_size() == 1 or dist.get_rank() == 0
    stop()
    if not first:
        return 0
    print(f"step {step} of {options.run_dir} is in {options.out_dir} ({options.dtype})")
    return verify(options.out_dir, config.model) if options.verify else 0


def verify(folder: Path, config: ModelConfig) -> int:
    """Compare logits on random tokens with transformers and print the result; returns the exit code."""
    length = min(256, config.max_positions)
    tokens_BS = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    difference, largest = largest_logit_difference(folder, folder, tokens_BS)
    print(f"transformers' logits differ by at most {difference:.2e}; the largest logit is {largest:.3g}")
    if difference <= VERIFY_BOUND * largest:
        return 0
    print(f"error: that is more than {VERIFY_BOUND:.0e} of the largest logit; do not use {folder}", file=sys.stderr)
    return FAILURE


def parse() -> argparse.Namespace:
    """Parse the command line."""
    summary, example = __doc__.strip().split("\n\n")
    parser = argparse.ArgumentParser(description=summary, epilog=example, formatter_class=HelpFormatter)
    parser.add_argument("run_dir", type=local_path, metavar="RUN_DIR", help="run directory with a checkpoint")
    parser.add_argument("out_dir", type=local_path, metavar="OUT_DIR", help="folder to make")
    parser.add_argument("--step", type=int, help="step of the checkpoint; by default the newest complete one")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="data type of the matrices")
    parser.add_argument("--verify", action="store_true", help="afterwards compare logits with transformers, in fp32")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in OUT_DIR")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
