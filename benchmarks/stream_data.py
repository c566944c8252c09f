"""The same random states in the forms that the loaders of the stream benchmark read."""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import zarr
from jaxtyping import Float32
from numcodecs import Blosc

from infra.objects import FolderObjects
from storage_schemas.from_arrays import write_store
from storage_schemas.samples import Sample
from storage_schemas.spec import Span, StoreSpec

REFERENCE_CHUNK = 128  # samples of one chunk in the published store; seeds.md 1.3
SAMPLES_PER_TAR = 64  # 100 MB a tar at ViT-B/14 size


@dataclass(frozen=True, kw_only=True)
class StreamData:
    """States of one span, four times on disk.

    Attributes:
        spec: Of our store; its layers are the states of the span.
        span: The states that every loader delivers.
        store: Folder of our store.
        int8: Folder of our store in int8.
        reference: Folder of the reference-style Zarr v2 array, (sample, state, token, dim) float32.
        tars: WebDataset tars with one (state, token, dim) array in the store's precision per sample.
    """

    spec: StoreSpec
    span: Span
    store: Path
    int8: Path
    reference: Path
    tars: tuple[Path, ...]


def make_spec(n_samples: int, span: Span, *, small: bool = False) -> StoreSpec:
    """A store of the span's states alone: ViT-B/14 with 4 registers at 224 px, or a tiny teacher."""
    return StoreSpec(
        layers=tuple(span.states),
        dim=16 if small else 768,
        has_cls=True,
        n_registers=4,
        grid=(2, 2) if small else (16, 16),
        precision="float16",
        codec="none",
        n_samples=n_samples,
        samples_per_shard=32 if small else 256,
        samples_per_chunk=8 if small else 16,
        teacher="random_states",
        teacher_weights_digest="0" * 64,
        preprocessing={},
        micro_batch=16,
        source_digest="0" * 64,
    )


def planted_states(spec: StoreSpec, rows: range) -> Float32[np.ndarray, "sample layer token dim"]:
    """Standard normal float32 states, a function of the sample index alone; float16 has to round them."""
    shape = (len(spec.layers), spec.n_tokens, spec.dim)
    out = np.empty((len(rows), *shape), np.float32)
    for place, row in enumerate(rows):
        np.random.default_rng((1, row)).standard_normal(dtype=np.float32, out=out[place])
    return out


def write_stream_data(folder: Path, spec: StoreSpec, span: Span) -> StreamData:
    """Write all forms below `folder`, 7.3 MB a sample at ViT-B/14 size and four states."""
    data = StreamData(
        spec=spec,
        span=span,
        store=folder / "store",
        int8=folder / "int8",
        reference=folder / "reference",
        tars=tuple(folder / f"{start:09d}.tar" for start in range(0, spec.n_samples, SAMPLES_PER_TAR)),
    )
    samples = [Sample(sample_id=f"{i:09d}.jpg", label=0, class_name="random", nbytes=1) for i in range(spec.n_samples)]
    for place, its_spec in ((data.store, spec), (data.int8, replace(spec, precision="int8"))):
        write_store(FolderObjects(place), its_spec, samples, lambda rows: planted_states(spec, rows))
    _write_reference(data)
    for path, start in zip(data.tars, range(0, spec.n_samples, SAMPLES_PER_TAR)):
        _write_tar(path, spec, range(start, min(start + SAMPLES_PER_TAR, spec.n_samples)))
    return data


def _write_reference(data: StreamData) -> None:
    shape = (len(data.spec.layers), data.spec.n_tokens, data.spec.dim)
    array = zarr.create_array(
        data.reference,
        shape=(data.spec.n_samples, *shape),
        chunks=(REFERENCE_CHUNK, 1, *shape[1:]),
        dtype="float32",
        compressors=Blosc(cname="zstd", clevel=3, shuffle=Blosc.SHUFFLE),
        zarr_format=2,
    )
    for start in range(0, data.spec.n_samples, REFERENCE_CHUNK):
        rows = range(start, min(start + REFERENCE_CHUNK, data.spec.n_samples))
        array[rows.start : rows.stop] = planted_states(data.spec, rows)


def _write_tar(path: Path, spec: StoreSpec, rows: range) -> None:
    with tarfile.open(path, "w") as tar:
        for row, states in zip(rows, _each(spec, rows)):
            member = io.BytesIO()
            np.save(member, states.astype(spec.precision))
            info = tarfile.TarInfo(f"{row:09d}.states.npy")
            info.size = member.tell()
            member.seek(0)
            tar.addfile(info, member)


def _each(spec: StoreSpec, rows: range) -> Iterator[np.ndarray]:
    for row in rows:
        yield planted_states(spec, range(row, row + 1))[0]
