"""The RayJobs: every rule that must hold of one, each seen to fail on a manifest that breaks it."""

import json
import re
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

import pipeline.__main__
import trainer.__main__
from infra.deployment import Deployment
from infra.manifests import render
from pipeline.config import ExtractConfig
from pipeline.run_config import RunConfig, check_run
from tests.rayjob_rules import problems
from trainer.commands.train_all import AllSpans

DEPLOYMENT = Deployment(bucket="my-bucket", image="registry.example.org/team/raptor:1", blocks="0-7,7-10,10-12")
SHAPES = (
    DEPLOYMENT,
    Deployment(bucket="my-bucket", image="localhost:5000/raptor:1", spot=False, on_demand_label="", s3_secret="keys"),
    Deployment(
        bucket="my-bucket",
        image="registry.example.org/raptor@sha256:" + "0" * 64,
        nodes=64,
        gpus_per_node=8,
        cores_per_node=94,
        memory_gib=900,
        notice_s=30,
        role_arn="arn:aws:iam::123456789012:role/writer",
        endpoint_url="https://s3.example.org",
        images="s3://pictures/train-{000000..000146}.tar",
        extract_args="--compute bfloat16 --max-error '1e-4'",
    ),
)
KINDS = ("extract", "train")


def rayjob(kind: str = "extract", deployment: Deployment = DEPLOYMENT) -> dict[str, Any]:
    return json.loads(_rendered(kind, deployment))  # no anchors: what is changed in one place changes there only


