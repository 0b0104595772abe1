"""Prepare token shards from documents: read, encode in worker processes, write, and resume after a kill.

The main process reads raw items and writes ids; the workers parse and encode. The shards depend on the inputs, the
tokenizer, the shard size and on whether duplicates are left out, not on batches, workers or interruptions: a run that
was killed and started again leaves the same bytes as one that was not.
"""

import errno
import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from trinity.data.chat.encode import ChatEncoder, ChatOptions
from trinity.data.chat.template import (
    TEMPLATE_FILE,
    ChatTemplate,
    load_template,
    source_hash,
    special_tokens,
    template_hash,
)
from trinity.data.prepare.dedup import SeenHashes
from trinity.data.prepare.shard_writer import DUPLICATE, KEPT, REASONS, TOO_LONG, Encoded, ShardWriter
from trinity.data.prepare.tokenize import Encoder
from trinity.data.prepare.worker_pool import map_in_processes
from trinity.data.sources.documents import BATCH_BYTES, BEGINNING, Position, RawBatch, note_empty_files
from trinity.data.sources.inputs import Dataset, DatasetInput, FileInputs, expand_inputs
from trinity.data.sources.shards import (
    HASHES,
    MASKED_VERSION,
    VERSION,
    kinds_of,
    shard_path,
    small_enough,
    token_dtype,
    why_damaged,
)
from trinity.data.tokenizer.tokenizer import bos_id, fingerprint, load_text_encoder, vocabulary_size
from trinity.errors import UserError
from trinity.io.json_files import read_json
from trinity.io.local import SUFFIX, file_lock, write_atomically
from trinity.terminal import Progress

SHARD_TOKENS = 1 << 28
LOCK_SECONDS = 5
"""Wait for the lock of the folder: the workers of a killed run end within this time."""


def prepare_data(
    inputs: list[Path | str] | Dataset,
    tokenizer: Path,
    out: Path,
    *,
    shard_tokens: int = SHARD_TOKENS,
    field: str = "text",
    kind: str | None = None,
    skip_bad_lines: bool = False,
    deduplicate: bool = False,
    workers: int = 0,
    progress: bool = False,
    chat: ChatOptions | None = None,
    template: Path | None = None,
) -> tuple[dict, bool]:
    """Write the token shards of the inputs to `out`; finish or repair those that a run with the same arguments began.

    Args:
        inputs: files, folders, glob patterns and URLs (see expand_inputs), read in this order; or a data set.
        tokenizer: folder with tokenizer.json.
        out: folder for the shards; new, empty, or of an earlier run with the same inputs and tokenizer.
        shard_tokens: tokens at which a shard is full (512 MiB of uint16 by default).
        field: name of the text in a JSON line or a row.
        kind: of files in folders and of patterns, if they are mixed: text, jsonl, parquet or all (see expand_inputs).
        skip_bad_lines: leave out and count items that cannot be read.
        deduplicate: of equal texts, and with chat of examples of equal tokens and mask, keep only the first, and count
            the others.
        workers: encoding processes beside this one; 0: this process encodes, with the tokenizers library's threads.
        progress: draw a progress bar on stderr.
        chat: read conversations, or prompts with completions, and write a loss mask; `field` is not used.
        template: with chat, the file of a template; None: the tokenizer's own.
    Returns:
        The content of index.json, and whether there was nothing to do.
    Raises:
        UserError: bad inputs (see read_documents), no document with text, or an `out` that holds something else.
        Failure: a worker was killed, or a URL cannot be reached.
    """
    _check_arguments(shard_tokens, workers, out)
    source = DatasetInput(inputs) if isinstance(inputs, Dataset) else FileInputs(expand_inputs(inputs, kind=kind))
    tok = load_text_encoder(tokenizer)
    header = _header(source, tokenizer, tok, shard_tokens, field, deduplicate)
    encoder: Encoder | ChatEncoder
    if chat is None:
        encoder = Encoder(tok, np.dtype(header["dtype"]), field, skip_bad_lines, hashed=deduplicate)
    else:
        encoder = _chat_encoder(tok, tokenizer, template, chat, skip_bad_lines, hashed=deduplicate)
        header = _chat_header(header, encoder)
    _check_folder(out, header)
    _make_folder(out)
    try:
        with file_lock(out, LOCK_SECONDS):
            return _prepare(source, encoder, out, header, workers, progress)
    except BlockingIOError:
        raise UserError(f"--out {out} is being written by another process; wait for it, or end it") from None


