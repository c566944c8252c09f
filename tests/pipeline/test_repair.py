"""Damage of every kind to every kind of object: verify reports it, and repair brings back the store to the byte."""

import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from infra.console import ExitCode, JobError, UserError
from infra.objects import FolderObjects
from infra.status import my_heartbeat
from pipeline.__main__ import main
from pipeline.config import ExtractConfig
from pipeline.extract import extract
from pipeline.job import ExtractResult
from pipeline.repair import repair
from storage_schemas.errors import NotAStoreError
from storage_schemas.keys import HEARTBEAT_KEY, LOG_PREFIX
from storage_schemas.spec import ARRAY_KINDS, HEAD_INPUT
from storage_schemas.verify import verify_store
from tests.cases import one_in
from tests.pipeline_jobs import ALONE, digest_of, fake_arguments, fake_config, leftovers, make_tree, run_job, snapshot

DATA = {kind: rf"(layer_.*/)?{kind}/(c/.*|\d+\.tar)" for kind in (*ARRAY_KINDS, HEAD_INPUT)}
KINDS = {
    "store.json": r"store\.json",
    "samples.parquet": r"samples\.parquet",
    "zarr.json": r"(.*/)?zarr\.json",
    "commit": r"commits/.*",
    "index": r"index\.parquet",
    "teacher": r"teacher/.*",
    "statistics": r"statistics/c/.*",
    **DATA,
}
EXTRACTED_AGAIN = ("commit", "statistics", *DATA)
HOWS = ("flip", "truncate", "delete", "swap", "foreign")
N_SLOW = 40  # of each kind and back end: 1,040 in all
#: Other settings than the defaults; int8, since it has every kind of array.
FORMS = {
    "zarr": {"precision": "int8", "codec": "zstd-1"},
    "webdataset": {"format": "webdataset", "precision": "int8", "codec": "gzip"},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("images"), 10, odd=True)


@pytest.fixture(scope="module")
def sound(images: Path, tmp_path_factory: pytest.TempPathFactory) -> ExtractConfig:
    """A finished store of two shards, with bad images, extracted with other settings than the defaults."""
    config = fake_config(images, tmp_path_factory.mktemp("sound") / "store", layers="0,2", precision="float32")
    run_job(config)
    return config


@pytest.fixture(scope="module", params=FORMS)
def form(request: pytest.FixtureRequest, images: Path, tmp_path_factory: pytest.TempPathFactory) -> ExtractConfig:
    """Likewise, in each back end."""
    place = tmp_path_factory.mktemp("sound") / "store"
    config = fake_config(images, place, layers="0,2", **FORMS[request.param])
    run_job(config)
    return config


