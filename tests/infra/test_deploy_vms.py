"""The cluster file, given to Ray's own launcher: its schema, its defaults, its provider at a simulated Amazon."""

import json
import os
import re
import shlex
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from moto.iam.policy_validation import IAMPolicyDocumentValidator

from infra.console import UserError
from infra.deployment import LEAST_DRIVER, Deployment
from infra.manifests import render

AMI = "ami-0123456789abcdef0"
DEPLOYMENT = Deployment(bucket="my-bucket", image="registry.example.org/team/raptor:1", region="us-east-1", ami=AMI)


def cluster(deployment: Deployment = DEPLOYMENT) -> dict[str, Any]:
    return json.loads(_rendered(deployment))


@cache
def _rendered(deployment: Deployment) -> str:
    return json.dumps(yaml.safe_load(render("vms", deployment)["cluster.yaml"]))


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` reads it: with Ray's defaults, and checked."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    found = prepare_config(config)
    validate_config(found)
    return found


def problems(config: dict[str, Any], cpus_per_worker: int) -> list[str]:
    """What Ray's schema does not see; `config` is as `prepared` gives it."""
    head = config["available_node_types"][config["head_node_type"]]
    workers = [one for name, one in config["available_node_types"].items() if name != config["head_node_type"]]
    found = []
    if head["resources"].get("CPU") != 0:
        found.append("work may be placed on the head")
    if "InstanceMarketOptions" in head["node_config"]:
        found.append("the head is on a spot machine")
    for one in workers:
        has = one["resources"]
        if cpus_per_worker * has.get("GPU", 0) > has.get("CPU", 0):
            found.append("a worker fits no machine")
    for one in (head, *workers):
        if not one["node_config"].get("ImageId", "").startswith("ami-"):
            found.append("Ray would take an image of 2023, whose driver is too old")
        if "IamInstanceProfile" not in one["node_config"]:
            found.append("Ray would make a role that may do everything")
        if one["node_config"].get("MetadataOptions", {}).get("HttpTokens") != "required":
            found.append("a role could be read by any program that fetches a URL")
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    options = dict(one.removeprefix("--").split("=", 1) for one in config["docker"]["run_options"])
    shm = int(options.get("shm-size", "0g").removesuffix("g")) * 2**30
    for command in commands:
        wanted = re.search(r"--object-store-memory=(\d+)", command)
        if "ray start" in command and not (wanted and int(wanted[1]) < 0.95 * shm):
            found.append("Ray's object store does not fit /dev/shm")
    tokens = [one for one in config["docker"]["run_options"] if "RAY_AUTH" in one]
    if "--env=RAY_AUTH_MODE=token" not in tokens or any("RAY_AUTH_TOKEN=" in one for one in tokens):
        found.append("the token is off, or written down")
    place = next((one.partition("RAY_AUTH_TOKEN_PATH=")[2] for one in tokens if "TOKEN_PATH" in one), "")
    if place not in config["file_mounts"]:
        found.append("the token is not brought to the machines")
    if any(config[name] for name in ("setup_commands", "head_setup_commands", "worker_setup_commands")):
        found.append("another Ray would be installed")
    if config["provider"].get("cache_stopped_nodes", True):
        found.append("machines would be kept stopped")
    return found


@pytest.mark.parametrize(
    "deployment",
    [
        DEPLOYMENT,
        Deployment(
            bucket="b-2", image="localhost:5000/x:1", ami=AMI, spot=False, endpoint_url="http://s3.example.org:9000"
        ),
        Deployment(
            **{"bucket": "b-2", "image": "r.example.org/x:1", "ami": AMI, "nodes": 16},
            **{"gpus_per_node": 4, "cores_per_node": 46, "memory_gib": 180},
        ),
    ],
)
def test_ray_takes_the_file(deployment: Deployment):
    config = prepared(cluster(deployment))
    assert problems(config, deployment.cpus_per_worker) == []
    gpu = config["available_node_types"]["gpu"]
    assert config["max_workers"] == gpu["max_workers"] == deployment.nodes
    assert gpu["resources"] == {"CPU": deployment.cores_per_node, "GPU": deployment.gpus_per_node}
    assert ("InstanceMarketOptions" in gpu["node_config"]) is deployment.spot
    assert config["docker"]["image"] == deployment.image


GONE = object()
HEAD, GPU = ("available_node_types", "head"), ("available_node_types", "gpu")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ((*HEAD, "resources"), {}, "work may be placed on the head"),
        ((*HEAD, "node_config", "InstanceMarketOptions"), {"MarketType": "spot"}, "head is on a spot machine"),
        ((*GPU, "resources", "CPU"), 8, "fits no machine"),
        ((*GPU, "node_config", "ImageId"), GONE, "driver is too old"),
        ((*HEAD, "node_config", "ImageId"), "latest_dlami", "driver is too old"),
        ((*GPU, "node_config", "IamInstanceProfile"), GONE, "may do everything"),
        ((*HEAD, "node_config", "MetadataOptions"), GONE, "by any program"),
        (("docker", "run_options"), ["--ulimit=nofile=65536:65536"], "does not fit /dev/shm"),
        (("docker", "run_options"), ["--shm-size=2g"], "the token is off"),
        (("docker", "run_options"), ["--env=RAY_AUTH_MODE=token", "--env=RAY_AUTH_TOKEN=x"], "written down"),
        (("file_mounts",), {}, "not brought to the machines"),
        (("setup_commands",), GONE, "another Ray would be installed"),
        (("provider", "cache_stopped_nodes"), GONE, "kept stopped"),
    ],
)
def test_a_file_that_breaks_a_rule_is_noticed(path: tuple[str, ...], value: Any, said: str):
    broken = json.loads(json.dumps(cluster()))
    place = broken
    for part in path[:-1]:
        place = place[part]
    if value is GONE:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    found = problems(prepared(broken), DEPLOYMENT.cpus_per_worker)
    assert any(said in one for one in found), found


@pytest.mark.parametrize(
    ("path", "value"), [(("max_workers",), "4"), (("head_node_type",), "none"), (("docker", "shm"), 1), (("typo",), 1)]
)
def test_ray_refuses_what_is_none(path: tuple[str, ...], value: Any):
    broken = cluster()
    place = broken
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(Exception, match=r"is not of type|head_node_type|Additional properties"):
        prepared(broken)


def test_the_variable_of_the_head_is_left_to_the_shell_of_the_machine():
    """`$RAY_HEAD_IP` is Ray's, and not one of the template's."""
    (command,) = [one for one in cluster()["worker_start_ray_commands"] if "ray start" in one]
    assert "--address=$RAY_HEAD_IP:6379" in shlex.split(command)


def test_ray_start_takes_the_commands():
    """Ray's own command line reads them, and starts nothing."""
    from click import NoSuchOption
    from ray.scripts.scripts import start

    commands = [*cluster()["head_start_ray_commands"], *cluster()["worker_start_ray_commands"]]
    starts = [shlex.split(one.partition("ray start ")[2]) for one in commands if "ray start" in one]
    head, worker = (start.make_context("start", list(words)).params for words in starts)
    assert (head["head"], head["num_cpus"], head["dashboard_host"]) == (True, 0, "127.0.0.1")
    assert head["object_store_memory"] == worker["object_store_memory"] == 2**30
    assert (worker["address"], head["port"]) == ("$RAY_HEAD_IP:6379", 6379)
    with pytest.raises(NoSuchOption):
        start.make_context("start", ["--object-store-memroy=1"])


@pytest.mark.parametrize("region", ["us-east-1", "eu-north-1", "cn-north-1"])
def test_any_region_will_do_as_the_image_is_given(region: str):
    """Ray has images for 15 regions and ends with an error in others; it is not asked."""
    from ray.autoscaler._private.aws.config import DEFAULT_AMI, _check_ami

    assert (region in DEFAULT_AMI) is (region == "us-east-1")
    config = prepared(cluster(replace(DEPLOYMENT, region=region, head_ami="ami-00000001")))
    _check_ami(config)
    images = {name: one["node_config"]["ImageId"] for name, one in config["available_node_types"].items()}
    assert images == {"head": "ami-00000001", "gpu": AMI}


def test_the_driver_that_is_asked_for_runs_the_cuda_that_is_pinned():
    """CUDA 13 runs on drivers of 580 and newer; with another major version this number must be looked up again."""
    pinned = re.search(r"^cuda-toolkit==(\d+)\.", Path("requirements.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert {"13": 580}[pinned[1]] == LEAST_DRIVER
    assert f"{LEAST_DRIVER} or newer" in Path("docs/deploy.md").read_text()
    assert f"{LEAST_DRIVER} or newer" in render("vms", DEPLOYMENT)["cluster.yaml"]
    with pytest.raises(UserError, match=rf"AMI is missing: .* driver of {LEAST_DRIVER} or newer"):
        render("vms", replace(DEPLOYMENT, ami="", head_ami=AMI))


@pytest.mark.parametrize(
    ("region", "trusted", "passed"),
    [
        ("eu-west-1", "ec2.amazonaws.com", ["ec2.amazonaws.com"]),
        ("us-gov-west-1", "ec2.amazonaws.com", ["ec2.amazonaws.com"]),
        ("cn-north-1", "ec2.amazonaws.com.cn", ["ec2.amazonaws.com", "ec2.amazonaws.com.cn"]),
    ],
)
def test_the_head_may_pass_the_role_to_the_service_that_the_role_trusts(region: str, trusted: str, passed: list[str]):
    found = {name: text for name, text in render("vms", replace(DEPLOYMENT, region=region)).items() if "policy" in name}
    (trust,) = json.loads(found["trust-policy.json"])["Statement"]
    (gives,) = [one for one in json.loads(found["head-policy.json"])["Statement"] if one["Action"] == "iam:PassRole"]
    assert trust["Principal"] == {"Service": trusted}
    assert gives["Condition"]["StringEquals"]["iam:PassedToService"] == passed


@pytest.mark.parametrize("name", ["head-policy.json", "trust-policy.json"])
def test_the_policies_are_policies(name: str):
    text = render("vms", DEPLOYMENT)[name]
    found = json.loads(text)
    assert found["Version"] == "2012-10-17"
    if name == "head-policy.json":
        IAMPolicyDocumentValidator(text).validate()


@pytest.mark.slow
def test_rays_launcher_starts_such_machines_at_a_simulated_amazon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """`ray up` up to the machines themselves: its own code against moto's EC2 and IAM, with the calls it makes."""
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # the launcher keeps an ssh key there
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "simulated")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "simulated")
    policy = json.loads(render("vms", DEPLOYMENT)["head-policy.json"])
    with mock_aws():
        boto3.setup_default_session()
        iam, ec2 = boto3.client("iam"), boto3.client("ec2", DEPLOYMENT.region)
        for role in ("raptor-head", "raptor-worker"):
            iam.create_instance_profile(InstanceProfileName=role)
        config = bootstrap_aws(prepared(cluster()))
        assert iam.list_roles()["Roles"] == []  # Ray has made none that may do everything

        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        calls: set[str] = set()
        for client in (provider.ec2.meta.client, provider.ec2_fail_fast.meta.client):
            client.meta.events.register("before-call.ec2", lambda model, **_: calls.add(f"ec2:{model.name}"))
        tags = {"ray-node-type": "worker", "ray-user-node-type": "gpu", "ray-cluster-name": config["cluster_name"]}
        provider.create_node(config["available_node_types"]["gpu"]["node_config"], tags, 1)
        started = [one for group in ec2.describe_instances()["Reservations"] for one in group["Instances"]]
        assert len(started) == 1
        for one in started:
            assert (one["InstanceType"], one["InstanceLifecycle"]) == (DEPLOYMENT.instance_type, "spot")
            assert one["IamInstanceProfile"]["Arn"].endswith("instance-profile/raptor-worker")
            assert one["MetadataOptions"]["HttpTokens"] == "required"
        provider.terminate_nodes(provider.non_terminated_nodes({}))
        states = {
            one["State"]["Name"] for group in ec2.describe_instances()["Reservations"] for one in group["Instances"]
        }
        assert states <= {"terminated", "shutting-down"}
        kinds = ec2.describe_instance_types(InstanceTypes=[DEPLOYMENT.instance_type])["InstanceTypes"]
    boto3.DEFAULT_SESSION = None
    allowed = {one for statement in policy["Statement"] for one in _list(statement["Action"])}
    assert calls - {"ec2:CreateTags"} <= allowed
    assert {"ec2:RunInstances", "ec2:TerminateInstances", "ec2:DescribeInstances"} <= calls
    # The default machine has what one pod of the default variables takes.
    assert kinds[0]["VCpuInfo"]["DefaultVCpus"] >= DEPLOYMENT.cores_per_node
    assert kinds[0]["GpuInfo"]["Gpus"][0]["Count"] == DEPLOYMENT.gpus_per_node
    assert kinds[0]["MemoryInfo"]["SizeInMiB"] >= DEPLOYMENT.memory_gib * 1024


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
