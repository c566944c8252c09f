"""The image: what goes into it, what never does, and a linter's word on its file."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from docker.utils.build import exclude_paths

from infra.deployment import CONTAINER_HOME, CONTAINER_USER, Deployment
from infra.manifests import render

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "infra" / "deploy" / "docker" / "Dockerfile"


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """What reaches a builder of a work tree full of things that must not: Docker's own reading of .dockerignore."""
    root = tmp_path_factory.mktemp("tree")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    unwanted = (
        *(".git/config", ".venv/bin/python", "data/stores/digits/train/store.json", "local.mk", ".env", "infra/.env"),
        *("pipeline/.aws/credentials", "pipeline/__pycache__/job.cpython-311.pyc", "auth_token", "id_rsa", ".netrc"),
    )
    for name in (*tracked, *unwanted):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    return {name for name in exclude_paths(root, patterns) if (root / name).is_file()}


def test_only_what_the_image_is_made_of_reaches_the_builder(context: set[str]):
    allowed = re.compile(
        r"(infra|storage_schemas|pipeline|trainer|analysis|benchmarks)/[^.].*|pyproject\.toml|requirements\.txt"
    )
    assert {name for name in context if not allowed.fullmatch(name)} <= {"Dockerfile", ".dockerignore"}
    sent = context - {".dockerignore"}
    assert not [name for name in sent if re.search(r"(^|/)\.|__pycache__|token|credentials|/results/", name)]


def test_everything_that_the_package_needs_reaches_the_builder(context: set[str]):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    present = context | _untracked()
    for package in project["tool"]["setuptools"]["packages"]:
        folder = ROOT / package.replace(".", "/")
        assert {str(path.relative_to(ROOT)) for path in folder.glob("*.py")} <= present
    for package, patterns in project["tool"]["setuptools"]["package-data"].items():
        for pattern in patterns:
            found = {str(path.relative_to(ROOT)) for path in (ROOT / package).glob(pattern) if path.is_file()}
            assert found, (package, pattern)
            assert found <= present


def _untracked() -> set[str]:
    """Files that somebody is just writing."""
    command = ["git", "ls-files", "--others", "--exclude-standard"]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0].upper(), line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


def stages() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for word, rest in instructions():
        if word == "FROM":
            name = rest.rpartition(" AS ")[2]
        found.setdefault(name, []).append((word, rest))
    return found


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_each_target_runs_as_somebody_without_rights(target: str):
    users = [rest for word, rest in stages()[target] if word == "USER"]
    assert users == [f"{CONTAINER_USER}:{CONTAINER_USER}"]
    (made,) = [rest for word, rest in stages()["base"] if word == "RUN" and "useradd" in rest]
    assert f"--uid {CONTAINER_USER}" in made
    assert f"--home-dir {CONTAINER_HOME}" in made
    after = [word for word, _ in stages()[target]]
    assert "RUN" not in after[after.index("USER") :]  # nothing could be installed there


def test_cuda_is_what_is_built_when_nothing_is_said():
    assert list(stages())[-1] == "cuda"


def test_no_secret_is_asked_for_or_kept():
    for word, rest in instructions():
        assert not (word in ("ENV", "ARG") and re.search(r"SECRET|TOKEN|PASSWORD|KEY", rest)), rest
        assert word != "ADD"
    copied = [rest for word, rest in instructions() if word == "COPY" and "--from=" not in rest]
    assert copied == ["requirements.txt ./", ". ."]  # the second in a stage of which only a wheel is taken


def test_versions_are_the_projects():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (image,) = [rest for word, rest in instructions() if word == "ARG"]
    python = re.fullmatch(r"PYTHON_IMAGE=python:(3\.\d+)\.\d+-slim-\w+", image)
    assert python is not None
    assert python[1] == project["tool"]["mypy"]["python_version"]
    bases = {rest.split()[0] for word, rest in instructions() if word == "FROM"}
    assert bases - set(stages()) == {"${PYTHON_IMAGE}"}
    assert re.search(r"uv==\d+\.\d+\.\d+", DOCKERFILE.read_text())


def test_the_cpu_target_leaves_out_cuda_and_nothing_else():
    (command,) = [rest for word, rest in stages()["cpu-environment"] if word == "RUN"]
    pattern = re.search(r"'([^']+)'", command)
    assert pattern is not None
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    left_out = {line.partition("==")[0] for line in lines if re.search(pattern[1], line)}
    assert all(re.match(r"(nvidia|cuda|triton)", name) for name in left_out)
    assert "triton" in left_out
    needed = {line.partition("==")[0] for line in lines} - left_out
    assert {"torch", "ray", "timm", "obstore", "boto3"} <= needed


def test_what_runs_it_finds_what_it_needs():
    """bash: Ray and KubeRay start everything with it. wget: KubeRay's probes. rsync, ssh: `ray up`. gcc: our reader."""
    (installed,) = [rest for word, rest in stages()["base"] if word == "RUN" and "apt-get install" in rest]
    assert {"gcc", "libc6-dev", "openssh-client", "rsync", "wget"} <= set(installed.split())
    assert not {"ENTRYPOINT", "HEALTHCHECK"} & {word for word, _ in instructions()}


def lint(text: str) -> list[dict[str, str]]:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert program is not None, "hadolint is in requirements.txt"
    done = subprocess.run([program, "--format", "json", "-"], input=text, capture_output=True, text=True, check=False)
    return json.loads(done.stdout)


def test_a_linter_finds_nothing():
    assert lint(render("docker", Deployment())["Dockerfile"]) == []


@pytest.mark.parametrize(
    ("good", "bad", "code"),
    [
        ("USER 1000:1000\n", "USER root\n", "DL3002"),
        ("pip install --no-cache-dir uv==0.13.9", "pip install --no-cache-dir uv", "DL3013"),
        ("FROM base AS tools", "FROM python:latest AS tools", "DL3007"),
        ("COPY requirements.txt ./", "ADD requirements.txt ./", "DL3020"),
        ("WORKDIR /build", "WORKDIR build", "DL3000"),
        ("COPY . .", "COPPY . .", "DL1000"),
    ],
)
def test_the_linter_would_find_something(good: str, bad: str, code: str):
    text = DOCKERFILE.read_text()
    assert good in text
    assert code in {one["code"] for one in lint(text.replace(good, bad))}