@pytest.fixture(scope="module")
def foreign(form: ExtractConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound store of another identity, whose objects have the same sizes where both have them."""
    images = make_tree(tmp_path_factory.mktemp("others"), 16)
    place = tmp_path_factory.mktemp("foreign") / "store"
    run_job(replace(form, images=str(images), store=str(place), layers="0,1", weights="random:1"))
    return place


@pytest.fixture(scope="module")
def digest(sound: ExtractConfig) -> str:
    assert sound.store is not None
    return digest_of(sound.store)


@pytest.fixture
def damaged(sound: ExtractConfig, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return copy_of(sound, tmp_path / "damaged")


def copy_of(sound: ExtractConfig, place: Path) -> Path:
    assert sound.store is not None
    return shutil.copytree(sound.store, place)


def keys_of(store: Path, kind: str) -> list[str]:
    return [info.key for info in FolderObjects(store).list() if re.fullmatch(KINDS[kind], info.key)]


def damage(store: Path, kind: str, how: str, rng: random.Random, foreign: Path | None = None) -> str:
    """Damage one object of a kind, put a foreign one in its place, or swap two; says which."""
    keys = keys_of(store, kind)
    key = rng.choice(keys)
    data = (store / key).read_bytes()
    if how == "flip":
        changed = bytearray(data)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        (store / key).write_bytes(changed)
    elif how == "truncate":
        (store / key).write_bytes(data[: rng.randrange(len(data))])
    elif how == "delete":
        (store / key).unlink()
    elif how == "foreign":
        assert foreign is not None
        others = [k for k in keys_of(foreign, kind) if k in keys]
        key = rng.choice([k for k in others if (foreign / k).read_bytes() != (store / k).read_bytes()])
        (store / key).write_bytes((foreign / key).read_bytes())
    else:
        differing = [k for k in keys if (store / k).read_bytes() != data]
        alike = [k for k in differing if (store / k).stat().st_size == len(data)]  # the hardest to see
        other = rng.choice(alike or differing)
        (store / key).write_bytes((store / other).read_bytes())
        (store / other).write_bytes(data)
        return f"{key} and {other} swapped"
    return f"{key}: {how}"


def cases(store: str, kind: str, first: int, n: int) -> list[tuple[str, int]]:
    """Damage and seed; two are swapped only where there are two."""
    hows = [how for how in HOWS if how != "swap" or len(keys_of(Path(store), kind)) > 1]
    return [(hows[seed % len(hows)], seed) for seed in range(first, first + n)]


def wanted_of(sound: ExtractConfig, store: Path, *kinds: str) -> ExtractConfig:
    """What a person has to type: the images; and what the extraction was given if the store cannot say it any more."""
    if {"store.json", "teacher"} & set(kinds):
        return replace(sound, store=str(store))
    return ExtractConfig(images=sound.images, store=str(store))


def check_reported_and_mended(form: ExtractConfig, foreign: Path, place: Path, kind: str, how: str, seed: int) -> None:
    assert form.store is not None
    store = copy_of(form, place)
    what = damage(store, kind, how, random.Random(f"{kind} {seed}"), foreign)
    problems = verify_store(FolderObjects(store))
    assert problems, f"verify does not report {what} (seed {seed})"
    if how != "swap" and (kind, how) != ("store.json", "foreign"):  # then it is the others that do not belong
        assert any(problem.key == what.partition(":")[0] for problem in problems), (what, problems)
    (result,) = repair(wanted_of(form, store, kind), ALONE)
    assert result.complete
    assert digest_of(store) == digest_of(form.store), what
    if kind in EXTRACTED_AGAIN:
        assert 0 < result.n_done <= (8 if how != "swap" else 16), what
    else:
        assert result.n_done == 0, f"{what}: only what is damaged is done again"
    shutil.rmtree(store)


@pytest.mark.parametrize("kind", KINDS)
def test_random_damage_is_reported_and_mended(kind: str, form: ExtractConfig, foreign: Path, tmp_path: Path) -> None:
    """Of each kind in each back end one, such that every damage is among those of each back end."""
    nth = list(KINDS).index(kind) + (2 if form.format == "zarr" else 0)
    ((how, seed),) = cases(str(form.store), kind, nth, 1)
    check_reported_and_mended(form, foreign, tmp_path / "store", kind, how, seed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_1040_random_damages(kind: str, form: ExtractConfig, foreign: Path, tmp_path: Path) -> None:
    for how, seed in cases(str(form.store), kind, 1000, N_SLOW):
        check_reported_and_mended(form, foreign, tmp_path / str(seed), kind, how, seed)


def test_a_foreign_commit_alone_does_not_mislead(images: Path, tmp_path: Path) -> None:
    """Of a store with one commit, another's: images and settings tell which of the two documents is the stranger."""
    config = fake_config(images, tmp_path / "store", samples_per_shard=16)
    run_job(config)
    digest = digest_of(tmp_path / "store")
    run_job(replace(config, store=str(tmp_path / "other"), weights="random:1"))
    (tmp_path / "store/commits/000000.json").write_bytes((tmp_path / "other/commits/000000.json").read_bytes())
    repair(ExtractConfig(images=str(images), store=config.store, teacher="fake_vit", weights="random:0"), ALONE)
    assert digest_of(tmp_path / "store") == digest


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 4))])
def test_many_damages_at_once(seed: int, sound: ExtractConfig, digest: str, damaged: Path) -> None:
    rng = random.Random(seed)
    for kind in rng.sample([kind for kind in KINDS if kind != "patches_scale"], 5):
        damage(damaged, kind, rng.choice(["flip", "truncate", "delete"]), rng)
    (result,) = repair(wanted_of(sound, damaged, "store.json"), ALONE)
    assert result.complete
    assert digest_of(damaged) == digest
    assert leftovers(damaged) == []


def test_a_sound_store_is_left_as_it_is(sound: ExtractConfig, digest: str, damaged: Path) -> None:
    (result,) = repair(wanted_of(sound, damaged), ALONE)
    assert (result.n_done, result.complete) == (0, True)
    assert digest_of(damaged) == digest


