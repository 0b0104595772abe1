"""Continue texts, or chat, with a run's newest checkpoint or with a Hugging Face folder of an AfMoE model.

Text is printed as it is generated; the texts of a batch come one after the other. A prompt that is given n times is
continued in n ways. With --chat, each --prompt is a user's turn of one conversation, and each line of --prompts begins
a conversation of its own; without either, turns are read from the terminal, a line each.

Example: python tools/generate.py runs/smoke --prompt "def main" --temperature 0.8 --top-p 0.95
         python tools/generate.py out/nano --prompts questions.txt --max-new-tokens 64 --json > answers.jsonl
         python tools/generate.py out/chat --chat
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import trinity  # noqa: F401  # before torch, for the policy of its threads

# isort: split

from trinity.command_line import HelpFormatter, check_device, check_text, local_path
from trinity.data.tokenizer.tokenizer import load_tokenizer
from trinity.errors import UserError, run_main
from trinity.evaluation.chat import AnswerSettings, ChatTemplate, Conversation, end_of_turn_ids, first_messages
from trinity.evaluation.generate import PREFILL_CHUNK, Generation
from trinity.evaluation.sampling import Sampling
from trinity.evaluation.text_stream import stream_texts
from trinity.interop import load_hf
from trinity.interop.tokenizer_files import special_ids
from trinity.io.json_files import to_json
from trinity.models import Trinity
from trinity.training.load_run import load_model
from trinity.training.run_tokenizer import run_tokenizer


class Loaded(NamedTuple):
    """A model, and the folder of its tokenizer."""

    model: Trinity
    folder: Path


def main() -> None:
    """Print the prompts and their continuations, or a conversation."""
    options = parse()
    check(options)
    sampling = Sampling(options.temperature, options.top_p, options.top_k, options.min_p, options.repetition_penalty)
    prompts = [*options.prompt, *(read_prompts(options.prompts) if options.prompts else [])]
    loaded = load(options)
    stop_ids = end_of_turn_ids(loaded.folder, loaded.model.config.vocab_size)
    settings = AnswerSettings(
        options.max_new_tokens, sampling, options.seed, stop_ids, options.stop, options.prefill_chunk
    )
    if options.chat and not options.prompts:
        converse(loaded, settings, options)
        return
    for first in range(0, len(prompts), options.batch):
        continue_batch(loaded, prompts[first : first + options.batch], Counter(prompts[:first]), settings, options)


def continue_batch(
    loaded: Loaded, prompts: list[str], earlier: Counter[str], settings: AnswerSettings, options: argparse.Namespace
) -> None:
    """Continue some prompts at once; `earlier` counts those of the batches before."""
    seeds = []
    for prompt in prompts:
        seeds.append(settings.seed + earlier[prompt])
        earlier[prompt] += 1
    generation = Generation(
        loaded.model, encode(loaded, prompts, options), settings.max_new_tokens, settings.sampling, seeds,
        settings.stop_ids, settings.chunk,
    )  # fmt: skip
    printer = printer_of(prompts, options)
    for piece in stream_texts(generation, load_tokenizer(loaded.folder), settings.stop):
        printer.add(*piece)


class TextPrinter:
    """Print texts that grow side by side, one after the other: the first that has not ended as it grows.

    Args:
        beginnings: what each text begins with.
    """

    def __init__(self, beginnings: list[str]) -> None:
        self._waiting = [[beginning] for beginning in beginnings]
        self._ended, self._row = [False] * len(beginnings), 0
        self._print()

    def add(self, row: int, text: str, end: str | None) -> None:
        """Add to a text, and print what its turn allows."""
        self._waiting[row].append(text)
        self._ended[row] = end is not None
        self._print()

    def _print(self) -> None:
        while self._row < len(self._ended):
            row = self._row
            ended = self._ended[row]
            print("".join(self._waiting[row]), end="\n" if ended else "", flush=True)
            self._waiting[row].clear()
            if not ended:
                return
            self._row += 1


class JsonPrinter:
    """Print each text as a line of JSON, in the order of the prompts: {"prompt", "text", "tokens", "end"}."""

    def __init__(self, prompts: list[str]) -> None:
        self._lines: list[dict[str, Any]] = [
            {"prompt": prompt, "text": "", "tokens": 0, "end": None} for prompt in prompts
        ]
        self._row = 0

    def add(self, row: int, text: str, end: str | None) -> None:
        """Add a token to a text, and print what its turn allows."""
        line = self._lines[row]
        line["text"], line["tokens"], line["end"] = line["text"] + text, line["tokens"] + 1, end
        while self._row < len(self._lines) and self._lines[self._row]["end"]:
            print(to_json(self._lines[self._row], ensure_ascii=False), flush=True)
            self._row += 1


def printer_of(prompts: list[str], options: argparse.Namespace) -> TextPrinter | JsonPrinter:
    """Prints as JSON, or as text after its prompt; in a chat after the user's turn, if several are given."""
    if options.json:
        return JsonPrinter(prompts)
    if not options.chat:
        return TextPrinter(prompts)
    several = len(options.prompt or []) > 1 or options.prompts
    return TextPrinter([f"> {prompt}\n" if several else "" for prompt in prompts])


