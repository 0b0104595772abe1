"""tools/gpu_check.sh: whatever a part does, and wherever the check is killed, what was measured before is there.

The script runs as a user would run it, with a stub in place of the worker (stub_gpu_worker.py).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import attention, expert_peers, experts, head, nano_step, timing
from gpu_check import arguments, gpu_tests, kernel_profile, packages, smoke_run, worker
from gpu_check.kernel_profile import Interval
from gpu_check.parts import PARTS
from gpu_check.results import committed_name, is_measured, judged, read_cases
from gpu_check.supervisor import Check

from trinity.config.load import load_config
from trinity.errors import UserError
from trinity.models import Trinity

ROOT = Path(__file__).parents[2]
NAMES = [part.name for part in PARTS if part.cpu_options is not None]
FEW = ["ceilings", "step_copying", "experts", "tests"]
"""Parts, in order, of the tests in which one misbehaves."""
FILES = {"check.json", "results.jsonl", "results.tar.gz", "summary.md"}
Start = Callable[..., subprocess.Popen]
SECONDS = "{} is not a number of seconds above 0; write for example {}"
"""What is said of a wrong time, for test_mistakes."""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start the script with OUT = tmp_path/out, in a group of its own; kill what is left of it in the end."""
    started = []

    def begin(
        *parts: str, cpu: bool = True, stub: dict[str, str] | None = None, **environment: str
    ) -> subprocess.Popen:
        command = ["bash", ROOT / "tools" / "gpu_check.sh", *(["--cpu"] if cpu else []), tmp_path / "out", *parts]
        added = {
            "PYTHON": sys.executable, "STUB": json.dumps(stub or {}), "TMPDIR": str(tmp_path),
            "CHECK_WORKER": f"{sys.executable} {ROOT / 'tests' / 'tools' / 'stub_gpu_worker.py'}",
        }  # fmt: skip
        process = subprocess.Popen(
            command, env=os.environ | added | environment, start_new_session=True, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def written(out: Path) -> dict[str, Any]:
    """check.json, after a look at the folder: few files to copy, and all readable."""
    names = {path.name for path in out.iterdir()}
    assert names >= FILES, names
    assert len(names) <= 8
    with tarfile.open(out / "results.tar.gz") as archive:
        assert {"check.json", "summary.md"} <= set(archive.getnames())
    check = json.loads((out / "check.json").read_text())
    assert {"gpu", "date", "versions", "machine", "parts", "results"} <= set(check)
    assert "| part | outcome |" in (out / "summary.md").read_text()
    return check


def outcomes(check: dict[str, Any]) -> dict[str, str]:
    return {row["part"]: row["outcome"] for row in check["parts"]}


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """The condition's first true value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("did not happen")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except OSError:
        return False


def test_every_part_runs(start: Start, tmp_path: Path) -> None:
    """In the order of the table; with the log of each in the archive, and nothing left in the temporary folder."""
    process = start()
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    check = written(tmp_path / "out")
    assert list(outcomes(check)) == [part.name for part in PARTS]
    assert {name for name, outcome in outcomes(check).items() if outcome == "done"} == set(NAMES)
    assert all(check["results"][name].keys() == {"first", "second"} for name in NAMES)
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        assert {f"logs/{name}.log" for name in NAMES} <= set(archive.getnames())
    assert output.splitlines()[0].startswith(f"{NAMES[0]}: done")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("behaviour", ["fail", "die", "hang"])
@pytest.mark.parametrize("part", [FEW[0], FEW[1], FEW[-1]])
def test_a_bad_part_is_a_row(start: Start, tmp_path: Path, part: str, behaviour: str) -> None:
    """What it measured before is kept, the others run, and the exit code is 1."""
    process = start(*FEW, stub={part: behaviour}, CHECK_PART_SECONDS="2")
    process.communicate(timeout=120)
    assert process.returncode == 1
    check = written(tmp_path / "out")
    expected = dict.fromkeys(FEW, "done") | {part: "timed out" if behaviour == "hang" else "failed"}
    assert outcomes(check) == expected
    assert check["results"][part]["first"]["seconds"] == 1.0
    if behaviour == "hang":
        assert not is_alive(check["results"][part]["child"]["pid"])
    if behaviour == "fail":
        assert [row["failed_cases"] for row in check["parts"] if row["part"] == part] == [1]
        assert "**out of memory**" in (tmp_path / "out" / "summary.md").read_text()


def test_a_part_that_ignores_sigterm(start: Start, tmp_path: Path) -> None:
    process = start(*FEW, stub={"experts": "ignore"}, CHECK_PART_SECONDS="2")
    process.communicate(timeout=120)
    check = written(tmp_path / "out")
    assert outcomes(check)["experts"] == "timed out"
    assert outcomes(check)[FEW[-1]] == "done"
    assert not is_alive(check["results"]["experts"]["first"]["pid"])


def test_parts_that_do_not_fit_are_rows(start: Start, tmp_path: Path) -> None:
    """A hang takes the rest of the total time; what follows is skipped with the reason."""
    process = start(stub={"ceilings": "hang"}, CHECK_SECONDS="22")
    process.communicate(timeout=120)
    assert process.returncode == 1
    check = written(tmp_path / "out")
    first, *rest = check["parts"]
    assert first["outcome"] == "timed out"
    assert first["seconds"] > 5
    assert {row["outcome"] for row in rest} == {"skipped", "left out"}
    assert all("s were left" in row["why"] for row in rest if row["outcome"] == "skipped")
    assert check["seconds"] < 22


@pytest.mark.parametrize("part", FEW)
@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_check_keeps_its_results(start: Start, tmp_path: Path, part: str, name: signal.Signals) -> None:
    """Every part before is done, the running one has its first case, and no process is left."""
    process = start(*FEW, stub={part: "hang"})
    results = tmp_path / "out" / "results.jsonl"
    wait_for(lambda: results.exists() and f'"{part}", "case": "child"' in results.read_text())
    os.killpg(process.pid, name)
    process.communicate(timeout=30)
    assert process.returncode == (1 if name == signal.SIGTERM else -signal.SIGKILL)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    index = FEW.index(part)
    assert [row["part"] for row in rows if row["case"] == "second"] == FEW[:index]
    assert rows[-2]["part"] == part
    wait_for(lambda: not any(is_alive(row["pid"]) for row in rows if "pid" in row), seconds=10)
    check = written(tmp_path / "out")
    expected = dict.fromkeys(FEW[:index], "done") | {part: "running"}
    if name == signal.SIGTERM:
        expected = dict.fromkeys(FEW, "skipped") | expected | {part: "stopped"}
        assert check["results"][part]["first"]["seconds"] == 1.0
    assert outcomes(check) == expected


def test_an_extra_part_may_lack_time_but_not_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sanitizer skipped for lack of time leaves the exit code 0; an access that it finds does not."""
    extra = next(part for part in PARTS if part.name == "sanitizer")
    for outcome, code in (("done", 0), ("skipped", 0), ("timed out", 0), ("failed", 1)):
        scratch = tmp_path / outcome
        scratch.mkdir()
        check = Check(scratch, scratch, cpu=False, began=time.time())
        monkeypatch.setattr(check, "_in_worker", lambda *_, outcome=outcome: (1, outcome))
        assert check.run([extra]) == code
        main = extra._replace(extra=False)
        assert check.run([main]) == int(outcome != "done")


def test_named_parts_alone_run(start: Start, tmp_path: Path) -> None:
    """In the check's order; an unknown name is refused with the names that exist."""
    process = start("norms", "ceilings")
    assert process.communicate(timeout=60)[0].count("done") == 2
    assert list(outcomes(written(tmp_path / "out"))) == ["ceilings", "norms"]
    shutil.rmtree(tmp_path / "out")
    process = start("norm")
    assert "there is no part norm; the parts are ceilings, " in process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("names", "data", "sentence"),
    [
        (["smoke"], "", "smoke needs the part data, or DATA=FOLDER; write: data smoke"),
        (["smoke", "norms"], "", "smoke needs the part data, or DATA=FOLDER; write: norms data smoke"),
        (["smoke_reference"], "d", "smoke_reference needs the part smoke; write: smoke smoke_reference"),
        (
            ["smoke_reference"], "",
            "smoke_reference needs the part data, or DATA=FOLDER, and the part smoke; "
            "write: data smoke smoke_reference",
        ),
        (["smoke"], "d", None),
        (["smoke_reference", "data", "smoke"], "", None),
        ([], "", None),
    ],
)  # fmt: skip
def test_a_part_needs_another(
    names: list[str], data: str, sentence: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part named without the parts whose files it reads is refused with what to write."""
    monkeypatch.setenv("DATA", data)
    if sentence is None:
        assert {part.name for part in arguments.chosen(names)} == set(names or [part.name for part in PARTS])
        return
    with pytest.raises(UserError) as caught:
        arguments.chosen(names)
    assert str(caught.value) == sentence


def test_a_part_of_which_every_case_failed(start: Start, tmp_path: Path) -> None:
    """It is a failed part; one whose cases lack a package is left out; and without a figure nothing is to commit."""
    process = start("norms", stub={"norms": "only out of memory"})
    output = process.communicate(timeout=60)[0]
    assert (process.returncode, "to commit" in output) == (1, False)
    assert output.startswith("norms: failed (every case failed) after ")
    assert written(tmp_path / "out")["parts"][0]["why"] == "every case failed"
    shutil.rmtree(tmp_path / "out")
    process = start("ceilings", "norms", stub={"norms": "only No module named 'no_such_package.ops'"})
    output = process.communicate(timeout=60)[0]
    assert (process.returncode, "to commit" in output) == (0, True)
    assert "norms: left out (needs the package no_such_package) after " in output
    check = written(tmp_path / "out")
    assert [row["failed_cases"] for row in check["parts"]] == [0, 0]
    assert check["results"]["norms"]["first"] == {"skipped": "needs the package no_such_package"}


def test_outcome_by_cases() -> None:
    """One figure is enough; a row of the machine or the settings is none; a module of ours that lacks is a failure."""
    failed, figure = {"failed": "out of memory"}, {"seconds": 1.0}
    assert judged({}) == judged({"data": {"skipped": "ready in the folder DATA"}}) == {"outcome": "done"}
    assert judged({"a": failed, "b": figure}) == {"outcome": "done"}
    assert judged({"a": failed, "b": {"skipped": "x"}})["outcome"] == "failed"
    assert judged({"Nano: settings": {"words": []}, "Nano: the rest": failed})["outcome"] == "failed"
    assert not is_measured("machine", {"cores": 2})
    assert is_measured("first", figure)
    assert packages.missing_in("No module named 'no_such_package'") == "no_such_package"
    assert packages.missing_in("No module named 'trinity.none'") is None
    assert packages.missing_in("out of memory") is None


def test_without_a_gpu(start: Start, tmp_path: Path) -> None:
    """One sentence before OUT is made, and nothing runs. The real worker tells by its exit code."""
    process = start(cpu=False, stub={"": "no gpu"})
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (2, "")
    assert errors == "error: torch finds no GPU; use --cpu to try the check without one\n"
    assert not list(tmp_path.iterdir())
    if not torch.cuda.is_available():
        assert worker.run("measure:ceilings", {}, needs_gpu=True) == worker.NO_GPU
        assert worker.run("", {}, needs_gpu=True) == worker.NO_GPU
    assert worker.run("", {}, needs_gpu=False) == 0


def test_a_gpu_that_is_lost(start: Start, tmp_path: Path) -> None:
    """After the first look every part runs, also those for a GPU alone; a part without one ends the check with 2."""
    process = start("ceilings", "grouped_queries", "norms", cpu=False, stub={"norms": "no gpu"})
    errors = process.communicate(timeout=60)[1]
    assert (process.returncode, errors.count("torch finds no GPU")) == (2, 1)
    assert list(outcomes(written(tmp_path / "out")).values()) == ["done", "done", "failed"]


def test_a_look_for_the_gpu_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends after a while, and the parts run and show what is wrong."""
    stub = ROOT / "tests" / "tools" / "stub_gpu_worker.py"
    monkeypatch.setenv("CHECK_WORKER", f"{sys.executable} {stub}")
    paths = [ROOT, ROOT / "kernels", ROOT / "tools"]  # as gpu_check.sh sets it
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
    for behaviour, expected in (("hang", False), ("", False), ("no gpu", True)):
        scratch = tmp_path / f"scratch {behaviour}"
        scratch.mkdir()
        monkeypatch.setenv("STUB", json.dumps({"": behaviour}))
        monkeypatch.setattr("gpu_check.supervisor.LOOK_SECONDS", 1.0 if behaviour == "hang" else 30.0)
        check = Check(tmp_path / "out", scratch, cpu=False, began=time.time())
        began = time.monotonic()
        assert check.finds_no_gpu() is expected
        assert time.monotonic() - began < 15
        check.close()


def test_stopped_before_the_first_part(start: Start, tmp_path: Path) -> None:
    """A signal during the look for the GPU: OUT is not made, so that the same call can be made again."""
    process = start(cpu=False, stub={"": "hang"})
    wait_for(lambda: list(tmp_path.glob("*/logs/gpu.log")))
    os.kill(process.pid, signal.SIGTERM)
    assert process.communicate(timeout=30) == ("", "error: stopped before the first part\n")
    assert process.returncode == 1
    assert not list(tmp_path.iterdir())


def test_a_finished_check_is_kept(start: Start, tmp_path: Path) -> None:
    """A second call into its folder is refused, whatever else is right or wrong with it, and changes no byte."""
    start("ceilings").communicate(timeout=60)
    out = tmp_path / "out"
    date = written(out)["date"]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    sentence = f"error: {out.resolve()} holds a check of {date}; name another folder, or delete it\n"
    calls: list[tuple[list[str], bool, dict[str, str], str]] = [
        (["ceilings"], True, {}, sentence),
        ([], False, {}, sentence),
        (["norm"], True, {}, "error: there is no part norm; "),
        ([], True, {"CHECK_SECONDS": "x"}, sentence),
    ]
    for parts, cpu, environment, expected in calls:
        process = start(*parts, cpu=cpu, **environment)
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output) == (2, "")
        assert errors.startswith(expected)
        assert errors.count("\n") == 1
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_folders_that_are_refused(tmp_path: Path) -> None:
    """Any of the check's files is kept; without a date in check.json it is that of the file."""
    out = tmp_path / "out"
    arguments.refuse_out(out)
    out.mkdir()
    (out / "notes.txt").touch()
    arguments.refuse_out(out)
    (out / "summary.md").touch()
    with pytest.raises(UserError, match=r"out has a file summary\.md, which the check would replace; name another"):
        arguments.refuse_out(out)
    (out / "results.jsonl").touch()
    os.utime(out / "results.jsonl", (86400 * 365.5, 86400 * 365.5))
    with pytest.raises(UserError, match=r"out holds a check of 1971-01-01; name another folder, or delete it"):
        arguments.refuse_out(out)
    (out / "check.json").write_text('{"date": "2026-12-01"}')
    with pytest.raises(UserError, match=r"out holds a check of 2026-12-01; "):
        arguments.refuse_out(out)


