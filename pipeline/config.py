"""What a person asks of an extraction, and what can be refused of it before any library for teachers is loaded."""

import dataclasses
import os
from collections.abc import Container
from dataclasses import dataclass
from pathlib import PurePath

from infra.console import UserError
from infra.objects import check_location
from pipeline.locations import is_remote, lies_in, plain_location
from pipeline.preprocessing import INTERPOLATIONS
from pipeline.sources import DIGITS, ImageFolderSource, images_name, open_sources
from pipeline.teacher_kinds import kind_of
from storage_schemas.errors import SchemaError
from storage_schemas.find import is_store, store_around
from storage_schemas.indices import parse_layers
from storage_schemas.spec import BACKENDS, CODECS, CODECS_OF, COMPUTE_PRECISIONS, PRECISIONS, SHUFFLES

DEFAULT_TEACHER = "vit_base_patch14_reg4_dinov2.lvd142m"
DEFAULT_STORES = "data/stores"


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """What to extract, and how.

    Attributes:
        images: "digits"; a folder of class folders or of WebDataset tars, or one with such folders train/ and val/; or
            tars by a pattern such as s3://bucket/train-{000000..000146}.tar. Here, on s3://, or at any URL of fsspec's.
        store: Where the store goes, or the stores train and val: a folder, or s3://bucket/prefix; None is
            data/stores/<name of images>, for a Raptor data/stores/<name of images>-run-<name of its run>.
        teacher: Any timm ViT, or digits_vit, or run:<RUN> for the Raptor of a finished run; None is digits_vit for
            digits, else DINOv2 ViT-B/14 with registers.
        weights: None for timm's pretrained (or the shipped) ones; a file in timm's or Meta's naming; or random:<seed>.
        head: File of a linear classifier on [final-norm CLS; mean of final-norm patches]; None if there is none.
        image_size: Side of the square crop, px; None is the teacher's.
        resize_size: The short side is resized to this before the crop, px; None is image_size / 0.875.
        interpolation: bicubic or bilinear; None is the teacher's.
        format: zarr or webdataset.
        precision: Of stored patch states: float32, float16, bfloat16 or int8. The small kinds are always float32.
        codec: none; with zarr also lz4, zstd-1 or zstd-3, with webdataset gzip; lossless.
        shuffle: byte or bit shuffle before lz4 or zstd; None is byte.
        compute: Arithmetic of the teacher: float32, tf32, bfloat16 or float16.
        layers: States to store, such as 0-12 or 0,6,12; None is all.
        limit: Only the first so many samples of the shuffled order of each split; None is all.
        samples_per_shard: Unit of work and commit; None is 128 for digits, else 256.
        samples_per_chunk: What is read and decoded whole; None is 32 for digits, else 16.
        micro_batch: Images per forward pass; None is 32 for digits, else 16.
        order_seed: Seed of the shuffle; 42 gives the order of the published extraction.
        overwrite: Delete a store of another identity first.
    """

    images: str = DIGITS
    store: str | None = None
    teacher: str | None = None
    weights: str | None = None
    head: str | None = None
    image_size: int | None = None
    resize_size: int | None = None
    interpolation: str | None = None
    format: str = "zarr"
    precision: str = "float16"
    codec: str = "none"
    shuffle: str | None = None
    compute: str = "float32"
    layers: str | None = None
    limit: int | None = None
    samples_per_shard: int | None = None
    samples_per_chunk: int | None = None
    micro_batch: int | None = None
    order_seed: int = 42
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Local paths mean the same in every process and folder: ~ is the home, and relative ones begin here.

        Raises:
            UserError: One of them begins like an address and is none; as a path it would be a folder called "s3:".
        """
        for name in ("store", "images", "weights", "head"):
            _check_location(name, getattr(self, name) or "")
        for name in ("images", "weights", "head"):
            value = getattr(self, name)
            if value and value != DIGITS and not is_remote(value) and not value.startswith("random"):
                object.__setattr__(self, name, os.path.abspath(os.path.expanduser(value)))
        if self.store:
            object.__setattr__(self, "store", plain_location(self.store))


def _check_location(name: str, value: str) -> None:
    try:
        if not value.startswith("random:"):
            check_location(value)
    except UserError as error:
        raise UserError(f"{name.upper()}={error}") from error


def check_config(config: ExtractConfig) -> None:
    """Refuse settings that cannot be, all at once.

    Raises:
        UserError: Lists every setting that is wrong, with what it may be.
    """
    problems = [
        f"{name.upper()}={value}: expected one of {', '.join(allowed)}"
        for name, value, allowed in (
            ("format", config.format, BACKENDS),
            ("precision", config.precision, PRECISIONS),
            ("codec", config.codec, CODECS),
            ("shuffle", config.shuffle or "none", SHUFFLES),
            ("compute", config.compute, COMPUTE_PRECISIONS),
            ("interpolation", config.interpolation or "bicubic", INTERPOLATIONS),
        )
        if value not in allowed
    ]
    codecs = CODECS_OF.get(config.format, CODECS)
    if config.codec in CODECS and config.codec not in codecs:
        problems.append(f"CODEC={config.codec}: expected one of {', '.join(codecs)}, which FORMAT={config.format} has")
    problems += [
        f"{name.upper()}={value}: expected a number of at least 1"
        for name in ("image_size", "resize_size", "limit", "samples_per_shard", "samples_per_chunk", "micro_batch")
        if (value := getattr(config, name)) is not None and value < 1
    ]
    shard, chunk = sizes(config)
    if min(shard, chunk) >= 1 and shard % chunk:
        problems.append(f"SAMPLES_PER_SHARD={shard}: expected a multiple of SAMPLES_PER_CHUNK={chunk}")
    try:
        parse_layers(config.layers or "0")
    except SchemaError as error:
        problems.append(f"{error.title}: {error.problems[0]}")
    if is_remote(config.store or "") and not (config.store or "").startswith("s3://"):
        problems.append(f"STORE={config.store}: expected a local path, or s3://bucket/prefix")
    if problems:
        raise UserError("\n  ".join(["these settings cannot be:", *problems]))


def check_inputs(config: ExtractConfig) -> None:
    """Refuse what can be seen to be wrong before a teacher is loaded, which may take minutes and a network.

    Raises:
        UserError: Settings that cannot be, or images that are not there.
    """
    check_config(config)
    sources = open_sources(config.images)
    for source in sources.values():
        if isinstance(source, ImageFolderSource):
            source.check_has_images()
    if config.images != DIGITS and lies_in(store_root(config), config.images):
        raise UserError(
            f"STORE={store_root(config)} lies inside IMAGES={config.images}, where it would be listed as a class of "
            "images. Give a STORE elsewhere"
        )
    for location in (split_location(config, split) for split in sources):
        around = None if is_remote(location) else store_around(location)
        if around:
            raise UserError(inside_a_store(location, around))


def teacher_name(config: ExtractConfig) -> str:
    """The teacher asked for, or the default for these images."""
    return config.teacher or ("digits_vit" if config.images == DIGITS else DEFAULT_TEACHER)


def store_root(config: ExtractConfig) -> str:
    """Where the store, or the folder with stores train and val, goes; of another kind's teacher, beside the usual."""
    kind, _, place = teacher_name(config).partition(":")
    of = f"-{kind}-{PurePath(place).name}" if kind_of(teacher_name(config)) else ""
    return config.store or f"{DEFAULT_STORES}/{images_name(config.images) or 'images'}{of}"


