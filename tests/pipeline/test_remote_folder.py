"""Class folders of images at an address: the samples of the same tree on a disk; a million of them in little memory."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.objects import MemoryObjects, ObjectAccessError, ObjectInfo
from pipeline.sources import ImageFolderSource, RemoteFolderSource, SourceError, open_sources
from storage_schemas.samples import Sample, source_digest

REPOSITORY = Path(__file__).parents[2]


def over(objects: MemoryObjects, classes: tuple[str, ...] | None = None) -> RemoteFolderSource:
    source = RemoteFolderSource("memory://images", classes)
    vars(source)["_objects"] = objects
    return source


def objects_of(*names: str) -> MemoryObjects:
    objects = MemoryObjects("memory://images")
    for name in names:
        objects.put(name, name.encode())
    return objects


NAMES = (
    *("b/z.jpg", "b/a.JPEG", "b/B.Png", "b/10.bmp", "b/9.bmp", "b/notes.txt", "b/noextension", "b/empty.jpg"),
    *("a/deep/er/1.jpg", "a/deep-er/2.jpg", "a/deep/3.jpg", "a/4.webp", "a/._5.jpg", "a/folder.jpg/6.tiff"),
    *("Z/1.ppm", "Z/1.pgm", "é/ü.jpg", "a b/c d.jpg", "a-b/x.jpg", "stray.jpg", "readme.txt", "nothing/x.txt"),
)


def write_tree(root: Path, names: tuple[str, ...] | list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def test_samples_order_labels_and_notes_are_those_of_the_tree_on_disk(tmp_path: Path) -> None:
    here, there = ImageFolderSource(write_tree(tmp_path, NAMES)), over(objects_of(*NAMES))
    ours, theirs = here.listing(), there.listing()
    assert list(theirs) == list(ours)
    assert len(theirs) == 17
    assert source_digest(theirs) == source_digest(ours)
    assert there.class_names() == here.class_names()
    assert there.notes(theirs) == here.notes(ours)
    assert [there.read(s) for s in theirs] == [here.read(s) for s in ours]


PARTS = st.text("ab.-_A", min_size=1, max_size=3).filter(lambda part: part not in (".", ".."))


@given(folders=st.lists(st.lists(PARTS, min_size=1, max_size=3), max_size=12))
def test_the_order_is_the_same_for_any_nesting(
    folders: list[list[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    paths = {f"{'/'.join(parts)}/i.jpg" for parts in folders} | {"c/i.jpg"}
    root = write_tree(tmp_path_factory.mktemp("tree"), sorted(paths))
    classes = tuple(name for name in ImageFolderSource(root).class_names())
    assert list(over(objects_of(*paths), classes).listing()) == list(ImageFolderSource(root).listing())


def test_names_that_cannot_be_asked_for_are_all_told() -> None:
    class Odd(MemoryObjects):
        def list(self, prefix: str = ""):
            for key in (
                "a/1.jpg",
                "a//2.jpg",
                "a/../3.jpg",
                "a/b\\4.jpg",
                "a/new\nline.jpg",
                "a/\udcff.jpg",
                "x//y.txt",
            ):
                yield ObjectInfo(key=key, nbytes=1)

        def list_folder(self, prefix: str = ""):
            return objects_of("a/1.jpg").list_folder()

    with pytest.raises(SourceError) as caught:
        over(Odd()).listing()
    message = str(caught.value)
    assert "cannot be listed, 5 problems" in message
    for name in ("a//2.jpg", "a/../3.jpg", "a/b\\\\4.jpg", "a/new\\nline.jpg", "a/\\udcff.jpg"):
        assert f"'{name}': " in message, name


def test_errors_name_the_object_and_are_no_verdict_on_it() -> None:
    class Away(MemoryObjects):
        def get(self, key: str, *, at_most: int | None = None) -> bytes:
            raise ObjectAccessError(key, f"{key}: 503 SlowDown")

        def list(self, prefix: str = ""):
            raise ObjectAccessError(".", "403 AccessDenied")

    source, away = over(objects_of("a/1.jpg")), over(Away("memory://images"))
    (found,) = source.listing()
    with pytest.raises(
        SourceError, match=r"cannot read sample 'a/1\.jpg' below memory://images: a/1\.jpg: 503 SlowDown"
    ):
        away.read(found)
    for act in (away.class_names, lambda: over(Away(), ("a",)).listing()):
        with pytest.raises(SourceError, match=r"cannot list the image folder memory://.*: 403 AccessDenied"):
            act()
    for name in ("a/2.jpg", "../a/1.jpg", "", "/etc/passwd"):
        with pytest.raises(SourceError, match=f"cannot read sample '{name}' below memory://images: "):
            source.read(Sample(sample_id=name, label=0, class_name="a", nbytes=1))


def test_an_object_that_has_become_huge_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.remote_folder.MAX_IMAGE_NBYTES", 7)
    objects = objects_of("a/1.jpg")
    source = over(objects)
    (sample,) = source.listing()
    assert source.read(sample) == b"a/1.jpg"
    objects.put("a/1.jpg", bytes(8))
    with pytest.raises(SourceError, match=r"cannot read sample 'a/1\.jpg' below memory://images: .*7"):
        source.read(sample)


def test_wrong_addresses_get_one_clear_message_each() -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("flat/1.jpg", "flat/list.csv", "noimages/a/x.txt"):
        memory.pipe_file(f"/wrong/{name}", b"x")
    with pytest.raises(SourceError, match="memory://wrong/none is empty; expected class folders"):
        open_sources("memory://wrong/none")
    with pytest.raises(SourceError, match="flat holds no class folders, but 1 image and 1 other file"):
        open_sources("memory://wrong/flat")
    with pytest.raises(SourceError, match="1 class folder and no image in any of them"):
        open_sources("memory://wrong/noimages/")[""].listing()


def test_splits_and_their_labels_are_those_of_a_disk() -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("train/a/1.jpg", "train/b/2.jpg", "train/c/3.jpg", "val/b/4.jpg", "val/c/5.jpg", "other/x.jpg"):
        memory.pipe_file(f"/splits/{name}", b"x")
    sources = open_sources("memory://splits")
    assert [(name, len(source.listing())) for name, source in sources.items()] == [("train", 3), ("val", 2)]
    assert [(s.class_name, s.label) for s in sources["val"].listing()] == [("b", 1), ("c", 2)]
    assert [source.name for source in sources.values()] == ["train", "val"]


def test_a_source_travels_small() -> None:
    source = over(objects_of(*(f"a/{i}.jpg" for i in range(500))))
    source.listing()
    assert len(pickle.dumps(source)) < 300
    assert pickle.loads(pickle.dumps(source)) == source  # noqa: S301


MILLION = """
import random
import sys
import numpy
from infra.objects import Folder, ObjectInfo
from pipeline.remote_folder import RemoteFolderSource
from storage_schemas.samples import source_digest

