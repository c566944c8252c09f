"""Images to a store, end to end, on the tiny teacher: the same bytes however it is run, and the right ones."""

import itertools
import json
import os
import random
import signal
import socket
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode

import pipeline.extract
import pipeline.job
import pipeline.shard
from infra.console import ExitCode, JobError, StopFlag, UserError
from pipeline.config import ExtractConfig
from pipeline.extract import exit_code, extract, extract_planned
from pipeline.job import ExtractResult
from pipeline.settings import make_teacher, plan_stores
from pipeline.shard import RunnerConfig
from pipeline.sources import ImageFolderSource, SourceError
from pipeline.summary import summarise
from pipeline.teacher import Teacher, load_teacher
from storage_schemas import open_store
from storage_schemas.from_arrays import split_kinds
from storage_schemas.keys import HEARTBEAT_KEY
from storage_schemas.reader import Store
from storage_schemas.samples import Sample
from tests.pipeline_jobs import (
    ALONE,
    BAD_IMAGES,
    ON_RAY,
    THREADS,
    digest_of,
    fake_config,
    leftovers,
    make_tree,
    run_job,
    snapshot,
)

N_IMAGES = 28  # with the odd ones; four shards, the last one of four


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("images"), N_IMAGES - 6, odd=True)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("head") / "head.pth"
    generator = torch.Generator().manual_seed(0)
    torch.save(
        {"weight": torch.randn(3, 16, generator=generator), "bias": torch.randn(3, generator=generator)},
        path,
    )
    return path


@pytest.fixture(scope="module")
def first(images: Path, head: Path, tmp_path_factory: pytest.TempPathFactory) -> ExtractResult:
    """A job done in peace."""
    return run_job(fake_config(images, tmp_path_factory.mktemp("first") / "store", head=str(head)))


@pytest.fixture(scope="module")
def store(first: ExtractResult) -> Store:
    return open_store(first.planned.location)


@pytest.fixture(scope="module")
def teacher(head: Path) -> Teacher:
    return load_teacher("fake_vit", "random:0", head=str(head))


def reference_order(images: Path) -> list[str]:
    """Row by row, as the published script has it: torchvision's listing, shuffled by random.Random(42)."""
    listed = [Path(path).relative_to(images).as_posix() for path, _ in ImageFolder(str(images)).samples]
    order = list(range(len(listed)))
    random.Random(42).shuffle(order)
    return [listed[place] for place in order]


def reference_states(images: Path, names: list[str], teacher: Teacher) -> np.ndarray:
    """(sample, layer, token, dim), image by image through torchvision's own transforms."""
    own = teacher.preprocessing
    transform = transforms.Compose(
        [
            transforms.Resize(own.resize_size, InterpolationMode.BICUBIC),
            transforms.CenterCrop(own.image_size),
            transforms.ToTensor(),
            transforms.Normalize(own.mean, own.std),
        ]
    )
    made = []
    for name in names:
        with Image.open(images / name) as image:
            made.append(teacher.layer_states(transform(image.convert("RGB"))[None])[0].numpy())
    return np.stack(made)


def test_rows_are_the_reference_s_and_say_so(store: Store, images: Path) -> None:
    table = store.samples
    assert table["sample_id"].to_pylist() == reference_order(images)
    classes = {"class0": 0, "class1": 1, "class2": 2}
    assert [(name.split("/")[0], classes[name.split("/")[0]]) for name in table["sample_id"].to_pylist()] == list(
        zip(table["class_name"].to_pylist(), table["label"].to_pylist())
    )
    assert table["nbytes"].to_pylist() == [(images / name).stat().st_size for name in table["sample_id"].to_pylist()]


def test_bad_images_are_recorded_named_and_invalid_and_no_others(first: ExtractResult, store: Store) -> None:
    assert {name: code for _, name, code in first.bad_images} == BAD_IMAGES
    names = store.samples["sample_id"].to_pylist()
    assert {names[index]: code for index, code in store.table.bad_images.items()} == BAD_IMAGES
    assert store.samples["valid"].to_pylist() == [name not in BAD_IMAGES for name in names]
    assert store.n_valid == N_IMAGES - len(BAD_IMAGES)
    with pytest.raises(UserError, match=r"class1/text\.jpg.*image was bad: not_an_image"):
        store.read(samples=[names.index("class1/text.jpg")])
    told = summarise([first], first.planned.location)
    assert "3 images did not decode" in told
    assert "class0/truncated.jpg: truncated" in told


