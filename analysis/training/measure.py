"""One checkpoint measured: similarity of its layers, phases, spectra at its taps, ways of tokens, fit of a Raptor.

Everything is measured on the same images at every checkpoint, and goes into one document of a few hundred kB, so that a
long work is done checkpoint by checkpoint and what is done is not done again.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64

from analysis.interventions import token_kinds
from analysis.partitions import segments_of, spans_text
from analysis.phase_report import Phases, find_phases
from analysis.phases import DEFAULT_OBJECTIVE
from analysis.similarity import CosineAccumulator
from analysis.spectra import N_SINGULAR, SpectralScalars
from analysis.training.paths import Plane, fit_plane
from analysis.training.raptor_fit import Images, RaptorFit, fit_raptor, measure_fit
from analysis.training.records import EpochRecord
from analysis.training.taps import (
    N_PATHS,
    N_SPECTRA,
    PATHS_SEED,
    SPECTRA_SEED,
    TapSpectra,
    fixed_subset,
    tap_names,
    tap_states,
)
from pipeline.preprocess import normalise
from pipeline.teacher import Teacher

FORMAT = 1
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """What is measured.

    Attributes:
        k: Phases that the depth is cut into, and blocks of the Raptor.
        raptor_steps: Steps of 16 images that the Raptor is trained for; 0: no Raptor.
        seed: Of the Raptor's first weights and the order of its images.
    """

    k: int = 3
    raptor_steps: int = 200
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class PhaseClarity:
    """How clearly the layers 1 to L fall into k contiguous phases.

    Attributes:
        blocks: Spans of the best contiguous cut, by normalised association.
        score: Of it.
        random_mean: Of random contiguous cuts into as many.
        random_std: Of them.
        within: Mean cosine between two layers of one phase.
        across: Mean cosine between two layers of different phases.
    """

    blocks: str
    score: float
    random_mean: float
    random_std: float
    within: float
    across: float

    @property
    def contrast(self) -> float:
        """within - across: 0 where phases are no phases."""
        return self.within - self.across


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one checkpoint showed.

    Attributes:
        n_images: Of similarity and phases, and that the Raptor was measured on.
        images_digest: sha256 of their pixels: checkpoints are compared only on the same images.
        cosines: Mean cosine between layers 0 to L by token kind, over images and tokens: (layer, layer).
        phases: Of the distances over CLS and patch means, layers 1 to L.
        record: Scalars at the taps, over the fixed choice of images.
        n_vectors: Rows of each tap's covariance.
        singular_values: The first 50 at each tap: square roots of the covariance's eigenvalues, descending.
        cls_path: Mean CLS state at each tap from PosEmbed on, over the fixed choice of 100 images: (tap, dim).
        plane: Of the CLS states at these taps, image by image.
        raptor: Its fit; None if none was asked for.
    """

    n_images: int
    images_digest: str
    cosines: Mapping[str, Float64[np.ndarray, "layer layer"]]
    phases: PhaseClarity
    record: EpochRecord
    n_vectors: Mapping[str, int]
    singular_values: Mapping[str, Float64[np.ndarray, " direction"]]
    cls_path: Float64[np.ndarray, "tap dim"]
    plane: Plane
    raptor: RaptorFit | None

    def similarity(self, kind: str) -> float:
        """Mean cosine between two different layers of 1 to L."""
        return mean_similarity(self.cosines[kind])


def mean_similarity(cosines: Float64[np.ndarray, "layer layer"]) -> float:
    """Mean over pairs of different layers, layer 0, which no block has made, left out."""
    inner = cosines[1:, 1:]
    n = len(inner)
    return float((inner.sum() - np.trace(inner)) / (n * (n - 1)))


def phase_clarity(phases: Phases) -> PhaseClarity:
    """Numbers of the chosen phases and of the random contiguous ones beside them; NaN where there are none of these."""
    n = len(phases.distance)
    group = np.empty(n, np.int64)
    for number, rows in enumerate(phases.chosen.groups):
        group[list(rows)] = number
    pairs = np.triu_indices(n, 1)
    similarity, same = 1 - phases.distance[pairs], group[pairs[0]] == group[pairs[1]]
    random = [one.score for one in phases.controls["random contiguous"]]
    return PhaseClarity(
        blocks=spans_text(phases.chosen.groups),
        score=phases.chosen.score,
        random_mean=float(np.mean(random)) if random else float("nan"),
        random_std=float(np.std(random, ddof=1)) if len(random) > 1 else float("nan"),
        within=float(similarity[same].mean()) if same.any() else float("nan"),
        across=float(similarity[~same].mean()) if not same.all() else float("nan"),
    )


