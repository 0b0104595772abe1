"""Continue a text with a run's newest checkpoint, or with a Hugging Face folder of an AfMoE model.

Every token takes a forward pass over the whole text (there is no key-value cache): for a quick look, not for serving.
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
    """Print the prompt and its continuation, token by token."""
    options = parse()
    model, tokenizer_folder = load(options.folder)
    ids = special_ids(tokenizer_folder, model.config.vocab_size)
    tokenizer = load_tokenizer(tokenizer_folder)
    tokens = prompt_tokens(tokenizer, ids, options.prompt)
    print(options.prompt, end="", flush=True)
    decoder = DecodeStream(skip_special_tokens=True)
    for token in stream(
        model, tokens, options.max_new_tokens, options.temperature, options.top_p, options.seed, ids.stop
    ):
        print(decoder.step(tokenizer, token) or "", end="", flush=True)  # None until the bytes form a character
    print()


def load(folder: Path) -> tuple[Trinity, Path]:
    """(the model of a run directory or Hugging Face folder, the folder of its tokenizer)."""
    if (folder / "config.json").is_file():
        return load_hf(folder), folder
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} has neither a config.json nor a config.yaml; give a Hugging Face folder or a run's")
    model, config, _ = load_model(folder)
    tokenizer = run_tokenizer(folder, config)
    if tokenizer is None:
        raise UserError(f"{folder} is a run without data.tokenizer, so its tokens cannot be decoded")
    return model, tokenizer


def prompt_tokens(tokenizer: Tokenizer, ids: SpecialIds, prompt: str) -> list[int]:
    """Token ids of the prompt as the beginning of a document: BOS first, if the tokenizer has it."""
    tokens = tokenizer.encode(prompt, add_special_tokens=False).ids
    return tokens if ids.bos is None else [ids.bos, *tokens]


def parse() -> argparse.Namespace:
    """Parse the command line."""
    summary, _, example = __doc__.strip().rpartition("\n")
    parser = argparse.ArgumentParser(description=summary, epilog=example, formatter_class=HelpFormatter)
    parser.add_argument("folder", type=local_path, metavar="HF_DIR_OR_RUN_DIR", help="folder of the model")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="most tokens to generate")
    parser.add_argument("--temperature", type=float, default=0.8, help="sampling temperature; 0: greedy decoding")
    parser.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        help="nucleus sampling: total probability",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed; the same seed gives the same text")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