def blocked(folder: Path, *names: str) -> dict[str, str]:
    """An environment in which Python finds none of these modules."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({names}))\n")
    return {"PYTHONPATH": str(folder)}


def test_missing_packages_are_named(start: Start, tmp_path: Path) -> None:
    """One sentence before anything runs, and no temporary folder is left."""
    process = start(**blocked(tmp_path / "site", "omegaconf", "backports"))
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (2, "")
    names = ["omegaconf", *(["backports.zstd"] if "backports.zstd" in packages.NEEDED else [])]
    assert f"lacks {', '.join(names)}: " in errors
    assert errors.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"site"}


def test_advice_on_missing_packages(tmp_path: Path) -> None:
    """The repository's environment first, if it is there and not in use; wheels, but never of torch."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    download = "(pip download --no-deps --only-binary=:all: -d wheels tqdm numpy) and name it in WHEELS"
    wheels = f"put wheels for Python {version} into a folder {download}"
    names = ["tqdm", "numpy"]
    assert packages.advice(names, tmp_path / ".venv") == f"{sys.executable} lacks tqdm, numpy: {wheels}"
    assert packages.advice(names, Path(sys.prefix)) == f"{sys.executable} lacks tqdm, numpy: {wheels}"
    assert packages.advice(["torch"], tmp_path / ".venv").endswith("torch >= 2.11, or make one with `make venv`")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    activate = "activate the repository's environment (. .venv/bin/activate) or set PYTHON=.venv/bin/python"
    assert packages.advice(names, tmp_path / ".venv").endswith(f" lacks tqdm, numpy: {activate}; or {wheels}")
    with_torch = packages.advice(["torch", "tqdm"], tmp_path / ".venv")
    assert with_torch.endswith(f"{activate}; or set PYTHON to a Python with torch >= 2.11")


