"""What a store is: its identity, token kinds, chunk arithmetic. Opens nothing."""

import dataclasses
import json
import operator
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal, SupportsIndex

from storage_schemas.errors import SchemaError

FORMAT_VERSION = 1

Kind = Literal["cls", "registers", "patches", "patches_scale", "patch_mean"]
KINDS: tuple[Kind, ...] = ("cls", "registers", "patches", "patch_mean")  # of tokens: what can be asked for
ARRAY_KINDS: tuple[Kind, ...] = ("cls", "registers", "patches", "patches_scale", "patch_mean")  # what is stored
HEAD_INPUT = "head_input"

BACKENDS = ("zarr", "webdataset")
PRECISIONS = ("float32", "float16", "bfloat16", "int8")
BLOSC_CODECS = ("lz4", "zstd-1", "zstd-3")
CODECS_OF = {"zarr": ("none", *BLOSC_CODECS), "webdataset": ("none", "gzip")}
CODECS = ("none", *BLOSC_CODECS, "gzip")
SHUFFLES = ("none", "byte", "bit")
COMPUTE_PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
PRECISION_NBYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}

# Limits that no real store meets; they keep a hostile store.json from claiming all memory before anything is read.
MAX_SAMPLES = 2**31 - 1
MAX_TAR_SAMPLES = 10**9  # names in archives have nine digits
TAR_SAMPLE_NBYTES = 1152  # the most that headers and zeros add to a sample in an archive
MAX_SHARDS = 2**22
MAX_CHUNKS = 2**27  # of all arrays together
MAX_CHUNK_NBYTES = 2**31 - 17  # before the codec, headers included; what Blosc takes
# So that a commit, which names them, stays far below what is read of a document.
MAX_SHARD_SAMPLES = 2**16
MAX_SHARD_CHUNKS = 2**17  # of all arrays together
_MAX_INTEGER = 2**63 - 1  # of any field: what other languages can read
_MAX_JSON_DEPTH = 16
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100
_REPR.maxlist = _REPR.maxtuple = 20


