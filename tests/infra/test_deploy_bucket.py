"""The bucket's policies, lived under by our own commands on a server that obeys them."""

import io
import json
import os
import secrets
from pathlib import Path
from typing import Any

import pytest
from moto.iam.policy_validation import IAMPolicyDocumentValidator

import pipeline.__main__
import storage_schemas.__main__
import trainer.__main__
from infra.console import ExitCode, UserError, run_door
from infra.deployment import Deployment
from infra.manifests import render
from infra.objects import ObjectAccessError, ObjectMissingError, open_objects
from tests.policies import Request, allows, asked, policy_server, without
from tests.s3_servers import S3Server, environment_of, settings_of

DOORS = {"pipeline": pipeline.__main__, "storage_schemas": storage_schemas.__main__, "trainer": trainer.__main__}
SMALL = "--limit 8 --layers 0 --samples-per-shard 8 --samples-per-chunk 8"
EXTRACT = f"pipeline extract {SMALL} --no-ray --device cpu"
DEPLOYMENT = Deployment(
    bucket="my-bucket", prefix="team/acts", images="s3://pictures/imagenet", weights="s3://weights/dino.pth"
)


def policies(deployment: Deployment) -> dict[str, Any]:
    return {name: json.loads(text) for name, text in render("bucket", deployment).items()}


