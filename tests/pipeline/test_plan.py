"""What the plan states before the first image is what is then written, and held under."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings

from infra.console import ExitCode
from infra.objects import FolderObjects, MemoryObjects
from pipeline.__main__ import main
from pipeline.extract import extract
from pipeline.plan import describe, plan_store
from pipeline.run_config import RunConfig
from storage_schemas.keys import COMMITS_PREFIX, commit_shard
from storage_schemas.spec import StoreSpec
from tests import examples
from tests.pipeline_jobs import fake_arguments, fake_config, make_tree
from tests.s3_servers import S3Server
from tests.stores import make_spec, write_planted
from tests.strategies import specs

REPO = Path(__file__).parents[2]


def planned(spec: StoreSpec, *, depth: int = 2, n_threads: int = 2, weights_nbytes: int = 0, n_states: int = 13):
    files = {"model.safetensors": weights_nbytes}
    return plan_store(spec, teacher_files=files, n_states=n_states, depth=depth, n_threads=n_threads)


def data_nbytes(objects: MemoryObjects) -> int:
    """Bytes below layer_*, head_input and statistics, documents left out."""
    return sum(info.nbytes for info in objects.list() if is_data(info.key))


def is_data(key: str) -> bool:
    return "/c/" in key or key.endswith(".tar")


@settings(max_examples=examples.of(25))
@given(spec=specs(codec="none", shuffle="none"))
def test_planned_bytes_and_objects_are_those_written(spec: StoreSpec) -> None:
    objects = MemoryObjects()
    write_planted(objects, spec)
    plan = planned(spec)
    assert plan.data_nbytes == data_nbytes(objects)
    n_commits = sum(commit_shard(info.key) is not None for info in objects.list(COMMITS_PREFIX))
    assert (plan.n_samples, plan.n_shards) == (spec.n_samples, n_commits)
    assert plan.n_objects == n_commits + sum(is_data(info.key) for info in objects.list())


def test_an_extraction_writes_what_it_planned(tmp_path: Path) -> None:
    config = fake_config(make_tree(tmp_path / "images", 21), tmp_path / "store", layers="1,2")
    (result,) = extract(config, RunConfig(no_ray=True, device="cpu"))
    data = [info.nbytes for info in FolderObjects(tmp_path / "store").list() if "/c/" in info.key]
    assert sum(data) == result.plan.data_nbytes
    commits = list((tmp_path / "store/commits").iterdir())
    assert len(data) + len(commits) == result.plan.n_objects
    assert result.nbytes == result.plan.data_nbytes + sum(path.stat().st_size for path in commits)


def test_the_first_shard_is_a_full_one() -> None:
    spec = make_spec(n_samples=20)  # 8, 8 and 4 samples, in chunks of 4
    plan = planned(spec)
    assert plan.shard_nbytes < plan.data_nbytes < 3 * plan.shard_nbytes
    assert planned(make_spec(n_samples=8)).data_nbytes == plan.shard_nbytes


def test_memory_grows_with_what_is_in_flight() -> None:
    spec = make_spec(dim=64, samples_per_shard=64)
    base = planned(spec, depth=1, n_threads=1).worker_nbytes
    assert planned(spec, depth=3, n_threads=1).worker_nbytes > base
    assert planned(spec, depth=1, n_threads=4).worker_nbytes > base
    assert planned(spec, depth=1, n_threads=1, n_states=30).worker_nbytes > base
    assert planned(spec, depth=1, n_threads=1, weights_nbytes=10**9).worker_nbytes >= base + 3 * 10**9


def test_the_plan_is_told_in_words_and_codecs_are_bounds() -> None:
    lines = describe(planned(make_spec()), make_spec(), "there/store")
    assert "there/store: 21 images, layers 0 to 2 of fake, 9 tokens x 8 channels, patches in float16" in lines[0]
    for layers, said in (((0, 2, 3), "layers 0, 2 to 3 of fake"), ((5,), "layer 5 of fake")):
        part = make_spec(layers=layers)
        assert f": 21 images, {said}, 9 tokens" in describe(planned(part), part, "x")[0]
    assert "3 shards" in lines[1]
    assert "of memory" in lines[1]
    spec = make_spec(codec="zstd-1", shuffle="byte")
    assert " before zstd-1" in describe(planned(spec), spec, "x")[1]


#: A teacher of real size on small pictures, and shards whose buffers weigh more than its weights.
MEASURED = {
    "teacher": "vit_small_patch14_reg4_dinov2", "weights": "random:0", "image_size": 126, "precision": "float32",
    "samples_per_shard": 96, "samples_per_chunk": 16, "micro_batch": 16,
}  # fmt: skip

_PROGRAM = """
import json, re, sys
from pathlib import Path
from pipeline.extract import extract
from pipeline.run_config import RunConfig
from pipeline.config import ExtractConfig
config, run = json.loads(sys.argv[1])
(result,) = extract(ExtractConfig(**config), RunConfig(**run))
assert result.complete
# not ru_maxrss, which begins with what the parent had when it forked
peak = 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(json.dumps({"peak": peak, "stated": result.plan.worker_nbytes}))
"""


def check_memory(images: Path, store: Path | str, depth: int, **changes: object) -> None:
    """Extract in a process of its own and hold its largest resident size against the plan."""
    config = MEASURED | {"images": str(images), "store": str(store)} | changes
    run = {"no_ray": True, "device": "cpu", "depth": depth, "cpus_per_worker": 2}
    command = [sys.executable, "-c", _PROGRAM, json.dumps([config, run])]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{changes}: peak {found['peak'] / 1e6:.0f} MB, stated {found['stated'] / 1e6:.0f} MB")
    assert found["stated"] / 3 < found["peak"] < found["stated"]


def test_measured_memory_stays_under_the_plan_and_near_it(tmp_path: Path) -> None:
    check_memory(make_tree(tmp_path / "images", 64), tmp_path / "store", depth=1, samples_per_shard=64)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"layers": "0"},  # states that are not stored are made all the same
        {"precision": "float16", "micro_batch": 48},
        {"codec": "zstd-1", "samples_per_shard": 48},
        {"image_size": 224, "micro_batch": 32},
    ],
)
def test_measured_memory_of_other_shapes(changes: dict, tmp_path: Path) -> None:
    check_memory(make_tree(tmp_path / "images", 192), tmp_path / "store", depth=2, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"precision": "float32"}, {"codec": "zstd-1", "samples_per_shard": 48}])
def test_measured_memory_of_writing_to_s3(
    changes: dict, tmp_path: Path, moto: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in moto.environment.items():
        monkeypatch.setenv(name, value)
    images = make_tree(tmp_path / "images", 192)
    check_memory(images, f"s3://{moto.make_bucket()}/x", depth=2, **changes)


def test_the_plan_is_for_reading_only(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    images = make_tree(tmp_path / "images", 21)
    assert main(["plan", *fake_arguments(images, tmp_path / "store", "--no-measure")]) == ExitCode.OK
    assert f"{tmp_path / 'store'}: 21 images" in capfd.readouterr().out
    assert not (tmp_path / "store").exists()
