"""WebDataset tars as a source: what webdataset reads is what we list, at the price of headers; nothing is believed."""

import gzip
import io
import pickle
import random
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.console import UserError
from infra.objects import MemoryObjects
from pipeline.sources import SourceError, TarSource, images_name, open_sources
from pipeline.tar_source import expand_braces, split_pattern
from pipeline.tar_walk import MAX_HEADER_NBYTES, TarWalk
from storage_schemas.samples import Sample, source_digest
from tests import examples
from tests.pipeline.tars import header, image_tars, read_by_webdataset, sample, tar_of, write_tar


class Counted(MemoryObjects):
    """Keeps what was read: (key, start, nbytes)."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        super().__init__("memory://tars")
        self.reads: list[tuple[str, int, int]] = []
        for key, data in objects.items():
            self.put(key, data)

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        self.reads.append((key, start, buffer.nbytes))
        super().read_into(key, start, buffer)


def over(objects: MemoryObjects) -> TarSource:
    source = TarSource("memory://tars")
    vars(source)["_objects"] = objects
    return source


def listed(members: Sequence[tuple[str, bytes] | tarfile.TarInfo], **options: int) -> list[Sample]:
    return list(over(Counted({"a.tar": tar_of(members, **options)})).listing())


def refusal(data: bytes) -> str:
    with pytest.raises(SourceError) as caught:
        over(Counted({"a.tar": data})).listing()
    return str(caught.value)


def random_images(n: int, nbytes: int, seed: int = 0) -> dict[str, bytes]:
    rng = random.Random(seed)
    return {f"class{i % 5}/img-{i:04d}.jpg": rng.randbytes(rng.randrange(nbytes // 2, nbytes)) for i in range(n)}


# ---------------------------------------------------------------- what is listed


def test_samples_are_those_of_webdataset_in_its_order(tmp_path: Path) -> None:
    rng = random.Random(0)
    for i in range(3):
        keys = [f"{folder}k{i}{j}" for j in range(8) for folder in [rng.choice(["", "x/", "x.y/z/"])]]
        members = [
            {
                "__key__": key,
                rng.choice(["jpg", "JPEG", "png", "webp"]): rng.randbytes(2000),
                "cls": str(rng.randrange(1000)).encode(),
                "json": b"{}" * rng.randrange(3000),
                "seg.png": b"not the image",
            }
            for key in keys
        ]
        write_tar(tmp_path / f"t-{2 - i}.tar", members)
    samples = TarSource(str(tmp_path)).listing()
    theirs = [
        (Path(found["__url__"]).name, found["__key__"], int(found["cls"]), found[extension])
        for path in sorted(tmp_path.iterdir())
        for found in read_by_webdataset(path)
        for extension in found.keys() & {"jpg", "jpeg", "png", "webp"}
    ]
    assert len(theirs) == 24
    for ours, (tar, key, label, image) in zip(samples, theirs, strict=True):
        assert ours.tar == tar
        assert ours.sample_id.rpartition(".")[0] == f"{tar}/{key}"
        assert (ours.label, ours.class_name, ours.nbytes) == (label, str(label), len(image))
        with open(tmp_path / tar, "rb") as file:
            file.seek(ours.offset or 0)
            assert file.read(ours.nbytes) == image
        assert TarSource(str(tmp_path)).read(ours) == image


def test_names_are_read_as_webdataset_reads_them() -> None:
    found = listed(
        [
            header("./sub", tarfile.DIRTYPE),
            header("./folder.jpg", tarfile.DIRTYPE),
            *sample("./sub/a"),
            ("README", b"no extension"),
            ("__meta__.json", b"about the tar"),
            ("b.v2.PNG", b"no image: its extension is v2.png"),
            ("b.Cls", b" 7\n"),
            ("b.JPG", b"upper"),
            ("c.d/e.cls", b"-1"),
            ("c.d/e.jpeg", b""),
            ("only.json", b"no sample"),
            ("._a.jpg", b"what a Mac leaves"),
        ]
    )
    assert [(s.sample_id, s.label, s.nbytes) for s in found] == [
        ("a.tar/sub/a.jpg", 3, 5),
        ("a.tar/b.JPG", 7, 5),
        ("a.tar/c.d/e.jpeg", -1, 0),
    ]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_foreign_names_are_read_in_every_kind_of_tar(format: int) -> None:
    keys = ["x" * 95, "d" * 90 + "/" + "e" * 60]
    if format != tarfile.USTAR_FORMAT:
        keys += ["é" * 70, "long/" * 300 + "k", "ü"]
    source = over(Counted({"a.tar": tar_of([m for key in keys for m in sample(key, key.encode())], format=format)}))
    samples = source.listing()
    assert [s.sample_id for s in samples] == [f"a.tar/{key}.jpg" for key in keys]
    assert [source.read(s).decode() for s in samples] == keys


def test_reading_is_one_request_of_the_image_and_its_header(tmp_path: Path) -> None:
    paths = image_tars(tmp_path, random_images(6, 5000))
    objects = Counted({path.name: path.read_bytes() for path in paths})
    source = over(objects)
    for found in source.listing():
        objects.reads.clear()
        assert len(source.read(found)) == found.nbytes
        assert objects.reads == [(found.tar, (found.offset or 0) - 512, found.nbytes + 512)]


@pytest.mark.parametrize(
    ("nbytes", "requests", "bytes_each"), [(200_000, 1.1, 8_800), (40_000, 1.1, 12_000), (3_000, 0.1, 6_000)]
)
def test_listing_costs_a_small_request_an_image_and_small_images_fewer(
    nbytes: int, requests: float, bytes_each: int, tmp_path: Path
) -> None:
    """Of webdataset's own tars, whose members have pax headers for their times."""
    n = 60
    (path,) = image_tars(tmp_path, random_images(n, nbytes), n_tars=1)
    objects = Counted({path.name: path.read_bytes()})
    assert len(over(objects).listing()) == n
    assert len(objects.reads) <= requests * n + 3
    assert sum(read[2] for read in objects.reads) <= bytes_each * n + 20_000