@pytest.mark.parametrize(
    ("words", "environment", "sentence"),
    [
        ([], {}, "name a folder for the results: gpu_check.sh [--cpu] OUT [PART ...]"),
        (["--cpu"], {}, "name a folder for the results: gpu_check.sh [--cpu] OUT [PART ...]"),
        (["out", "--cpu"], {}, "--cpu goes first: gpu_check.sh --cpu OUT [PART ...]"),
        (["--gpu", "out"], {}, "there is no option --gpu; use gpu_check.sh [--cpu] OUT [PART ...]"),
        (["out"], {"PYTHON": "nopy"}, "PYTHON=nopy is no program; set PYTHON to a Python, as PYTHON=.venv/bin/python"),
        (["out"], {"WHEELS": "no/ne"}, "WHEELS=no/ne is not a folder; name one that exists, or unset WHEELS"),
        (["out"], {"DATA": "none"}, "DATA=none is not a folder; name one that exists, or unset DATA"),
        (
            ["out"],
            {"DATA": "w"},
            "DATA={folder}/w has no folder tokenizer; name a folder that `make data` wrote, or unset DATA",
        ),
        (["out", "norm"], {}, f"there is no part norm; the parts are {', '.join(part.name for part in PARTS)}"),
        (["out"], {"CHECK_SECONDS": "x"}, SECONDS.format("CHECK_SECONDS=x", "CHECK_SECONDS=540")),
        (["out"], {"CHECK_SECONDS": "0"}, SECONDS.format("CHECK_SECONDS=0", "CHECK_SECONDS=540")),
        (["out"], {"CHECK_SECONDS": "nan"}, SECONDS.format("CHECK_SECONDS=nan", "CHECK_SECONDS=540")),
        (["out"], {"CHECK_PART_SECONDS": "-1"}, SECONDS.format("CHECK_PART_SECONDS=-1", "CHECK_PART_SECONDS=60")),
        (["out", "smoke"], {}, "smoke needs the part data, or DATA=FOLDER; write: data smoke"),
        (["file"], {}, "{folder}/file is a file; name a folder for the results"),
        (["file/below/out"], {}, "{folder}/file is a file; name a folder for the results"),
        (["out"], {"WHEELS": "w"}, "WHEELS={folder}/w has no file *.whl; put wheels into it, or unset WHEELS"),
    ],
)
def test_mistakes(tmp_path: Path, words: list[str], environment: dict[str, str], sentence: str) -> None:
    """One sentence and exit code 2; OUT is not made, and no temporary folder is left."""
    (tmp_path / "w").mkdir()
    (tmp_path / "temporary").mkdir()
    (tmp_path / "file").write_text("kept")
    environment = os.environ | {"PYTHON": sys.executable, "TMPDIR": str(tmp_path / "temporary")} | environment
    command = ["bash", ROOT / "tools" / "gpu_check.sh", *words]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    folder = tmp_path.resolve()
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {sentence.format(folder=folder)}\n")
    assert {path.name for path in tmp_path.iterdir()} == {"w", "temporary", "file"}
    assert (tmp_path / "file").read_text() == "kept"
    assert not list((tmp_path / "temporary").iterdir())


