"""The few variables that every deployment is rendered from, checked together, and what follows from them."""

import ipaddress
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

from infra.console import UserError

What = Literal["docker", "bucket", "kubernetes", "vms"]

STOPPING_S = 15  # of the grace period, for what Ray does after it has waited for the work in flight
LEAST_DRIVER = 580  # of NVIDIA, which CUDA 13 needs: that is what the pinned PyTorch brings
LEAST_NOTICE_S = 30
HEAD_CORES, HEAD_MEMORY_GIB = 2, 8  # with less the head runs out of memory while the driver reads commits
OBJECT_STORE_GIB = 1  # activations never pass through it
CONTAINER_USER = 1000  # also the first account of the machines' images, whose files are mounted into the container
CONTAINER_HOME = "/home/ray"

_DNS_LABEL = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX_PART = re.compile(r"(?!\.\.?$)[A-Za-z0-9._-]+")
_IMAGE = re.compile(
    r"([a-z0-9][a-z0-9.-]*(:\d+)?/)?[a-z0-9]+([._-]+[a-z0-9]+|/[a-z0-9]+)*"
    r"(:[A-Za-z0-9_][A-Za-z0-9._-]{0,127}|@sha256:[0-9a-f]{64})"
)
_REGION = re.compile(r"[a-z]{2,3}(-[a-z]+)+-\d")
_ENDPOINT = re.compile(r"https?://[A-Za-z0-9.-]+(:\d+)?")
_LOCATION = re.compile(r"[a-z][a-z0-9+]*://[^\s\x00-\x20\x7f'\"\\$`]+")
_ROLE = re.compile(r"arn:aws[a-z-]*:iam::\d{12}:role/[\w+=,.@/-]+")
_LABEL = re.compile(
    r"([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?"
    r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?=[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
)
_INSTANCE = re.compile(r"[a-z0-9-]+\.[a-z0-9-]+")
_AMI = re.compile(r"ami-[0-9a-f]{8}([0-9a-f]{9})?")
_SPANS = re.compile(r"\d+-\d+(,\d+-\d+)*")
_LONGEST_NAME = 38  # KubeRay takes 47 characters for a RayJob; "-extract" is put behind


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """Where the work runs, on what, and on whose bucket. It checks itself when it is rendered (`check`).

    Attributes:
        bucket: S3 bucket of store and runs.
        prefix: Within it; the store is <prefix>/store, runs are <prefix>/runs.
        images: Of an extraction: digits, or a URL that all machines can read, as s3://other-bucket/imagenet.
        weights: Of the teacher, a URL; empty for timm's own, from its hub.
        blocks: Spans of a training, such as 0-7,7-10,10-12; empty for the saved phases of the store.
        extract_args: Further flags of an extraction, such as "--compute bfloat16 --precision int8".
        train_args: Further flags of a training.
        image: Of the container, with a tag or digest; empty is the one that `docker` builds here.
        cluster: What everything made is called.
        region: Of bucket and machines.
        endpoint_url: Of an S3 server that is not Amazon's.
        nodes: GPU machines, at most.
        gpus_per_node: GPUs of one pod or machine.
        cores_per_node: Cores of one pod or machine that the work may use.
        memory_gib: Memory of one pod, GiB.
        spot: Whether GPU machines are spot ones, which may be taken away.
        notice_s: Time between the warning and the loss of a spot machine, seconds: 120 at AWS, 30 at Google.
        hours: A Kubernetes job that lasts longer is ended; the same job goes on.
        namespace: Of Kubernetes.
        role_arn: AWS role that pods get through their service account (IRSA); empty with EKS Pod Identity.
        s3_secret: Kubernetes Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, where there are no roles.
        spot_label: Label, key=value, of nodes that are spot machines; empty: anywhere.
        on_demand_label: Of nodes that stay, for the head; empty: anywhere.
        instance_type: EC2 type of a GPU machine.
        head_instance_type: EC2 type of the head.
        ami: Image of GPU machines, with Docker, its NVIDIA runtime and an NVIDIA driver of 580 or newer.
        head_ami: Image of the head, with Docker; empty is the same.
    """

    bucket: str = ""
    prefix: str = "activations"
    images: str = "digits"
    weights: str = ""
    blocks: str = ""
    extract_args: str = ""
    train_args: str = ""
    image: str = ""
    cluster: str = "raptor"
    region: str = "us-east-1"
    endpoint_url: str = ""
    nodes: int = 4
    gpus_per_node: int = 1
    cores_per_node: int = 14
    memory_gib: int = 56
    spot: bool = True
    notice_s: int = 120
    hours: int = 48
    namespace: str = "raptor"
    role_arn: str = ""
    s3_secret: str = ""
    spot_label: str = "karpenter.sh/capacity-type=spot"
    on_demand_label: str = "karpenter.sh/capacity-type=on-demand"
    instance_type: str = "g5.4xlarge"
    head_instance_type: str = "m5.xlarge"
    ami: str = ""
    head_ami: str = ""

    def check(self, what: What) -> None:
        """Refuse what could not work.

        Raises:
            UserError: Lists every variable that is wrong, with what it may be.
        """
        if problems := list(self._problems(what)):
            raise UserError("\n  ".join([f"make deploy WHAT={what} cannot be rendered:", *problems]))

    def _problems(self, what: What) -> Iterator[str]:
        yield from self._texts_wrong(what)
        yield from self._numbers_wrong()
        for variable, text in (("EXTRACT_ARGS", self.extract_args), ("TRAIN_ARGS", self.train_args)):
            try:
                shlex.split(text)
            except ValueError as error:
                yield f"{variable}={text!r}: {error}; expected flags as they are typed in a shell"
            if not text.isprintable():
                yield f"{variable}={text!r}: expected one line of printable characters"
        if what in ("kubernetes", "vms") and "/" not in self.image:
            yield (
                f"IMAGE={self.image!r}: machines must be able to pull it; expected a registry, a name and a tag, such "
                "as registry.example.org/raptor:1"
            )
        if what != "docker" and not self.bucket:
            yield "BUCKET is missing: expected the name of an S3 bucket, such as my-bucket"
        if what == "vms" and not self.ami:
            yield (
                "AMI is missing: expected the id of an image of Amazon's with Docker and an NVIDIA driver of "
                f"{LEAST_DRIVER} or newer, such as ami-0123456789abcdef0; docs/deploy.md says how to find one"
            )

    def _texts_wrong(self, what: What) -> Iterator[str]:
        named = f"a label as Kubernetes takes it: at most {_LONGEST_NAME} of a-z, 0-9 and -, beginning with a letter"
        checks = (
            ("BUCKET", self.bucket, is_bucket(self.bucket), "3 to 63 of a-z, 0-9, dots and hyphens"),
            ("PREFIX", self.prefix, _is_prefix(self.prefix), "a plain path such as team/activations, of A-Za-z0-9._-"),
            ("IMAGES", self.images, self.images == "digits" or _is(_LOCATION, self.images), f"digits or {_URL}"),
            ("WEIGHTS", self.weights, _is(_LOCATION, self.weights), _URL),
            ("BLOCKS", self.blocks, _is(_SPANS, self.blocks), "spans such as 0-7,7-10,10-12"),
            ("IMAGE", self.image, _is_image(self.image), "a name with a tag that stays, not latest, or with a digest"),
            ("CLUSTER", self.cluster, _is(_DNS_LABEL, self.cluster) and len(self.cluster) <= _LONGEST_NAME, named),
            ("REGION", self.region, _is(_REGION, self.region), "a region such as us-east-1"),
            ("ENDPOINT_URL", self.endpoint_url, _is(_ENDPOINT, self.endpoint_url), "such as http://host:9000"),
            ("NAMESPACE", self.namespace, _is(_DNS_LABEL, self.namespace), "a label such as raptor"),
            ("ROLE_ARN", self.role_arn, _is(_ROLE, self.role_arn), "such as arn:aws:iam::123456789012:role/writer"),
            ("S3_SECRET", self.s3_secret, _is(_DNS_LABEL, self.s3_secret), "the name of a Secret"),
            ("SPOT_LABEL", self.spot_label, _is(_LABEL, self.spot_label), "key=value"),
            ("ON_DEMAND_LABEL", self.on_demand_label, _is(_LABEL, self.on_demand_label), "key=value"),
            ("INSTANCE_TYPE", self.instance_type, _is(_INSTANCE, self.instance_type), "such as g5.4xlarge"),
            ("HEAD_INSTANCE_TYPE", self.head_instance_type, _is(_INSTANCE, self.head_instance_type), "as m5.xlarge"),
            ("AMI", self.ami, _is(_AMI, self.ami), "such as ami-0123456789abcdef0"),
            ("HEAD_AMI", self.head_ami, _is(_AMI, self.head_ami), "such as ami-0123456789abcdef0"),
        )
        required = {"CLUSTER": self.cluster, "REGION": self.region, "NAMESPACE": self.namespace, "IMAGES": self.images}
        if what == "vms":
            required |= {"INSTANCE_TYPE": self.instance_type, "HEAD_INSTANCE_TYPE": self.head_instance_type}
        for variable, value, good, expected in checks:
            if (value or variable in required) and not (value and good):
                yield f"{variable}={value!r}: expected {expected}"
        if self.role_arn and self.s3_secret:
            yield "ROLE_ARN and S3_SECRET: pods have one or the other; expected one of the two"

    def _numbers_wrong(self) -> Iterator[str]:
        for variable, number in (
            ("NODES", self.nodes),
            ("GPUS_PER_NODE", self.gpus_per_node),
            ("CORES_PER_NODE", self.cores_per_node),
            ("HOURS", self.hours),
        ):
            if number < 1:
                yield f"{variable}={number}: expected at least 1"
        if self.cores_per_node < self.gpus_per_node:
            yield (
                f"CORES_PER_NODE={self.cores_per_node}: each of the {self.gpus_per_node} GPUs needs a core of its own "
                f"to be fed; expected at least {self.gpus_per_node}, better 8 for each"
            )
        least = 8 * max(1, self.gpus_per_node)
        if self.memory_gib < least:
            yield f"MEMORY_GIB={self.memory_gib}: expected at least {least}, 8 for each GPU's worker"
        if self.notice_s < LEAST_NOTICE_S:
            yield f"NOTICE_S={self.notice_s}: expected at least {LEAST_NOTICE_S}, which every cloud gives"

    # ---------------------------------------------------------------- what follows

    @property
    def image_tag(self) -> str:
        """The image as it is pulled, or as it is built here."""
        return self.image or f"raptor-activation-store:{version('raptor-activation-store')}"

    @property
    def ray_version(self) -> str:
        """Of the installed Ray, which is the one in requirements.txt: head, workers and submitter have the same."""
        return version("ray")

    @property
    def partition(self) -> str:
        """AWS's name for the part of the world that ARNs begin with."""
        return {"cn": "aws-cn", "us-gov": "aws-us-gov"}.get(re.split(r"-[a-z]+-\d", self.region)[0], "aws")

    @property
    def store(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}/store"

    @property
    def runs(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}/runs"

    @property
    def workers(self) -> int:
        """Teacher actors, one for each GPU."""
        return self.nodes * self.gpus_per_node

    @property
    def cpus_per_worker(self) -> int:
        """Such that as many actors as there are GPUs fit one pod."""
        return self.cores_per_node // self.gpus_per_node

    @property
    def drain_s(self) -> int:
        """How long a node that is told to go waits for the work in flight; less than its grace period."""
        return self.notice_s - STOPPING_S

    @property
    def head_drain_s(self) -> int:
        """How long a deleted head waits for its driver: until the last worker is gone, and some seconds to wind up."""
        return self.notice_s + STOPPING_S

    @property
    def head_grace_s(self) -> int:
        """Time between the deletion of the head and its end."""
        return self.head_drain_s + STOPPING_S

    def extract_command(self) -> str:
        """What the driver of an extraction runs, quoted for one shell."""
        weights = ["--weights", self.weights] if self.weights else []
        return shlex.join(
            [
                *("python", "-m", "pipeline", "extract", "--images", self.images, "--store", self.store, *weights),
                # Said and not found out: when the driver starts, most machines are not there yet.
                *("--workers", str(self.workers), "--cpus-per-worker", str(self.cpus_per_worker), "--device", "cuda"),
                *shlex.split(self.extract_args),
            ]
        )

    def train_command(self) -> str:
        """What the driver of a training runs: all blocks side by side, one GPU each."""
        blocks = ["--blocks", self.blocks] if self.blocks else []
        n_at_once = min(self.workers, self.blocks.count(",") + 1) if self.blocks else self.workers
        return shlex.join(
            [
                *("python", "-m", "trainer", "train", "--block", "all", *blocks, "--store", self.store),
                *("--run", self.runs, "--at-once", str(n_at_once), "--device", "cuda"),
                *shlex.split(self.train_args),
            ]
        )


_URL = "a URL that every machine can read, such as s3://bucket/imagenet, without quotes, $ and spaces"


def is_bucket(name: str) -> bool:
    """Whether S3 takes this as a bucket's name."""
    try:
        ipaddress.ip_address(name)
        return False
    except ValueError:
        return _is(_BUCKET, name) and ".." not in name


def keys_below(location: str) -> tuple[str, list[str]] | None:
    """Bucket and patterns of the keys that s3://bucket/key means; None for other places.

    A key may be an object or a folder: itself and what lies below it. Of a pattern it is all that begins alike.
    """
    if not location.startswith("s3://"):
        return None
    bucket, _, key = location.removeprefix("s3://").partition("/")
    fixed = re.split(r"[*?\[{]", key, maxsplit=1)[0]
    if fixed != key or not key:
        return bucket, [f"{fixed}*"]
    return bucket, [fixed.rstrip("/"), f"{fixed.rstrip('/')}/*"]


def _is(pattern: re.Pattern[str], text: str) -> bool:
    return pattern.fullmatch(text) is not None


def _is_prefix(text: str) -> bool:
    return all(_is(_PREFIX_PART, part) for part in text.split("/"))


def _is_image(text: str) -> bool:
    return _is(_IMAGE, text) and not text.endswith(":latest")
