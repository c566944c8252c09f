"""What must hold of a RayJob: what KubeRay's operator refuses (as of v1.7), and what it lets people get wrong."""

import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

Document = dict[str, Any]

# Fields that the operator knows; Kubernetes drops others without a word when validation is off.
_JOB_FIELDS = {
    *("entrypoint", "submissionMode", "backoffLimit", "submitterConfig", "submitterPodTemplate", "metadata"),
    *("shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "preRunningDeadlineSeconds"),
    *("runtimeEnvYAML", "rayClusterSpec", "clusterSelector", "deletionStrategy", "suspend", "jobId", "managedBy"),
    *("entrypointNumCpus", "entrypointNumGpus", "entrypointResources"),
}
_CLUSTER_FIELDS = {
    *("rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs"),
    *("gcsFaultToleranceOptions", "headServiceAnnotations", "suspend", "managedBy", "upgradeStrategy", "tlsOptions"),
    *("networkPolicy", "historyServerOptions"),
}
_GROUP_FIELDS = {
    *("groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds", "labels", "resources", "priority"),
    *("rayStartParams", "template", "numOfHosts", "scaleStrategy", "suspend"),
}
_MODES = {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"}
_SECRET = re.compile(r"SECRET|TOKEN$|PASSWORD|ACCESS_KEY", re.IGNORECASE)
_DRAIN, _STOP_WAIT = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "RAY_JOB_STOP_WAIT_TIME_S"
_RESOURCES_IN_PARAMS = {"num-cpus", "num-gpus", "memory", "resources"}


def problems(document: Document) -> list[str]:
    """All that is wrong with a RayJob; empty for a good one."""
    job, cluster = document["spec"], document["spec"]["rayClusterSpec"]
    return [*_name(document), *_job(job), *_cluster(cluster), *_groups(cluster), *_work(job, cluster)]


def _name(document: Document) -> Iterator[str]:
    if document["apiVersion"] != "ray.io/v1" or document["kind"] != "RayJob":
        yield "it is no RayJob of ray.io/v1"
    name = document["metadata"]["name"]
    if len(name) > 47 or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"name {name}: a DNS-1035 label of at most 47 characters is taken"


def _job(job: Document) -> Iterator[str]:
    if unknown := set(job) - _JOB_FIELDS:
        yield f"unknown fields of a job: {unknown}"
    mode = job.get("submissionMode", "K8sJobMode")
    if mode not in _MODES:
        yield f"submissionMode {mode} is unknown"
    if job.get("backoffLimit", 0) < 1:
        yield "backoffLimit: without it a lost head ends the job"
    if "backoffLimit" not in job.get("submitterConfig", {}):
        yield "submitterConfig.backoffLimit: retries of the submitter are another number than backoffLimit"
    if mode == "SidecarMode" and {"submitterConfig", "submitterPodTemplate"} & set(job):
        yield "SidecarMode has no submitter of its own to configure"
    if not job.get("shutdownAfterJobFinishes"):
        yield "shutdownAfterJobFinishes: the machines would stay"
        if job.get("ttlSecondsAfterFinished", 0) > 0:
            yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if "deletionStrategy" in job:
        yield "deletionStrategy excludes shutdownAfterJobFinishes and needs a feature gate"
    if "clusterSelector" in job:
        yield "clusterSelector excludes backoffLimit"
    for name in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if not (isinstance(job.get(name), int) and job[name] > 0):
            yield f"{name}: a positive number is wanted, or it may wait for ever"


def _cluster(cluster: Document) -> Iterator[str]:
    if unknown := set(cluster) - _CLUSTER_FIELDS:
        yield f"unknown fields of a cluster: {unknown}"
    auth = cluster.get("authOptions", {})
    if auth.get("mode") != "token":
        yield "authOptions.mode: everybody in the cluster could run jobs"
    if auth.get("enableK8sTokenAuth"):
        yield "enableK8sTokenAuth is refused for a RayJob"
    version = cluster.get("rayVersion")
    if not isinstance(version, str) or [int(part) for part in version.split(".")] < [2, 52]:
        yield f"rayVersion {version}: at least 2.52.0 must be written for authOptions"
    options = cluster.get("autoscalerOptions", {})
    if not cluster.get("enableInTreeAutoscaling") or options.get("version") != "v2":
        yield "the autoscaler of version v2 is wanted, by autoscalerOptions.version"
    for where, group in _named_groups(cluster):
        pod, container = group["template"]["spec"], group["template"]["spec"]["containers"][0]
        if options.get("version") == "v2" and pod.get("restartPolicy", "Never") != "Never":
            yield f"{where}: restartPolicy must be Never or unset with autoscaler v2"
        if "RAY_enable_autoscaler_v2" in _environment(container):
            yield f"{where}: autoscalerOptions.version and the variable exclude each other"
        if not pod.get("serviceAccountName"):
            yield f"{where}: without serviceAccountName it has no access to S3"
        yield from _container(where, pod, container)
    keys = [group["template"]["spec"]["containers"][0].get("envFrom", []) for _, group in _named_groups(cluster)]
    if any(one != keys[0] for one in keys):
        yield "head and workers have different secrets"
    images = {group["template"]["spec"]["containers"][0]["image"] for _, group in _named_groups(cluster)}
    if len(images) != 1 or any(":" not in image.rpartition("/")[2] or image.endswith(":latest") for image in images):
        yield f"images {images}: one is wanted, with a tag that stays"


def _container(where: str, pod: Document, container: Document) -> Iterator[str]:
    who, may = pod.get("securityContext", {}), container.get("securityContext", {})
    if not who.get("runAsNonRoot") or who.get("runAsUser", 0) == 0:
        yield f"{where}: it may run as root"
    if may.get("allowPrivilegeEscalation", True) or may.get("capabilities", {}).get("drop") != ["ALL"]:
        yield f"{where}: it may gain privileges"
    for name, one in _environment(container).items():
        if _SECRET.search(name) and "value" in one:
            yield f"{where}: the secret {name} is written into the manifest"
    resources = container.get("resources", {})
    if "memory" not in resources.get("limits", {}):
        yield f"{where}: no limits.memory, so Ray sees the memory of the machine"
    if resources.get("requests") != resources.get("limits"):
        yield f"{where}: requests differ from limits"


def _groups(cluster: Document) -> Iterator[str]:
    head = cluster["headGroupSpec"]
    if head["rayStartParams"].get("num-cpus") != "0":
        yield "the head's num-cpus must be 0: work there endangers the driver"
    if _gib(_limits(head).get("memory", "0Gi")) < 4:
        yield "the head has less than 4 GiB"
    if "spot" in head["template"]["spec"].get("nodeSelector", {}).values():
        yield "the head is on a spot machine"
    yield from _end_of_the_head(cluster)
    for where, group in _named_groups(cluster):
        if unknown := set(group) - _GROUP_FIELDS:
            yield f"{where}: unknown fields {unknown}"
        params = group["rayStartParams"]
        if not all(isinstance(value, str) for value in params.values()):
            yield f"{where}: rayStartParams are strings"
        if "labels" in params:
            yield f"{where}: labels are a field of the group, not of rayStartParams"
        if _RESOURCES_IN_PARAMS & set(params) and group.get("resources"):
            yield f"{where}: resources are in rayStartParams and in the group"
    for group in cluster["workerGroupSpecs"]:
        yield from _worker(cluster, group)


def _end_of_the_head(cluster: Document) -> Iterator[str]:
    """Whether the driver has the time to end, when the job is stopped and when it is deleted."""
    head = cluster["headGroupSpec"]["template"]["spec"]
    grace, drain = _grace_s(head), _seconds(head, _DRAIN, 30)
    stop = _seconds(head, _STOP_WAIT, 3)
    longest = max(_grace_s(one["template"]["spec"]) for one in cluster["workerGroupSpecs"])
    if not 0 < drain < grace:
        yield f"head: it is killed after {grace} s while it drains for {drain} s"
    if drain < longest:
        yield f"head: it drains for {drain} s, and its workers may end their work for {longest} s"
    if stop < drain:
        yield f"head: a driver that is stopped is killed after {stop} s; its pod would wait for {drain} s"


def _worker(cluster: Document, group: Document) -> Iterator[str]:
    where, pod = group["groupName"], group["template"]["spec"]
    least, most = group.get("minReplicas"), group.get("maxReplicas")
    if (least is None or most is None) and not cluster.get("enableInTreeAutoscaling"):
        yield f"{where}: without autoscaling minReplicas and maxReplicas are required"
    if least is None or most is None or not 0 <= least <= group.get("replicas", 0) <= most:
        yield f"{where}: minReplicas <= replicas <= maxReplicas does not hold"
    grace, drain = _grace_s(pod), _seconds(pod, _DRAIN, 30)
    if not 0 < drain < grace:
        yield f"{where}: it is killed after {grace} s while it drains for {drain} s"
    if int(_limits(group).get("nvidia.com/gpu", 0)) and not any(
        one.get("key") == "nvidia.com/gpu" for one in pod.get("tolerations", [])
    ):
        yield f"{where}: GPU machines are tainted, and it does not tolerate that"
    is_spot = "spot" in pod.get("nodeSelector", {}).values()
    if is_spot != (group.get("labels", {}).get("ray.io/market-type") == "spot"):
        yield f"{where}: ray.io/market-type is not what its machines are"


def _work(job: Document, cluster: Document) -> Iterator[str]:
    """Whether what the driver asks for fits the pods."""
    words = shlex.split(job["entrypoint"])
    flags = dict(pairwise(words))
    if "extract" in words and "--workers" not in words:
        yield "how many workers is not said, and a cluster that begins with none cannot be counted"
    if flags.get("--device") != "cuda":
        yield "the device is not said, and the head, where the command runs, has no GPU"
    (group,) = cluster["workerGroupSpecs"]
    cores, gpus = float(_limits(group).get("cpu", 0)), int(_limits(group).get("nvidia.com/gpu", 0))
    if gpus < 1:
        yield "the pods have no GPU"
    if float(flags.get("--cpus-per-worker", 1)) * gpus > cores:
        yield f"{gpus} workers of {flags['--cpus-per-worker']} cores never fit a pod of {cores:g}"
    if int(flags.get("--workers", flags.get("--at-once", 0))) > group.get("maxReplicas", 0) * gpus:
        yield "more workers are asked for than the cluster can ever hold"
    if not flags.get("--store", "").startswith("s3://"):
        yield "the store is on no machine that all see"


def _named_groups(cluster: Document) -> Iterator[tuple[str, Document]]:
    yield "head", cluster["headGroupSpec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group


def _environment(container: Document) -> dict[str, Document]:
    return {one["name"]: one for one in container.get("env", [])}


def _seconds(pod: Document, name: str, default: int) -> int:
    return int(_environment(pod["containers"][0]).get(name, {}).get("value", default))


def _grace_s(pod: Document) -> int:
    return pod.get("terminationGracePeriodSeconds", 30)


def _limits(group: Document) -> Document:
    return group["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {})


def _gib(text: str) -> float:
    return float(text.removesuffix("Gi"))