def test_wheels_that_pip_refuses(tmp_path: Path) -> None:
    """pip's exit and the unknown part's: both after the temporary folder is made, and it is removed."""
    (tmp_path / "wheels").mkdir()
    (tmp_path / "temporary").mkdir()
    for name, pip in (("refuses", "exit 1"), ("installs", 'mkdir -p "${CHECK_SCRATCH:?}/site"')):
        python = tmp_path / name
        python.write_text(f'#!/bin/sh\nif [ "$2" = pip ]; then {pip}; else exec {sys.executable} "$@"; fi\n')
        python.chmod(0o755)
        (tmp_path / "wheels" / "a.whl").touch()
        environment = {"PYTHON": str(python), "TMPDIR": str(tmp_path / "temporary"), "WHEELS": "wheels"}
        command = ["bash", ROOT / "tools" / "gpu_check.sh", "out", "norm"]
        done = subprocess.run(command, env=os.environ | environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert ("there is no part norm" in done.stderr) == (name == "installs")
        assert not list((tmp_path / "temporary").iterdir())


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence, and every part runs; 2 if the files are not complete in the end, else what the parts give."""

    def full(*_: object) -> None:
        Path("/dev/full").write_bytes(b"0")

    parts = [part for part in PARTS if part.name in FEW]
    for name, forever in (("for a moment", False), ("to the end", True)):
        out = tmp_path / name
        out.mkdir()
        check = Check(out, out, cpu=True, began=time.time())
        monkeypatch.setattr(check, "_in_worker", lambda *_: (0, "done"))
        # the file's own temporary file is on a full disk, and is removed after the error
        (out / "check.json.tmp").symlink_to("/dev/full")
        if forever:
            monkeypatch.setattr("gpu_check.supervisor.write_all", full)
        assert check.run(parts) == (2 if forever else 0)
        printed = capsys.readouterr()
        assert [line.split(": ")[1][:4] for line in printed.out.splitlines()[: len(FEW)]] == ["done"] * len(FEW)
        assert "cannot be written (No space left on device); the check goes on" in printed.err
        assert printed.err.count("\n") == 1
        if not forever:
            assert set(outcomes(json.loads((out / "check.json").read_text())).values()) == {"done"}


def test_nothing_else_is_needed(tmp_path: Path) -> None:
    """Every part, the suites and the tests' conftest import without the packages that a bare machine lacks."""
    lacking = ["datasets", "dill", "multiprocess", "liger_kernel", "plotly", "wandb", "hypothesis", "matplotlib"]
    modules = sorted({f"gpu_check.{part.function.split(':')[0]}" for part in PARTS})
    modules += sorted({f"benchmarks.{part.options['suite']}" for part in PARTS if "suite" in part.options})
    modules += ["benchmarks.expert_peers", "tests.conftest", "tests.kernels.conftest", "trinity.training.trainer"]
    environment = blocked(tmp_path / "site", *lacking)
    environment["PYTHONPATH"] += "".join(f":{path}" for path in (ROOT, ROOT / "kernels", ROOT / "tools"))
    code = f"import importlib\nfor name in {modules}: importlib.import_module(name)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_parts_are_callable() -> None:
    """Each part's function takes its options, each suite takes those handed on, and each step's variant exists."""
    assert len({part.name for part in PARTS}) == len(PARTS)
    for part in PARTS:
        module, name = part.function.split(":")
        function = getattr(import_module(f"gpu_check.{module}"), name)
        for options in (part.options, part.cpu_options):
            if options is None:
                continue
            signature(function).bind(**options)
            if "suite" in options:
                suite = import_module(f"benchmarks.{options['suite']}")
                signature(suite.run).bind(**{k: v for k, v in options.items() if k != "suite"})
            if "variant" in options:
                assert options["variant"] in nano_step.VARIANTS


def test_contenders_exist() -> None:
    """The names that the parts choose are names of the suites: a misspelt one would measure nothing."""
    chosen = {part.name: part.options.get("names", []) for part in PARTS}
    assert set(chosen["experts"]) | set(chosen["experts_liger"]) <= set(
        expert_peers.contenders(experts.CUDA_CASES["Nano"])
    ) | {"trinity triton"}
    assert set(chosen["head"]) <= {"ours", *head._contenders("cpu"), "Liger"}
    attends = next(part for part in PARTS if part.name == "attention").options
    assert set(attends["engines"]) <= set(attention.CONTENDERS)


@pytest.mark.parametrize("variant", nano_step.VARIANTS)
def test_variants_load(variant: str) -> None:
    """Whole and with 28 layers, which are the 3.17B parameters that fit 80 GB."""
    words = nano_step.VARIANTS[variant][1]
    load_config(str(ROOT / nano_step.CONFIG), words)
    short = load_config(str(ROOT / nano_step.CONFIG), [*words, f"model.layers={nano_step.SHORT}"])
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Trinity(short.model).parameters())
    assert parameters == pytest.approx(3.17e9, rel=2e-3)