def converse(loaded: Loaded, settings: AnswerSettings, options: argparse.Namespace) -> None:
    """One conversation with the turns of --prompt, or of the terminal."""
    conversation = Conversation(loaded.model, ChatTemplate(loaded.folder), settings, options.system)
    for turn in options.prompt or read_turns():
        printer = printer_of([turn], options)
        for piece in conversation.answer(turn):
            printer.add(*piece)


def read_turns() -> Iterator[str]:
    """The lines that the user types, until the end of input (Ctrl-D); empty ones are left out."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def load(options: argparse.Namespace) -> Loaded:
    """The model of a run directory or Hugging Face folder, and the folder of its tokenizer."""
    folder: Path = options.folder
    if (folder / "config.json").is_file():
        model, tokenizer = load_hf(folder), folder
    elif (folder / "config.yaml").is_file():
        model, config, _ = load_model(folder)
        found = run_tokenizer(folder, config)
        if found is None:
            raise UserError(f"{folder} is a run without data.tokenizer, so its tokens cannot be decoded")
        tokenizer = found
    else:
        raise UserError(f"{folder} has neither a config.json nor a config.yaml; give a Hugging Face folder or a run's")
    return Loaded(model.to(options.device), tokenizer)


def encode(loaded: Loaded, prompts: list[str], options: argparse.Namespace) -> list[list[int]]:
    """Token ids of each prompt as the beginning of a document, BOS first, or as the first turn of a conversation."""
    if options.chat:
        template = ChatTemplate(loaded.folder)
        return [template.token_ids(first_messages(options.system, prompt)) for prompt in prompts]
    tokenizer, bos = load_tokenizer(loaded.folder), special_ids(loaded.folder, loaded.model.config.vocab_size).bos
    begin = [] if bos is None else [bos]
    return [begin + tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]


def read_prompts(path: Path) -> list[str]:
    """A prompt of each line that is not empty; in a .jsonl file a string, or an object with the field "prompt".

    Raises:
        UserError: a line is no prompt, or there is none.
    """
    prompts = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would also split at U+2028 or \f
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}; save it in UTF-8") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        prompt: object = line
        if path.suffix == ".jsonl":
            try:
                value = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number} is not JSON ({error})") from None
            prompt = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(prompt, str):
            raise UserError(f'{path}, line {number} has no prompt; write a string, or {{"prompt": "…"}}')
        check_text(f"{path}, line {number}", prompt)
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{path} has no prompt; write one in each line")
    return prompts


def check(options: argparse.Namespace) -> None:
    """Refuse options that cannot be used."""
    if not (options.prompt or options.prompts or options.chat):
        raise UserError("there is nothing to continue; give --prompt TEXT, --prompts FILE or --chat")
    if options.chat and options.prompt and options.prompts:
        raise UserError("--chat takes --prompt, the turns of one conversation, or --prompts, a turn a line; give one")
    if options.system and not options.chat:
        raise UserError("--system is the first message of a chat; give --chat too")
    for name in ("max_new_tokens", "batch", "prefill_chunk"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1")
    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed {options.seed} is not between 0 and 2⁶³ − 1")
    for text in options.prompt or []:
        check_text("--prompt", text)
    check_text("--system", options.system or "")
    check_device(options.device)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    summary, _, example = __doc__.strip().partition("\n\nExample: ")
    parser = argparse.ArgumentParser(description=summary, epilog=f"Example: {example}", formatter_class=HelpFormatter)
    parser.add_argument("folder", type=local_path, metavar="HF_DIR_OR_RUN_DIR", help="folder of the model")
    what = parser.add_argument_group("what to continue")
    what.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="text to continue; may be repeated")
    what.add_argument(
        "--prompts", type=local_path, metavar="FILE", help='a text of each line; .jsonl: strings or {"prompt": "…"}'
    )
    what.add_argument("--chat", action="store_true", help="the tokenizer's chat template around each prompt")
    what.add_argument("--system", metavar="TEXT", help="with --chat: the system's message")
    how = parser.add_argument_group("how")
    how.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="most tokens to generate")
    how.add_argument("--temperature", type=float, default=0.8, help="sampling temperature; 0: greedy decoding")
    how.add_argument("--top-p", type=float, default=0.95, help="nucleus sampling: total probability")
    how.add_argument("--top-k", type=int, default=0, help="number of likeliest tokens to sample from; 0: all")
    how.add_argument(
        "--min-p", type=float, default=0.0, help="least probability of a token, as a share of the likeliest's"
    )
    how.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1: tokens of the text are less likely"
    )
    how.add_argument("--seed", type=int, default=0, help="random seed; the same seed gives the same text")
    how.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="text that ends a continuation; may be repeated"
    )
    how.add_argument("--batch", type=int, default=16, metavar="N", help="prompts to continue at once")
    how.add_argument(
        "--prefill-chunk", type=int, default=PREFILL_CHUNK, metavar="N", help="tokens of a prompt to read at once"
    )
    how.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    how.add_argument(
        "--json", action="store_true", help='a line of JSON for each text: {"prompt", "text", "tokens", "end"}'
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