def test_progress_is_told_while_tars_are_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", [{"__key__": str(i), "jpg": b"x", "cls": b"1"} for i in range(300)])
    samples, seen = TarWalk.samples, []

    def slow(self: TarWalk):
        for found in samples(self):
            time.sleep(0.005)
            yield found

    monkeypatch.setattr(TarWalk, "samples", slow)
    monkeypatch.setattr("pipeline.tar_source._TELL_S", 0.05)
    assert len(TarSource(str(path.parent)).listing(progress=seen.append)) == 300
    assert seen[-1] == 300
    assert seen == sorted(seen)
    assert len(set(seen)) > 5


def test_a_source_travels_small_and_is_the_same_elsewhere(tmp_path: Path) -> None:
    image_tars(tmp_path, random_images(6, 300))
    source = TarSource(str(tmp_path))
    found = source.listing()[4]
    assert len(pickle.dumps(source)) < 400
    elsewhere = pickle.loads(pickle.dumps(source))  # noqa: S301
    assert elsewhere == source
    assert elsewhere.read(found) == source.read(found)


# ---------------------------------------------------------------- which tars


def test_tars_are_named_by_folder_pattern_or_one_by_one(tmp_path: Path) -> None:
    image_tars(tmp_path / "tars", random_images(12, 300), n_tars=4)
    (tmp_path / "tars/notes.txt").write_text("left alone")
    (tmp_path / "tars/link.tar").symlink_to(tmp_path / "tars/train-000003.tar")
    root = f"{tmp_path}/tars"
    for images, tars in {
        root: ["link.tar", *(f"train-00000{i}.tar" for i in range(4))],
        f"{root}/": ["link.tar", *(f"train-00000{i}.tar" for i in range(4))],
        f"{root}/train-{{000000..000002}}.tar": [f"train-00000{i}.tar" for i in range(3)],
        f"{root}/train-*[13].tar": ["train-000001.tar", "train-000003.tar"],
        f"{root}/train-00000{{3,0}}.tar": ["train-000000.tar", "train-000003.tar"],
        f"{root}/link.tar": ["link.tar"],
        f"{tmp_path}/*/train-00000?.tar": [f"tars/train-00000{i}.tar" for i in range(4)],
    }.items():
        source = open_sources(images)[""]
        assert isinstance(source, TarSource)
        assert [info.key for info in source.tars()] == tars
        assert [s.tar for s in source.listing()] == [tar for tar in tars for _ in range(3)]


