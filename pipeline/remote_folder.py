"""A folder of class folders of images on S3, or wherever fsspec reads: the same samples as of that tree on a disk."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc

from infra.fsspec_objects import ReadOnlyObjects, open_read_only
from infra.objects import ObjectError, ObjectInfo, check_key
from pipeline.image_folder import TELL_EVERY, LeftOut, folder_notes, no_class_folders, no_images
from pipeline.source_errors import IMAGE_EXTENSIONS, MAX_IMAGE_NBYTES, SourceError, is_image_name, join_problems
from storage_schemas.samples import SCHEMA, Sample, Samples

_IS_IMAGE = rf"(?i)/[^/]*(?:{'|'.join(IMAGE_EXTENSIONS)})$".replace(".", r"\.")
_PARTS = r"(?s)^(?P<class_name>[^/]+)(?P<folder>/.*)?/[^/]*$"
#: Keys that `check_key` may not like: it is asked about these alone.
_IS_ODD = r"[^ -~]|\\|(?:^|/)\.{0,2}(?:/|$)"


@dataclass(frozen=True)
class RemoteFolderSource:
    """A folder of class folders of images at an address, in the order of torchvision's ImageFolder.

    Classes are as in `ImageFolderSource`. Objects whose key ends in "/", which some tools leave to show an empty
    folder, are no images. Reading is one GET an image; listing is one LIST a thousand keys.

    Attributes:
        root: Address of the folder that holds the class folders: s3://bucket/prefix, or any URL of fsspec's.
        classes: Class names in label order; None takes the class folders of `root`.
    """

    root: str
    classes: tuple[str, ...] | None = None
    _left_out: LeftOut = field(default_factory=LeftOut, init=False, repr=False, compare=False)

    def __reduce__(self) -> tuple:  # it travels as its address; clients are made anew
        return type(self), (self.root, self.classes)

    @cached_property
    def _objects(self) -> ReadOnlyObjects:
        return open_read_only(self.root)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.root.rstrip("/").rpartition("/")[2]

    def class_names(self) -> list[str]:
        """Names of the class folders, in label order.

        Raises:
            SourceError: The root cannot be listed, or holds no folder.
        """
        if self.classes is not None:
            return list(self.classes)
        folders, names = list_level(self._objects)
        if not folders:
            raise SourceError(no_class_folders(self.root, names))
        return folders

    def listing(self, progress: Callable[[int], None] | None = None) -> Samples:
        """All samples in the source's order; about 70 bytes each, and twice that while they are sorted.

        Args:
            progress: Called with the number of keys seen so far, every 10,000 and at the end.

        Raises:
            SourceError: The folder cannot be listed, or there is no image at all; or names that cannot be asked for:
                all are told, up to ten.
        """
        classes, problems = self.class_names(), list[str]()
        self._left_out.clear()
        parts = [
            _to_table(self._noted(infos, set(classes)), classes, problems) for infos in _batches(self._list(), progress)
        ]
        if problems:
            raise SourceError(join_problems(f"{self.root} cannot be listed", problems))
        if not sum(len(part) for part in parts):
            raise SourceError(no_images(self.root, len(classes)))
        table = pa.concat_tables(parts)
        del parts
        samples = Samples(table.select(SCHEMA.names[1:]).cast(SCHEMA.remove(0)))
        return samples.sorted_by(table["label"], table["folder"], table["sample_id"])

    def _noted(self, infos: list[ObjectInfo], classes: set[str]) -> list[ObjectInfo]:
        """The same, when those that lie in class folders and are no images have been counted."""
        for key in (info.key for info in infos):
            if not key.endswith("/") and not is_image_name(key) and "/" in key and key.partition("/")[0] in classes:
                self._left_out.add(key.rpartition("/")[2])
        return infos

    def _list(self) -> Iterator[ObjectInfo]:
        try:
            yield from self._objects.list()
        except ObjectError as error:
            raise SourceError(f"cannot list the image folder {self.root}: {error}") from error

    def notes(self, samples: Samples) -> list[str]:
        """What a person should know of the last listing and that stops nothing."""
        stray = [name for name in list_level(self._objects)[1] if is_image_name(name)]
        return folder_notes(self.class_names(), samples, stray, self._left_out)

    def read(self, sample: Sample) -> bytes:
        """The bytes of one object.

        Raises:
            SourceError: It cannot be read, now; says why. Never a verdict on the image.
        """
        try:
            return self._objects.get(sample.sample_id, at_most=MAX_IMAGE_NBYTES)
        except (ObjectError, ValueError) as error:  # ValueError: a name that no object can have
            raise SourceError(
                f"cannot read sample {sample.sample_id!r} below {self.root}: {error}", tried_again=True
            ) from error


def list_level(objects: ReadOnlyObjects) -> tuple[list[str], list[str]]:
    """Names of the folders, and of the objects, right below the root; sorted.

    Raises:
        SourceError: It cannot be listed.
    """
    try:
        level = objects.list_folder()
    except ObjectError as error:
        raise SourceError(f"cannot list the image folder {objects.location}: {error}") from error
    return sorted(name.rstrip("/") for name in level.folders), [info.key for info in level.objects]


def _batches(infos: Iterable[ObjectInfo], progress: Callable[[int], None] | None) -> Iterator[list[ObjectInfo]]:
    rows, n_seen = iter(infos), 0
    while True:
        batch = list(islice(rows, TELL_EVERY))
        n_seen += len(batch)
        if progress is not None:
            progress(n_seen)
        yield batch
        if len(batch) < TELL_EVERY:
            return


def _to_table(infos: list[ObjectInfo], classes: list[str], problems: list[str]) -> pa.Table:
    """The images among objects, with their class, label, and folder below the class folder."""
    try:
        keys = pa.array([info.key for info in infos], pa.string())
    except UnicodeEncodeError:
        odd = [info.key for info in infos if info.key.encode(errors="replace").decode() != info.key]
        problems.extend(f"{key!r}: the name is not UTF-8, and a store keeps names as text; rename it" for key in odd)
        return _to_table([info for info in infos if info.key not in odd], classes, problems)
    table = pa.table({"sample_id": keys, "nbytes": pa.array([info.nbytes for info in infos], pa.int64())})
    table = table.filter(pc.match_substring_regex(table["sample_id"], _IS_IMAGE))
    for key in table["sample_id"].filter(pc.match_substring_regex(table["sample_id"], _IS_ODD)).to_pylist():
        try:
            check_key(key)
        except ValueError:
            problems.append(f"{key!r}: objects of such a name are not read; rename it")
    found = pc.extract_regex(table["sample_id"], _PARTS).combine_chunks()
    class_name = pc.struct_field(found, "class_name")
    label = pc.index_in(class_name, value_set=pa.array(classes, pa.string())).cast(pa.int64())
    table = table.append_column("class_name", class_name).append_column("label", label)
    return table.append_column("folder", pc.struct_field(found, "folder")).filter(pc.is_valid(label))
