"""Which images there are, in which order, and a clear word about everything that can be wrong with a folder."""

import hashlib
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchvision.datasets import ImageFolder

from infra.console import UserError
from pipeline import image_folder
from pipeline.digits import digits_split, load_digit_arrays
from pipeline.sources import DigitsSource, ImageFolderSource, SourceError, open_sources, storage_order
from storage_schemas.samples import Sample


def fill(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def named(sample_id: str) -> Sample:
    return Sample(sample_id=sample_id, label=0, class_name="", nbytes=0)


def torchvision_order(root: Path) -> list[tuple[str, int]]:
    dataset = ImageFolder(str(root))
    return [(Path(path).relative_to(root).as_posix(), label) for path, label in dataset.samples]


def our_order(root: Path) -> list[tuple[str, int]]:
    return [(sample.sample_id, sample.label) for sample in ImageFolderSource(root).listing()]


def test_rows_are_shuffled_as_the_reference_shuffles_them() -> None:
    assert storage_order(10) == [7, 3, 2, 8, 5, 6, 9, 4, 0, 1]
    imagenet = storage_order(1_281_167)
    assert imagenet[:8] == [700127, 809255, 1248748, 843600, 434322, 2216, 1114500, 414713]
    assert imagenet[-3:] == [576778, 52451, 233478]
    assert storage_order(10, seed=7) != storage_order(10)


def test_order_and_labels_are_torchvisions_whatever_the_names(tmp_path: Path) -> None:
    fill(
        tmp_path,
        *("b/z.jpg", "b/a.JPEG", "b/B.Png", "b/10.bmp", "b/9.bmp", "b/notes.txt", "b/noextension"),
        *("a/deep/er/1.jpg", "a/deep-er/2.jpg", "a/deep/3.jpg", "a/4.webp", "a/._5.jpg", "a/folder.jpg/6.tiff"),
        *("Z/1.ppm", "Z/1.pgm", "é/ü.jpg", "a b/c d.jpg", "a b/line\nbreak.jpg"),
    )
    assert our_order(tmp_path) == torchvision_order(tmp_path)
    assert len(our_order(tmp_path)) == 16


@given(names=st.lists(st.text("ab.-_A/", min_size=1, max_size=6).filter(lambda n: not n.startswith("/")), max_size=12))
def test_order_is_torchvisions_for_any_nesting(names: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("tree")
    fill(root, *(f"{name.replace('..', 'x').rstrip('./') or 'y'}/i.jpg".replace("//", "/") for name in [*names, "c"]))
    assert our_order(root) == torchvision_order(root)


def test_links_are_followed(tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", "x/1.jpg", "2.jpg")
    root = fill(tmp_path / "root", "a/0.jpg")
    (root / "b").symlink_to(tmp_path / "elsewhere" / "x")
    (root / "a" / "more").symlink_to(tmp_path / "elsewhere" / "x")
    (root / "a" / "link.jpg").symlink_to(tmp_path / "elsewhere" / "2.jpg")
    assert our_order(root) == torchvision_order(root)
    assert ImageFolderSource(root).read(named("a/link.jpg")) == b"2.jpg"


def test_a_listing_knows_sizes_and_names_and_reads_back(tmp_path: Path) -> None:
    source = ImageFolderSource(str(fill(tmp_path, "cat/one.jpg", "dog/sub/three.jpg")))
    seen: list[int] = []
    samples = source.listing(progress=seen.append)
    assert [(s.class_name, s.label, s.nbytes) for s in samples] == [("cat", 0, 11), ("dog", 1, 17)]
    assert [source.read(s) for s in samples] == [b"cat/one.jpg", b"dog/sub/three.jpg"]
    assert seen == [2]
    assert source.name == tmp_path.name


def test_empty_classes_keep_their_labels_and_are_told(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.jpg", "c/2.jpg", "stray.jpg", "readme.txt", "a/notes.txt", "c/sub/anim.gif")
    (tmp_path / "b").mkdir()
    source = ImageFolderSource(tmp_path)
    source.listing()
    samples = source.listing()
    assert [(s.sample_id, s.label) for s in samples] == [("a/1.jpg", 0), ("c/2.jpg", 2)]
    assert source.notes(samples) == [
        "1 class without images, which keep their labels: b",
        "1 image outside of class folders, left out: stray.jpg",
        "2 files with other endings left out, such as 'anim.gif'",
    ]


def test_folders_without_an_image_are_known_without_a_whole_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "none", "a/1.txt", "b/store.json")
    with pytest.raises(SourceError, match="has 2 class folders and no image in any of them"):
        ImageFolderSource(tmp_path / "none").check_has_images()
    fill(tmp_path / "some", "a/1.jpg", "b/2.jpg")
    walked: list[str] = []
    whole = image_folder._image_paths
    monkeypatch.setattr(image_folder, "_image_paths", lambda top, *rest: walked.append(top) or whole(top, *rest))
    ImageFolderSource(tmp_path / "some").check_has_images()
    assert walked == [str(tmp_path / "some" / "a")]


def test_a_source_travels_small(tmp_path: Path) -> None:
    source = ImageFolderSource(fill(tmp_path, *(f"a/{i}.jpg" for i in range(500))))
    source.listing()
    assert len(pickle.dumps(source)) < 600
    assert pickle.loads(pickle.dumps(source)) == source  # noqa: S301
    assert pickle.loads(pickle.dumps(DigitsSource("val"))) == DigitsSource("val")  # noqa: S301


@pytest.mark.parametrize("sample_id", ["../secret.jpg", "/etc/passwd", "a/../../secret.jpg", ""])
def test_no_name_leads_outside(sample_id: str, tmp_path: Path) -> None:
    fill(tmp_path, "secret.jpg", "root/a/1.jpg")
    with pytest.raises(SourceError, match="no path below the image folder"):
        ImageFolderSource(tmp_path / "root").read(named(sample_id))


def test_a_file_that_went_away_is_no_bad_image(tmp_path: Path) -> None:
    source = ImageFolderSource(fill(tmp_path, "a/1.jpg"))
    (tmp_path / "a" / "1.jpg").unlink()
    with pytest.raises(SourceError, match=r"cannot read sample 'a/1\.jpg' below .*: No such file or directory"):
        source.read(named("a/1.jpg"))
    with pytest.raises(SourceError, match="cannot read sample"):
        source.read(named("a/nul\0byte.jpg"))


def test_every_problem_of_a_listing_is_told_at_once(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.jpg", "b/2.jpg")
    (tmp_path / "a" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "a" / "self.jpg").symlink_to(tmp_path / "a" / "self.jpg")
    (tmp_path / "b" / "round").symlink_to(tmp_path / "b")
    os.mkfifo(tmp_path / "b" / "pipe.jpg")
    (Path(os.fsdecode(os.fsencode(tmp_path / "b") + b"/\xff.jpg"))).write_bytes(b"")
    with pytest.raises(SourceError) as caught:
        ImageFolderSource(tmp_path).listing()
    message = str(caught.value)
    assert "5 problems" in message
    for part in (
        "a/gone.jpg: a link to nothing",
        "a/self.jpg: Too many levels of symbolic links",
        "round: a link back to a folder that contains it",
        "b/pipe.jpg: not a regular file",
        "the name is not UTF-8",
    ):
        assert part in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_may_not_be_read_is_told(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.jpg", "b/2.jpg")
    (tmp_path / "b").chmod(0)
    try:
        with pytest.raises(SourceError, match="b: Permission denied"):
            ImageFolderSource(tmp_path).listing()
    finally:
        (tmp_path / "b").chmod(0o700)


def test_an_unreadable_folder_is_told_even_to_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "a/1.jpg", "b/2.jpg")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(SourceError, match="b: Permission denied"):
        ImageFolderSource(tmp_path).listing()


def test_wrong_folders_get_one_clear_message_each(tmp_path: Path) -> None:
    fill(tmp_path, "file.jpg", "flat/1.jpg", "flat/2.jpg", "flat/list.csv", "noimages/a/x.txt")
    (tmp_path / "empty").mkdir()
    for name, expected in {
        "missing": "there is no image folder .*missing; expected a folder of class folders or of tars",
        "file.jpg": r"file\.jpg is a file; expected a folder",
        "empty": "empty is empty; expected class folders",
        "flat": "flat holds no class folders, but 2 images and 1 other file; expected one folder per class",
    }.items():
        with pytest.raises(SourceError, match=expected):
            open_sources(str(tmp_path / name))
    with pytest.raises(SourceError, match="1 class folder and no image in any of them"):
        open_sources(str(tmp_path / "noimages"))[""].listing()
    with pytest.raises(UserError, match="Protocol not known: nope"):
        open_sources("nope://bucket/images")
    with pytest.raises(UserError, match="no images were named"):
        open_sources("")


def test_a_root_with_train_and_val_gives_both(tmp_path: Path) -> None:
    fill(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "train/c/3.jpg", "val/b/4.jpg", "val/c/5.jpg", "other/x.jpg")
    sources = open_sources(str(tmp_path))
    assert [(name, len(source.listing())) for name, source in sources.items()] == [("train", 3), ("val", 2)]
    # val lacks class a; its labels still mean what train's mean
    assert [(s.class_name, s.label) for s in sources["val"].listing()] == [("b", 1), ("c", 2)]


def test_one_split_alone_and_classes_called_train(tmp_path: Path) -> None:
    assert list(open_sources(str(fill(tmp_path / "imagenet", "train/a/1.jpg", "test/2.jpg")))) == ["train"]
    vehicles = open_sources(str(fill(tmp_path / "vehicles", "bus/1.jpg", "train/2.jpg")))
    assert [s.class_name for s in vehicles[""].listing()] == ["bus", "train"]
    fill(tmp_path / "flat", "train/a/1.jpg", "val/1.jpg", "val/2.jpg")
    with pytest.raises(SourceError, match="val holds no class folders, but 2 images"):
        open_sources(str(tmp_path / "flat"))


def test_digits_are_all_there_once_in_their_order() -> None:
    sources = open_sources("digits")
    listed = {split: sources[split].listing() for split in ("train", "val")}
    assert {split: len(samples) for split, samples in listed.items()} == {"train": 1438, "val": 359}
    places = {split: [int(s.sample_id[-8:-4]) for s in samples] for split, samples in listed.items()}
    assert places == {split: digits_split(split) for split in ("train", "val")}
    assert sorted(places["train"] + places["val"]) == list(range(1797))
    levels, labels = load_digit_arrays()
    for sample in listed["val"]:
        place = int(sample.sample_id[-8:-4])
        data = sources["val"].read(sample)
        assert len(data) == sample.nbytes
        assert sample.label == labels[place] == int(sample.class_name)
        grey = [round(level * 255 / 16 + 1e-9) for level in levels[place].reshape(-1).tolist()]
        assert list(data[-64:]) == grey


def test_the_digits_split_never_changes() -> None:
    val = digits_split("val")
    assert val[:12] == [5, 8, 11, 21, 23, 24, 37, 47, 49, 51, 52, 70]
    assert hashlib.sha256(repr(val).encode()).hexdigest().startswith("160ed392cf80fa66")
    with pytest.raises(ValueError, match="no split 'test'; there are train and val"):
        DigitsSource("test")


@pytest.mark.parametrize("sample_id", ["train/5/0005.pgm", "val/4/0005.pgm", "val/5/9999.pgm", "val/5/5.pgm", "x"])
def test_digits_have_no_other_names(sample_id: str) -> None:
    with pytest.raises(SourceError, match="the digits have no sample"):
        DigitsSource("val").read(named(sample_id))