def test_a_pattern_means_the_same_at_an_address(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in image_tars(tmp_path, random_images(8, 300), n_tars=4):
        memory.pipe_file(f"/{tmp_path.name}/a/{path.name}", path.read_bytes())
    memory.pipe_file(f"/{tmp_path.name}/a/.hidden.tar", b"")
    root = f"memory://{tmp_path.name}"
    for images, n in {
        f"{root}/a": 4,
        f"{root}/a/train-*[13].tar": 2,
        f"{root}/*/train-{{000000..000002}}.tar": 3,
    }.items():
        found = open_sources(images)[""].listing()
        assert len(found) == 2 * n
    local = TarSource(str(tmp_path))
    assert list(open_sources(f"{root}/a")[""].listing()) == list(local.listing())
    with pytest.raises(SourceError, match=r"1 problem:\n  memory://.*/a/train-000009\.tar is missing"):
        open_sources(f"{root}/a/train-00000{{0,9}}.tar")


def test_what_a_pattern_misses_is_told_at_once(tmp_path: Path) -> None:
    image_tars(tmp_path, random_images(4, 300), n_tars=2)
    with pytest.raises(SourceError, match=r"(?s)14 problems:.*train-000002\.tar is missing.*000011.*and 4 more"):
        open_sources(f"{tmp_path}/train-{{000000..000015}}.tar")
    with pytest.raises(SourceError, match=r"no file of .* is named val-\*\.tar"):
        open_sources(f"{tmp_path}/val-*.tar")
    (tmp_path / "x.tar.gz").write_bytes(b"")
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(SourceError, match=r"(?s)x\.tar\.gz is compressed.*gunzip.*|x\.zip is no \.tar file"):
        open_sources(f"{tmp_path}/x.*")
    with pytest.raises(SourceError, match="stands for more than 100,000 tars"):
        open_sources(f"{tmp_path}/{{0..99999999999999999999999}}.tar")
    with pytest.raises(SourceError, match="stands for more than 100,000 tars"):
        open_sources(f"{tmp_path}/{'{0..9}' * 30}.tar")
    for images in ("s3://bucket-*/x.tar", "s3://x.tar"):
        with pytest.raises(UserError, match="names no tars in a bucket; give a pattern such as s3://bucket/train"):
            open_sources(images)


def test_compressed_tars_are_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/a.tar.gz").write_bytes(gzip.compress(tar_of(sample("a"))))
    with pytest.raises(SourceError, match=r"1 compressed tar, in which no image.*a\.tar\.gz; unpack each once"):
        open_sources(str(tmp_path / "packed"))
    assert "a.tar: is compressed with gzip" in refusal(gzip.compress(tar_of(sample("a"))))
    assert "unpack it once: unzstd" in refusal(b"\x28\xb5\x2f\xfd" + bytes(600))


def test_a_root_with_tars_for_train_and_val_gives_both(tmp_path: Path) -> None:
    image_tars(tmp_path / "train", random_images(6, 300))
    image_tars(tmp_path / "val", random_images(2, 300, seed=1), n_tars=1, stem="val")
    assert {split: len(source.listing()) for split, source in open_sources(str(tmp_path)).items()} == {
        "train": 6,
        "val": 2,
    }


def test_class_folders_beside_tars_are_class_folders(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    image_tars(tmp_path, random_images(2, 300), n_tars=1)
    source = open_sources(str(tmp_path))[""]
    with pytest.raises(SourceError, match=rf"no image in any.*are named as IMAGES={tmp_path}/\*\.tar"):
        source.listing()
    (tmp_path / "cat/1.jpg").write_bytes(b"")
    assert [s.sample_id for s in source.listing()] == ["cat/1.jpg"]


@pytest.mark.parametrize(
    ("images", "name"),
    [
        ("digits", "digits"),
        ("/data/imagenet", "imagenet"),
        ("s3://bucket/imagenet/", "imagenet"),
        ("s3://bucket", "bucket"),
        ("/data/imagenet/train-{000000..000146}.tar", "train"),
        ("s3://bucket/imagenet-train-*.tar", "imagenet-train"),
        ("s3://bucket/inet/*.tar", "inet"),
        ("s3://bucket/inet/{train,val}.tar", "inet"),
        ("/data/one.tar", "one"),
    ],
)
def test_images_have_a_name(images: str, name: str) -> None:
    assert images_name(images) == name


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("a-{3..1}", ["a-3", "a-2", "a-1"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("{a,b{0..1}}", ["a", "b0", "b1"]),
        ("{a}-{}-{..}", ["{a}-{}-{..}"]),
    ],
)
def test_braces(pattern: str, names: list[str]) -> None:
    assert sorted(expand_braces(pattern)) == sorted(names)


def test_patterns_are_split_where_the_first_wildcard_is() -> None:
    assert split_pattern("/d/a-{0..1}.tar") == ("/d", "a-{0..1}.tar")
    assert split_pattern("s3://b/x/*/a.tar") == ("s3://b/x", "*/a.tar")
    assert split_pattern("s3://b/x.tar") == ("s3://b", "x.tar")
    assert split_pattern("/x.tar") == ("/", "x.tar")
    assert split_pattern("x.tar") == (".", "x.tar")


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("../x.jpg", b"")], r"'\.\./x\.jpg': is no relative path"),
        ([("a/../../x.jpg", b"")], "is no relative path"),
        ([("/etc/x.jpg", b"")], r"'/etc/x\.jpg': is no relative path"),
        ([("a\\..\\x.jpg", b"")], "no plain UTF-8 text"),
        ([("\udcff.jpg", b"")], "no plain UTF-8 text"),
        ([header("x.jpg", tarfile.SYMTYPE, link="/etc/passwd")], "'x.jpg': is a link, to '/etc/passwd'"),
        ([header("x.jpg", tarfile.LNKTYPE, link="y.jpg")], "is a link, to 'y.jpg'"),
        ([header("x.jpg", tarfile.CHRTYPE)], "is a device, pipe or of another kind"),
        ([header("x.jpg", tarfile.FIFOTYPE)], "is a device, pipe or of another kind"),
        ([header("x.jpg", b"M")], r"of another kind \(type b'M'\)"),
        ([header("x.jpg", tarfile.GNUTYPE_SPARSE)], "is sparse"),
        ([("x.jpg", b"")], r"'x': an image without a label; expected a member x\.cls"),
        ([("x.cls", b"1")], "'x': a label without an image"),
        ([("x.cls", b"1"), ("y.cls", b"1"), ("x.jpg", b""), ("y.jpg", b"")], "4 problems"),
        ([("x.cls", b"cat"), ("x.jpg", b"")], r"'x\.cls': a label is an integer as text; found b'cat'"),
        ([("x.cls", b""), ("x.jpg", b"")], "a label is an integer as text; found b''"),
        ([("x.cls", b"1" * 5000), ("x.jpg", b"")], "a label is an integer as text"),
        ([("x.cls", b"1"), ("x.jpg", b""), ("x.png", b"")], r"2 images of one sample: x\.jpg, x\.png"),
        ([("x.cls", b"1"), ("x.cls", b"2"), ("x.jpg", b"")], "2 labels of one sample"),
        ([*sample("x"), *sample("y"), *sample("x")], r"'a\.tar/x\.jpg' is there 2 times"),
        ([("readme.txt", b"")], "1 tar in .* hold no image; expected members that end in"),
        ([], "hold no image"),
    ],
)
def test_members_that_cannot_be_are_refused_by_name(members: list, expected: str) -> None:
    import re

    found = refusal(tar_of(members, format=tarfile.GNU_FORMAT))
    assert re.search(expected, found), found
    assert "hold no image" in found or "a.tar" in found