def split_location(config: ExtractConfig, split: str) -> str:
    """Where the store of a split goes."""
    return f"{store_root(config)}/{split}" if split else store_root(config)


def inside_a_store(location: str, store: str) -> str:
    """Why a place is refused."""
    return (
        f"{location} would lie inside a store, {store}, and spoil it. Give STORE= the folder that the stores train and "
        "val lie in, or a place elsewhere"
    )


def of_one_split(config: ExtractConfig, splits: Container[str]) -> tuple[ExtractConfig, str]:
    """Settings for one of several stores, where STORE is that store itself and not the folder that they lie in.

    Returns:
        The settings, for the folder; and the split, "" if STORE is the folder already, or no store, or of no split.
    """
    folder, _, name = store_root(config).rstrip("/").rpartition("/")
    if "" in splits or name not in splits or not is_store(store_root(config)):
        return config, ""
    return dataclasses.replace(config, store=folder or "."), name


def sizes(config: ExtractConfig) -> tuple[int, int]:
    """Samples per shard and per chunk, with their defaults."""
    shard, chunk = (128, 32) if config.images == DIGITS else (256, 16)
    return (
        shard if config.samples_per_shard is None else config.samples_per_shard,
        chunk if config.samples_per_chunk is None else config.samples_per_chunk,
    )