def _check_arguments(shard_tokens: int, workers: int, out: Path) -> None:
    """Refuse arguments that cannot be meant."""
    if shard_tokens < 1:
        raise UserError(f"--shard-tokens {shard_tokens} must be at least 1")
    if workers < 0:
        raise UserError(f"--workers {workers} must be 0 or more")
    if "://" in str(out):
        raise UserError(f"--out {out} is a URL; give a local folder, and copy the finished folder there")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")


def _chat_encoder(
    tok: Tokenizer, tokenizer: Path, template: Path | None, options: ChatOptions, skip_bad: bool, hashed: bool
) -> ChatEncoder:
    end_id = tok.token_to_id(special_tokens(tokenizer).get("eos_token", ""))
    dtype = token_dtype(vocabulary_size(tok))
    return ChatEncoder(tok, dtype, _template(tokenizer, template), end_id, options, skip_bad, hashed)


def _template(tokenizer: Path, file: Path | None) -> ChatTemplate | None:
    """The template to render with; None if the tokenizer has none, as pairs of texts need none.

    Raises:
        UserError: `file` differs from the tokenizer's own template, which exports will have.
    """
    own = template_hash(tokenizer)
    if file is None:
        return None if own is None else load_template(tokenizer)
    template = load_template(tokenizer, file)
    if own is not None and own != source_hash(template.source):
        raise UserError(
            f"--template {file} differs from {tokenizer / TEMPLATE_FILE}, which inference would use; make a tokenizer "
            "with that template by tools/chat_tokenizer.py, or leave --template out"
        )
    return template


def _chat_header(header: dict, encoder: ChatEncoder) -> dict:
    identity = None if encoder.template is None else source_hash(encoder.template.source)
    chat = {"template": identity, **encoder.options._asdict()}
    return header | {"version": MASKED_VERSION, "field": None, "chat": chat}


def _prepare(
    source: FileInputs | DatasetInput,
    encoder: Encoder | ChatEncoder,
    out: Path,
    header: dict,
    workers: int,
    progress: bool,
) -> tuple[dict, bool]:
    index = read_json(out / "index.json")
    shards = _complete_shards(out, index or read_json(out / "progress.json"), header)
    if index is not None and len(shards) == len(index["shards"]):
        (out / "progress.json").unlink(missing_ok=True)  # left by a kill between the two files
        return index, True
    if not os.access(out, os.W_OK):
        raise UserError(f"--out {out} cannot be written; check its permissions, or give another folder")
    seen = _load_hashes(out, shards) if header["deduplicate"] else None
    writer = ShardWriter(out, header, header["shard_tokens"], shards)
    start = Position(*shards[-1]["next"]) if shards else BEGINNING
    groups = _groups(source.batches(encoder.field, start))
    with closing(_encode(groups, encoder, workers)) as encoded, _bar(source, progress) as bar:
        _write(writer, encoded, seen, bar)
    if writer.tokens == 0:
        raise _nothing_left(source, writer, encoder)
    if isinstance(encoder, ChatEncoder) and encoder.template is not None:
        write_atomically(out / TEMPLATE_FILE, encoder.template.source)
    index = writer.finish(source.end)
    if isinstance(source, FileInputs):
        note_empty_files(source.files, index["input_documents"])
    return index, False


def _nothing_left(source: FileInputs | DatasetInput, writer: ShardWriter, encoder: Encoder | ChatEncoder) -> UserError:
    """Why no document was written."""
    too_long = writer.left_out.get(REASONS[TOO_LONG])
    if not too_long or not isinstance(encoder, ChatEncoder):
        return UserError(f"{source} holds no document with text; give a file that does")
    _, _, choice, most = encoder.options
    alone = ", even without what comes before their first trained token" if choice == "truncate-prompt" else ""
    return UserError(
        f"{source} holds no other than {too_long} examples of more than --max-tokens {most}{alone}, so none is left; "
        "use a larger number, or give shorter examples"
    )


