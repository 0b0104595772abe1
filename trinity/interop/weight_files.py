"""The safetensors files of a Hugging Face folder, found without trusting the folder: no pickle, no path out of it."""

from pathlib import Path
from shlex import quote

from trinity.errors import UserError
from trinity.io.json_files import read_json

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files: the single one, or those of the index; each in this folder itself."""
    names = {_SINGLE}
    if not (directory / _SINGLE).exists():
        if not (directory / _INDEX).exists():
            raise UserError(
                f"{directory} has neither {_SINGLE} nor {_INDEX}; pickled weights are not read: "
                "load such a folder with transformers and save_pretrained it"
            )
        index = read_json(directory / _INDEX, "fetch or export it again") or {}
        file_by_tensor = index.get("weight_map")
        if not isinstance(file_by_tensor, dict) or not file_by_tensor:
            raise UserError(f"{directory / _INDEX} has no weight_map; fetch or export it again")
        names = set(map(str, file_by_tensor.values()))
    return [_file_in_folder(directory, name) for name in sorted(names)]


def _file_in_folder(directory: Path, name: str) -> Path:
    """Refuse a file that is missing, or outside the folder and its Hugging Face cache."""
    path = directory / name
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise UserError(f"{directory / _INDEX} names {name!r}; only names of safetensors files in the folder are read")
    if not path.is_file():
        raise UserError(f"{path} is missing or not a file; fetch or export the folder again")
    target = path.resolve()
    if target.parent not in (directory.resolve(), _blobs(directory)):
        copy = f"cp --remove-destination {quote(str(target))} {quote(str(path))}"
        raise UserError(f"{path} is a link out of the folder; put the file itself in its place: {copy}")
    return path


def _blobs(directory: Path) -> Path | None:
    """MODEL/blobs, where the cache of huggingface_hub keeps the files of MODEL/snapshots/REVISION; else None."""
    snapshots = directory.resolve().parent
    return snapshots.parent / "blobs" if snapshots.name == "snapshots" else None
