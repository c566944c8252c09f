"""Images on real S3 servers: the same store as from the same images on a disk, and errors that name the object."""

from pathlib import Path

import numpy as np
import pytest

from infra.console import UserError
from infra.objects import FolderObjects, Objects, open_objects
from pipeline.config import check_inputs
from pipeline.extract import extract
from pipeline.shard import ImageBytes
from pipeline.sources import ImageFolderSource, RemoteFolderSource, SourceError, TarSource, open_sources
from storage_schemas import open_store
from storage_schemas.reader import Store
from storage_schemas.samples import Sample, samples_of_table
from tests.fault_proxy import Fault
from tests.pipeline.tars import image_tars
from tests.pipeline_jobs import ALONE, BAD_IMAGES, digest_of, encode_image, fake_config, make_tree, run_job
from tests.s3_servers import S3Server

pytestmark = pytest.mark.s3


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("images"), 11, odd=True)


@pytest.fixture(scope="module")
def from_disk(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("disk") / "store"
    run_job(fake_config(tree, store))
    return store


def upload(folder: Path, location: str) -> Objects:
    objects = open_objects(location)
    for info in FolderObjects(folder).list():
        objects.put(info.key, FolderObjects(folder).get(info.key))
    return objects


def states_by_name(store: Store) -> dict[str, np.ndarray]:
    """By the image's name without the tar's; valid ones only."""
    rows = np.flatnonzero(store.valid)
    names = store.samples["sample_id"].to_pylist()
    return {names[row].rpartition(".tar/")[2]: states for row, states in zip(rows, store.read(samples=rows))}


def test_a_store_from_class_folders_on_s3_is_the_one_from_disk(
    tree: Path, from_disk: Path, s3_location: str, tmp_path: Path
) -> None:
    upload(tree, f"{s3_location}/tree")
    source = open_sources(f"{s3_location}/tree/")[""]
    assert isinstance(source, RemoteFolderSource)
    assert list(source.listing()) == list(ImageFolderSource(tree).listing())
    result = run_job(fake_config(f"{s3_location}/tree", tmp_path / "store"))
    assert result.complete
    assert digest_of(tmp_path / "store") == digest_of(from_disk)
    assert {name: code for _, name, code in result.bad_images} == BAD_IMAGES


def test_a_store_from_tars_on_s3_has_the_states_of_the_images_on_disk(
    tree: Path, from_disk: Path, s3_location: str, tmp_path: Path
) -> None:
    images = {info.key: FolderObjects(tree).get(info.key) for info in FolderObjects(tree).list()}
    image_tars(tmp_path / "tars", images)
    upload(tmp_path / "tars", f"{s3_location}/tars")
    for images_at, store in (
        (f"{s3_location}/tars/train-{{000000..000002}}.tar", "store"),
        (f"{s3_location}/tars", "again"),
        (str(tmp_path / "tars"), "local"),
    ):
        result = run_job(fake_config(images_at, tmp_path / store))
        assert {name.partition(".tar/")[2]: code for _, name, code in result.bad_images} == BAD_IMAGES
    assert digest_of(tmp_path / "store") == digest_of(tmp_path / "again") == digest_of(tmp_path / "local")
    ours, disk = open_store(tmp_path / "store"), states_by_name(open_store(from_disk))
    found = states_by_name(ours)
    assert found.keys() == disk.keys()
    assert all(np.array_equal(found[name], disk[name]) for name in disk)
    assert ours.samples.column_names[:7] == [
        *("sample_index", "sample_id", "label", "class_name", "nbytes", "tar", "offset")
    ]
    labels = dict(zip(ours.samples["sample_id"].to_pylist(), ours.samples["label"].to_pylist()))
    assert all(label == int(name.partition("class")[2][0]) for name, label in labels.items())
    assert ours.verify() == []


def test_resuming_from_tars_goes_on_and_other_tars_are_refused(s3_location: str, tmp_path: Path) -> None:
    images = {f"class{i % 2}/{i}.png": encode_image(i, format="PNG") for i in range(20)}
    image_tars(tmp_path / "tars", images)
    objects = upload(tmp_path / "tars", s3_location)
    config = fake_config(s3_location, tmp_path / "store")
    run_job(config)
    digest = digest_of(tmp_path / "store")
    (tmp_path / "store/commits/000001.json").unlink()
    result = run_job(config)
    assert (result.n_done, result.n_before) == (8, 12)
    assert digest_of(tmp_path / "store") == digest
    image_tars(tmp_path / "other", dict(reversed(images.items())))
    for info in FolderObjects(tmp_path / "other").list():
        objects.put(info.key, FolderObjects(tmp_path / "other").get(info.key))
    with pytest.raises(UserError, match=r"source_digest|samples\.parquet"):
        run_job(config)


ODD = (
    *("a/with space.jpg", "a/é ü.jpg", "a/plus+.jpg", "a/100%.jpg", "a/%2e.jpg", "a/a#b.jpg", "a/a?b&c=d.jpg"),
    *("a/[x]{y}~'.jpg", "日/本.jpg"),
)


def test_odd_names_are_listed_and_read(s3_location: str) -> None:
    objects = open_objects(s3_location)
    for name in ODD:
        objects.put(name, name.encode())
    source = RemoteFolderSource(s3_location)
    samples = source.listing()
    assert [s.sample_id for s in samples] == sorted(ODD)
    assert [source.read(s).decode() for s in samples] == sorted(ODD)


def test_what_is_missing_or_refused_is_named(s3_location: str, tmp_path: Path) -> None:
    objects = upload(image_tars(tmp_path, {"class0/1.jpg": b"x" * 900}, n_tars=1)[0].parent, f"{s3_location}/tars")
    objects.put("train-000009.tar.gz", b"")
    folder = open_objects(f"{s3_location}/folder")
    folder.put("a/1.jpg", b"one")
    sources: list[ImageBytes] = [TarSource(f"{s3_location}/tars"), RemoteFolderSource(f"{s3_location}/folder")]
    found: list[Sample] = [source.listing()[0] for source in sources]  # type: ignore[attr-defined]
    objects.delete("train-000000.tar")
    folder.delete("a/1.jpg")
    for source, sample, name in zip(sources, found, ("train-000000.tar", "a/1.jpg")):
        with pytest.raises(SourceError, match=f"cannot read sample .* below {s3_location}.*{name} is missing"):
            source.read(sample)
    with pytest.raises(SourceError, match="folder is empty; expected class folders with images in them, or tars"):
        open_sources(f"{s3_location}/folder")
    with pytest.raises(SourceError, match=r"train-000000\.tar is missing"):
        open_sources(f"{s3_location}/tars/train-{{000000..000000}}.tar")
    for images in ("s3://no-such-bucket-at-all/images", "s3://no-such-bucket-at-all/*.tar"):
        with pytest.raises(SourceError, match=r"cannot list the .*there is no bucket no-such-bucket-at-all"):
            open_sources(images)


@pytest.mark.parametrize("fault", ["503", "truncate"])
def test_faults_on_the_way_to_images_cost_nothing(
    fault: Fault, tree: Path, from_disk: Path, s3_server: S3Server, s3_location: str, tmp_path: Path, monkeypatch
) -> None:
    """Of every request that lists or reads images the first fails, and of those of tars too."""
    upload(tree, f"{s3_location}/tree")
    image_tars(tmp_path / "tars", {f"class0/{i}.jpg": encode_image(i) for i in range(3)}, n_tars=1)
    upload(tmp_path / "tars", f"{s3_location}/tars")
    with s3_server.faulty() as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        rules = [
            proxy.inject(fault, "LIST"),
            proxy.inject(fault, "GET", r"class0/\d*[369]\.jpg", times=3),
            proxy.inject(fault, "GET", r"\.tar$", times=2),
        ]
        run_job(fake_config(f"{s3_location}/tree", tmp_path / "store"))
        tars = TarSource(f"{s3_location}/tars")
        assert [tars.read(found) for found in tars.listing()] == [encode_image(i) for i in range(3)]
        assert [rule.n_hit for rule in rules] == [1, 3, 2]
    assert digest_of(tmp_path / "store") == digest_of(from_disk)


def test_images_that_may_not_be_read_stop_the_job_and_are_no_bad_images(
    tree: Path, s3_server: S3Server, s3_location: str, tmp_path: Path, monkeypatch
) -> None:
    upload(tree, f"{s3_location}/tree")
    with s3_server.faulty() as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.inject("403", "GET", r"class0/003\.jpg", times=None)
        (result,) = extract(fake_config(f"{s3_location}/tree", tmp_path / "store"), ALONE)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    (outcome,) = result.quarantined
    assert "cannot read sample 'class0/003.jpg'" in str(outcome)
    assert "403" in str(outcome)
    assert "class0/003.jpg" not in {name for _, name, _ in result.bad_images}
    assert run_job(fake_config(f"{s3_location}/tree", tmp_path / "store")).complete


def test_a_store_beside_its_images_on_s3_is_no_class_folder(s3_location: str) -> None:
    open_objects(s3_location).put("images/a/1.jpg", b"")
    with pytest.raises(UserError, match="lies inside IMAGES"):
        check_inputs(fake_config(f"{s3_location}/images", f"{s3_location}/images/store"))
    check_inputs(fake_config(f"{s3_location}/images", f"{s3_location}/store"))


def test_the_samples_of_a_store_read_its_images_again(tree: Path, s3_location: str, tmp_path: Path) -> None:
    """All that a worker has: where the images are, and samples.parquet."""
    images = {info.key: FolderObjects(tree).get(info.key) for info in FolderObjects(tree).list()}
    image_tars(tmp_path / "tars", images)
    upload(tmp_path / "tars", s3_location)
    extract(fake_config(s3_location, tmp_path / "store"), ALONE)
    samples = samples_of_table(open_store(tmp_path / "store").samples)
    source = TarSource(s3_location)
    assert {s.sample_id.partition(".tar/")[2]: source.read(s) for s in samples} == images