def test_tars_without_images_are_told() -> None:
    source = over(Counted({"a.tar": tar_of(sample("x")), "b.tar": tar_of([]), "c.tar": tar_of([("readme.txt", b"")])}))
    assert source.notes(source.listing()) == ["2 tars without images: b.tar, c.tar"]
    source = over(Counted({"a.tar": tar_of(sample("x")), "b.tar": tar_of(sample("x"))}))
    samples = source.listing()
    assert [one.sample_id for one in samples] == ["a.tar/x.jpg", "b.tar/x.jpg"]
    assert source.notes(samples) == []


def test_all_problems_of_all_tars_are_told_at_once() -> None:
    bad = tar_of([*sample("fine"), ("/x.jpg", b""), header("l.jpg", tarfile.SYMTYPE, link="x"), ("m.cls", b"x")])
    worse = tar_of([(f"{i}.jpg", b"") for i in range(1000)])
    objects = Counted({"a.tar": bad, "b.tar": bad[:2000], "c.tar": worse, "d.tar": b"junk" * 500, "e.tar": b""})
    with pytest.raises(SourceError) as caught:
        over(objects).listing()
    message = str(caught.value)
    for part in (
        "a.tar: '/x.jpg': is no relative path",
        "a.tar: 'l.jpg': is a link",
        "a.tar: 'm.cls': a label is an integer",
        "b.tar: is cut off",
        "c.tar: '0': an image without a label",
        "more",
    ):
        assert part in message, part
    assert len(message.splitlines()) == 12


