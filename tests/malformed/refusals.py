"""Check how a malformed input is refused: one sentence, exit code 2, and no file of the user changed."""

from collections.abc import Callable
from pathlib import Path

from trinity.config.load import OmegaConf, build_config
from trinity.errors import USER_MISTAKE, explain
from trinity.training.trainer import pretrain

REFUSED_START = {"lock", "status.json"}
"""Files that a refused start leaves in its run directory (trinity/training/README.md)."""
DAMAGE_FOUND = REFUSED_START | {"events.jsonl"}
"""The same, if a damaged checkpoint was logged as an event."""


def snapshot(folder: Path) -> dict[str, tuple]:
    """Path → (mode, size and time, content or link target) for everything below a folder."""
    entries = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        if path.is_symlink():
            content: object = path.readlink()
        else:
            content = path.read_bytes() if path.is_file() else None
        # the entries of a folder are in the snapshot themselves
        stamp = (status.st_size, status.st_mtime_ns) if content is not None else None
        entries[str(path.relative_to(folder))] = (status.st_mode, stamp, content)
    return entries


def refusal(call: Callable[[], object], *folders: Path, may_change: set[str] = frozenset()) -> str:
    """The error message of a call that must fail with exit code 2 without changing the folders.

    Args:
        call: runs the program's function.
        folders: their content must not change.
        may_change: names directly in a folder that may be added or changed, such as REFUSED_START in a run directory.
    Returns:
        the message, one line.
    """
    before = {folder: snapshot(folder) for folder in folders}
    explained = None
    try:
        result = call()
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
    assert explained is not None, f"accepted: {result}"
    code, sentence = explained
    assert code == USER_MISTAKE, sentence
    assert len(sentence.splitlines()) == 1, sentence
    for folder, old in before.items():
        new = snapshot(folder)
        changed = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
        assert changed <= may_change, (sentence, changed)
    return sentence


def train(settings: dict, *words: str) -> int:
    """Run the settings in this process, as launch/pretrain.py does; returns the exit code."""
    raw = [("test", OmegaConf.create(settings)), ("test", OmegaConf.from_dotlist(list(words)))]
    return pretrain(build_config(raw), [])


def replace_by_folder(path: Path) -> None:
    """Replace a file by a folder."""
    path.unlink()
    path.mkdir()


def replace_by_loop(path: Path) -> None:
    """Replace a file by a link to itself."""
    path.unlink()
    path.symlink_to(path)


def replace_by_dangling_link(path: Path) -> None:
    """Replace a file by a dangling link."""
    path.unlink()
    path.symlink_to("nowhere")