def test_a_record_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written at once; a later line of the same case wins; a torn line is left out; without the variable, nothing."""
    path = tmp_path / "results.jsonl"
    timing.record("lost", {"seconds": 0.0})
    monkeypatch.setenv("BENCH_RECORD", str(path))
    monkeypatch.setenv("BENCH_PART", "experts")
    timing.record("a", {"seconds": float("nan"), "why": ValueError("x")})
    timing.record("a", {"seconds": 2.0})
    with open(path, "a") as file:
        file.write('{"part": "experts", "case": "b", "sec')
    assert len(path.read_text().splitlines()) == 3
    assert read_cases(path) == {"experts": {"a": {"seconds": 2.0}}}
    assert read_cases(tmp_path / "none") == {}


def test_contenders_are_reported_after_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A suite cut short has the median so far; one that fails is reported too."""
    seconds = iter([9.0, 1.0, 3.0])
    monkeypatch.setattr(timing, "parts_of", lambda call: call(None) or [next(seconds)])
    reports = []

    def broken(_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    calls = {"good": lambda _: None, "broken": broken}
    timing.take_turns(calls, 2, lambda name, row: reports.append((name, row)))
    assert reports == [
        ("good", {"seconds": [9.0]}), ("broken", {"failed": "out of memory"}),
        ("good", {"seconds": [1.0]}), ("good", {"seconds": [2.0]}),
    ]  # fmt: skip


def test_an_error_of_a_part_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory in a step is a row and no failure of the part; any other error is a row and exit code 1."""
    monkeypatch.setenv("BENCH_RECORD", str(tmp_path / "results.jsonl"))
    monkeypatch.setenv("BENCH_PART", "step")

    def full(*_: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(nano_step, "measure", full)
    assert worker.run("measure:step", {"variant": "as configured"}, needs_gpu=False) == 0
    assert worker.run("measure:step", {"variant": "none"}, needs_gpu=False) == 1
    rows = read_cases(tmp_path / "results.jsonl")["step"].values()
    assert [row["failed"] for row in rows if "failed" in row] == ["out of memory", "KeyError: 'none'"]


def test_a_variant_that_changes_nothing_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the config already has a variant's settings, the row says so and nothing is measured twice."""
    monkeypatch.setenv("BENCH_RECORD", str(tmp_path / "results.jsonl"))
    monkeypatch.setenv("BENCH_PART", "step")
    monkeypatch.setattr(nano_step, "VARIANTS", {"same": ("balanced", ["batch.microbatch=8"])})
    monkeypatch.setattr(nano_step, "measure", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert worker.run("measure:step", {"variant": "same"}, needs_gpu=False) == 0
    assert read_cases(tmp_path / "results.jsonl")["step"]["smoke: the rest"] == {
        "skipped": "the config has these settings"
    }


def test_the_name_to_commit(tmp_path: Path) -> None:
    for gpu, name in (("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3"), ("NVIDIA H200", "h200"), (None, "cpu")):
        (tmp_path / "check.json").write_text(json.dumps({"gpu": gpu, "date": "2026-12-01"}))
        assert committed_name(tmp_path / "check.json") == f"2026-12-01-{name}-check.json"


def test_kernels_by_time() -> None:
    """Sums by name, the longest first; the shares of all rows are 1."""
    found = [Interval("a", 0, 2), Interval("b", 2, 7), Interval("a", 7, 10), Interval("c", 10, 11)]
    rows = kernel_profile.by_time(found, rows=2)
    assert list(rows) == ["a", "b", "the rest"]
    assert rows["a"] == {"us": 5, "calls": 2, "share": 5 / 11}
    assert rows["the rest"] == {"us": 1, "calls": 1, "share": 1 / 11}
    assert kernel_profile.by_time([]) == {}


def test_gaps() -> None:
    """Kernels that overlap count once; a kernel inside another opens no gap; the names on both sides are given."""
    found = [Interval("c", 30, 31), Interval("a", 0, 10), Interval("inside", 2, 3), Interval("b", 8, 12)]
    found += [Interval("d", 33, 40)]
    row = kernel_profile.gaps(found)
    assert (row["span_us"], row["idle_us"], row["busy_us"]) == (40, 20, 20)
    assert row["idle_share"] == 0.5
    assert row["gaps"] == 1
    assert row["longest"] == [{"us": 18, "after": "b", "before": "c"}, {"us": 2, "after": "c", "before": "d"}]
    assert kernel_profile.gaps([])["span_us"] == 0


def test_outcome_of_tests() -> None:
    """From pytest's last line; from the lines so far if it was killed."""
    lines = "FAILED tests/a.py::test_x[1] - assert 1 == 2\n1 failed, 3 passed, 28 deselected in 2.10s\n"
    expected = {"failed": 1, "passed": 3, "deselected": 28}
    assert gpu_tests.outcome(lines) == {"tests": expected, "failures": ["test_x[1]"]}
    assert gpu_tests.outcome("a.py::x PASSED\na.py::y FAILED\na.py::z ")["tests"] == {"passed": 1, "failed": 1}
    assert "tests/models/test_attention_backends.py" in gpu_tests.gpu_files()
    assert "tests/kernels/test_experts_triton.py" in gpu_tests.gpu_files()


def test_first_tests_are_of_every_op() -> None:
    """Each file of Triton kernels with an op has a test that runs before anything is timed."""
    select = next(part for part in PARTS if part.name == "first_tests").options["select"].split(" or ")
    texts = {path.name: path.read_text() for path in (ROOT / "tests" / "kernels").glob("test_*_triton.py")}
    without = {name for name, text in texts.items() if not any(word in text for word in select)}
    # CUDA graphs and sizes beyond 2³¹; how ops are called: neither is an op
    assert without <= {"test_gpu_triton.py", "test_custom_op_triton.py"}


def test_losses_are_compared() -> None:
    def steps(*losses: float) -> list[dict[str, float]]:
        return [{"loss": loss} for loss in losses]

    assert "failed" not in smoke_run.compare(steps(9, 8, 7), steps(9.04, 8, 7, 6))
    assert smoke_run.compare(steps(9, 8), steps(9, 8.05))["failed"] == "the losses differ by up to 6.2e-03"
    assert "failed" in smoke_run.compare(steps(9, float("nan")), steps(9, 8))
    assert smoke_run.compare([], steps(9))["failed"] == "one of the two runs has no step"
    assert len(smoke_run.references()) > 5


@pytest.mark.slow
def test_the_check_at_toy_size(tmp_path: Path) -> None:
    """The real parts, without a GPU, end with 0: in two minutes on two cores, and with time to spare on busy ones."""
    done = subprocess.run(
        ["bash", ROOT / "tools" / "gpu_check.sh", "--cpu", tmp_path / "out"],
        env=os.environ | {"PYTHON": sys.executable, "CHECK_SECONDS": "1800"}, capture_output=True, text=True,
    )  # fmt: skip
    check = written(tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {outcomes(check)[name] for name in NAMES} == {"done"}
    assert all(row["cases"] for row in check["parts"] if row["part"] in NAMES)
