"""The whole story on S3, as a person types it, on two unrelated servers and in both back ends."""

import os
import secrets
from pathlib import Path

import pytest

import analysis.__main__
import pipeline.__main__
import storage_schemas.__main__
import trainer.__main__
from infra.console import ExitCode, run_door
from infra.objects import open_objects
from storage_schemas import open_store
from storage_schemas.digest import content_digest
from tests.fault_proxy import Entry
from tests.s3_servers import S3Server, read_only_environment, shared_server
from trainer.run_files import BLOCK_KEY

DOORS = {
    "pipeline": pipeline.__main__.main,
    "storage_schemas": storage_schemas.__main__.main,
    "trainer": trainer.__main__.main,
    "analysis": analysis.__main__.main,
}
ALONE = "--no-ray --device cpu"


@pytest.fixture
def type_in(capsys: pytest.CaptureFixture[str]):
    """Runs a door with a line of arguments; returns exit code and all that was said."""

    def run(line: str) -> tuple[int, str]:
        package, *arguments = line.split()
        code = run_door(lambda: DOORS[package](arguments))
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def use(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def below(server: S3Server, bucket: str) -> list[Entry]:
    return [entry for entry in server.log if entry.bucket == bucket]


@pytest.mark.s3
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("rclone", "webdataset"),
        pytest.param("moto", "zarr", marks=pytest.mark.slow),
        pytest.param("moto", "webdataset", marks=pytest.mark.slow),
        pytest.param("rclone", "zarr", marks=pytest.mark.slow),
    ],
)
def test_the_whole_story(name: str, backend: str, type_in, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = shared_server(name)
    bucket = server.make_bucket()
    use(server.environment, monkeypatch)
    store, local = f"s3://{bucket}/{secrets.token_hex(3)}/digits", tmp_path / "digits"
    sizes = f"--format {backend} --limit 48 --samples-per-shard 32 --precision int8 {ALONE}"

    code, said = type_in(f"pipeline extract --store {store} {sizes}")
    assert code == ExitCode.OK, said
    assert f"Next: make train BLOCK=0-7 STORE={store}" in said
    assert type_in(f"pipeline extract --store {local} {sizes}")[0] == ExitCode.OK
    for split in ("train", "val"):  # the same bytes as on disk
        assert content_digest(open_objects(f"{store}/{split}")) == content_digest(open_objects(local / split))

    n_before = len(below(server, bucket))
    code, said = type_in(f"pipeline extract --store {store} {sizes}")
    assert code == ExitCode.OK, said
    assert not any(e.method == "PUT" for e in below(server, bucket)[n_before:] if "/log/" not in e.key)

    use(read_only_environment(server, bucket), monkeypatch)
    code, said = type_in(f"storage_schemas inspect {store}")
    assert code == ExitCode.OK, said
    assert said.count("int8 against float32") == 2
    code, said = type_in(f"pipeline verify --store {store}")
    assert code == ExitCode.OK, said
    assert said.count("sound") == 2
    code, said = type_in(f"storage_schemas stores s3://{bucket}")
    assert code == ExitCode.OK, said
    assert "digits/train" in said
    assert "digits/val" in said
    code, said = type_in(f"storage_schemas copy {store} {tmp_path / 'mirror'} --layers 0-2")
    assert code == ExitCode.OK, said
    mirror = open_store(tmp_path / "mirror" / "train")
    assert mirror.layers == (0, 1, 2)
    assert mirror.verify() == []
    code, said = type_in(f"analysis phases --k 2 --store {store} --out {tmp_path / 'phases'}")
    assert code == ExitCode.OK, said
    assert "BLOCKS=0-" in said
    code, said = type_in(f"trainer train --store {store} --block 0-2 --steps 2 --device cpu --run {tmp_path / 'run'}")
    assert code == ExitCode.OK, said
    assert not any(e.method in ("PUT", "DELETE", "POST") for e in below(server, bucket)[-40:])

    began = len(below(server, bucket))
    code, said = type_in(f"pipeline extract --store s3://{bucket}/other {sizes}")
    assert code in (ExitCode.BAD_INPUT, ExitCode.PROBLEMS), said
    assert "may not" in said or "403" in said or "Access" in said, said
    assert len(below(server, bucket)) - began < 12  # at once

    use(server.environment, monkeypatch)
    code, said = type_in(
        f"trainer train --store {store} --block 0-2 --steps 2 --device cpu --run s3://{bucket}/runs/0-2"
    )
    assert code == ExitCode.OK, said
    weights = open_objects(f"s3://{bucket}/runs/0-2").get(BLOCK_KEY)
    assert weights == open_objects(tmp_path / "run").get(BLOCK_KEY)
    code, said = type_in(f"storage_schemas copy {store} s3://{bucket}/copied")
    assert code == ExitCode.OK, said
    assert content_digest(open_objects(f"s3://{bucket}/copied/val")) == content_digest(open_objects(local / "val"))
    other = "webdataset" if backend == "zarr" else "zarr"
    code, said = type_in(f"storage_schemas convert {store} s3://{bucket}/converted --format {other}")
    assert code == ExitCode.OK, said
    code, said = type_in(f"storage_schemas convert s3://{bucket}/converted {tmp_path / 'back'} --format {backend}")
    assert code == ExitCode.OK, said
    assert content_digest(open_objects(tmp_path / "back" / "train")) == content_digest(open_objects(local / "train"))