@pytest.fixture
def type_in(capsys: pytest.CaptureFixture[str]):
    def run(line: str) -> tuple[int, str]:
        package, *arguments = line.split()
        code = run_door(lambda: DOORS[package].main(arguments))
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def become(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in environment_of(endpoint).items():
        monkeypatch.setenv(name, value)


@pytest.mark.slow
def test_our_commands_need_the_writer_policy_and_nothing_else(
    moto: S3Server, type_in, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    deployment = Deployment(bucket=moto.make_bucket(), prefix=secrets.token_hex(4))
    found = policies(deployment)
    with policy_server(moto.direct, found["writer.json"]) as server:
        become(server.endpoint, monkeypatch)
        code, said = type_in(f"{EXTRACT} --store {deployment.store}")
        assert code == ExitCode.OK, said
        assert server.denied == []

        server.policy = found["reader.json"]
        n_before = len(server.allowed)
        for line in (f"storage_schemas inspect {deployment.store}", f"pipeline verify --store {deployment.store}"):
            code, said = type_in(line)
            assert code == ExitCode.OK, said
        assert server.denied == []
        # Nothing is granted that is not used: neither to writers ...
        assert {one.action for one in server.allowed} == granted(found["writer.json"])
        # ... nor to readers.
        assert {one.action for one in server.allowed[n_before:]} == granted(found["reader.json"])

        code, said = type_in(f"{EXTRACT} --store {deployment.store} --overwrite --precision int8")
        assert code == ExitCode.BAD_INPUT
        assert f"nothing can be written to {deployment.store}" in said
        assert {one.action for one in server.denied} == {"s3:PutObject"}
        assert type_in(f"pipeline verify --store {deployment.store}")[0] == ExitCode.OK  # and nothing was

        server.policy = found["writer.json"]
        elsewhere = f"s3://{deployment.bucket}/elsewhere"
        code, said = type_in(f"{EXTRACT} --store {elsewhere}")
        assert code == ExitCode.BAD_INPUT
        assert "403" in said


def granted(policy: dict[str, Any]) -> set[str]:
    found = [statement["Action"] for statement in policy["Statement"]]
    return {one for actions in found for one in ([actions] if isinstance(actions, str) else actions)}


@pytest.mark.slow
@pytest.mark.parametrize("action", ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:ListBucket"])
def test_without_any_one_right_a_writer_is_refused(action: str, moto: S3Server, type_in, monkeypatch):
    deployment = Deployment(bucket=moto.make_bucket(), prefix=secrets.token_hex(4))
    writer = policies(deployment)["writer.json"]
    with policy_server(moto.direct, without(writer, action)) as server:
        become(server.endpoint, monkeypatch)
        code, said = type_in(f"{EXTRACT} --store {deployment.store}")
        assert code != ExitCode.OK, said
        assert "403" in said


@pytest.mark.slow
def test_a_training_lives_under_the_policies(moto: S3Server, type_in, monkeypatch, tmp_path: Path):
    deployment = Deployment(bucket=moto.make_bucket(), prefix=secrets.token_hex(4))
    found = policies(deployment)
    train = f"trainer train --block 0-2 --steps 2 --device cpu --store {deployment.store}"
    with policy_server(moto.direct, found["writer.json"]) as server:
        become(server.endpoint, monkeypatch)
        assert (
            type_in(f"{EXTRACT.replace('--layers 0', '--layers 0-2 --limit 32')} --store {deployment.store}")[0]
            == ExitCode.OK
        )
        code, said = type_in(f"{train} --run {deployment.runs}/one")
        assert code == ExitCode.OK, said
        server.policy = found["reader.json"]
        code, said = type_in(f"{train} --run {tmp_path / 'run'}")
        assert code == ExitCode.OK, said
        assert server.denied == []
        code, said = type_in(f"{train} --run {deployment.runs}/two")
        assert code == ExitCode.BAD_INPUT, said
        code, said = type_in(f"storage_schemas copy {deployment.store} {tmp_path / 'copy'}")
        assert code == ExitCode.OK, said


@pytest.mark.slow
def test_images_may_lie_in_another_bucket(moto: S3Server, type_in, monkeypatch):
    """With what only reads them: the listing and reading of images goes through another library."""
    from PIL import Image

    pictures = moto.make_bucket()
    deployment = Deployment(bucket=moto.make_bucket(), prefix="p", images=f"s3://{pictures}/digits/small")
    become(moto.endpoint, monkeypatch)
    for i in range(8):
        picture = io.BytesIO()
        Image.new("L", (28, 28), 30 * i).save(picture, "PNG")
        open_objects(deployment.images).put(f"class{i % 2}/{i}.png", picture.getvalue())
    writer = policies(deployment)["writer.json"]
    with policy_server(moto.direct, writer) as server:
        become(server.endpoint, monkeypatch)
        code, said = type_in(
            f"{EXTRACT} --images {deployment.images} --teacher digits_vit --image-size 32 --store {deployment.store}"
        )
        assert code == ExitCode.OK, said
        assert any(pictures in one.resource for one in server.allowed)
        assert server.denied == []


def test_a_missing_object_is_missing_and_not_forbidden(moto: S3Server, monkeypatch):
    """S3 says 404 only to those who may list; a policy without the right to list makes new stores impossible."""
    deployment = Deployment(bucket=moto.make_bucket(), prefix="a")
    writer = policies(deployment)["writer.json"]
    with policy_server(moto.direct, writer) as server:
        become(server.endpoint, monkeypatch)
        assert list(open_objects(deployment.store).list()) == []
        with pytest.raises(ObjectMissingError, match="is missing"):
            open_objects(deployment.store).get("store.json")
        server.policy = without(writer, "s3:ListBucket")
        with pytest.raises(ObjectAccessError, match="403"):
            open_objects(deployment.store).get("store.json")


@pytest.mark.parametrize(
    ("method", "path", "reader", "writer"),
    [
        ("GET", "/my-bucket/team/acts/store/store.json", True, True),
        ("HEAD", "/my-bucket/team/acts/runs/x", True, True),
        ("PUT", "/my-bucket/team/acts/store/store.json", False, True),
        ("DELETE", "/my-bucket/team/acts/store/log/probe", False, True),
        ("GET", "/my-bucket?list-type=2&prefix=team/acts/store/", True, True),
        ("GET", "/my-bucket?list-type=2&prefix=team/acts", True, True),
        ("GET", "/my-bucket?list-type=2&prefix=", False, False),
        ("GET", "/my-bucket?list-type=2", False, False),
        ("GET", "/my-bucket?list-type=2&prefix=team/actsother/", False, False),
        ("GET", "/my-bucket/team/actsother/x", False, False),
        ("PUT", "/my-bucket/team/x", False, False),
        ("GET", "/other/team/acts/store/x", False, False),
        ("GET", "/pictures/imagenet/train/cat/1.jpg", True, True),
        ("GET", "/pictures?list-type=2&prefix=imagenet/", True, True),
        ("GET", "/pictures?list-type=2&prefix=private/", False, False),
        ("GET", "/pictures/imagenet-private/1.jpg", False, False),
        ("GET", "/weights/dino.pth.old", False, False),
        ("PUT", "/pictures/imagenet/train/cat/1.jpg", False, False),
        ("DELETE", "/pictures/imagenet/train/cat/1.jpg", False, False),
        ("GET", "/weights/dino.pth", True, True),
        ("PUT", "/weights/dino.pth", False, False),
    ],
)
def test_who_may_do_what(method: str, path: str, reader: bool, writer: bool):
    found = policies(DEPLOYMENT)
    assert allows(found["reader.json"], asked(method, path)) is reader
    assert allows(found["writer.json"], asked(method, path)) is writer


@pytest.mark.parametrize("action", ["s3:PutBucketPolicy", "s3:DeleteBucket", "s3:PutObjectAcl", "s3:ListAllMyBuckets"])
def test_nobody_may_touch_the_bucket_itself(action: str):
    for name in ("reader.json", "writer.json"):
        for resource in ("arn:aws:s3:::my-bucket", "arn:aws:s3:::my-bucket/team/acts/x", "*"):
            assert not allows(policies(DEPLOYMENT)[name], Request(action, resource))


@pytest.mark.parametrize("name", ["reader.json", "writer.json"])
def test_another_parser_of_policies_takes_them(name: str):
    IAMPolicyDocumentValidator(render("bucket", DEPLOYMENT)[name]).validate()


def test_it_would_not_take_a_wrong_one():
    wrong = render("bucket", DEPLOYMENT)["reader.json"].replace("s3:GetObject", "s3 GetObject")
    with pytest.raises(Exception, match=r"Policy|policy|vendor|action"):
        IAMPolicyDocumentValidator(wrong).validate()


def test_unfinished_uploads_are_ended_and_nothing_else(moto: S3Server):
    """Read back from a server that keeps lifecycle rules: nothing that is whole is ever deleted by age."""
    bucket = moto.make_bucket()
    found = render("bucket", Deployment(bucket=bucket))
    client = settings_of(moto.direct).make_client(timeout_s=30)
    client.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration=json.loads(found["lifecycle.json"]))
    (rule,) = client.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]
    client.put_bucket_policy(Bucket=bucket, Policy=found["bucket-policy.json"])
    (kept,) = json.loads(client.get_bucket_policy(Bucket=bucket)["Policy"])["Statement"]
    assert (kept["Effect"], kept["Condition"]) == ("Deny", {"Bool": {"aws:SecureTransport": "false"}})
    assert rule["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 3}
    assert rule["Status"] == "Enabled"
    assert not {"Expiration", "NoncurrentVersionExpiration", "Transitions"} & set(rule)


@pytest.mark.parametrize(("region", "partition"), [("cn-north-1", "aws-cn"), ("us-gov-west-1", "aws-us-gov")])
def test_other_partitions_have_their_own_names(region: str, partition: str):
    text = "".join(render("bucket", Deployment(bucket="my-bucket", region=region)).values())
    assert f"arn:{partition}:s3:::my-bucket" in text
    assert "arn:aws:" not in text


def test_a_bucket_that_is_none_is_refused():
    for bucket in ("", "A", "a..b", "192.168.0.1", "-a-", "a_b", 'x","Effect":"Allow', "a" * 64):
        with pytest.raises(UserError, match="BUCKET"):
            render("bucket", Deployment(bucket=bucket))