@cache
def _rendered(kind: str, deployment: Deployment) -> str:
    return json.dumps(yaml.safe_load(render("kubernetes", deployment)[f"{kind}.yaml"]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("deployment", SHAPES)
def test_every_rule_holds(kind: str, deployment: Deployment):
    assert problems(rayjob(kind, deployment)) == []


CLUSTER = ("spec", "rayClusterSpec")
HEAD = (*CLUSTER, "headGroupSpec")
WORKERS = (*CLUSTER, "workerGroupSpecs", 0)
POD = ("template", "spec")
CONTAINER = (*POD, "containers", 0)
LIMITS = (*CONTAINER, "resources", "limits")
GONE = object()
STOP_WAIT, DRAIN = -2, -1  # of the environment of the head

BROKEN: list[tuple[tuple[str | int, ...], Any, str]] = [
    (("metadata", "name"), "x" * 48, "at most 47"),
    (("metadata", "name"), "Extract", "DNS-1035"),
    (("apiVersion",), "ray.io/v1alpha1", "no RayJob"),
    (("spec", "backofLimit"), 3, "unknown fields of a job"),
    (("spec", "backoffLimit"), GONE, "a lost head ends the job"),
    (("spec", "submitterConfig"), GONE, "retries of the submitter"),
    (("spec", "submissionMode"), "JobMode", "is unknown"),
    (("spec", "submissionMode"), "SidecarMode", "no submitter of its own"),
    (("spec", "shutdownAfterJobFinishes"), False, "ttlSecondsAfterFinished needs"),
    (("spec", "shutdownAfterJobFinishes"), GONE, "the machines would stay"),
    (("spec", "deletionStrategy"), {"deletionRules": []}, "deletionStrategy excludes"),
    (("spec", "clusterSelector"), {"ray.io/cluster": "x"}, "clusterSelector excludes"),
    (("spec", "activeDeadlineSeconds"), 0, "activeDeadlineSeconds: a positive"),
    (("spec", "preRunningDeadlineSeconds"), GONE, "preRunningDeadlineSeconds: a positive"),
    ((*CLUSTER, "rayVerson"), "2.60.0", "unknown fields of a cluster"),
    ((*CLUSTER, "rayVersion"), GONE, "rayVersion None"),
    ((*CLUSTER, "rayVersion"), "2.9.0", "at least 2.52.0"),
    ((*CLUSTER, "authOptions"), GONE, "everybody in the cluster"),
    ((*CLUSTER, "authOptions", "mode"), "disabled", "everybody in the cluster"),
    ((*CLUSTER, "authOptions", "enableK8sTokenAuth"), True, "refused for a RayJob"),
    ((*CLUSTER, "autoscalerOptions", "version"), GONE, "autoscaler of version v2"),
    ((*CLUSTER, "enableInTreeAutoscaling"), False, "autoscaler of version v2"),
    ((*HEAD, *POD, "restartPolicy"), "Always", "head: restartPolicy"),
    ((*WORKERS, *POD, "restartPolicy"), "OnFailure", "gpu-spot: restartPolicy"),
    ((*HEAD, *CONTAINER, "env", 0), {"name": "RAY_enable_autoscaler_v2", "value": "1"}, "exclude each other"),
    ((*HEAD, *CONTAINER, "env", 0), {"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}, "is written into the manifest"),
    ((*WORKERS, *CONTAINER, "env", 0), {"name": "RAY_AUTH_TOKEN", "value": "x"}, "is written into the manifest"),
    ((*WORKERS, *POD, "serviceAccountName"), GONE, "no access to S3"),
    ((*HEAD, *POD, "serviceAccountName"), GONE, "no access to S3"),
    ((*HEAD, *POD, "securityContext", "runAsNonRoot"), GONE, "head: it may run as root"),
    ((*WORKERS, *POD, "securityContext", "runAsUser"), 0, "gpu-spot: it may run as root"),
    ((*WORKERS, *CONTAINER, "securityContext"), GONE, "may gain privileges"),
    ((*WORKERS, *CONTAINER, "image"), "registry.example.org/team/raptor:2", "one is wanted"),
    ((*HEAD, "rayStartParams", "num-cpus"), GONE, "num-cpus must be 0"),
    ((*HEAD, "rayStartParams", "num-cpus"), 0, "rayStartParams are strings"),
    ((*HEAD, *LIMITS, "memory"), "2Gi", "less than 4 GiB"),
    ((*HEAD, *POD, "nodeSelector"), {"karpenter.sh/capacity-type": "spot"}, "head is on a spot"),
    ((*WORKERS, "rayStartParams", "labels"), "a=b", "labels are a field of the group"),
    ((*HEAD, "resources"), {"CPU": "0"}, "resources are in rayStartParams and in the group"),
    ((*WORKERS, "minReplica"), 0, "gpu-spot: unknown fields"),
    ((*WORKERS, "minReplicas"), 5, "does not hold"),
    ((*WORKERS, "maxReplicas"), GONE, "does not hold"),
    ((*WORKERS, *LIMITS, "memory"), GONE, "no limits.memory"),
    ((*WORKERS, *CONTAINER, "resources", "requests", "cpu"), "2", "requests differ from limits"),
    ((*WORKERS, *LIMITS, "cpu"), "8", "never fit a pod"),
    ((*WORKERS, *LIMITS, "nvidia.com/gpu"), GONE, "no GPU"),
    ((*WORKERS, "maxReplicas"), 3, "than the cluster can ever hold"),
    ((*WORKERS, *POD, "terminationGracePeriodSeconds"), GONE, "killed after 30 s"),
    ((*WORKERS, *POD, "terminationGracePeriodSeconds"), 105, "killed after 105 s while it drains for 105"),
    ((*HEAD, *CONTAINER, "env", STOP_WAIT), GONE, "is stopped is killed after 3 s"),
    ((*HEAD, *CONTAINER, "env", STOP_WAIT, "value"), "134", "is stopped is killed after 134 s"),
    ((*HEAD, *CONTAINER, "env", DRAIN), GONE, "drains for 30 s, and its workers may end their work for 120 s"),
    ((*HEAD, *POD, "terminationGracePeriodSeconds"), GONE, "head: it is killed after 30 s while it drains for 135 s"),
    ((*HEAD, *POD, "terminationGracePeriodSeconds"), 135, "head: it is killed after 135 s"),
    ((*WORKERS, *CONTAINER, "envFrom"), [{"secretRef": {"name": "others"}}], "different secrets"),
    ((*HEAD, *CONTAINER, "envFrom"), [{"secretRef": {"name": "others"}}], "different secrets"),
    ((*WORKERS, *POD, "tolerations"), [], "does not tolerate"),
    ((*WORKERS, "labels"), {"ray.io/market-type": "on-demand"}, "not what its machines are"),
    (("spec", "entrypoint"), "python -m pipeline extract --store data/x", "on no machine that all see"),
    (("spec", "entrypoint"), "python -m pipeline extract --device cuda", "cannot be counted"),
    (("spec", "entrypoint"), "python -m pipeline extract --workers 4", "the device is not said"),
    (("spec", "entrypoint"), "python -m trainer train --at-once 3 --device cpu", "the device is not said"),
]


@pytest.mark.parametrize(("path", "value", "said"), BROKEN)
def test_a_manifest_that_breaks_a_rule_is_noticed(path: tuple[str | int, ...], value: Any, said: str):
    broken = rayjob()
    place: Any = broken
    for part in path[:-1]:
        place = place[part]
    if value is GONE:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    assert any(re.search(re.escape(said), problem) for problem in problems(broken)), problems(broken)


def test_without_autoscaling_replicas_must_be_said():
    broken = rayjob()
    broken["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] = False
    del broken["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplicas"]
    assert any("without autoscaling minReplicas and maxReplicas are required" in one for one in problems(broken))


def test_ray_start_has_the_parameters():
    """The operator makes flags of them: num-cpus becomes --num-cpus."""
    from ray.scripts.scripts import start

    known = {name for one in start.params for name in one.opts}
    cluster = rayjob()["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], cluster["workerGroupSpecs"][0]):
        assert group["rayStartParams"]
        assert {f"--{name}" for name in group["rayStartParams"]} <= known


def test_the_version_is_the_pinned_one():
    pinned = re.search(r"^ray==(\S+)$", Path("requirements.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert rayjob()["spec"]["rayClusterSpec"]["rayVersion"] == pinned[1]


@pytest.mark.parametrize("images", ["s3://b/train-{000000..000146}.tar", "s3://b/(a)&;<b>|!*?~#", "gs://b/ü%20x"])
def test_a_shell_gives_the_driver_just_what_was_typed(images: str):
    """The submitter hands the entrypoint to bash, and what Ray is told is quoted for a second shell by Ray itself."""
    command = rayjob("extract", Deployment(bucket="my-bucket", image="r.example.org/x:1", images=images))
    bash = ["bash", "-c", f"printf '%s\\0' {command['spec']['entrypoint']}"]
    words = subprocess.run(bash, capture_output=True, text=True, check=True).stdout.split("\0")
    assert words[words.index("--images") + 1] == images
    again = ["bash", "-c", f"printf '%s\\0' {shlex.join(words[:-1])}"]
    assert subprocess.run(again, capture_output=True, text=True, check=True).stdout.split("\0") == words


@pytest.mark.parametrize("deployment", SHAPES)
def test_the_doors_take_the_commands(deployment: Deployment, monkeypatch: pytest.MonkeyPatch):
    """The real parsers of the two doors read the entrypoints; only what they would then do is not done."""
    extracts: list[tuple[ExtractConfig, RunConfig]] = []
    trainings: list[AllSpans] = []
    monkeypatch.setattr("pipeline.extract.extract_and_tell", lambda *typed, **_: extracts.append(typed) or 0)
    monkeypatch.setattr("trainer.commands.train.train_all", lambda typed, _: trainings.append(typed) or 0)
    for kind, door in (("extract", pipeline.__main__), ("train", trainer.__main__)):
        words = shlex.split(rayjob(kind, deployment)["spec"]["entrypoint"])
        assert words[:3] == ["python", "-m", door.__name__.removesuffix(".__main__")]
        assert door.main(words[3:]) == 0
    ((config, run),), (spans,) = extracts, trainings
    check_run(run)
    assert (config.images, config.store) == (deployment.images, deployment.store)
    assert (run.workers, run.cpus_per_worker, run.device) == (deployment.workers, deployment.cpus_per_worker, "cuda")
    options = spans.options
    assert (options.store, options.run, spans.blocks) == (deployment.store, deployment.runs, deployment.blocks)
    assert (spans.place.device, spans.at_once) == ("cuda", 3 if deployment.blocks else deployment.workers)


def test_secrets_are_named_and_never_written():
    found = rayjob(deployment=SHAPES[1])["spec"]["rayClusterSpec"]
    for group in (found["headGroupSpec"], found["workerGroupSpecs"][0]):
        assert group["template"]["spec"]["containers"][0]["envFrom"] == [{"secretRef": {"name": "keys"}}]


def test_the_service_account_has_the_role():
    namespace, account = yaml.safe_load_all(render("kubernetes", SHAPES[2])["base.yaml"])
    assert (namespace["kind"], account["kind"]) == ("Namespace", "ServiceAccount")
    assert account["metadata"]["annotations"] == {"eks.amazonaws.com/role-arn": "arn:aws:iam::123456789012:role/writer"}
    job = rayjob(deployment=SHAPES[2])
    assert job["metadata"]["namespace"] == account["metadata"]["namespace"] == namespace["metadata"]["name"]
    assert job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["serviceAccountName"] == "raptor"


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("group", ["head", "worker"])
def test_kubernetes_knows_every_field_of_the_pods(group: str, tmp_path: Path):
    """kubectl reads a pod into its own types and writes it again: a field that it does not know would be lost."""
    cluster = rayjob(deployment=SHAPES[1])["spec"]["rayClusterSpec"]
    spec = cluster["headGroupSpec"] if group == "head" else cluster["workerGroupSpecs"][0]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec["template"]["spec"]}

    pod["spec"]["containers"][0]["image"] = "x:1"

    def through(document: dict[str, Any]) -> Any:
        (tmp_path / "pod.json").write_text(json.dumps(document))
        command = ["kubectl", "set", "image", "--local", "-f", str(tmp_path / "pod.json"), "*=x:1", "-o", "json"]
        return _full(json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["spec"])

    before = _full(pod["spec"])
    pod["spec"]["containers"][0]["image"] = "x:2"  # nothing is written where nothing changes
    assert through(pod) == before
    pod["spec"]["terminationGracePeriod"] = 90  # misspelt
    assert through(pod) != _full(pod["spec"])


def _full(value: Any) -> Any:
    """Without what is empty, which kubectl leaves out."""
    if isinstance(value, dict):
        return {name: _full(one) for name, one in value.items() if one not in ({}, [], None)}
    return [_full(one) for one in value] if isinstance(value, list) else value
