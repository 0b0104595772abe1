"""launch/kubernetes.yaml against Kubernetes' schema, and the values that must agree with each other."""

import json
from pathlib import Path

import pytest
import yaml

from tests.launch.launch_fakes import ROOT, fake_torch, node

DOCUMENTS = {
    document["kind"]: document for document in yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text())
}
JOB = DOCUMENTS["Job"]["spec"]
POD = JOB["template"]["spec"]
CONTAINER = POD["containers"][0]


@pytest.mark.parametrize("kind", ["Service", "PersistentVolumeClaim", "Job"])
def test_schema(kind: str) -> None:
    """Names, types and required fields, unknown fields refused."""
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate").validate
    validate(DOCUMENTS[kind], "1.33", strict=True)


def test_pod_names() -> None:
    """A pod of an indexed job is named JOB-INDEX.SUBDOMAIN if a headless service of the subdomain's name selects it."""
    service = DOCUMENTS["Service"]
    assert (DOCUMENTS["Job"]["apiVersion"], JOB["completionMode"]) == ("batch/v1", "Indexed")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"].items() <= JOB["template"]["metadata"]["labels"].items()
    assert POD["subdomain"] == service["metadata"]["name"]
    assert f"--head={DOCUMENTS['Job']['metadata']['name']}-0.{POD['subdomain']}" in CONTAINER["args"]
    assert service["spec"]["ports"][0]["port"] == 29400  # node.py's default


def test_number_of_nodes() -> None:
    """The number of nodes is the same in three places; all nodes start at once."""
    nodes = JOB["completions"]
    assert JOB["parallelism"] == nodes
    assert f"--nodes={nodes}" in CONTAINER["args"]
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert "--processes=8" in CONTAINER["args"]


@pytest.mark.parametrize(
    ("code", "action"), [(2, "FailJob"), (3, "FailJob"), (75, "Ignore"), (1, "counted"), (137, "counted")]
)
def test_action_for_an_exit_code(code: int, action: str) -> None:
    """The first rule that matches; a failure without a rule is counted for its pod, since a run fails on all pods."""
    matching = [
        rule["action"]
        for rule in JOB["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
        and rule["onExitCodes"]["operator"] == "In"
        and rule["onExitCodes"]["containerName"] == CONTAINER["name"]
        and code in rule["onExitCodes"]["values"]
    ]
    assert [*matching, "counted"][0] == action
    assert POD["restartPolicy"] == "Never"  # Kubernetes refuses a podFailurePolicy with any other
    assert JOB["backoffLimitPerIndex"] >= 1
    assert JOB["maxFailedIndexes"] == 0


def test_an_eviction_is_not_counted() -> None:
    """A preempted, drained or evicted pod is started again without limit."""
    conditions = {"type": "DisruptionTarget", "status": "True"}
    rules = JOB["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules if conditions in rule.get("onPodConditions", [])] == ["Ignore"]


def test_grace_period_and_volumes() -> None:
    """Time to save, shared memory, and folders on a persistent volume."""
    assert POD["terminationGracePeriodSeconds"] >= 600
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in CONTAINER["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    claim = DOCUMENTS["PersistentVolumeClaim"]["metadata"]["name"]
    for folder in ("runs", "data"):
        assert mounts[f"{CONTAINER['workingDir']}/{folder}"]["persistentVolumeClaim"]["claimName"] == claim


def test_placeholders() -> None:
    """The image is a placeholder in capitals, without a registry."""
    assert CONTAINER["image"].isupper()
    assert not {"/", "."} & set(CONTAINER["image"])


def test_container_command(tmp_path: Path) -> None:
    """node.py accepts the container's arguments, with $(RUN_DIR) replaced as Kubernetes does."""
    assert CONTAINER["command"] == ["python", "launch/node.py"]
    variables = {variable["name"]: variable["value"] for variable in CONTAINER["env"]}
    assert variables["RUN_DIR"].startswith("runs/")
    words = [word.replace("$(RUN_DIR)", str(tmp_path / "run")) for word in CONTAINER["args"]]
    ended = node(fake_torch(tmp_path / "fake"), tmp_path, words, JOB_COMPLETION_INDEX="255")
    assert ended.returncode == 0, ended.stderr
    arguments = json.loads((tmp_path / "run" / "arguments.json").read_text())
    assert arguments[-3:] == ["launch/pretrain.py", "configs/large.yaml", f"run.dir={tmp_path}/run"]
    assert "node 255 of 256" in ended.stderr
    assert (ROOT / "configs" / "large.yaml").is_file()
