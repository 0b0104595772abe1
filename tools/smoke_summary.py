"""The last part of `make smoke`: export the run, compare it with transformers, print a sample and one summary line.

python tools/smoke_summary.py runs/smoke --out runs/smoke/hf/final
"""

import argparse
import json
import statistics
from pathlib import Path

from trinity.command_line import HelpFormatter, local_path
from trinity.errors import UserError, run_main
from trinity.io.json_files import number

PROMPT = "def main("


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("run", type=local_path, help="run directory")
    parser.add_argument("--out", type=local_path, required=True, help="folder to export to")
    return parser.parse_args()


def read_metrics(run: Path) -> list[dict]:
    """The metrics of each training step, with NaN for a value that was not finite."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run} has no metrics.jsonl; run launch/pretrain.py first")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    return [{name: number(value) for name, value in record.items()} for record in steps]


def main() -> None:
    """Export, compare, sample, summarise."""
    arguments = parse()
    import torch

    from trinity.data.sources.shards import TokenSource
    from trinity.data.stream.validation import validation_sequences
    from trinity.data.tokenizer.tokenizer import bos_id, load_tokenizer
    from trinity.evaluation.generate import generate
    from trinity.interop import export_hf
    from trinity.interop.verify import largest_logit_difference
    from trinity.reporting.unigram import unigram_entropy
    from trinity.training.load_run import load_model
    from trinity.training.run_tokenizer import run_tokenizer

    records = read_metrics(arguments.run)
    model, config, _ = load_model(arguments.run)
    tokenizer_folder = run_tokenizer(arguments.run, config)
    export_hf(model, arguments.out, tokenizer_folder, dtype=torch.float32, overwrite=True)

    held_out = {name: TokenSource(folder) for name, folder in config.data.validation.items()}
    first = next(iter(held_out.values()))
    rows = list(validation_sequences(first, config.data.sequence_length, 2))
    difference, largest = largest_logit_difference(model, arguments.out, torch.stack([row.tokens for row in rows]))

    tokenizer = load_tokenizer(tokenizer_folder)
    prompt = [bos_id(tokenizer), *tokenizer.encode(PROMPT, add_special_tokens=False).ids]
    stop = [bos_id(tokenizer)]
    sample = generate(model, prompt, max_new_tokens=60, temperature=0.8, top_p=0.95, seed=0, stop_ids=stop)
    print(f"sample: {PROMPT}{tokenizer.decode(sample)}\n")

    entropy = {name: unigram_entropy({name: source}, {name: 1.0}) for name, source in held_out.items()}
    validation = " ".join(
        f"{name} {records[-1][f'validation_loss.{name}']:.3f} nats/token "
        f"({records[-1][f'validation_bits_per_byte.{name}']:.3f} bits/byte; unigram entropy {entropy[name]:.3f})"
        for name in held_out
    )
    losses = [record["loss"] for record in records if record["loss"] is not None]  # null: not finite
    first_loss, last_loss = losses[0], losses[-1]
    speed = statistics.median(record["tokens_per_second"] for record in records)
    print(
        f"smoke: loss {first_loss:.3f} → {last_loss:.3f} | validation {validation} | "
        f"{speed:,.0f} tokens/s | export {arguments.out} | "
        f"largest logit difference to transformers {difference:.1e} (of logits up to {largest:.1f})"
    )


if __name__ == "__main__":
    run_main(main)