def test_states_are_those_of_the_teacher_on_the_same_image(store: Store, images: Path, teacher: Teacher) -> None:
    names = [name for name, valid in zip(store.samples["sample_id"].to_pylist(), store.valid) if valid]
    expected = reference_states(images, names, teacher)
    for token, kind in enumerate(("cls", "registers", "patches", "patch_mean")):
        del token
        found, wanted = store.read(tokens=kind), split_kinds(store.spec, expected)[kind]
        wanted = wanted if wanted.ndim == 4 else wanted[:, :, None]
        if kind == "patches":  # half a unit in the last of eleven bits, and the float32 arithmetic of another batch
            assert np.all(np.abs(found - wanted) <= np.abs(wanted) * 2.0**-11 + 1e-5)
            assert not np.array_equal(found, wanted)
        else:
            np.testing.assert_allclose(found, wanted, atol=1e-5)
    # the teacher is known in closed form: state l is state 0 plus l (l + 1) / 2
    cls = store.read(tokens="cls")
    np.testing.assert_allclose(cls - cls[:, :1], np.array([0, 1, 3, 6])[None, :, None, None] + 0 * cls, atol=1e-5)


def test_grey_cmyk_and_rotated_images_are_read_as_pil_reads_them(store: Store, images: Path, teacher: Teacher) -> None:
    names = ["class0/grey.jpg", "class1/cmyk.jpg", "class2/rotated.jpg"]
    rows = [store.samples["sample_id"].to_pylist().index(name) for name in names]
    expected = split_kinds(store.spec, reference_states(images, names, teacher))["patch_mean"]
    np.testing.assert_allclose(store.read(samples=rows, tokens="patch_mean")[:, :, 0], expected, atol=1e-5)
    assert np.abs(expected[2] - expected[0]).max() > 0.01  # the comparison could fail


def test_head_input_gives_the_logits_of_the_teachers_own_head(
    first: ExtractResult, store: Store, images: Path, teacher: Teacher
) -> None:
    names = [name for name, valid in zip(store.samples["sample_id"].to_pylist(), store.valid) if valid]
    last = torch.from_numpy(reference_states(images, names, teacher)[:, -1])
    head_input = store.read_head_input()
    assert head_input.shape == (len(names), 2 * teacher.dim)
    np.testing.assert_allclose(head_input, teacher.head_input(teacher.final_norm(last)).detach().numpy(), atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(teacher.head(torch.from_numpy(head_input)), teacher.logits(last), atol=1e-4)
    right = (teacher.logits(last).argmax(dim=1).numpy() == store.samples["label"].to_numpy()[store.valid]).mean()
    assert f"{right:.2%} of these images right" in summarise([first], store.location)


def test_statistics_are_those_of_the_valid_states_before_rounding(store: Store, images: Path, teacher: Teacher) -> None:
    names = [name for name, valid in zip(store.samples["sample_id"].to_pylist(), store.valid) if valid]
    kinds = split_kinds(store.spec, reference_states(images, names, teacher).astype(np.float64).astype(np.float32))
    found = store.statistics
    for j, kind in enumerate(store.spec.token_kinds):
        rows = np.moveaxis(kinds[kind], 1, 0).reshape(len(store.layers), -1, teacher.dim).astype(np.float64)
        assert np.all(found.count[:, j] == rows.shape[1])
        np.testing.assert_allclose(found.mean[:, j], rows.mean(axis=1), atol=1e-5)
        np.testing.assert_allclose(
            found.m2[:, j], ((rows - rows.mean(axis=1, keepdims=True)) ** 2).sum(axis=1), rtol=1e-4
        )
        np.testing.assert_allclose(found.min[:, j], rows.min(axis=1), atol=1e-5)
        np.testing.assert_allclose(found.max[:, j], rows.max(axis=1), atol=1e-5)


def test_the_store_is_sound_and_its_log_is_told(first: ExtractResult, store: Store) -> None:
    assert store.verify() == []
    assert leftovers(Path(store.location)) == []
    log = Path(store.location, "log")
    assert not Path(store.location, HEARTBEAT_KEY).exists()
    (run,) = [path.parent for path in log.glob("*/status.json")]
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["images_done"], status["images_total"]) == ("complete", N_IMAGES, N_IMAGES)
    assert status["bad_images"] == len(BAD_IMAGES)
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["versions"]["torch"] == torch.__version__.partition("+")[0] or torch.__version__
    assert provenance["settings"]["spec"]["teacher"] == "fake_vit"
    shards = [json.loads(line) for line in (run / "shards.jsonl").read_text().splitlines()]
    assert sorted(shard["shard"] for shard in shards) == [0, 1, 2, 3]
    assert first.nbytes == sum(shard["nbytes"] for shard in shards)


