"""Renders the files below infra/deploy/ from the variables of a deployment: `python -m infra deploy`.

The files are `string.Template`s. Whatever is put into them is first made JSON, which is also YAML, so that no value can
be taken for anything but a value; and what was rendered is parsed before it is written.
"""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Annotated, Any

import tyro
import yaml

from infra.console import UserError
from infra.deployment import (
    CONTAINER_HOME,
    CONTAINER_USER,
    HEAD_CORES,
    HEAD_MEMORY_GIB,
    OBJECT_STORE_GIB,
    Deployment,
    What,
    keys_below,
)
from infra.jobs import GRACE_S

TEMPLATES = Path(__file__).with_name("deploy")
_TOKEN_PATH = f"{CONTAINER_HOME}/.ray/auth_token"
_GIB = 2**30


def render(what: What, deployment: Deployment) -> dict[str, str]:
    """The files of a kind of deployment, by name.

    Raises:
        UserError: Lists every variable that is wrong.
    """
    deployment.check(what)
    return {"docker": _docker, "bucket": _bucket, "kubernetes": _kubernetes, "vms": _vms}[what](deployment)


def write(files: Mapping[str, str], out: Path) -> None:
    """Put rendered files into a folder, in the place of those that are there.

    Raises:
        UserError: The folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (out / name).write_text(text)
    except OSError as error:
        raise UserError(f"OUT={out} cannot be written: {error.strerror}; give another folder") from error


def deploy(
    what: Annotated[What, tyro.conf.Positional],
    deployment: Annotated[Deployment, tyro.conf.OmitArgPrefixes],
    out: str = "",
) -> None:
    """Render the files of a deployment, and print what to type with them.

    Args:
        what: docker, bucket, kubernetes or vms.
        deployment: Its variables.
        out: Folder for the files; empty is data/deploy/<what>.
    """
    folder = Path(out or f"data/deploy/{what}")
    files = render(what, deployment)
    write(files, folder)
    print("\n".join(str(folder / name) for name in files))
    print("Next, as docs/deploy.md explains:")
    print("\n".join(f"  {line}" for line in next_commands(what, deployment, folder)))


def next_commands(what: What, d: Deployment, folder: Path) -> list[str]:
    """What to type with the rendered files."""
    at = {name: shlex.quote(str(folder / name)) for name in _NAMES[what]}
    if what == "docker":
        return [f"docker build --file {at['Dockerfile']} --target cuda --tag {d.image_tag} ."]
    if what == "bucket":
        return [
            f"aws s3api create-bucket --bucket {d.bucket}{_region_of_bucket(d)}",
            f"aws s3api put-public-access-block --bucket {d.bucket} --public-access-block-configuration "
            "BlockPublicAcls=true,IgnorePublicAcls=true,BlockPublicPolicy=true,RestrictPublicBuckets=true",
            f"aws s3api put-bucket-policy --bucket {d.bucket} --policy file://{at['bucket-policy.json']}",
            f"aws s3api put-bucket-lifecycle-configuration --bucket {d.bucket} "
            f"--lifecycle-configuration file://{at['lifecycle.json']}",
            f"aws iam create-policy --policy-name {d.cluster}-writer --policy-document file://{at['writer.json']}",
            f"aws iam create-policy --policy-name {d.cluster}-reader --policy-document file://{at['reader.json']}",
        ]
    if what == "kubernetes":
        return [
            f"kubectl apply -f {at['base.yaml']}",
            f"kubectl apply -f {at['extract.yaml']}",
            f"kubectl -n {d.namespace} get rayjob {d.cluster}-extract -w",
        ]
    return ["ray get-auth-token --generate", f"ray up {at['cluster.yaml']}", f"ray dashboard {at['cluster.yaml']}"]


_NAMES: dict[What, tuple[str, ...]] = {
    "docker": ("Dockerfile",),
    "bucket": ("reader.json", "writer.json", "bucket-policy.json", "lifecycle.json"),
    "kubernetes": ("base.yaml", "extract.yaml", "train.yaml"),
    "vms": ("cluster.yaml", "head-policy.json", "trust-policy.json"),
}


def _docker(d: Deployment) -> dict[str, str]:
    return {"Dockerfile": (TEMPLATES / "docker" / "Dockerfile").read_text()}


# ---------------------------------------------------------------- bucket


def _bucket(d: Deployment) -> dict[str, str]:
    own = f"{_arn(d, 's3')}:::{d.bucket}"
    readable = [f"{own}/{d.prefix}/*"]
    lists = {d.bucket: [d.prefix, f"{d.prefix}/*"]}
    for place in filter(None, map(keys_below, (d.images, d.weights))):
        bucket, keys = place
        readable += [f"{_arn(d, 's3')}:::{bucket}/{key}" for key in keys]
        lists.setdefault(bucket, []).extend(keys)
    values = {
        "readable": sorted(set(readable)),
        "writable": f"{own}/{d.prefix}/*",
        "bucket": own,
        "bucket_objects": f"{own}/*",
    }
    # One statement for each bucket. Without the right to list, S3 answers 403 in the place of 404, and a store that is
    # not there yet would look like one that is forbidden.
    statements = [
        {
            "Sid": f"List{i}",
            "Effect": "Allow",
            "Action": "s3:ListBucket",
            "Resource": f"{_arn(d, 's3')}:::{bucket}",
            "Condition": {"StringLike": {"s3:prefix": sorted(set(prefixes))}},
        }
        for i, (bucket, prefixes) in enumerate(lists.items())
    ]
    return {
        name: _filled(f"bucket/{name}", values, {"lists": ",\n    ".join(map(json.dumps, statements))})
        for name in _NAMES["bucket"]
    }


def _region_of_bucket(d: Deployment) -> str:
    """Where Amazon makes buckets if it is not told is the one region that must not be told."""
    if d.region == "us-east-1":
        return ""
    return f" --region {d.region} --create-bucket-configuration LocationConstraint={d.region}"


def _arn(d: Deployment, service: str) -> str:
    return f"arn:{d.partition}:{service}"


# ---------------------------------------------------------------- kubernetes


def _kubernetes(d: Deployment) -> dict[str, str]:
    variables = _variables(d)
    drain = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    # Not told, Ray kills a driver 3 s after it has asked it to stop.
    stopping = {"RAY_JOB_STOP_WAIT_TIME_S": str(max(GRACE_S, d.head_drain_s)), drain: str(d.head_drain_s)}
    values: dict[str, Any] = {
        "namespace": d.namespace,
        "name": d.cluster,
        "role": {"eks.amazonaws.com/role-arn": d.role_arn} if d.role_arn else {},
        "image": d.image,
        "ray_version": d.ray_version,
        "active_deadline_s": d.hours * 3600,
        "object_store": str(OBJECT_STORE_GIB * _GIB),  # a string, as all rayStartParams
        "head_nodes": _labels(d.on_demand_label),
        "worker_nodes": _labels(d.spot_label if d.spot else d.on_demand_label),
        "grace_s": d.notice_s,
        "head_grace_s": d.head_grace_s,
        "user": CONTAINER_USER,
        "head_environment": _environment(variables | stopping),
        "worker_environment": _environment(variables | {drain: str(d.drain_s)}),
        "secrets": [{"secretRef": {"name": d.s3_secret}}] if d.s3_secret else [],
        "head_cores": str(HEAD_CORES),
        "head_memory": f"{HEAD_MEMORY_GIB}Gi",
        "group": "gpu-spot" if d.spot else "gpu",
        "group_labels": {"ray.io/market-type": "spot" if d.spot else "on-demand"},
        "nodes": d.nodes,
        "cores": str(d.cores_per_node),
        "memory": f"{d.memory_gib}Gi",
        "gpus": str(d.gpus_per_node),
    }
    jobs = {
        "extract": {"command": d.extract_command(), "least": 0},
        "train": {"command": d.train_command(), "least": 1},
    }
    return {
        "base.yaml": _filled("kubernetes/base.yaml", values),
        **{
            f"{kind}.yaml": _filled("kubernetes/rayjob.yaml", values | {"job": f"{d.cluster}-{kind}"} | own)
            for kind, own in jobs.items()
        },
    }


def _variables(d: Deployment) -> dict[str, str]:
    """What every container is told, wherever it runs."""
    endpoint = {"AWS_ENDPOINT_URL": d.endpoint_url} if d.endpoint_url else {}
    return {"AWS_REGION": d.region, **endpoint, "RAY_USAGE_STATS_ENABLED": "0"}


def _environment(variables: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in variables.items()]


def _labels(text: str) -> dict[str, str]:
    key, _, value = text.partition("=")
    return {key: value} if text else {}


# ---------------------------------------------------------------- machines of Amazon


_PARTS = ("subnet", "security-group", "network-interface", "volume", "key-pair")


def _vms(d: Deployment) -> dict[str, str]:
    ec2 = f"{_arn(d, 'ec2')}:{d.region}:*"
    variables = _variables(d) | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": _TOKEN_PATH,
        "RAY_JOB_START_TIMEOUT_SECONDS": "86400",  # a job may wait a day for its machine; Ray's own is 15 minutes
    }
    service = "ec2.amazonaws.com.cn" if d.partition == "aws-cn" else "ec2.amazonaws.com"
    values: dict[str, Any] = {
        "name": d.cluster,
        "region": d.region,
        "nodes": d.nodes,
        "image": d.image,
        "run_options": [
            f"--shm-size={2 * OBJECT_STORE_GIB}g",  # twice of what Ray is told to take; it refuses more than 95 %
            "--ulimit=nofile=65536:65536",
            *(f"--env={name}={value}" for name, value in variables.items()),
        ],
        "token_path": _TOKEN_PATH,
        "head_instance_type": d.head_instance_type,
        "instance_type": d.instance_type,
        "head_ami": d.head_ami or d.ami,
        "ami": d.ami,
        "head_profile": f"{d.cluster}-head",
        "worker_profile": f"{d.cluster}-worker",
        "cores": d.cores_per_node,
        "gpus": d.gpus_per_node,
        "cpus_per_worker": d.cpus_per_worker,
        "object_store_nbytes": OBJECT_STORE_GIB * _GIB,
        "instances": f"{ec2}:instance/*",
        # What an instance is started from and with; Amazon's images belong to no account of the person's.
        "parts": [f"{_arn(d, 'ec2')}:{d.region}::image/*", *(f"{ec2}:{part}/*" for part in _PARTS)],
        "worker_role": f"{_arn(d, 'iam')}::*:role/{d.cluster}-worker",
        "ec2": service,
        # What the role is passed to has the name that it trusts, or the world's also where it trusts another.
        "passed_to": sorted({service, "ec2.amazonaws.com"}),
    }
    market = "\n      InstanceMarketOptions: {MarketType: spot}" if d.spot else ""
    return {name: _filled(f"vms/{name}", values, {"market": market}) for name in _NAMES["vms"]}


# ---------------------------------------------------------------- templates


def _filled(template: str, values: Mapping[str, Any], raw: Mapping[str, str] | None = None) -> str:
    """A template with all its values as JSON, and `raw` as it is."""
    safe = {name: json.dumps(value) for name, value in values.items()}
    text = Template((TEMPLATES / template).read_text()).substitute(safe, **(raw or {}))
    if template.endswith(".json"):
        text = json.dumps(json.loads(text), indent=2) + "\n"
    else:
        list(yaml.safe_load_all(text))
    return text
