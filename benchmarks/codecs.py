"""What codecs make of real states: bytes per value, and values encoded and decoded per second by one core."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.machine import this_machine
from benchmarks.real_states import States, digits_states, photo_states
from benchmarks.report import Cell, Result
from benchmarks.rounds import Rates, run_rounds
from storage_schemas.layout import chunks_view, decode_payload, encode_payload, full_chunk_nbytes
from storage_schemas.precision import round_patches
from storage_schemas.spec import BLOSC_CODECS, PRECISION_NBYTES, PRECISIONS, StoreSpec

NOTES = (
    "Chunks are those of the store: patches of 16 samples of one layer (ViT-B/14) or 32 (digits_vit). Bytes per value "
    "count int8's scales, one float32 for each sample and channel, which are stored beside it without codec.",
    "Rates are of one core, in GB of uncompressed stored bytes per second, through the functions that the store itself "
    "uses. `none` is a copy of the bytes; not even that happens in a store, where values are written once, into their "
    "place in the object. gzip is the codec of WebDataset stores.",
    "Samples per second is what one core could decode of eight states (span 0-7) of a ViT-B/14, patches alone.",
)
CODECS = (
    ("zarr", "none", "none"),
    *(("zarr", codec, shuffle) for codec in BLOSC_CODECS for shuffle in ("byte", "bit")),
    ("webdataset", "gzip", "none"),
)
_KIND = "patches"
_VALUES_PER_SAMPLE = 8 * 256 * 768


@dataclass(frozen=True, kw_only=True)
class CodecsBenchmark:
    """Sizes of this benchmark.

    Attributes:
        n_digits, n_photos: Samples of a chunk, of digits_vit and of ViT-B/14; 0 leaves that teacher out.
        layers: States that are encoded, of both teachers.
        n_rounds: Every combination runs once in each.
        least_s: Each is repeated for at least so long in a round.
    """

    n_digits: int = 32
    n_photos: int = 16
    layers: tuple[int, ...] = (0, 4, 8, 12)
    n_rounds: int = 3
    least_s: float = 0.15


QUICK = CodecsBenchmark(n_digits=4, n_photos=0, layers=(0, 12), n_rounds=1, least_s=0.0)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to store the states of one teacher.

    Attributes:
        states: Whose.
        spec: Of a store of one chunk and layer.
        memories: Of each layer's chunk, laid out as in an object.
        scale_nbytes: What int8 stores beside them.
    """

    states: str
    spec: StoreSpec
    memories: list[np.ndarray]
    scale_nbytes: int

    @property
    def n_values(self) -> int:
        return len(self.memories) * self.spec.n_samples * self.spec.n_patches * self.spec.dim

    @property
    def raw_nbytes(self) -> int:
        return self.n_values * PRECISION_NBYTES[self.spec.precision]


def run(config: CodecsBenchmark) -> Result:
    """Make states, check that every codec gives them back, time all in turn."""
    made: dict[str, Callable[[int], States]] = {"digits_vit": digits_states, "ViT-B/14": photo_states}
    sizes = (config.n_digits, config.n_photos)
    teachers = {name: make(n)[:, list(config.layers)] for (name, make), n in zip(made.items(), sizes) if n}
    cases = [case for name, states in teachers.items() for case in make_cases(name, states)]
    with ThreadPoolExecutor(1) as one_core:  # in the main thread Blosc would use all cores
        return one_core.submit(_measure, config, cases).result()


def make_cases(name: str, states: States) -> Iterator[Case]:
    """Every precision with every codec of both back ends."""
    for precision in PRECISIONS:
        rounded = [round_patches(precision, states[:, i]) for i in range(states.shape[1])]
        for backend, codec, shuffle in CODECS:
            spec = _spec(states, backend=backend, precision=precision, codec=codec, shuffle=shuffle)
            memories = [np.zeros(full_chunk_nbytes(spec, _KIND), np.uint8) for _ in rounded]
            for memory, (stored, _) in zip(memories, rounded):
                chunks_view(spec, _KIND, memory)[0] = stored
            scales = [scale.nbytes for _, scale in rounded if scale is not None]
            yield Case(states=name, spec=spec, memories=memories, scale_nbytes=sum(scales))


def encode_all(case: Case) -> list[bytes]:
    """The payload of each chunk."""
    return [bytes(encode_payload(case.spec, _KIND, 0, memory.data)) for memory in case.memories]


def check_lossless(case: Case, payloads: list[bytes]) -> None:
    """Raise AssertionError if anything does not come back bit for bit."""
    for memory, payload in zip(case.memories, payloads):
        expected = chunks_view(case.spec, _KIND, memory)[0]
        if decode_payload(case.spec, _KIND, 0, payload).tobytes() != expected.tobytes():
            raise AssertionError(f"{case.spec.precision} through {case.spec.codec}: other bytes came back")


def _measure(config: CodecsBenchmark, cases: list[Case]) -> Result:
    payloads = [encode_all(case) for case in cases]
    for case, encoded in zip(cases, payloads):
        check_lossless(case, encoded)
    encoders = {str(i): (lambda case=case: len(encode_all(case)) and case.raw_nbytes) for i, case in enumerate(cases)}
    decoders = {str(i): (lambda i=i: _decode_all(cases[i], payloads[i])) for i in range(len(cases))}
    encode = run_rounds(encoders, n_rounds=config.n_rounds, least_s=config.least_s)
    decode = run_rounds(decoders, n_rounds=config.n_rounds, least_s=config.least_s)
    rows = [
        _row(case, sum(map(len, encoded)), encode[str(i)], decode[str(i)])
        for i, (case, encoded) in enumerate(zip(cases, payloads))
    ]
    return Result(
        name="codecs",
        title=f"Codecs on states {', '.join(map(str, config.layers))} of digits_vit and a ViT-B/14 with random weights",
        machine=this_machine(),
        settings=asdict(config),
        rows=rows,
        notes=NOTES,
    )


def _decode_all(case: Case, payloads: list[bytes]) -> int:
    """Into new memory, as a reader's buffers are somewhere else than the payload."""
    for payload in payloads:
        decoded = decode_payload(case.spec, _KIND, 0, payload)
        if case.spec.codec == "none":
            decoded.copy()
    return case.raw_nbytes


def _row(case: Case, nbytes: int, encode: Rates, decode: Rates) -> dict[str, Cell]:
    spec = case.spec
    per_value = (nbytes + case.scale_nbytes) / case.n_values
    return {
        "states": case.states,
        "precision": spec.precision,
        "codec": spec.codec,
        "shuffle": spec.shuffle,
        "bytes/value": per_value,
        "of float32": per_value / 4,
        "saved by the codec": 1 - nbytes / case.raw_nbytes if spec.codec != "none" else 0.0,
        "encode GB/s": encode.median / 1e9,
        "decode GB/s": decode.median / 1e9,
        "samples/s, decoded": decode.median / (_VALUES_PER_SAMPLE * PRECISION_NBYTES[spec.precision]),
    }


def _spec(states: States, **choices: Any) -> StoreSpec:
    n_samples, _, n_patches, dim = states.shape
    return StoreSpec(
        layers=(0,),
        dim=dim,
        has_cls=False,
        n_registers=0,
        grid=(1, n_patches),
        n_samples=n_samples,
        samples_per_shard=n_samples,
        samples_per_chunk=n_samples,
        teacher="benchmark",
        teacher_weights_digest="none",
        micro_batch=n_samples,
        source_digest="none",
        **choices,
    )