def measure_checkpoint(
    teacher: Teacher,
    epoch: int,
    *,
    train: Images,
    held_out: Images,
    labels: Int64[torch.Tensor, " image"],
    settings: MeasureSettings,
    progress: Callable[[int], None] | None = None,
) -> Measured:
    """Everything about one checkpoint.

    Args:
        teacher: As it was after that epoch; with CLS token.
        epoch: Which.
        train: That a Raptor is trained on; not normalised.
        held_out: That everything is measured on.
        labels: Classes of `held_out`.
        settings: What is measured.
        progress: Told of each step of the Raptor.
    """
    cosines, phases = _similarity(teacher, held_out, settings.k)
    spectra = _spectra(teacher, held_out)
    cls_states = _cls_states(teacher, held_out)
    raptor = None
    if settings.raptor_steps:
        segments = segments_of(phases.chosen.groups)
        assert segments is not None
        steps = settings.raptor_steps
        fitted = fit_raptor(teacher, train, segments, n_steps=steps, seed=settings.seed, progress=progress)
        raptor = measure_fit(fitted, teacher, held_out, labels, steps)
    return Measured(
        n_images=len(held_out),
        images_digest=sha256(held_out.numpy().tobytes()).hexdigest(),
        cosines=cosines,
        phases=phase_clarity(phases),
        record=EpochRecord(epoch=epoch, scalars=spectra.scalars()),
        n_vectors=spectra.n_vectors(),
        singular_values=spectra.singular_values(N_SINGULAR),
        cls_path=cls_states.mean(axis=0),
        plane=fit_plane(cls_states),
        raptor=raptor,
    )


def _similarity(teacher: Teacher, images: Images, k: int) -> tuple[dict[str, np.ndarray], Phases]:
    kinds = token_kinds(has_cls=teacher.has_cls, n_registers=teacher.n_registers, n_patches=teacher.n_patches)
    sums = {kind: CosineAccumulator(teacher.n_layers) for kind in [*kinds, "patch_mean"]}
    for part in images.split(_BATCH):
        states = teacher.layer_states(normalise(part, teacher.preprocessing)).cpu().numpy()
        for kind, tokens in kinds.items():
            sums[kind].update(states[:, :, tokens])
        sums["patch_mean"].update(states[:, :, kinds["patches"]].mean(axis=2))
    cosines = {kind: one.result().mean for kind, one in sums.items()}
    distance = 1 - (cosines["cls"] + cosines["patch_mean"])[1:, 1:] / 2
    np.fill_diagonal(distance, 0)
    return cosines, find_phases((distance + distance.T).clip(0) / 2, k, None, DEFAULT_OBJECTIVE)


def _spectra(teacher: Teacher, images: Images) -> TapSpectra:
    spectra = TapSpectra(tap_names(teacher.n_layers - 1), teacher.dim)
    chosen = images[fixed_subset(len(images), N_SPECTRA, SPECTRA_SEED)]
    for part in chosen.split(_BATCH):
        spectra.update(tap_states(teacher.model, normalise(part, teacher.preprocessing).to(teacher.device)))
    return spectra


def _cls_states(teacher: Teacher, images: Images) -> np.ndarray:
    """(image, tap, dim) from PosEmbed on: the patch embedding has no CLS token."""
    chosen = images[fixed_subset(len(images), N_PATHS, PATHS_SEED)]
    found = tap_states(teacher.model, normalise(chosen, teacher.preprocessing).to(teacher.device))
    later = tap_names(teacher.n_layers - 1)[1:]
    return np.stack([found[name][:, 0].double().cpu().numpy() for name in later], axis=1)


# ---------------------------------------------------------------- as a document


def to_json(measured: Measured) -> str:
    """Every number with all its digits; NaN as NaN, which Python reads again."""
    document = {"format": FORMAT, **asdict(measured)}
    document["record"] = {
        "epoch": measured.record.epoch,
        "scalars": {tap: asdict(one) for tap, one in measured.record.scalars.items()},
    }
    return json.dumps(document, default=lambda array: array.tolist())


def from_json(text: str) -> Measured:
    """What `to_json` wrote.

    Raises:
        ValueError, KeyError, TypeError: It is something else.
    """
    found: dict[str, Any] = json.loads(text)
    if found.pop("format") != FORMAT:
        raise ValueError(f"it is not of format {FORMAT}")
    record, phases, plane, raptor = (found.pop(name) for name in ("record", "phases", "plane", "raptor"))
    return Measured(
        n_images=found["n_images"],
        images_digest=found["images_digest"],
        cosines={kind: np.array(one) for kind, one in found["cosines"].items()},
        phases=PhaseClarity(**phases),
        record=EpochRecord(
            epoch=record["epoch"],
            scalars={tap: SpectralScalars(**one) for tap, one in record["scalars"].items()},
        ),
        n_vectors=found["n_vectors"],
        singular_values={tap: np.array(one) for tap, one in found["singular_values"].items()},
        cls_path=np.array(found["cls_path"]),
        plane=Plane(**{name: np.array(one) for name, one in plane.items()}),
        raptor=None if raptor is None else _raptor_from(raptor),
    )


def _raptor_from(found: dict[str, Any]) -> RaptorFit:
    return RaptorFit(
        blocks=tuple(found["blocks"]),
        n_steps=found["n_steps"],
        n_images=found["n_images"],
        r2={kind: np.array(one) for kind, one in found["r2"].items()},
        r2_one_mean={kind: np.array(one) for kind, one in found["r2_one_mean"].items()},
        accuracy=found["accuracy"],
    )
