"""What a person asks of an extraction, turned into the identity of each store to be written."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from infra.console import UserError
from pipeline.config import ExtractConfig, check_config, sizes, split_location, teacher_name
from pipeline.preprocessing import Preprocessing
from pipeline.sources import DIGITS, Source, open_sources, storage_order
from pipeline.teacher import Teacher, load_teacher
from storage_schemas.indices import parse_layers
from storage_schemas.samples import Samples, samples_to_bytes, source_digest
from storage_schemas.spec import BLOSC_CODECS, StoreSpec

_N_SIZED = 20_000  # samples by which the size of the table of all is told


@dataclass(frozen=True, kw_only=True)
class PlannedStore:
    """One store to be written: its identity and everything its documents hold.

    Attributes:
        split: "train", "val", or "" for images that are not split.
        location: Where it goes.
        source: Of its images.
        spec: Its identity.
        samples: In store order.
        teacher_files: What goes under teacher/.
        n_states: States that one forward pass makes, stored or not.
        notes: What a person should know of the listing.
    """

    split: str
    location: str
    source: Source
    spec: StoreSpec
    samples: Samples
    teacher_files: dict[str, bytes]
    n_states: int
    notes: list[str]

    @property
    def teacher_nbytes(self) -> dict[str, int]:
        """Sizes of the teacher's files, by name."""
        return {name: len(data) for name, data in self.teacher_files.items()}

    @property
    def samples_nbytes(self) -> int:
        """About the size of samples.parquet."""
        few = self.samples[:_N_SIZED]
        return len(samples_to_bytes(few)) * len(self.samples) // len(few)


def make_teacher(config: ExtractConfig) -> Teacher:
    """Load the teacher that a config names, on the CPU."""
    return load_teacher(teacher_name(config), config.weights, config.image_size, config.head, compute=config.compute)


def plan_stores(
    config: ExtractConfig, teacher: Teacher, say: Callable[[str], None] = lambda message: None
) -> list[PlannedStore]:
    """The stores that a config asks for: one, or one a split.

    Raises:
        UserError: Images or settings cannot be used.
    """
    check_config(config)
    sources, files = open_sources(config.images), teacher.to_files()
    return [plan_split(config, teacher, files, split, source, say) for split, source in sources.items()]


def plan_split(
    config: ExtractConfig,
    teacher: Teacher,
    teacher_files: dict[str, bytes],
    split: str,
    source: Source,
    say: Callable[[str], None] = lambda message: None,
) -> PlannedStore:
    """The store of one split; `teacher_files` is teacher.to_files(), made once for all splits."""
    listing = source.listing(progress=_ListingProgress(split or source.name, say))
    order = storage_order(len(listing), config.order_seed)[: config.limit]
    samples = listing.take(order)
    return PlannedStore(
        split=split,
        location=split_location(config, split),
        source=source,
        spec=_spec(config, teacher, len(samples), source_digest(listing)),
        samples=samples,
        teacher_files=teacher_files,
        n_states=teacher.n_layers,
        notes=source.notes(listing),
    )


class _ListingProgress:
    """Says how many files have been seen, every 50,000."""

    def __init__(self, name: str, say: Callable[[str], None]) -> None:
        self._name, self._say, self._told = name, say, 0

    def __call__(self, n_seen: int) -> None:
        if n_seen - self._told >= 50_000:
            self._told = n_seen
            self._say(f"listing {self._name}: {n_seen:,} images so far")


def _spec(config: ExtractConfig, teacher: Teacher, n_samples: int, digest: str) -> StoreSpec:
    shard, chunk = sizes(config)
    return StoreSpec(
        backend=config.format,
        layers=_layers(config.layers, teacher),
        dim=teacher.dim,
        has_cls=teacher.has_cls,
        n_registers=teacher.n_registers,
        grid=teacher.grid,
        precision=config.precision,
        codec=config.codec,
        shuffle=(config.shuffle or "byte") if config.codec in BLOSC_CODECS else "none",
        n_samples=n_samples,
        samples_per_shard=shard,
        samples_per_chunk=chunk,
        order_seed=config.order_seed,
        teacher=teacher.name,
        teacher_weights_digest=teacher.weights_digest,
        preprocessing=_preprocessing(config, teacher).to_dict(),
        compute=config.compute,
        micro_batch=config.micro_batch or (32 if config.images == DIGITS else 16),
        source_digest=digest,
    )


def _preprocessing(config: ExtractConfig, teacher: Teacher) -> Preprocessing:
    own = teacher.preprocessing
    assert teacher.image_size == own.image_size  # raises for a teacher of rectangles: a store's images are squares
    try:
        return dataclasses.replace(
            own,
            resize_size=config.resize_size or own.resize_size,
            interpolation=config.interpolation or own.interpolation,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def _layers(text: str | None, teacher: Teacher) -> tuple[int, ...]:
    every = range(teacher.n_layers)
    if text is None:
        return tuple(every)
    asked = parse_layers(text)
    if not set(asked) <= set(every):
        raise UserError(f"LAYERS={text}: {teacher.name} has states 0 to {teacher.n_layers - 1}")
    return asked