@dataclass(frozen=True, init=False)
class Span:
    """States `start` to `stop` of the depth, both ends included; `Span(0, 7)` is eight states.

    A block trained on it takes state `start` and produces `start + 1` to `stop`.
    """

    start: int
    stop: int

    def __init__(self, start: SupportsIndex, stop: SupportsIndex) -> None:
        # numpy's integers become Python's, since spans are shown and become JSON
        object.__setattr__(self, "start", operator.index(start))
        object.__setattr__(self, "stop", operator.index(stop))
        if not 0 <= self.start < self.stop:
            raise SchemaError(
                f"BLOCK={self.start}-{self.stop}",
                ["a span is a-b with 0 <= a < b, both ends states; for example BLOCK=0-7"],
            )

    @classmethod
    def parse(cls, text: str) -> "Span":
        """Read `"0-7"`."""
        match = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", text)
        if match is None:
            raise SchemaError(f"BLOCK={text}", ["expected two layer numbers a-b with a < b; for example BLOCK=0-7"])
        return cls(int(match[1]), int(match[2]))

    @property
    def n_states(self) -> int:
        return self.stop - self.start + 1

    @property
    def states(self) -> range:
        return range(self.start, self.stop + 1)

    def __str__(self) -> str:
        return f"{self.start}-{self.stop}"


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """Everything that must match for two runs to write the same store. Checks itself when built.

    Attributes:
        backend: How arrays are laid out as objects: "zarr" or "webdataset".
        layers: The teacher states stored, increasing; 0 is the state before the first teacher block.
        dim: Channels per token.
        has_cls: Whether the teacher has a CLS token.
        n_registers: Further prefix tokens (registers, a distillation token); 0 for none.
        grid: Patch rows and columns.
        precision: How patch states are stored; the small kinds are always float32.
        codec: How chunks are compressed; lossless.
        shuffle: Byte or bit shuffle in front of lz4 and zstd; "none" with the other codecs.
        n_samples: Samples in the plan, valid or not.
        samples_per_shard: Samples of one shard, the unit of work, retry and commit; a multiple of samples_per_chunk.
        samples_per_chunk: Samples of one chunk, what is coded, checked and decoded whole.
        order_seed: Seed of the shuffle of the source listing.
        teacher: The teacher's architecture name.
        teacher_weights_digest: sha256 over its weights.
        preprocessing: Bytes of an image file to pixels, as recorded by the pipeline.
        compute: Arithmetic of the teacher's forward pass.
        micro_batch: Images per forward pass; the last one of a shard is padded.
        source_digest: sha256 over the sorted relative names and sizes of the whole source.
    """

    backend: str = "zarr"
    layers: tuple[int, ...]
    dim: int
    has_cls: bool
    n_registers: int
    grid: tuple[int, int]
    precision: str = "float16"
    codec: str = "none"
    shuffle: str = "none"
    n_samples: int
    samples_per_shard: int
    samples_per_chunk: int
    order_seed: int = 42
    teacher: str
    teacher_weights_digest: str
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    compute: str = "float32"
    micro_batch: int
    source_digest: str

    def __post_init__(self) -> None:
        problems = _field_problems(self) or list(_size_problems(self))
        if problems:
            raise SchemaError("store identity", problems)

    @property
    def n_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def n_tokens(self) -> int:
        """Tokens in the teacher's order: CLS, registers, patches in row order."""
        return int(self.has_cls) + self.n_registers + self.n_patches

    @property
    def token_kinds(self) -> tuple[Kind, ...]:
        """The kinds this teacher has, in the format's order."""
        absent = {"cls": not self.has_cls, "registers": self.n_registers == 0}
        return tuple(kind for kind in KINDS if not absent.get(kind, False))

    @property
    def array_kinds(self) -> tuple[Kind, ...]:
        """The kinds of arrays of each layer, in the format's order: the token kinds, and for int8 its scale."""
        stored = {*self.token_kinds, *(["patches_scale"] if self.precision == "int8" else [])}
        return tuple(kind for kind in ARRAY_KINDS if kind in stored)

    @property
    def has_head_input(self) -> bool:
        return self.has_cls

    @property
    def n_shards(self) -> int:
        return -(-self.n_samples // self.samples_per_shard)

    @property
    def n_chunks(self) -> int:
        """Chunks of one (layer, kind) in the whole store."""
        return -(-self.n_samples // self.samples_per_chunk)

    @property
    def chunks_per_shard(self) -> int:
        return self.samples_per_shard // self.samples_per_chunk

    def shard_samples(self, shard: SupportsIndex) -> range:
        """Sample indices of a shard; the last shard may be short."""
        shard = operator.index(shard)
        if not 0 <= shard < self.n_shards:
            raise IndexError(f"shard {shard} is not in the store; it has shards 0 to {self.n_shards - 1}")
        start = shard * self.samples_per_shard
        return range(start, min(start + self.samples_per_shard, self.n_samples))

    def shard_chunks(self, shard: SupportsIndex) -> range:
        """Chunk indices of a shard that hold samples."""
        samples = self.shard_samples(shard)
        return range(samples.start // self.samples_per_chunk, -(-samples.stop // self.samples_per_chunk))

    def chunk_samples(self, chunk: SupportsIndex) -> range:
        """Sample indices of a chunk; the last chunk of the store may be short."""
        chunk = operator.index(chunk)
        if not 0 <= chunk < self.n_chunks:
            raise IndexError(f"chunk {chunk} is not in the store; it has chunks 0 to {self.n_chunks - 1}")
        start = chunk * self.samples_per_chunk
        return range(start, min(start + self.samples_per_chunk, self.n_samples))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` undoes it."""
        return {**dataclasses.asdict(self), "layers": list(self.layers), "grid": list(self.grid)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "StoreSpec":
        """Build from parsed JSON.

        Raises:
            SchemaError: Lists every unknown, missing or ill-typed field.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        problems = [f"unknown field {name!r}" for name in document if name not in fields]
        problems += [f"missing field {name!r}" for name in fields if name not in document]
        if problems:
            raise SchemaError("store identity", problems)
        values = dict(document)
        for name in ("layers", "grid"):
            if not isinstance(values[name], list):
                raise SchemaError("store identity", [f"{name} is {_shown(values[name])}, expected a list"])
            values[name] = tuple(values[name])
        problems = _field_problems(SimpleNamespace(**values))
        if problems:
            raise SchemaError("store identity", problems)
        return cls(**values)


def differences(
    found: StoreSpec,
    asked: StoreSpec,
    *,
    found_has: str = "the store has",
    asked_has: str = "this run asks for",
) -> list[str]:
    """Field by field, how one identity differs from another: by default, that in a store from the one asked for."""
    return [
        f"{f.name}: {found_has} {getattr(found, f.name)!r}, {asked_has} {getattr(asked, f.name)!r}"
        for f in dataclasses.fields(StoreSpec)
        if getattr(found, f.name) != getattr(asked, f.name)
    ]


def _field_problems(spec: Any) -> list[str]:
    """What is wrong with the fields of a StoreSpec, or of anything with its attributes."""
    problems = []
    for name, allowed in (
        ("backend", BACKENDS),
        ("precision", PRECISIONS),
        ("codec", CODECS),
        ("shuffle", SHUFFLES),
        ("compute", COMPUTE_PRECISIONS),
    ):
        if getattr(spec, name) not in allowed:
            problems.append(f"{name} is {_shown(getattr(spec, name))}, expected one of {', '.join(allowed)}")
    for name, least in (
        ("dim", 1),
        ("n_registers", 0),
        ("n_samples", 1),
        ("samples_per_shard", 1),
        ("samples_per_chunk", 1),
        ("micro_batch", 1),
    ):
        value = getattr(spec, name)
        if not _is_int(value) or value < least:
            problems.append(f"{name} is {_shown(value)}, expected an integer from {least} to {_MAX_INTEGER:,}")
    if not _is_int(spec.order_seed):
        problems.append(f"order_seed is {_shown(spec.order_seed)}, expected an integer of at most 63 bits")
    if not isinstance(spec.has_cls, bool):
        problems.append(f"has_cls is {_shown(spec.has_cls)}, expected true or false")
    for name in ("teacher", "teacher_weights_digest", "source_digest"):
        value = getattr(spec, name)
        if not isinstance(value, str) or not value or not value.isprintable():  # it goes to terminals
            problems.append(f"{name} is {_shown(value)}, expected printable text")
    if not isinstance(spec.preprocessing, Mapping) or not _is_plain_json(spec.preprocessing):
        problems.append(
            f"preprocessing is {_shown(spec.preprocessing)}, expected an object of plain JSON values, no tuples, "
            f"at most {_MAX_JSON_DEPTH} deep"
        )
    layers = spec.layers
    if not layers or not all(_is_int(x) and 0 <= x < 100 for x in layers) or list(layers) != sorted(set(layers)):
        problems.append(f"layers are {_shown(list(layers))}, expected increasing numbers from 0 to 99")
    if len(spec.grid) != 2 or not all(_is_int(x) and x >= 1 for x in spec.grid):
        problems.append(f"grid is {_shown(spec.grid)}, expected patch rows and columns")
    if spec.backend in BACKENDS and spec.codec in CODECS and spec.codec not in CODECS_OF[spec.backend]:
        codecs = ", ".join(CODECS_OF[spec.backend])
        problems.append(f"codec is {spec.codec!r} with backend {spec.backend!r}, which has {codecs}")
    if (spec.codec in BLOSC_CODECS) != (spec.shuffle != "none") and spec.codec in CODECS and spec.shuffle in SHUFFLES:
        problems.append(
            f"shuffle is {spec.shuffle!r} with codec {spec.codec!r}; {', '.join(BLOSC_CODECS)} have one, others none"
        )
    if not problems and spec.samples_per_shard % spec.samples_per_chunk:
        problems.append(
            f"samples_per_shard {spec.samples_per_shard} is not a multiple of "
            f"samples_per_chunk {spec.samples_per_chunk}"
        )
    return problems


def _size_problems(spec: StoreSpec) -> Iterator[str]:
    if spec.n_samples > MAX_SAMPLES:
        yield f"n_samples is {spec.n_samples}, at most {MAX_SAMPLES:,} are supported"
    if spec.backend == "webdataset" and spec.n_samples > MAX_TAR_SAMPLES:
        yield f"n_samples is {spec.n_samples}, a WebDataset store has at most {MAX_TAR_SAMPLES:,}"
    if spec.n_shards > MAX_SHARDS:
        yield f"{spec.n_shards} shards, at most {MAX_SHARDS:,} are supported; take more samples_per_shard"
    if spec.samples_per_shard > MAX_SHARD_SAMPLES:
        yield f"samples_per_shard is {spec.samples_per_shard}, at most {MAX_SHARD_SAMPLES:,} are supported"
    n_shard_chunks = len(spec.layers) * len(spec.array_kinds) * spec.chunks_per_shard
    if n_shard_chunks > MAX_SHARD_CHUNKS:
        yield (
            f"{n_shard_chunks} chunks in a shard, at most {MAX_SHARD_CHUNKS:,} are supported; "
            "take more samples_per_chunk or fewer samples_per_shard"
        )
    n_chunks = len(spec.layers) * len(spec.array_kinds) * max(spec.n_chunks, spec.chunks_per_shard)
    if n_chunks > MAX_CHUNKS:
        yield f"{n_chunks} chunks in all, at most {MAX_CHUNKS:,} are supported; take more samples_per_chunk"
    per_sample = max(spec.n_patches * PRECISION_NBYTES[spec.precision], 4 * spec.n_registers, 8) * spec.dim
    per_sample += TAR_SAMPLE_NBYTES if spec.backend == "webdataset" else 0
    if spec.samples_per_chunk * per_sample > MAX_CHUNK_NBYTES:
        yield (
            f"a chunk has {spec.samples_per_chunk * per_sample} bytes, at most {MAX_CHUNK_NBYTES:,} are supported; "
            "take fewer samples_per_chunk"
        )


def _is_plain_json(value: object) -> bool:
    """Whether JSON gives back what it was given: no tuples, no NaN, no keys but text; and other code may recurse."""
    try:
        return not _is_deeper(value, _MAX_JSON_DEPTH) and json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError, RecursionError):
        return False


def _is_deeper(value: object, most: int) -> bool:
    """Whether containers lie within each other more often than that."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else None
    return inner is not None and (most == 0 or any(_is_deeper(child, most - 1) for child in inner))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MAX_INTEGER


def _shown(value: object) -> str:
    """A value of whatever size and depth, for a message."""
    try:
        return _REPR.repr(value)
    except ValueError:  # Python spells no number of more than 4,300 digits
        return "a number of thousands of digits"
