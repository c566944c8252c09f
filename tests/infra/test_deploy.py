"""The variables of a deployment, and `make deploy`."""

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.__main__ import main
from infra.console import ExitCode, UserError
from infra.deployment import Deployment, What
from infra.manifests import TEMPLATES, render, write
from tests import examples

GOOD = {"bucket": "my-bucket", "image": "registry.example.org/raptor:1", "ami": "ami-0123456789abcdef0"}
HOSTILE = (
    "x\ny: z",
    '"',
    "'; rm -rf /",
    "${IFS}",
    "$(id)",
    "{{x}}",
    "a: b",
    "- a",
    "&a",
    "*a",
    "!!python/x",
    "\x00",
    "é",
)


@pytest.mark.parametrize("what", get_args(What))
def test_every_kind_can_be_rendered_and_is_what_it_says(what: What):
    for name, text in render(what, Deployment(**GOOD)).items():
        if name.endswith(".json"):
            assert isinstance(json.loads(text), dict)
        elif name.endswith(".yaml"):
            assert all(isinstance(one, dict) for one in yaml.safe_load_all(text))
        assert "$" not in text.replace("$RAY_HEAD_IP", "") or what == "docker"


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize(
    "variable",
    [
        *(
            "bucket",
            "prefix",
            "image",
            "cluster",
            "region",
            "endpoint_url",
            "namespace",
            "role_arn",
            "s3_secret",
            "blocks",
        ),
        *(
            "spot_label",
            "on_demand_label",
            "instance_type",
            "head_instance_type",
            "images",
            "weights",
            "ami",
            "head_ami",
        ),
    ],
)
def test_what_could_be_taken_for_something_else_is_refused(variable: str, text: str):
    with pytest.raises(UserError, match=variable.upper()):
        render("kubernetes", Deployment(**GOOD | {variable: text}))


PLAIN = yaml.safe_load(render("kubernetes", Deployment(**GOOD))["extract.yaml"])


@settings(max_examples=10)
@given(text=st.text(st.characters(codec="ascii"), min_size=1, max_size=40))
def test_no_text_of_the_person_changes_the_shape_of_a_file(text: str):
    """Free text stays in the place that it was put in, and nothing else moves."""
    try:
        found = render("kubernetes", Deployment(**GOOD, images=f"s3://b/{text}"))
    except UserError:
        return
    one = yaml.safe_load(found["extract.yaml"])
    assert shlex.split(one["spec"]["entrypoint"])[5] == f"s3://b/{text}"
    assert one | {"spec": one["spec"] | {"entrypoint": PLAIN["spec"]["entrypoint"]}} == PLAIN


def test_all_that_is_wrong_is_said_at_once():
    wrong: dict[str, Any] = {
        **{"bucket": "A", "prefix": "a//b", "images": "/data/imagenet", "blocks": "0..7", "image": "raptor:latest"},
        **{
            "cluster": "N",
            "region": "here",
            "endpoint_url": "host",
            "nodes": 0,
            "gpus_per_node": 8,
            "cores_per_node": 4,
        },
        **{
            "memory_gib": 16,
            "notice_s": 10,
            "hours": 0,
            "role_arn": "x",
            "ami": "ubuntu",
            "s3_secret": "y",
            "extract_args": "'",
        },
    }
    with pytest.raises(UserError) as caught:
        render("kubernetes", Deployment(**wrong))
    assert caught.value.exit_code == ExitCode.BAD_INPUT
    said = str(caught.value)
    for variable in wrong:
        if variable not in ("gpus_per_node", "s3_secret"):
            assert f"{variable.upper()}=" in said, variable
    assert "each of the 8 GPUs needs a core" in said
    assert "ROLE_ARN and S3_SECRET: pods have one or the other" in said
    assert "expected a registry, a name and a tag" in said


def test_what_a_kind_does_not_need_need_not_be_given():
    render("docker", Deployment())
    render("bucket", Deployment(bucket="my-bucket"))
    for what in ("kubernetes", "vms"):
        with pytest.raises(UserError, match=r"IMAGE=''.*\n.*BUCKET is missing"):
            render(what, Deployment())


@settings(max_examples=examples.of(40))
@given(notice_s=st.integers(30, 600), gpus=st.integers(1, 16), cores=st.integers(1, 256), nodes=st.integers(1, 200))
def test_what_follows_is_consistent(notice_s: int, gpus: int, cores: int, nodes: int):
    try:
        found = Deployment(
            **GOOD, notice_s=notice_s, gpus_per_node=gpus, cores_per_node=cores, nodes=nodes, memory_gib=8 * gpus
        )
        found.check("kubernetes")
    except UserError:
        assert cores < gpus
        return
    assert 0 < found.drain_s < found.notice_s < found.head_drain_s < found.head_grace_s
    assert 1 <= found.cpus_per_worker * gpus <= cores
    assert found.workers == nodes * gpus


def test_the_door_writes_the_files_and_says_what_to_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "it is here"
    arguments = ["deploy", "bucket", "--bucket", "my-bucket", "--region", "eu-central-1", "--out", str(out)]
    assert main(arguments) == ExitCode.OK
    said = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "reader.json",
        "writer.json",
        "bucket-policy.json",
        "lifecycle.json",
    }
    assert "LocationConstraint=eu-central-1" in said
    assert f"'{out}/writer.json'" in said
    assert main(arguments) == ExitCode.OK  # again, over the old ones
    assert main(["deploy", "bucket", "--out", str(out)]) == ExitCode.BAD_INPUT
    assert "BUCKET is missing" in capsys.readouterr().err


def test_a_folder_that_cannot_be_is_said(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"OUT=.*file cannot be written: .*; give another folder"):
        write({"a": "b"}, tmp_path / "file")


def test_make_passes_the_variables_on():
    line = "make -n deploy WHAT=vms BUCKET=b IMAGE=r/x:1 NODES=7 SPOT=0 EXTRACT_ARGS=--precision\\ int8 OUT=x"
    line += " AMI=ami-1 HEAD_AMI=ami-2"
    said = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout
    for words in (
        "infra deploy 'vms'",
        "--bucket 'b'",
        "--image 'r/x:1'",
        "--nodes '7'",
        "--no-spot",
        "--out 'x'",
        "--ami 'ami-1'",
        "--head-ami 'ami-2'",
    ):
        assert words in said
    assert "--extract-args '--precision int8'" in said


def test_every_template_is_rendered_and_every_page_names_it():
    kinds = {path.parent.name for path in TEMPLATES.rglob("*") if path.is_file()} - {"monitoring"}
    assert kinds == set(get_args(What))
    page = Path("docs/deploy.md").read_text()
    for what in get_args(What):
        assert f"make deploy WHAT={what}" in page
        for name in render(what, Deployment(**GOOD)):
            assert name in page, name