def test_elsewhere_by_relative_paths_with_threads_it_is_the_same_store(
    first: ExtractResult, images: Path, head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").symlink_to(images)
    n_torch_threads = torch.get_num_threads()
    run_job(fake_config("pictures", "there/store/", head=str(head)), THREADS)
    assert digest_of("there/store") == digest_of(first.planned.location)
    assert torch.get_num_threads() == n_torch_threads


def test_nothing_outside_the_log_knows_where_or_when(store: Store, images: Path) -> None:
    secrets = [str(images), store.location, socket.gethostname(), "/tmp/"]
    for name, data in snapshot(Path(store.location), without=["log/"]).items():
        for secret in secrets:
            if len(secret) > 4:  # shorter ones turn up in states by chance
                assert secret.encode() not in data, (secret, name)


@pytest.mark.ray
def test_through_ray_it_is_the_same_store(
    ray_cluster: None, first: ExtractResult, images: Path, head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").symlink_to(images)
    result = run_job(fake_config("pictures", "store", head=str(head)), ON_RAY)
    assert result.complete
    assert str(os.getpid()) not in {report.worker.rpartition(":")[2] for report in result.reports}
    assert digest_of("store") == digest_of(first.planned.location)


def test_a_second_run_does_nothing_and_says_so(
    first: ExtractResult, images: Path, head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("nothing should have been started")

    for name in ("ray_for", "Rounds", "at_work", "begin_store"):
        monkeypatch.setattr(pipeline.extract, name, never)
    monkeypatch.setattr(RunnerConfig, "__call__", never)
    location = Path(first.planned.location)
    before = {path: path.stat().st_mtime_ns for path in location.rglob("*")}
    for run in (ALONE, ON_RAY):
        again = run_job(fake_config(images, location, head=str(head)), run)
        assert (again.n_done, again.n_before, again.complete) == (0, N_IMAGES, True)
        assert again.bad_images == first.bad_images
        assert "complete already: nothing was done" in summarise([again], str(location))
        assert exit_code([again]) == ExitCode.OK
    assert {path: path.stat().st_mtime_ns for path in location.rglob("*")} == before


def test_limit_keeps_the_first_rows(store: Store, images: Path, tmp_path: Path) -> None:
    run_job(fake_config(images, tmp_path / "few", limit=10))
    few = open_store(tmp_path / "few")
    assert few.samples["sample_id"].to_pylist() == store.samples["sample_id"].to_pylist()[:10]
    assert few.spec.source_digest == store.spec.source_digest
    rows = np.flatnonzero(few.valid)
    assert np.array_equal(few.read(samples=rows), store.read(samples=rows))


def test_train_and_val_become_two_stores(images: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        make_tree(tmp_path / "images" / split, 5)
    results = extract(fake_config(tmp_path / "images", tmp_path / "stores"), ALONE)
    assert [result.planned.split for result in results] == ["train", "val"]
    assert digest_of(tmp_path / "stores/train") == digest_of(tmp_path / "stores/val")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"precision": "float32"}, ["precision: the store has 'float16', this run asks for 'float32'"]),
        ({"limit": 20, "compute": "bfloat16"}, ["n_samples: the store has 28, this run asks for 20", "compute: "]),
        ({"weights": "random:1"}, ["teacher_weights_digest: the store has"]),
        ({"order_seed": 7}, ["order_seed: the store has 42, this run asks for 7"]),
        ({"layers": "0,2", "micro_batch": 4}, ["layers: the store has (0, 1, 2, 3)", "micro_batch: "]),
        ({"resize_size": 17}, ["preprocessing: "]),
    ],
)
def test_another_identity_is_refused_field_by_field(
    store: Store, images: Path, head: Path, changes: dict, said: list[str]
) -> None:
    before = snapshot(Path(store.location))
    with pytest.raises(UserError) as refused:
        run_job(fake_config(images, store.location, **({"head": str(head)} | changes)))
    assert all(line in str(refused.value) for line in said), refused.value
    assert "--overwrite" in str(refused.value)
    assert str(refused.value).count("\n") == 1 + len(said) or "weights" in changes
    assert snapshot(Path(store.location)) == before