def test_an_unfinished_store_is_finished(sound: ExtractConfig, digest: str, damaged: Path) -> None:
    for key in ("index.parquet", "commits/000001.json"):
        (damaged / key).unlink()
    (damaged / "layer_00/cls/c/1/0").write_bytes(b"half")
    assert verify_store(FolderObjects(damaged)) == []  # work in progress is no damage
    (result,) = repair(wanted_of(sound, damaged), ALONE)
    assert result.n_done == 8
    assert digest_of(damaged) == digest


def test_all_commits_lost(sound: ExtractConfig, digest: str, damaged: Path) -> None:
    shutil.rmtree(damaged / "commits")
    assert {p.key for p in verify_store(FolderObjects(damaged))} >= {"commits/000000.json", "commits/000001.json"}
    (result,) = repair(wanted_of(sound, damaged), ALONE)
    assert result.n_done == 16
    assert digest_of(damaged) == digest


@pytest.mark.parametrize("other", ["another tree", "one image more", "one image changed"])
def test_wrong_images_are_refused_and_nothing_is_changed(
    other: str, sound: ExtractConfig, damaged: Path, tmp_path: Path
) -> None:
    damage(damaged, "patches", "flip", random.Random(0))
    images = tmp_path / "others"
    if other == "another tree":
        make_tree(images, 16)
    else:
        shutil.copytree(sound.images, images)
        name = "class0/000.jpg" if other == "one image changed" else "class0/more.jpg"
        (images / name).write_bytes((images / "class0/000.jpg").read_bytes() + b"x")
    before = snapshot(damaged)
    with pytest.raises(
        UserError, match=r"IMAGES or the teacher are not those of .*nothing was changed:\s+source_digest"
    ):
        repair(ExtractConfig(images=str(images), store=str(damaged)), ALONE)
    assert snapshot(damaged) == before


WRONG = ({"precision": "float16"}, {"weights": "random:1"}, {"layers": None}, {"micro_batch": 5}, {"limit": 15})


@pytest.mark.parametrize(("how", "wrong"), one_in(2, ["flip", "delete"], WRONG))
def test_a_lost_identity_and_wrong_settings_are_refused(
    how: str, wrong: dict, sound: ExtractConfig, damaged: Path
) -> None:
    damage(damaged, "store.json", how, random.Random(0))
    before = snapshot(damaged)
    with pytest.raises(UserError, match=r"its commits belong to one with digest .*nothing was changed"):
        repair(replace(sound, store=str(damaged), **wrong), ALONE)
    assert snapshot(damaged) == before


def test_a_damaged_teacher_and_other_weights_are_refused(sound: ExtractConfig, damaged: Path) -> None:
    damage(damaged, "teacher", "flip", random.Random(0))
    before = snapshot(damaged)
    with pytest.raises(UserError, match=r"nothing was changed:\s+teacher_weights_digest: the store has"):
        repair(replace(sound, store=str(damaged), weights="random:7"), ALONE)
    assert snapshot(damaged) == before


