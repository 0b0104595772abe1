"""What the pages name exists: files, links, make targets, options, config keys; and their configs load."""

import io
import json
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.docs.markdown_pages import DOCS, PAGES, ROOT, fenced, inline
from trinity.config import ZOO, RunConfig, load_config, save_config
from trinity.config.hf_config import to_hf_config
from trinity.config.load import NAMED_MAPS, flatten

CHECKED = [ROOT / "README.md", *PAGES]
EVERY_PAGE = sorted(
    path for path in ROOT.rglob("*.md") if path.relative_to(ROOT).parts[0] not in (".venv", "data", "runs", "build")
)
UNKNOWN_YET = "add_balancing_rule.md"
"""Its config word is new: test_balancing_page.py loads it with the page's changes."""
SHELL = re.compile(r"^(?:[A-Z_]+=\S+ )*(?:python|torchrun|sbatch|kubectl|bash|make|pip|touch|\.) .*", re.DOTALL)
SECTIONS = set(RunConfig.__dataclass_fields__)
KEYS = set(flatten(RunConfig()))
LINK = re.compile(r"\]\(([^)\s]+)\)")
PLACE = re.compile(r"(?:tools|launch|configs|trinity|tests|docs|kernels)/[\w./-]*")
WORD = re.compile(r"([a-z_]+(?:\.[a-z_]+)*)(?:=(.*))?", re.DOTALL)


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command in shell blocks and in inline code, without environment variables."""
    for line in "\n".join(fenced(page, "sh") + inline(page)).replace("\\\n", " ").splitlines():
        if SHELL.fullmatch(line):
            words = shlex.split(line, comments=True)
            yield words[next(i for i, word in enumerate(words) if not re.match("[A-Z_]+=", word)) :]


def script(words: list[str]) -> tuple[str, list[str]] | None:
    """The file of this project that a command runs, and its arguments."""
    for place, word in enumerate(words[1:], 1):
        if re.fullmatch(r"(?:tools|launch)/\S+\.(?:py|sh)", word):
            return word, words[place + 1 :]
    return None


@cache
def help_of(tool: str) -> str:
    """What a tool prints for --help, in this process; its folder is in the path, as when Python runs it."""
    before = sys.argv, sys.path
    sys.argv, sys.path = [tool, "--help"], [str((ROOT / tool).parent), *sys.path]
    try:
        with redirect_stdout(io.StringIO()) as output, pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / tool), run_name="__main__")
    finally:
        sys.argv, sys.path = before
    assert ended.value.code == 0
    return output.getvalue()


@pytest.mark.parametrize("page", CHECKED, ids=lambda page: page.name)
def test_commands(page: Path) -> None:
    """Scripts exist and know their flags; make knows its targets; pip's extras are in pyproject.toml."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for words in commands(page):
        if words[0] == "make":
            assert set(words[1:]) <= targets, words
        if words[0] == "pip":
            assert set(re.findall(r"\[(\w+)\]", words[-1])) <= set(extras), words
        if words[0] == "kubectl":
            assert (ROOT / words[-1]).is_file(), words
        if (tool_call := script(words)) is None:
            continue
        tool, arguments = tool_call
        assert (ROOT / tool).is_file(), tool
        flags = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        inner = script(["", *arguments])  # node.py starts another one
        if tool.endswith(".py"):
            help_text = help_of(tool) + (help_of(inner[0]) if inner else "")
            assert {flag for flag in flags if not re.search(rf"(?<![\w-]){flag}(?![\w-])", help_text)} == set(), words
        assert {word for word in arguments if word.startswith("configs/") and not (ROOT / word).is_file()} == set()


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_files(page: Path) -> None:
    """Links lead to files and, after #, to headings of theirs; paths in inline code exist, generated ones apart."""
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        file, _, heading = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert "://" in link or target.exists(), link
        if heading:
            assert heading in headings(target), link
    named = {code for code in inline(page) if PLACE.fullmatch(code) and "NAME" not in code}
    assert {place for place in named if not (ROOT / place).exists()} == set()


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them: lower case, no punctuation, hyphens for spaces."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", CHECKED, ids=lambda page: page.name)
def test_config_keys(page: Path) -> None:
    """In inline code: `parallel.shard`, `recompute=block`."""
    for code in inline(page):
        for word in code.split():
            match = WORD.fullmatch(word)
            section = match[1].split(".")[0] if match and not word.endswith(".py") else ""  # balancing.py is a file
            if match and section in SECTIONS and ("." in match[1] or match[2] is not None):
                assert is_key(match[1]), f"{word} in {page.name}"


def is_key(key: str) -> bool:
    """Whether this is a field, a section, or an entry of a map of names."""
    parent = key.rpartition(".")[0]
    return key in KEYS or parent in NAMED_MAPS or any(existing.startswith(f"{key}.") for existing in KEYS)


@pytest.fixture
def newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folders that a reader of the pages has made before; only the files that loading a config reads."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for run in ("mine", "smoke", "laws", "chat"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        save_config(load_config("configs/smoke.yaml"), tmp_path / "runs" / run / "config.yaml")
    (tmp_path / "mine-hf").mkdir()
    model = to_hf_config(ZOO["smoke"], bos_id=0, eos_id=0, pad_id=None, dtype=torch.bfloat16)
    (tmp_path / "mine-hf" / "config.json").write_text(json.dumps(model))


@pytest.mark.usefixtures("newcomer")
@pytest.mark.parametrize("page", CHECKED, ids=lambda page: page.name)
def test_configs_load(page: Path) -> None:
    """The config of each pretrain, plan and show_batch command, with its overrides."""
    for words in commands(page):
        tool_call = script(words)
        if tool_call is None or page.name == UNKNOWN_YET:
            continue
        config = next((word for word in tool_call[1] if word.endswith(".yaml")), None)
        if config and "/" in config:
            load_config(config, [word for word in tool_call[1] if re.match(r"[a-z_]+(\.[a-z_]+)*=", word)])


def test_the_script_for_gpus_has_help(tmp_path: Path) -> None:
    """Its argument is a folder to make; --help must not be taken for it."""
    done = subprocess.run(
        ["bash", ROOT / "tools" / "gpu_check.sh", "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "gpu_check.sh [--cpu] OUT" in done.stdout


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert {page.name for page in PAGES if page.name != "README.md"} <= set(LINK.findall(index))