@pytest.mark.parametrize("size", [10 * 2**30, 2**62, -1, -(2**40)])
def test_sizes_that_the_tar_has_no_room_for_are_refused(size: int) -> None:
    data = bytearray(tar_of([*sample("a"), header("b.jpg"), *sample("c")], format=tarfile.GNU_FORMAT))
    place = 4 * 512
    info = header("b.jpg")
    info.size = size
    block = info.create_gnu_header(info.get_info(), "utf-8", "surrogateescape")
    data[place : place + 512] = block
    found = refusal(bytes(data))
    assert f"a.tar: 'b.jpg': declares {size:,} bytes, of which the tar has" in found


def test_the_size_of_pax_records_is_bounded() -> None:
    for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
        data = (
            tar_of([*sample("a")])[: 4 * 512] + header("x", kind, size=10**10).tobuf(tarfile.GNU_FORMAT) + bytes(10240)
        )
        assert f"headers of more than {MAX_HEADER_NBYTES:,} bytes for one member" in refusal(data)
    nested = header("x", tarfile.GNUTYPE_LONGNAME, size=0).tobuf() * 5000 + bytes(1024)
    assert "a.tar: is no tar" in refusal(nested)
    digits = header("x", tarfile.XHDTYPE, size=25_000).tobuf() + b"1" * 25_088 + tar_of(sample("a"))
    began = time.process_time()
    assert len(over(Counted({"a.tar": digits})).listing()) == 1  # what is no record is passed by
    assert time.process_time() - began < 20


def test_pax_records_that_contradict_the_header_are_refused() -> None:
    def with_record(record: bytes) -> bytes:
        line = b"%d %s\n" % (len(record) + 4, record)
        assert len(line) == len(record) + 4
        info = header("PaxHeaders/a", tarfile.XHDTYPE, size=len(line))
        return info.tobuf() + line.ljust(512, b"\0") + tar_of([("a.jpg", b"image"), ("a.cls", b"1")])

    assert "its extended header says otherwise than its own" in refusal(with_record(b"size=000003"))
    assert "its extended header says otherwise than its own" in refusal(with_record(b"path=other.jpg"))
    assert "declares -1 bytes" in refusal(with_record(b"size=-00001"))
    assert "is sparse" in refusal(with_record(b"GNU.sparse.map=0,5"))


def test_tars_put_together_are_not_taken_for_one() -> None:
    one, two = tar_of(sample("a")), tar_of(sample("b"))
    assert "a.tar: goes on behind its end mark, after 'a.jpg'" in refusal(one + two)
    whole = over(Counted({"a.tar": one + bytes(10240 * 3)}))
    assert len(whole.listing()) == 1


SOUND = tar_of([m for i in range(6) for m in sample(f"k{i}", bytes([i]) * (300 * i))])
SOUND_PAX = tar_of(
    [m for i in range(4) for m in sample(f"{'k' * 120}{i}", bytes([i]) * 700)], format=tarfile.PAX_FORMAT
)