def _write(writer: ShardWriter, encoded: Iterable[Encoded], seen: SeenHashes | None, bar: Progress) -> None:
    earlier = writer.tokens
    for part in encoded:
        if earlier and not bar.n:
            bar.skip_to(part.done)  # an earlier run's work does not count for the speed
        writer.write(part if seen is None else _without_duplicates(part, seen))
        bar.describe(f"{(writer.tokens - earlier) / max(bar.seconds, 1e-9):,.0f} tokens/s")
        bar.update_to(part.done)


def _encode(
    groups: Iterator[list[RawBatch]], encoder: Encoder | ChatEncoder, workers: int
) -> Generator[Encoded, None, None]:
    if workers == 0:
        yield from map(encoder, groups)
        return
    sized = ((group, sum(batch.size for batch in group)) for group in groups)
    yield from map_in_processes(encoder, sized, workers, BATCH_BYTES)


def _groups(batches: Iterator[RawBatch]) -> Iterator[list[RawBatch]]:
    """Group batches of small files, so that a worker gets about BATCH_BYTES at once."""
    group: list[RawBatch] = []
    size = 0
    for batch in batches:
        group.append(batch)
        size += batch.size
        if size >= BATCH_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _without_duplicates(part: Encoded, seen: SeenHashes) -> Encoded:
    assert part.hashes is not None  # the encoder makes them for --deduplicate
    new_m = seen.add(part.hashes)
    if new_m.all():
        return part
    status = part.status.copy()
    status[np.flatnonzero(status == KEPT)[~new_m]] = DUPLICATE
    return part._replace(
        status=status,
        ids=part.ids[np.repeat(new_m, part.lengths)],
        mask=None if part.mask is None else part.mask[np.repeat(new_m, part.lengths)],
        lengths=part.lengths[new_m],
        text_bytes=part.text_bytes[new_m],
        hashes=part.hashes[new_m],
    )


def _load_hashes(out: Path, shards: list[dict]) -> SeenHashes:
    """The hashes of all texts in the finished shards."""
    seen = SeenHashes(sum(entry["documents"] for entry in shards))
    for number in range(len(shards)):
        seen.add(np.fromfile(shard_path(out, number, HASHES), "<u8").reshape(-1, 2))
    return seen


def _header(
    source: FileInputs | DatasetInput, tokenizer: Path, tok: Tokenizer, shard_tokens: int, field: str, deduplicate: bool
) -> dict:
    vocab_size = vocabulary_size(tok)
    return {
        "version": VERSION,
        "dtype": token_dtype(vocab_size).str,
        "vocab_size": vocab_size,
        "bos_id": bos_id(tok),
        "tokenizer": fingerprint(tokenizer),
        **source.header,
        "field": field,
        "shard_tokens": shard_tokens,
        "deduplicate": deduplicate,
    }


def _check_folder(out: Path, header: dict) -> None:
    """Raise UserError if `out` holds anything but a beginning of these shards; nothing in it is changed."""
    earlier = read_json(out / "index.json") or read_json(out / "progress.json")
    if earlier is None:
        names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
        for name in names:
            if not name.endswith(SUFFIX):
                raise UserError(f"--out {out} holds something else ({name}); give a new folder")
        return
    earlier = {"deduplicate": False} | earlier
    keys = [*header, *({"inputs", "dataset", "chat"} & set(earlier) - set(header))]
    differing = [key for key in keys if earlier.get(key) != header.get(key)]
    if differing and earlier["shards"]:
        raise UserError(
            f"--out {out} holds shards whose {', '.join(differing)} differ from this command's; "
            "give a new folder, or remove that one"
        )


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"--out {out} cannot be made ({error.strerror}); give a folder that can be written") from None


def _complete_shards(out: Path, index: dict | None, header: dict) -> list[dict]:
    """Entries of the complete shards in `out`, up to the first that is missing or damaged."""
    shards = index["shards"] if index else []
    kinds = (*kinds_of(header), HASHES) if header["deduplicate"] else kinds_of(header)
    checksums = small_enough(shards)
    for number, entry in enumerate(shards):
        if why_damaged(out, number, entry, checksums, kinds) is not None:
            return shards[:number]
    return shards


def _bar(source: FileInputs | DatasetInput, show: bool) -> Progress:
    """A progress bar over the input, with the time left."""
    return Progress("preparing", source.total, source.unit.removesuffix("s"), show, scaled=source.unit == "B")