class Bucket:
    location = "s3://bucket/imagenet"
    def __init__(self, n):
        self.n = n
    def list_folder(self, prefix=""):
        return Folder(objects=[], folders=[f"n{c:08d}/" for c in range(1000)])
    def list(self, prefix=""):
        for c in range(1000):
            for i in range(self.n // 1000):
                yield ObjectInfo(key=f"n{c:08d}/n{c:08d}_{i:05d}.JPEG", nbytes=100_000 + i)

def listing(n):
    source = RemoteFolderSource("s3://bucket/imagenet")
    vars(source)["_objects"] = Bucket(n)
    return source.listing(progress=seen.append)

def shuffled(samples):
    order = list(range(len(samples)))
    random.Random(42).shuffle(order)
    return samples.take(order)

def peak_mb():  # what getrusage says begins with what the parent held
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM:"))

seen, n = [], int(sys.argv[1])
source_digest(shuffled(listing(2000)))  # what the libraries need once
before = peak_mb()
seen.clear()
samples = listing(n)
listed = peak_mb() - before
assert samples[n - 1].sample_id == f"n00000999/n00000999_{n // 1000 - 1:05d}.JPEG"
assert (samples[1].nbytes, samples[n - 1].label) == (100_001, 999)
source_digest(samples)
rows = shuffled(samples)
print(listed, peak_mb() - before, samples.table.nbytes / n, numpy.diff([0, *seen]).max(), seen[-1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is what Linux says")
@pytest.mark.parametrize("n", [200_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_million_keys_are_listed_in_bounded_memory_with_progress(n: int) -> None:
    """Of the whole process, by what it held at most, in MB: for the listing, and until all rows are in store order."""
    done = subprocess.run(
        [sys.executable, "-c", MILLION, str(n)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    listed, planned, bytes_each, largest_step, seen = map(float, done.stdout.split())
    print(f"listed {listed:.0f} MB, planned {planned:.0f} MB, {bytes_each:.0f} bytes an image")
    assert bytes_each < 80
    assert listed < 30 + 220 * n / 1e6
    assert planned < 40 + 260 * n / 1e6
    assert largest_step <= 50_000
    assert seen == n