def test_other_images_in_the_same_folder_are_another_identity(tmp_path: Path) -> None:
    make_tree(tmp_path / "images", 6)
    run_job(fake_config(tmp_path / "images", tmp_path / "store"))
    (tmp_path / "images/class0/000.jpg").write_bytes((tmp_path / "images/class0/000.jpg").read_bytes() + b"x")
    with pytest.raises(UserError, match="source_digest: the store has"):
        run_job(fake_config(tmp_path / "images", tmp_path / "store"))


def test_overwrite_deletes_what_is_ours_and_nothing_else(images: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    run_job(fake_config(images, store, layers="0-2", limit=12))
    strangers = {"notes.txt": b"mine", "layer_00/notes.txt": b"mine too", "layer_00/cls/c/9/0/extra.txt": b"and this"}
    for name, data in strangers.items():
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_bytes(data)
    config = fake_config(images, store, layers="1,3", limit=9, overwrite=True)
    result = run_job(config)
    assert result.complete
    run_job(replace(config, store=str(tmp_path / "fresh"), overwrite=False))
    ours = snapshot(store, without=["log/"])
    assert {name: ours.pop(name) for name in strangers} == strangers
    assert ours == snapshot(tmp_path / "fresh", without=["log/"])
    again = run_job(config)  # the same identity is resumed, not deleted
    assert again.n_done == 0


def test_overwrite_of_what_is_no_store_is_refused(images: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter.txt").write_text("dear")
    with pytest.raises(UserError, match=r"is not empty and is no store: it holds letter\.txt"):
        run_job(fake_config(images, tmp_path / "home", overwrite=True))
    assert snapshot(tmp_path / "home") == {"letter.txt": b"dear"}


def test_a_store_that_lost_its_identity_is_not_written_over(images: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    run_job(fake_config(images, store, limit=9))
    (store / "store.json").unlink()
    before = snapshot(store)
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"committed shards but no store\.json.*REPAIR=1"):
            run_job(fake_config(images, store, limit=12, overwrite=overwrite))
    assert snapshot(store) == before


def test_documents_of_a_beginning_that_never_ended_do_not_stay(images: Path, tmp_path: Path) -> None:
    """A run killed while it wrote the documents, then one of another identity."""
    run_job(fake_config(images, tmp_path / "fresh", layers="1", limit=5))
    run_job(fake_config(images, tmp_path / "store", limit=9))
    for name in snapshot(tmp_path / "store", without=["log/"]):
        if not name.endswith("zarr.json"):
            (tmp_path / "store" / name).unlink()
    run_job(fake_config(images, tmp_path / "store", layers="1", limit=5))
    assert digest_of(tmp_path / "store") == digest_of(tmp_path / "fresh")


def planned_with(config: ExtractConfig) -> list:
    return plan_stores(config, make_teacher(config))


@pytest.mark.parametrize("how", ["vanishes", "turns into a folder"])
def test_a_file_that_cannot_be_read_fails_its_shard_and_is_no_bad_image(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.shard, "READ_BACKOFF_S", 0.001)
    images = make_tree(tmp_path / "images", 20)
    config = fake_config(images, tmp_path / "store")
    planned = planned_with(config)
    victim = planned[0].samples[9].sample_id  # in shard 1 of 3
    data = (images / victim).read_bytes()
    (images / victim).unlink()
    if how != "vanishes":
        (images / victim).mkdir()
    (result,) = extract_planned(planned, ALONE)
    (outcome,) = result.quarantined
    assert (outcome.shard, outcome.attempts) == (1, 3)
    assert victim in outcome.cause
    assert outcome.cause.startswith("SourceError")
    assert result.bad_images == []
    assert not result.complete
    assert exit_code([result]) == ExitCode.PROBLEMS
    told = summarise([result], str(tmp_path / "store"))
    assert f"shard 1 was given up: SourceError: cannot read sample '{victim}'" in told
    assert "The same command goes on from here." in told
    store = open_store(tmp_path / "store")
    assert store.committed.tolist() == [True, False, True]
    assert not (tmp_path / "store/index.parquet").exists()
    if how != "vanishes":
        (images / victim).rmdir()
    (images / victim).write_bytes(data)
    assert run_job(config).n_done == 8
    run_job(replace(config, store=str(tmp_path / "fresh")))
    assert digest_of(tmp_path / "store") == digest_of(tmp_path / "fresh")


def test_a_source_that_fails_for_a_moment_costs_nothing(
    store: Store, images: Path, head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.shard, "READ_BACKOFF_S", 0.001)
    read, calls = ImageFolderSource.read, itertools.count()

    def shaky(self: ImageFolderSource, sample: Sample) -> bytes:
        if next(calls) % 4 != 3:  # three failures in four, in a row
            raise SourceError("the network is away")
        return read(self, sample)

    monkeypatch.setattr(ImageFolderSource, "read", shaky)
    result = run_job(fake_config(images, tmp_path / "store", head=str(head)))
    assert result.complete
    assert result.quarantined == []
    assert digest_of(tmp_path / "store") == digest_of(store.location)


def test_more_than_ten_bad_images_stop_the_job_with_the_list(tmp_path: Path) -> None:
    images = make_tree(tmp_path / "images", 60)
    for name in reference_order(images)[3:14]:
        (images / name).write_bytes(b"text")
    config = fake_config(images, tmp_path / "store")
    with pytest.raises(
        JobError, match=r"11 images did not decode, more than the 10 that 60 images may have"
    ) as stopped:
        run_job(config)
    assert stopped.value.exit_code == ExitCode.PROBLEMS
    assert str(stopped.value).count(".jpg: not_an_image") == 11
    assert not (tmp_path / "store" / HEARTBEAT_KEY).exists()
    (status,) = (tmp_path / "store").glob("log/*/status.json")
    assert json.loads(status.read_text())["state"] == "stopped"
    done = open_store(tmp_path / "store")
    assert not done.is_complete
    assert done.verify() == []
    before = snapshot(tmp_path / "store")
    with pytest.raises(JobError, match="images did not decode"):
        run_job(config)  # the bad ones of earlier runs count
    assert snapshot(tmp_path / "store") == before


def test_ten_bad_images_do_not_stop_it(tmp_path: Path) -> None:
    images = make_tree(tmp_path / "images", 20)
    for i in range(0, 20, 2):
        next(images.rglob(f"{i:03d}.jpg")).write_bytes(b"")
    result = run_job(fake_config(images, tmp_path / "store"))
    assert result.complete
    assert len(result.bad_images) == 10
    assert open_store(tmp_path / "store").n_valid == 10


def test_a_shard_of_nothing_but_bad_images(tmp_path: Path) -> None:
    images = make_tree(tmp_path / "images", 5)
    for path in images.rglob("*.jpg"):
        path.write_bytes(b"text")
    result = run_job(fake_config(images, tmp_path / "store"))
    store = open_store(tmp_path / "store")
    assert (store.n_valid, store.n_committed, result.complete) == (0, 5, True)
    assert store.verify() == []
    assert store.statistics.count.max() == 0
    assert "0 of 5 images" in summarise([result], "store")


def overflowing_teacher(device: str) -> Teacher:
    teacher = load_teacher("fake_vit", "random:0", device=device)
    with torch.no_grad():
        teacher.model.patch_embed.proj.weight.mul_(1e6)
    return teacher


def test_states_that_do_not_fit_fail_the_shard_and_name_themselves(images: Path, tmp_path: Path) -> None:
    config = fake_config(images, tmp_path / "store", limit=3)
    (result,) = extract(config, ALONE, teacher_factory=overflowing_teacher)
    (outcome,) = result.quarantined
    assert "StateError" in outcome.cause
    assert "layer 0, patches, channel 0" in outcome.cause
    assert "PRECISION=float32" in outcome.cause
    assert open_store(tmp_path / "store").n_committed == 0


def interrupt_after(n_reads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    read, calls = ImageFolderSource.read, itertools.count(1)

    def reading(self: ImageFolderSource, sample: Sample) -> bytes:
        if next(calls) == n_reads:
            os.kill(os.getpid(), signal.SIGINT)
        return read(self, sample)

    monkeypatch.setattr(ImageFolderSource, "read", reading)


def test_ctrl_c_finishes_what_is_in_flight_and_the_rest_follows(
    tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "val"):
        make_tree(tmp_path / "images" / split, 20)
    config = fake_config(tmp_path / "images", tmp_path / "stores")
    with monkeypatch.context() as patched:
        interrupt_after(9, patched)
        results = extract(config, ALONE)
    assert "stopping: what is in flight will be finished" in capfd.readouterr().err
    assert [(result.n_done, result.complete) for result in results] == [(16, False), (0, False)]
    assert exit_code(results) == ExitCode.INTERRUPTED
    assert "stores/val: not begun" in summarise(results, "stores")
    assert not (tmp_path / "stores/val").exists()
    assert [result.n_done for result in extract(config, ALONE)] == [4, 20]
    assert digest_of(tmp_path / "stores/train") == digest_of(tmp_path / "stores/val")


def test_an_error_in_the_driver_leaves_no_thread_at_work(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever catches the error may look at the store at once, or start again in the same process."""
    monkeypatch.setattr(pipeline.job, "MIN_BAD_IMAGES", 0)
    config = fake_config(images, tmp_path / "store")
    with pytest.raises(JobError, match="did not decode"):
        run_job(config, THREADS)
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith(("shard", "heartbeat"))] == []
    monkeypatch.undo()
    assert run_job(config, THREADS).complete


def test_a_store_changed_between_planning_and_claiming_is_not_deleted(images: Path, tmp_path: Path) -> None:
    config = fake_config(images, tmp_path / "store", limit=5)
    job = pipeline.job.prepare(planned_with(config)[0], False, ALONE)
    run_job(config)
    before = digest_of(tmp_path / "store")
    with pytest.raises(UserError, match="another job has just written"):
        pipeline.extract._extract_store(job, ALONE, StopFlag(), None)
    assert digest_of(tmp_path / "store") == before


def test_a_damaged_commit_is_done_again(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    config = fake_config(images, tmp_path / "store", limit=20)
    run_job(config)
    before = digest_of(tmp_path / "store")
    (tmp_path / "store/commits/000001.json").write_bytes(b"{}")
    (tmp_path / "store/index.parquet").unlink()
    assert run_job(config).n_done == 8
    assert "commits/000001.json is damaged and its shard will be done again" in capfd.readouterr().err
    assert digest_of(tmp_path / "store") == before


def test_codecs_give_the_same_states_and_repeat_their_bytes(store: Store, images: Path, tmp_path: Path) -> None:
    config = fake_config(images, tmp_path / "a", codec="zstd-1", shuffle="bit")
    run_job(config)
    run_job(replace(config, store=str(tmp_path / "b")), THREADS)
    assert digest_of(tmp_path / "a") == digest_of(tmp_path / "b")
    assert np.array_equal(open_store(tmp_path / "a").read(), store.read())


def test_half_precision_compute_is_recorded_and_close(store: Store, images: Path, tmp_path: Path) -> None:
    run_job(fake_config(images, tmp_path / "store", limit=10, compute="bfloat16"))
    half = open_store(tmp_path / "store")
    assert half.spec.compute == "bfloat16"
    rows = np.flatnonzero(half.valid)
    found, exact = half.read(samples=rows, tokens="patches"), store.read(samples=rows, tokens="patches")
    np.testing.assert_allclose(found, exact, atol=0.1)
    assert not np.array_equal(found, exact)
