"""Run images through the stored teacher again, and compare with what is stored: drift of libraries, devices, images."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from infra.console import UserError, counted, say
from pipeline.preprocess import BadImageError, decode_image, normalise
from pipeline.preprocessing import Preprocessing
from pipeline.shard import resolve_device
from pipeline.sources import Source
from pipeline.teacher import Teacher, teacher_from_files
from storage_schemas.commit import Fidelity
from storage_schemas.consistency import moments_of
from storage_schemas.errors import Problem
from storage_schemas.from_arrays import make_fidelity, split_kinds
from storage_schemas.keys import array_path
from storage_schemas.reader import Store
from storage_schemas.samples import Sample, samples_of_table
from storage_schemas.spec import HEAD_INPUT
from storage_schemas.statistics import Statistics, merge

#: Relative MSE that the arithmetic of another machine or library may cause, by `compute`. Rounding differs in the last
#: places of a float32 (6e-8), bfloat16 (4e-3) or float16 and tf32 (5e-4), squared, and grows over a dozen blocks; other
#: weights or another image give 1e-2 and more.
ALLOWED = {"float32": 1e-9, "tf32": 1e-5, "float16": 1e-5, "bfloat16": 1e-3}
#: The error on record is a mean over shards; that of a few images scatters about it.
SCATTER = 4.0


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Stored states of one layer and kind, or head_input, against states made anew.

    Attributes:
        path: Of the array.
        found: Relative MSE, R2 and largest absolute difference.
        recorded: Largest relative MSE on record in a commit; 0 where nothing was rounded.
        allowed: Relative MSE that precision and arithmetic explain.
    """

    path: str
    found: Fidelity
    recorded: float
    allowed: float

    @property
    def is_small(self) -> bool:
        return self.found.relative_mse <= self.allowed


def recompute(store: Store, source: Source, n_images: int, *, seed: int = 0, device: str = "auto") -> list[Drift]:
    """Make the states of some valid images anew and compare them with those in a store.

    Each image takes the place in a micro-batch that it had in the extraction, with one thread of torch, so that on the
    same machine with the same libraries the arithmetic is the same to the last bit. What is in memory at once is
    the states of one micro-batch.

    Args:
        store: To be checked.
        source: Of its images.
        n_images: How many, drawn at random; all if there are fewer.
        seed: Of the draw.
        device: cpu, cuda or auto.

    Returns:
        For each layer and kind that is stored, and for head_input, which is float32 as the small kinds are.

    Raises:
        UserError: An image is not there, does not decode, or is not the one that was extracted.
    """
    rows = sorted(random.Random(seed).sample(np.flatnonzero(store.valid).tolist(), min(n_images, store.n_valid)))
    if not rows:
        raise UserError(f"{store.location} has no valid image yet, so nothing can be made anew")
    device = resolve_device(device)
    teacher = teacher_from_files(store.read_teacher_files(), device=device, compute=store.spec.compute)
    sums = {path: _Sums() for path in _paths(store)}
    batches = _micro_batches(store, rows)
    n_torch_threads = torch.get_num_threads()
    try:
        if device == "cpu":
            torch.set_num_threads(1)
        for number, batch in enumerate(batches):
            states = _make_states(store, source, teacher, batch)
            _add_batch(store, teacher, batch, states, sums)
            if len(batches) > 1:
                say(f"  made anew: micro-batch {number + 1} of {len(batches)}")
    finally:
        torch.set_num_threads(n_torch_threads)
    return [_drift(store, path, found.fidelity()) for path, found in sums.items()]


@dataclass(kw_only=True)
class _Sums:
    """What the differences of one array come to, added up, so that no states need be kept.

    Attributes:
        squared_error: Sum of squared differences.
        worst: Largest absolute difference.
        made: Moments per channel of the states made anew.
    """

    squared_error: float = 0.0
    worst: float = 0.0
    made: Statistics | None = None

    def add(self, stored: np.ndarray, made: np.ndarray) -> None:
        wide = made.astype(np.float64).reshape(-1, made.shape[-1])
        difference = stored.astype(np.float64).reshape(wide.shape) - wide
        self.squared_error += float((difference**2).sum())
        self.worst = float(np.maximum(self.worst, np.abs(difference).max(initial=0.0)))
        moments = moments_of(wide)
        self.made = moments if self.made is None else merge(self.made, moments)

    def fidelity(self) -> Fidelity:
        assert self.made is not None
        squares = float((self.made.m2 + self.made.count * self.made.mean**2).sum())
        return make_fidelity(self.squared_error, squares, float(self.made.m2.sum()), self.worst)


