"""Average checkpoints of one run into a Hugging Face folder: a decay of the learning rate without training it.

The weights of the checkpoints follow from the wished decay over their window (WSM): linear weighs evenly spaced
checkpoints equally. Masters are averaged in fp32. Take checkpoints of the constant-rate phase.

Example: python tools/average.py runs/smoke out/averaged --steps 100:250 --decay 1-sqrt
"""

import argparse

import trinity  # noqa: F401  # before torch, for the policy of its threads

# isort: split
import torch

from trinity.command_line import HelpFormatter, check_one_process, local_path
from trinity.errors import run_main
from trinity.merging.average_run import average, choose_steps
from trinity.optim.decay_weights import DECAYS, decay_weights

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def main() -> None:
    """Average, and print the weights."""
    options = parse()
    check_one_process("tools/average.py")
    steps = choose_steps(options.run_dir, options.steps)
    for step, weight in zip(steps, decay_weights(steps, options.decay)):
        print(f"step {step:>10,}  weight {weight:.4f}")
    averaged = average(
        options.run_dir,
        options.out_dir,
        steps,
        options.decay,
        dtype=DTYPES[options.dtype],
        workers=options.workers,
        overwrite=options.overwrite,
        progress=True,
    )
    print(f"the average is in {options.out_dir} ({options.dtype})\n{averaged}")


def parse() -> argparse.Namespace:
    """Parse the command line."""
    summary, example = __doc__.strip().rsplit("\n\n", 1)
    parser = argparse.ArgumentParser(description=summary, epilog=example, formatter_class=HelpFormatter)
    parser.add_argument("run_dir", type=local_path, metavar="RUN_DIR", help="run directory with checkpoints")
    parser.add_argument("out_dir", type=local_path, metavar="OUT_DIR", help="folder to make")
    parser.add_argument("--steps", required=True, metavar="A:B[:EVERY]", help="checkpoints from step A to B, or A,B,C")
    parser.add_argument(
        "--decay", choices=["equal", *DECAYS], default="linear", help="decay that the weights stand for"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="data type of the matrices")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="threads; the result does not depend on it")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in OUT_DIR")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