def test_what_is_no_store_is_not_made_one(sound: ExtractConfig, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter.txt").write_text("dear")
    for place in ("home", "nowhere"):
        with pytest.raises(NotAStoreError, match="is not a store"):
            repair(replace(sound, store=str(tmp_path / place)), ALONE)
    assert snapshot(tmp_path) == {"home/letter.txt": b"dear"}


def test_strays_of_ours_go_and_others_stay_and_are_named(sound: ExtractConfig, digest: str, damaged: Path) -> None:
    ours = ["layer_00/cls/c/7/0", "commits/000009.json", "layer_01/zarr.json", "teacher/head.safetensors"]
    for key in ours:
        (damaged / key).parent.mkdir(parents=True, exist_ok=True)
        (damaged / key).write_bytes(b"stray")
    (damaged / "layer_00/cls/c/0/.0.abc.put-tmp").write_bytes(b"torn")
    assert {problem.key for problem in verify_store(FolderObjects(damaged))} == set(ours)
    repair(wanted_of(sound, damaged), ALONE)
    assert digest_of(damaged) == digest
    assert leftovers(damaged) == []
    (damaged / "letter.txt").write_text("dear")
    with pytest.raises(JobError, match=r"these problems are left:\s+.*letter\.txt: not an object of this format"):
        repair(wanted_of(sound, damaged), ALONE)
    assert (damaged / "letter.txt").read_text() == "dear"


def test_a_store_at_work_is_not_repaired(sound: ExtractConfig, damaged: Path) -> None:
    damage(damaged, "patches", "flip", random.Random(0))
    (damaged / HEARTBEAT_KEY).write_bytes(my_heartbeat("another", 0.0).to_bytes())
    before = snapshot(damaged)
    with pytest.raises(UserError, match="is being written by another job"):
        repair(wanted_of(sound, damaged), ALONE)
    assert snapshot(damaged) == before


def test_repair_that_is_killed_is_done_again(
    sound: ExtractConfig, digest: str, damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(3)
    for kind in ("zarr.json", "patches", "samples.parquet", "index"):
        damage(damaged, kind, "flip", rng)
    put, n_left = FolderObjects.put, [1]

    def put_for_a_while(self: FolderObjects, key: str, data: object) -> None:
        if not key.startswith(LOG_PREFIX):
            n_left[0] -= 1
            if n_left[0] < 0:
                raise KeyboardInterrupt
        put(self, key, data)  # type: ignore[arg-type]

    for n in range(6):
        n_left[0] = n
        with monkeypatch.context() as patched:
            patched.setattr(FolderObjects, "put", put_for_a_while)
            with pytest.raises(KeyboardInterrupt):
                repair(wanted_of(sound, damaged), ALONE)
    repair(wanted_of(sound, damaged), ALONE)
    assert digest_of(damaged) == digest


def test_each_split_of_a_folder_is_mended(tmp_path: Path) -> None:
    for split in ("train", "val"):
        make_tree(tmp_path / "images" / split, 5)
    config = fake_config(tmp_path / "images", tmp_path / "stores")
    extract(config, ALONE)
    stores = [tmp_path / "stores" / split for split in ("train", "val")]
    before = [digest_of(store) for store in stores]
    damage(tmp_path / "stores/train", "patches", "flip", random.Random(0))
    damage(tmp_path / "stores/val", "index", "delete", random.Random(0))
    results: list[ExtractResult] = repair(ExtractConfig(images=config.images, store=config.store), ALONE)
    assert [result.n_done for result in results] == [5, 0]
    assert [digest_of(store) for store in stores] == before


def test_one_split_alone_is_mended_and_compared(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """The place that verify names is the split's own; the images are those of both."""
    for split in ("train", "val"):
        make_tree(tmp_path / "images" / split, 5)
    config = fake_config(tmp_path / "images", tmp_path / "stores")
    extract(config, ALONE)
    train, val = tmp_path / "stores/train", tmp_path / "stores/val"
    digest, other = digest_of(train), snapshot(val)
    damage(train, "patches", "flip", random.Random(0))
    damage(train, "store.json", "flip", random.Random(0))
    command = ["verify", *fake_arguments(tmp_path / "images", train)]
    assert main([*command, "--repair"]) == ExitCode.OK, capfd.readouterr().err
    assert digest_of(train) == digest
    assert main([*command, "--recompute", "2"]) == ExitCode.OK, capfd.readouterr().err
    assert snapshot(val) == other
    assert sorted(place.name for place in (tmp_path / "stores").iterdir()) == ["train", "val"]


def test_through_the_door(sound: ExtractConfig, digest: str, damaged: Path, capfd: pytest.CaptureFixture) -> None:
    damage(damaged, "patches", "delete", random.Random(0))
    damage(damaged, "zarr.json", "flip", random.Random(0))
    assert main(["verify", "--store", str(damaged)]) == ExitCode.PROBLEMS
    assert f"{damaged} has 2 problems in 1 shard" in capfd.readouterr().out
    command = ["verify", "--store", str(damaged), "--images", sound.images, "--repair", "--no-ray", "--device", "cpu"]
    assert main(command) == ExitCode.OK
    said = capfd.readouterr()
    assert "8 images in " in said.out
    assert "shard 1 will be extracted again" in said.err
    assert "damaged" not in said.err.replace(str(damaged), ""), "what it deleted itself is no damage that it found"
    assert digest_of(damaged) == digest
    assert main(["verify", "--store", str(damaged)]) == ExitCode.OK
