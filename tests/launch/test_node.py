"""launch/node.py: exit codes, torchrun's arguments, and signals, with up to two nodes on this machine."""

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.launch.launch_fakes import fake_torch, node, status
from tests.launch.local_nodes import free_port, start, wait_for


@pytest.fixture(scope="module")
def torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fake torch that runs nothing."""
    return fake_torch(tmp_path_factory.mktemp("fake"))


@pytest.mark.parametrize(
    ("exits", "written", "expected"),
    [
        ([], status(0), 0),
        ([75, 75], status(75), 75),
        ([2, 2], {}, 2),  # a mistake in the config: there is no run directory for status.json
        ([3, 3], status(3), 3),
        ([1, -15], status(1), 1),
        ([-9, -15], {}, 1),  # killed, as by the out-of-memory killer
        ([-15, 75], status(75), 75),  # torchrun ends the other processes when the first one ends
        ([1, 2], {}, 2),
        ([1], status(None), 1),  # status.json of a running run
        ([1, -6], status(0), 0),  # finished, then crashed at exit
        ([64], {}, 1),
    ],
)
def test_code_of_the_processes(torch: Path, tmp_path: Path, exits: list[int], written: dict, expected: int) -> None:
    """torchrun itself would return 0 for the first case and 1 for all others."""
    assert node(torch, tmp_path, exits=exits, files=written).returncode == expected


@pytest.mark.parametrize("code", [0, 75, 2, 3, 1, None])
def test_code_of_status_json(torch: Path, tmp_path: Path, code: int | None) -> None:
    """Used if torchrun lost the head node and so does not see its processes end."""
    ended = node(torch, tmp_path, files=status(code), torchrun_fails=True)
    assert ended.returncode == (1 if code is None else code)


@pytest.mark.parametrize("text", [None, "", '{"state": "saved"', "[]", '{"state": "saved"}'])
def test_no_code_in_status_json(torch: Path, tmp_path: Path, text: str | None) -> None:
    """Missing, empty, truncated or without a code: 1."""
    files = {} if text is None else {"status.json": text}
    assert node(torch, tmp_path, files=files, torchrun_fails=True).returncode == 1


def test_status_json_of_an_earlier_start_is_ignored(torch: Path, tmp_path: Path) -> None:
    """Otherwise a run that saved once and can no longer start would be restarted for ever."""
    (tmp_path / "status.json").write_text(status(75)["status.json"])
    assert node(torch, tmp_path, exits=[1]).returncode == 1
    assert node(torch, tmp_path, torchrun_fails=True).returncode == 1
    assert node(torch, tmp_path, exits=[1], files=status(75)).returncode == 75  # the same text, written again


def test_stop_file(torch: Path, tmp_path: Path) -> None:
    """STOP prevents a start; created during a run, it prevents a restart."""
    stop = {"STOP": "too many bad steps\n"}
    assert node(torch, tmp_path, exits=[75], files=stop).returncode == 2
    (tmp_path / "arguments.json").unlink()
    refused = node(torch, tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.strip().endswith(f"{tmp_path}/STOP says: too many bad steps; remove that file to run again")
    assert not (tmp_path / "arguments.json").exists()
    for exits, expected in (([], 0), ([3], 3), ([1], 2)):
        (tmp_path / "STOP").unlink()
        assert node(torch, tmp_path, exits=exits, files=stop).returncode == expected


@pytest.mark.parametrize("variable", ["SLURM_NODEID", "JOB_COMPLETION_INDEX"])
def test_node_index_from_the_scheduler(torch: Path, tmp_path: Path, variable: str) -> None:
    """Only node 0 hosts the rendezvous."""
    words = ["--nodes", "2", "--head", "first", "--run-dir", str(tmp_path), "script.py", "run.dir=x", "--dry-run"]
    for index, is_host in (("0", "true"), ("1", "false")):
        node(torch, tmp_path, words, **{variable: index})
        arguments = json.loads((tmp_path / "arguments.json").read_text())
        expected = {"--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=first:29400", "--max-restarts=0"}
        assert expected < set(arguments)
        assert f"--rdzv-conf=is_host={is_host},join_timeout=600,read_timeout=600" in arguments
        assert arguments[-3:] == ["script.py", "run.dir=x", "--dry-run"]


SAVES = """
import os, signal, sys, time
from pathlib import Path
signals = []
signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
run = Path(os.environ["RUN"])
(run / "started").write_text(str(os.getpid()))
while not signals:
    time.sleep(0.02)
time.sleep(1.5)
(run / "saved").write_text(f"{len(signals)}")
sys.exit(75)
"""


def test_signals_reach_the_processes(run: Path) -> None:
    """Kubernetes signals node.py alone, SLURM every process several times, which torchrun alone does not survive."""
    script = run / "saves.py"
    script.write_text(SAVES)
    launcher = start(run, [str(script)], f"--port={free_port()}")
    worker = int(wait_for(run / "started"))
    launcher.send_signal(signal.SIGTERM)
    for _ in range(2):
        time.sleep(0.3)
        for process in (launcher.pid, worker):
            os.kill(process, signal.SIGTERM)
    output, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == 75, output
    assert int(wait_for(run / "saved", 0.1)) >= 3


def test_signal_during_the_rendezvous(run: Path) -> None:
    """There is nothing to save yet, and the other node does not join: node.py ends at once."""
    port = free_port()
    launcher = start(run, ["none.py"], "--nodes=2", f"--port={port}")
    end = time.monotonic() + 60
    while True:  # until it listens: the signal handler is installed before that
        with socket.socket() as client:
            if client.connect_ex(("localhost", port)) == 0:
                break
        assert time.monotonic() < end
        time.sleep(0.1)
    launcher.send_signal(signal.SIGTERM)
    output, _ = launcher.communicate(timeout=10)
    assert launcher.returncode == 1, output
    assert "before the rendezvous was complete" in output


HANGS = """
import os, time
from pathlib import Path
name = f"start_{os.environ['GROUP_RANK']}_{os.environ['WORLD_SIZE']}"
with open(Path(os.environ["RUN"]) / name, "a") as file:
    file.write(f"{os.getpid()}\\n")
time.sleep(20 if len((Path(os.environ["RUN"]) / name).read_text().split()) == 1 else 1)
"""


@pytest.mark.slow
def test_replaced_node_rejoins(run: Path) -> None:
    """As for a Kubernetes pod that is replaced while the others hang in a collective: all restart and finish."""
    script = run / "hangs.py"
    script.write_text(HANGS)
    options = ["--nodes=2", f"--port={free_port()}"]
    first, second = (start(run, [str(script)], *options, index=index) for index in (0, 1))
    hanging = int(wait_for(run / "start_1_2"))
    for process in (second.pid, hanging):
        os.kill(process, signal.SIGKILL)
    second.communicate()
    replacement = start(run, [str(script)], *options, index=1)
    for launcher in (first, replacement):
        output, _ = launcher.communicate(timeout=120)
        assert launcher.returncode == 0, output
