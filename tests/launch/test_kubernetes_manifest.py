"""launch/kubernetes.yaml: Kubernetes' own schema, and what the schema does not know must go together."""

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


def test_pods_find_each_other() -> None:
    """A pod of an indexed job is called JOB-INDEX.SUBDOMAIN where a headless service of that name selects it."""
    service = DOCUMENTS["Service"]
    assert (DOCUMENTS["Job"]["apiVersion"], JOB["completionMode"]) == ("batch/v1", "Indexed")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"].items() <= JOB["template"]["metadata"]["labels"].items()
    assert POD["subdomain"] == service["metadata"]["name"]
    assert f"--head={DOCUMENTS['Job']['metadata']['name']}-0.{POD['subdomain']}" in CONTAINER["args"]
    assert service["spec"]["ports"][0]["port"] == 29400  # node.py's default


def test_number_of_nodes() -> None:
    """It stands in three places; all nodes at once."""
    nodes = JOB["completions"]
    assert JOB["parallelism"] == nodes
    assert f"--nodes={nodes}" in CONTAINER["args"]
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert "--processes=8" in CONTAINER["args"]


@pytest.mark.parametrize(
    ("code", "action"), [(2, "FailJob"), (3, "FailJob"), (75, "Ignore"), (1, "counted"), (137, "counted")]
)
def test_what_follows_an_exit_code(code: int, action: str) -> None:
    """The first rule that fits; a failure that fits none is counted for its pod, since a run fails on all at once."""
    fitting = [
        rule["action"]
        for rule in JOB["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
        and rule["onExitCodes"]["operator"] == "In"
        and rule["onExitCodes"]["containerName"] == CONTAINER["name"]
        and code in rule["onExitCodes"]["values"]
    ]
    assert [*fitting, "counted"][0] == action
    assert POD["restartPolicy"] == "Never"  # or the policy is refused
    assert JOB["backoffLimitPerIndex"] >= 1
    assert JOB["maxFailedIndexes"] == 0


def test_an_eviction_is_not_counted() -> None:
    """Preempted, drained, evicted."""
    conditions = {"type": "DisruptionTarget", "status": "True"}
    rules = JOB["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules if conditions in rule.get("onPodConditions", [])] == ["Ignore"]


def test_room() -> None:
    """Time to save, shared memory, and folders that outlive the pod."""
    assert POD["terminationGracePeriodSeconds"] >= 600
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in CONTAINER["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    claim = DOCUMENTS["PersistentVolumeClaim"]["metadata"]["name"]
    for folder in ("runs", "data"):
        assert mounts[f"{CONTAINER['workingDir']}/{folder}"]["persistentVolumeClaim"]["claimName"] == claim


def test_placeholders() -> None:
    """What the reader must fill in is in capitals, and no registry is named."""
    assert CONTAINER["image"].isupper()
    assert not {"/", "."} & set(CONTAINER["image"])


def test_the_container_starts(tmp_path: Path) -> None:
    """node.py understands the words, with $(RUN_DIR) as Kubernetes fills it in."""
    assert CONTAINER["command"] == ["python", "launch/node.py"]
    variables = {variable["name"]: variable["value"] for variable in CONTAINER["env"]}
    assert variables["RUN_DIR"].startswith("runs/")
    words = [word.replace("$(RUN_DIR)", str(tmp_path / "run")) for word in CONTAINER["args"]]
    ended = node(fake_torch(tmp_path / "fake"), tmp_path, words, JOB_COMPLETION_INDEX="255")
    assert ended.returncode == 0, ended.stderr
    told = json.loads((tmp_path / "run" / "words.json").read_text())
    assert told[-3:] == ["launch/pretrain.py", "configs/large.yaml", f"run.dir={tmp_path}/run"]
    assert "node 255 of 256" in ended.stderr
    assert (ROOT / "configs" / "large.yaml").is_file()
