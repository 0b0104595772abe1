"""The last part of `make smoke` and `make sft-smoke`: export the run, compare it with transformers, print samples and
one summary line. Of a run that fine-tunes, the samples are its prompts' answers before and after.

python tools/smoke_summary.py runs/smoke --out runs/smoke/hf/final
"""

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from trinity.command_line import HelpFormatter, local_path
from trinity.errors import UserError, run_main
from trinity.io.json_files import number

if TYPE_CHECKING:
    from trinity.data.sources.shards import TokenSource
    from trinity.models import Trinity

PROMPT = "def main("


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("run", type=local_path, help="run directory")
    parser.add_argument("--out", type=local_path, required=True, help="folder to export to")
    return parser.parse_args()


def read_metrics(run: Path) -> list[dict]:
    """The metrics of each training step, with NaN for a value that was not finite."""
    return [{name: number(value) for name, value in record.items()} for record in _records(run) if "loss" in record]


def _records(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run} has no metrics.jsonl; run launch/pretrain.py first")
    return [json.loads(line) for line in path.read_text().splitlines()]


def before_and_after(run: Path) -> str:
    """Each prompt's continuation at the first and the last evaluation."""
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    texts: dict[str, list[str]] = {}
    for sample in samples:
        texts.setdefault(sample["prompt"], []).append(sample["text"].strip())
    shown = [f"{prompt.strip()}\n  before: {found[0]}\n  after:  {found[-1]}\n" for prompt, found in texts.items()]
    return "\n".join(shown)


def fine_tuning_summary(run: Path, names: Iterable[str]) -> str:
    """Validation at the first and the last evaluation: nats per trained token, and the share of turns that end."""
    evaluated = [record for record in _records(run) if any(f"validation_loss.{name}" in record for name in names)]
    first, last = evaluated[0], evaluated[-1]
    return " ".join(
        f"{name} {first[f'validation_loss.{name}']:.3f} → {last[f'validation_loss.{name}']:.3f} nats/trained token, "
        f"turns that end {first[f'validation_end_of_turn.{name}']:.2f} → {last[f'validation_end_of_turn.{name}']:.2f}"
        for name in names
    )


def pretraining_summary(record: dict, held_out: dict[str, "TokenSource"]) -> str:
    """Validation of the last step, beside the entropy of a model that knows the tokens' frequencies alone."""
    from trinity.reporting.unigram import unigram_entropy

    entropy = {name: unigram_entropy({name: source}, {name: 1.0}) for name, source in held_out.items()}
    return " ".join(
        f"{name} {record[f'validation_loss.{name}']:.3f} nats/token "
        f"({record[f'validation_bits_per_byte.{name}']:.3f} bits/byte; unigram entropy {entropy[name]:.3f})"
        for name in held_out
    )


def sample_text(model: "Trinity", tokenizer_folder: Path) -> str:
    """PROMPT and its continuation."""
    from trinity.data.tokenizer.tokenizer import bos_id, load_tokenizer
    from trinity.evaluation.generate import generate

    tokenizer = load_tokenizer(tokenizer_folder)
    prompt = [bos_id(tokenizer), *tokenizer.encode(PROMPT, add_special_tokens=False).ids]
    stop = [bos_id(tokenizer)]
    sample = generate(model, prompt, max_new_tokens=60, temperature=0.8, top_p=0.95, seed=0, stop_ids=stop)
    return f"sample: {PROMPT}{tokenizer.decode(sample)}\n"


def main() -> None:
    """Export, compare, sample, summarise."""
    arguments = parse()
    import torch

    from trinity.data.sources.shards import TokenSource
    from trinity.data.stream.validation import validation_sequences
    from trinity.interop import export_hf
    from trinity.interop.verify import largest_logit_difference
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
    if config.data.loss == "masked":
        print(before_and_after(arguments.run))
        validation = fine_tuning_summary(arguments.run, held_out)
    else:
        print(sample_text(model, tokenizer_folder))
        validation = pretraining_summary(records[-1], held_out)

    losses = [record["loss"] for record in records if record["loss"] is not None]  # null: not finite
    first_loss, last_loss = losses[0], losses[-1]
    speed = statistics.median(record["tokens_per_second"] for record in records)
    print(
        f"{config.run.name}: loss {first_loss:.3f} → {last_loss:.3f} | validation {validation} | "
        f"{speed:,.0f} tokens/s | export {arguments.out} | "
        f"largest logit difference to transformers {difference:.1e} (of logits up to {largest:.1f})"
    )


if __name__ == "__main__":
    run_main(main)
