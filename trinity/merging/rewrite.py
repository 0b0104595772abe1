"""Replace a few tensors of a Hugging Face folder; every other byte stays as it is.

A file that holds such a tensor is copied to a temporary file, its rows are overwritten there, and the file is renamed.
So a reader sees the old file or the whole new one.
"""

import os
import shutil
from pathlib import Path

from torch import Tensor

from trinity.errors import UserError
from trinity.interop.output_folder import partial_folder
from trinity.io.local import atomic_file, copy_atomically, make_folder
from trinity.merging.sources import FolderSource, byte_view


def copy_folder(directory: Path) -> Path:
    """Copy the files of a folder into its partial folder, to change them there; returns that."""
    copy = partial_folder(directory)
    shutil.rmtree(copy, ignore_errors=True)
    make_folder(copy)
    for path in sorted(directory.iterdir()):
        copy_atomically(path, copy / path.name)
    return copy


def rewrite_tensors(folder: Path, tensors: dict[str, Tensor]) -> int:
    """Overwrite tensors of a folder, in the data types that it stores them in.

    Args:
        folder: a Hugging Face folder.
        tensors: name on disk → new values, of the stored shape.
    Returns:
        the number of tensors rewritten.
    Raises:
        UserError: the folder has no such tensor, or one of another shape.
    """
    source = FolderSource(str(folder), folder)
    by_file: dict[Path, list[tuple[int, memoryview]]] = {}
    for name, values in tensors.items():
        entry = source.entries.get(name)
        if entry is None or entry.shape != tuple(values.shape):
            raise UserError(f"{folder} has no {name} of shape {tuple(values.shape)}; export or merge it again")
        place = source.place(name)
        content = byte_view(values.detach().cpu().to(entry.dtype).contiguous())
        by_file.setdefault(place.path, []).append((place.offset, content))
    for path, patches in sorted(by_file.items()):
        with open(path, "rb") as old, atomic_file(path) as new:
            shutil.copyfileobj(old, new, 1 << 20)
            new.flush()
            for offset, content in patches:
                written = os.pwrite(new.fileno(), content, offset)
                assert written == len(content)  # of a regular file; a full disk raises
    return len(tensors)
