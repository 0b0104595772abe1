"""Continues a text with a run's newest checkpoint or a Hugging Face folder of an AfMoE model.

It computes everything again for every token (there is no cache): meant for a look at a model, not for serving one.
Example: python tools/generate.py runs/smoke --prompt "def main" --temperature 0.8 --top-p 0.95
"""

import argparse
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from trinity.command_line import HelpFormatter, local_path
from trinity.data.tokenizer.tokenizer import load_tokenizer
from trinity.errors import UserError, run_main
from trinity.evaluation.generate import stream
from trinity.interop import load_hf
from trinity.interop.tokenizer_files import SpecialIds, special_ids
from trinity.models import Trinity
from trinity.training.load_run import load_model
from trinity.training.run_tokenizer import run_tokenizer


def main() -> None:
    """Print the prompt and what follows, token by token."""
    options = parse()
    model, text_folder = load(options.folder)
    ids = special_ids(text_folder, model.config.vocab_size)
    tokenizer = load_tokenizer(text_folder)
    tokens = prompt_tokens(tokenizer, ids, options.prompt)
    print(options.prompt, end="", flush=True)
    decoder = DecodeStream(skip_special_tokens=True)
    for token in stream(
        model, tokens, options.max_new_tokens, options.temperature, options.top_p, options.seed, ids.stop
    ):
        print(decoder.step(tokenizer, token) or "", end="", flush=True)  # None until the bytes make a character
    print()


def load(folder: Path) -> tuple[Trinity, Path]:
    """The model in a folder of either kind, and its tokenizer's folder."""
    if (folder / "config.json").is_file():
        return load_hf(folder), folder
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} has neither a config.json nor a config.yaml; give a Hugging Face folder or a run's")
    model, config, _ = load_model(folder)
    tokenizer = run_tokenizer(folder, config)
    if tokenizer is None:
        raise UserError(f"{folder} is of a run without data.tokenizer, so its tokens have no text")
    return model, tokenizer


def prompt_tokens(tokenizer: Tokenizer, ids: SpecialIds, prompt: str) -> list[int]:
    """The prompt as the beginning of a document, which in training begins with its own token."""
    tokens = tokenizer.encode(prompt, add_special_tokens=False).ids
    return tokens if ids.bos is None else [ids.bos, *tokens]


def parse() -> argparse.Namespace:
    """The command line's words."""
    summary, _, example = __doc__.strip().rpartition("\n")
    parser = argparse.ArgumentParser(description=summary, epilog=example, formatter_class=HelpFormatter)
    parser.add_argument("folder", type=local_path, metavar="HF_DIR_OR_RUN_DIR", help="where the model is")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens that follow, at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-p", type=float, default=0.95, help="only the likeliest tokens of this probability")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
