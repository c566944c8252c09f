"""docs/scale.md says what the plan says, and its arithmetic is right."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import scale
from infra.status import BEAT_EVERY_S
from pipeline.plan import StorePlan, plan_store
from pipeline.plan_requests import alive_requests, commit_nbytes, index_nbytes
from storage_schemas.keys import sharded_array_paths
from storage_schemas.spec import MAX_CHUNKS, StoreSpec

PAGE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
SIZES = (1_281_167, 25_000_000)


def spec_of(n_images: int) -> StoreSpec:
    return replace(scale.VIT_BASE, n_samples=n_images)


def plan_of(n_images: int) -> StorePlan:
    return plan_store(
        spec_of(n_images),
        location="s3://my-bucket/store",
        teacher_files={"model.safetensors": 346_000_000},
        samples_nbytes=20 * n_images,
        n_states=13,
        depth=3,
        n_threads=16,
        n_workers=64,
    )


def row(name: str) -> list[str]:
    """The two numbers of a row of the first table."""
    (line,) = re.findall(rf"^\| {re.escape(name)}[^|]*\|(.*)$", PAGE, re.MULTILINE)
    return [cell.strip() for cell in line.split("|")[:2]]


@pytest.mark.parametrize(("place", "n_images"), list(enumerate(SIZES)))
def test_the_table_is_the_plans(place: int, n_images: int) -> None:
    plan, spec = plan_of(n_images), spec_of(n_images)
    terabytes = plan.data_nbytes / 1e12
    assert row("data")[place] == (f"{terabytes:.2f} TB" if terabytes < 10 else f"{terabytes:.0f} TB")
    assert row("shards of 256")[place] == f"{plan.n_shards:,}"
    assert row("objects: 55 a shard")[place] == f"{plan.n_objects:,}"
    assert plan.n_objects == 55 * plan.n_shards
    assert row("one shard")[place] == f"{plan.shard_nbytes / 1e6:,.0f} MB"
    assert row("PUT requests")[place] == f"{plan.extraction.put:,}"
    assert row("GET requests")[place] == f"{plan.extraction.get:,}"
    assert row("LIST requests")[place] == f"{plan.extraction.list:,}"
    assert row("a commit")[place] == f"{commit_nbytes(spec) / 1e3:.0f} kB"
    commits = commit_nbytes(spec) * plan.n_shards
    assert row("all commits")[place] == (f"{commits / 1e6:.0f} MB" if commits < 1e9 else f"{commits / 1e9:.2f} GB")
    assert row("index.parquet")[place] == f"{index_nbytes(spec) / 1e6:.0f} MB"


@pytest.mark.parametrize("gigabits", [10, 50])
def test_the_networks_table_is_arithmetic(gigabits: int) -> None:
    plan = plan_of(SIZES[0])
    per_image = plan.data_nbytes / plan.n_samples
    (line,) = re.findall(rf"^\| {gigabits} Gbit/s \|(.*)$", PAGE, re.MULTILINE)
    found = [float(re.sub(r"[^0-9.]", "", cell)) for cell in line.split("|")[:5]]
    per_gpu = gigabits * 1e9 / 8 / per_image
    all_gpus = 64 * per_gpu
    shards = all_gpus / 256
    puts = shards * (len(sharded_array_paths(spec_of(SIZES[0]))) + 3)
    assert found == pytest.approx([per_gpu, all_gpus, plan.n_samples / all_gpus, shards, puts], rel=0.02)


def test_a_billion_images_do_not_fit_for_the_reason_given() -> None:
    n_arrays = len(sharded_array_paths(spec_of(SIZES[0])))
    assert f"at most {MAX_CHUNKS:,} chunks" in PAGE
    assert f"with {n_arrays} arrays" in PAGE
    assert MAX_CHUNKS / n_arrays * 16 == pytest.approx(40e6, rel=0.02)
    least = 1e9 * n_arrays / MAX_CHUNKS
    assert f"chunks of {-(-least // 16) * 16:.0f} at least" in PAGE
    with pytest.raises(Exception, match="chunks in all, at most"):
        spec_of(1_000_000_000)


def test_signs_of_life_do_not_grow_with_workers() -> None:
    alive = alive_requests(BEAT_EVERY_S, 0)
    assert (alive.put, alive.get) == (2, 1)
    assert "plan: 3 requests in 10 s" in PAGE


def test_the_costs_are_measured_by_number_of_images() -> None:
    one, two = (scale.measure(n, 2) for n in scale.QUICK.n_images)
    assert (one["shards"], two["shards"]) == (3, 5)
    assert two["objects"] == 5 * 55
    assert one["samples.parquet MB"] < two["samples.parquet MB"]
    assert all(value >= 0 for value in two.values())
