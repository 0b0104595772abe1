"""Show the text of each row of a step, with the source, document and token range of each piece.

With data.loss=masked, tokens that are trained stand in ⟦ ⟧.

    python tools/show_batch.py configs/smoke.yaml --step 17
    python tools/show_batch.py configs/smoke.yaml --step 17 --rows 2 data.sequence_length=128

Steps count as in metrics.jsonl: the first is 1. The data are replayed from the run's nearest checkpoint before that
step, or from the beginning; no weights are needed.
"""

import argparse
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from trinity.command_line import HelpFormatter
from trinity.errors import UserError, run_main

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("config", help="the run's YAML file")
    parser.add_argument("settings", nargs="*", metavar="a.b=value", help="settings that override the file's")
    parser.add_argument("--step", type=int, required=True, help="which step, from 1")
    parser.add_argument("--rows", type=int, help="show only this many of its rows (all by default)")
    return parser.parse_intermixed_args()


def main() -> None:
    """Replay the data up to the step and print its rows."""
    arguments = parse()
    if arguments.step < 1:
        raise UserError(f"--step {arguments.step} must be at least 1")
    from trinity.config import load_config
    from trinity.config.paths import check_paths
    from trinity.data.tokenizer.tokenizer import load_tokenizer
    from trinity.training.build import total_steps
    from trinity.training.build_data import open_stream, seek_near
    from trinity.training.run_tokenizer import tokenizer_to_read, with_tokenizer

    config = load_config(arguments.config, arguments.settings)
    check_paths(config, fresh=False)  # fresh=True would also check init, which a batch does not need
    folder = tokenizer_to_read(config, Path(arguments.config).parent)
    if folder is None:
        raise UserError("data.tokenizer is not given; set it to the folder that the shards were made with")
    config = with_tokenizer(config, folder)
    tokenizer, stream = load_tokenizer(folder), open_stream(config, rank=0, ranks=1)
    seek_near(stream, config, arguments.step - 1)
    total = total_steps(config, stream.plan)
    if arguments.step > total:
        raise UserError(f"--step {arguments.step} is after the run's end; use a step from 1 to {total}")
    first, sequences = stream.first_of(arguments.step - 1), stream.plan.at(arguments.step - 1).sequences
    batch, masked = stream.batch(arguments.step - 1), config.data.loss == "masked"
    for row in range(min(sequences, arguments.rows or sequences)):
        k = first + row
        print(f"=== sequence {k}, stream {k % config.data.streams}")
        begin = 0
        for piece in batch.pieces[row]:
            end = begin + piece.length
            tokens, targets = (values_BS[row, begin:end].tolist() for values_BS in (batch.tokens_BS, batch.targets_BS))
            text = marked(tokenizer, tokens, targets) if masked else decoded(tokenizer, tokens)
            place = f"tokens {piece.start} to {piece.start + piece.length}"
            print(f"--- {piece.source}: document {piece.document}, {place}")
            print(text)
            begin = end
        if begin < batch.tokens_BS.shape[1]:
            print(f"--- padding: {batch.tokens_BS.shape[1] - begin} tokens")


def decoded(tokenizer: "Tokenizer", tokens: list[int]) -> str:
    """The text of tokens, special ones too."""
    return tokenizer.decode(tokens, skip_special_tokens=False)


def marked(tokenizer: "Tokenizer", tokens: list[int], targets: list[int]) -> str:
    """The text of a piece, with ⟦ ⟧ around runs of tokens that are targets; a token is the target of the one before."""
    from trinity_kernels.cross_entropy import IGNORE

    trained = [False, *(target != IGNORE for target in targets[:-1])]
    runs = groupby(zip(trained, tokens), key=itemgetter(0))
    texts = [(is_trained, decoded(tokenizer, [token for _, token in run])) for is_trained, run in runs]
    return "".join(f"⟦{text}⟧" if is_trained else text for is_trained, text in texts)


if __name__ == "__main__":
    run_main(main)