@pytest.mark.parametrize("whole", [SOUND, SOUND_PAX], ids=["ustar", "pax"])
def test_a_tar_that_was_cut_anywhere_never_passes_for_a_whole_one(whole: bytes) -> None:
    n = len(over(Counted({"a.tar": whole})).listing())
    for nbytes in [*range(0, len(whole), 512), *range(100, len(whole), 1111)]:
        objects = Counted({"a.tar": whole[:nbytes]})
        try:
            found = over(objects).listing()
        except SourceError:
            continue
        assert len(found) == n, nbytes  # only zeros behind the end mark were cut off
        assert not whole[nbytes:].strip(b"\0")
        assert nbytes >= len(whole.rstrip(b"\0")) + 512


@given(data=st.data())
@settings(max_examples=examples.of(150), suppress_health_check=[HealthCheck.too_slow])
def test_changed_bytes_never_crash_the_listing(data: st.DataObject) -> None:
    changed = bytearray(data.draw(st.sampled_from([SOUND, SOUND_PAX])))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(changed) - 1))
        changed[place] = data.draw(st.integers(0, 255))
    source = over(Counted({"a.tar": bytes(changed)}))
    try:
        found = source.listing()
    except SourceError:
        return
    for one in found:
        assert len(source.read(one)) == one.nbytes


@given(blocks=st.lists(st.binary(min_size=512, max_size=512), max_size=4), head=st.sampled_from([b"", SOUND[:2048]]))
@settings(max_examples=examples.of(60))
def test_junk_is_refused(blocks: list[bytes], head: bytes) -> None:
    junk = head + b"".join(blocks)
    if junk.strip(b"\0"):
        assert "a.tar" in refusal(junk)


# ---------------------------------------------------------------- what changes


def test_an_image_that_is_no_longer_where_it_was_is_never_another_one(tmp_path: Path) -> None:
    same_size = {f"class0/{i}.png": bytes([i]) * 700 for i in range(4)}
    (path,) = image_tars(tmp_path, same_size, n_tars=1)
    source = TarSource(str(tmp_path))
    samples = source.listing()
    digest = source_digest(samples)
    image_tars(tmp_path, dict(reversed(same_size.items())), n_tars=1)
    for found in samples:
        with pytest.raises(SourceError, match=r"train-000000\.tar was changed since it was listed: .* is there"):
            source.read(found)
    again = source.listing()
    assert source_digest(again) == digest  # names and sizes are the same; rows, and so samples.parquet, are not
    assert list(again) != list(samples)
    image_tars(tmp_path, same_size | {"class0/3.png": bytes(701)}, n_tars=1)
    assert source_digest(source.listing()) != digest
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(
        SourceError, match=r"cannot read sample 'train-000000\.tar/class0/3\.png' below .*were asked for"
    ):
        source.read(samples[3])
    path.unlink()
    with pytest.raises(SourceError, match=r"cannot read sample .*train-000000\.tar is missing"):
        source.read(samples[0])


def test_a_sample_of_another_kind_of_source_is_told() -> None:
    source = over(Counted({"a.tar": SOUND}))
    plain = Sample(sample_id="a.tar/k0.jpg", label=0, class_name="0", nbytes=0)
    for found in (plain, Sample(sample_id="x", label=0, class_name="0", nbytes=0, tar="a.tar", offset=512)):
        with pytest.raises(SourceError, match="lies in no tar; IMAGES are tars, but the store's were not"):
            source.read(found)
    climbing = Sample(sample_id="../a.tar/k0.jpg", label=0, class_name="0", nbytes=0, tar="../a.tar", offset=512)
    with pytest.raises(SourceError, match="cannot read sample"):
        source.read(climbing)


def test_a_read_that_fails_is_no_verdict_on_a_tar() -> None:
    from infra.objects import ObjectAccessError

    class Away(Counted):
        def read_into(self, key: str, start: int, buffer: memoryview) -> None:
            raise ObjectAccessError(key, f"{key}: 503 SlowDown")

    with pytest.raises(SourceError, match=r"cannot list the tars of memory://tars: a\.tar: 503 SlowDown"):
        over(Away({"a.tar": SOUND})).listing()


def test_the_sink_of_these_tests_writes_what_tarfile_reads() -> None:
    with tarfile.open(fileobj=io.BytesIO(SOUND_PAX)) as tar:
        assert len(tar.getnames()) == 8