def drift_problems(drifts: Sequence[Drift]) -> list[Problem]:
    """Those that precision and arithmetic do not explain."""
    return [
        Problem(
            key=drift.path,
            what="the stored states are not those that the stored teacher makes of these images",
            expected=f"a relative MSE of at most {drift.allowed:.1e}",
            found=f"{drift.found.relative_mse:.1e}",
        )
        for drift in drifts
        if not drift.is_small
    ]


def drift_lines(drifts: Sequence[Drift], n_images: int) -> list[str]:
    """The comparison as a table to print."""
    kept = [drift for drift in drifts if drift.recorded == 0]
    exact = sum(drift.found.worst == 0 for drift in kept)
    same = f"{exact} of {len(kept)} arrays kept in float32 are equal to the last bit"
    head = f"{counted(n_images, 'image')} made anew: {same}"
    title = f"  {'':<22}{'relative MSE':>14}{'on record':>12}{'R2':>14}{'worst':>11}"
    return [head, title, *(f"  {_row(drift)}" for drift in drifts)]


def _row(drift: Drift) -> str:
    found = drift.found
    mark = "" if drift.is_small else f"  more than {drift.allowed:.1e}"
    return (
        f"{drift.path:<22}{found.relative_mse:>14.2e}{drift.recorded:>12.2e}{found.r2:>14.9f}{found.worst:>11.2e}{mark}"
    )


def _decode(source: Source, sample: Sample, preprocessing: Preprocessing) -> np.ndarray:
    data = source.read(sample)
    if len(data) != sample.nbytes:
        raise UserError(
            f"{sample.sample_id} has {len(data):,} bytes here, and had {sample.nbytes:,} when it was extracted: IMAGES "
            "are not those of this store"
        )
    try:
        return decode_image(data, preprocessing)
    except BadImageError as error:
        raise UserError(
            f"{sample.sample_id} does not decode ({error}), and did when it was extracted: IMAGES are not those of "
            "this store, or another library reads them"
        ) from error


def _paths(store: Store) -> list[str]:
    paths = [array_path(layer, kind) for layer in store.layers for kind in store.spec.token_kinds]
    return [*paths, HEAD_INPUT] if store.spec.has_head_input else paths


def _micro_batches(store: Store, rows: Sequence[int]) -> list[dict[int, int]]:
    """Rows by their place in a micro-batch, which is the one that they had; as few batches as that allows."""
    batches: list[dict[int, int]] = []
    for row in rows:
        place = row % store.spec.samples_per_shard % store.spec.micro_batch
        free = next((batch for batch in batches if place not in batch), None)
        if free is None:
            batches.append(free := {})
        free[place] = row
    return batches


def _make_states(store: Store, source: Source, teacher: Teacher, batch: Mapping[int, int]) -> list[torch.Tensor]:
    """All states of a micro-batch, layer 0 first; places that no row has are black."""
    preprocessing = Preprocessing.from_dict(dict(store.spec.preprocessing))
    samples = samples_of_table(store.samples.take(list(batch.values())))
    side = preprocessing.image_size
    pixels = np.zeros((store.spec.micro_batch, 3, side, side), np.uint8)
    for place, sample in zip(batch, samples):
        pixels[place] = _decode(source, sample, preprocessing)
    with torch.inference_mode():
        return teacher.layer_states_list(normalise(torch.from_numpy(pixels).to(teacher.device), preprocessing))


def _add_batch(
    store: Store, teacher: Teacher, batch: Mapping[int, int], states: Sequence[torch.Tensor], sums: dict[str, _Sums]
) -> None:
    """Compare a micro-batch with what is stored of it, one layer at a time."""
    places, rows, spec = list(batch), list(batch.values()), store.spec
    for layer in store.layers:
        made = split_kinds(spec, states[layer][places].cpu().numpy())
        for kind in spec.token_kinds:
            stored = store.read(layers=[layer], samples=rows, tokens=kind)
            sums[array_path(layer, kind)].add(stored, made[kind])
    if spec.has_head_input:
        with torch.inference_mode():
            head_input = teacher.head_input(teacher.final_norm(states[-1]))[places].float().cpu().numpy()
        sums[HEAD_INPUT].add(store.read_head_input(rows), head_input)


def _drift(store: Store, path: str, found: Fidelity) -> Drift:
    on_record = store.table.fidelity.get(path)
    recorded = on_record.relative_mse if on_record else 0.0
    return Drift(path=path, found=found, recorded=recorded, allowed=ALLOWED[store.spec.compute] + SCATTER * recorded)
