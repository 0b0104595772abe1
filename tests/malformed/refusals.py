"""What every malformed input must meet: one sentence of the user's mistake, and not a byte of theirs changed."""

from collections.abc import Callable
from pathlib import Path

from trinity.config.load import OmegaConf, build_config
from trinity.errors import USER_MISTAKE, explain
from trinity.training.trainer import pretrain

REFUSED_START = {"lock", "status.json"}
"""What a refused start leaves in its run directory (trinity/training/README.md)."""
DAMAGE_FOUND = REFUSED_START | {"events.jsonl"}
"""The same, where a checkpoint was found damaged and that was noted."""


def snapshot(folder: Path) -> dict[str, tuple]:
    """Everything below a folder: kind, size, time, and content or the link's end."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        if path.is_symlink():
            content: object = path.readlink()
        else:
            content = path.read_bytes() if path.is_file() else None
        # the entries of a folder are in the snapshot themselves
        stamp = (status.st_size, status.st_mtime_ns) if content is not None else None
        found[str(path.relative_to(folder))] = (status.st_mode, stamp, content)
    return found


def refusal(call: Callable[[], object], *folders: Path, gains: set[str] = frozenset()) -> str:
    """The sentence with which a call refuses what is in some folders.

    Args:
        call: what one of the programs calls.
        folders: whatever is in them must stay as it is.
        gains: names directly in one of them that may come or change: REFUSED_START of a run directory.
    Returns:
        the sentence, which is one line and means exit code 2.
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
    for folder, then in before.items():
        now = snapshot(folder)
        changed = {name for name in then.keys() | now.keys() if then.get(name) != now.get(name)}
        assert changed <= gains, (sentence, changed)
    return sentence


def train(settings: dict, *words: str) -> int:
    """Run the settings in this process, as launch/pretrain.py does; returns the exit code."""
    raw = [("test", OmegaConf.create(settings)), ("test", OmegaConf.from_dotlist(list(words)))]
    return pretrain(build_config(raw), [])


def become_folder(path: Path) -> None:
    """A folder stands where a file was."""
    path.unlink()
    path.mkdir()


def become_loop(path: Path) -> None:
    """A link to itself."""
    path.unlink()
    path.symlink_to(path)


def become_dangling(path: Path) -> None:
    """A link to nothing."""
    path.unlink()
    path.symlink_to("nowhere")
