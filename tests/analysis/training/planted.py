"""Records and runs with known curves, without any model."""

from pathlib import Path

import numpy as np

from analysis.spectra import SpectralScalars, spectral_scalars
from analysis.training.measure import Measured, PhaseClarity
from analysis.training.paths import fit_plane
from analysis.training.raptor_fit import RaptorFit
from analysis.training.records import EpochRecord
from analysis.training.runs import Point, Run
from analysis.training.taps import tap_names
from trainer.digits_teacher import DigitsTeacherConfig, Evaluation
from trainer.teacher_checkpoints import TeacherCheckpoint

N_BLOCKS = 4


def scalars(tilt: float) -> SpectralScalars:
    """Of eight eigenvalues that fall by a factor: a smaller tilt is a flatter spectrum."""
    return spectral_scalars(np.exp(-tilt * np.arange(8.0)))


def record(epoch: int, tilts: list[float]) -> EpochRecord:
    """Of as many blocks as there are tilts less the three other taps."""
    return EpochRecord(epoch=epoch, scalars=dict(zip(tap_names(len(tilts) - 3), map(scalars, tilts), strict=True)))


def checkpoint(epoch: int, val_loss: float, drop_path: float = 0.0, seed: int = 0) -> TeacherCheckpoint:
    return TeacherCheckpoint(
        epoch=epoch,
        weights=Path("w"),
        head=Path("h"),
        digest=f"{epoch}",
        train=Evaluation(loss=1.0 / (epoch + 1), accuracy=0.9),
        val=Evaluation(loss=val_loss, accuracy=0.5 + drop_path / 10),
        config=DigitsTeacherConfig(drop_path=drop_path, seed=seed),
    )


def measured(epoch: int, similarity: float, r2: float | None, images: str = "same") -> Measured:
    """Every two layers have one cosine."""
    cosines = np.full((N_BLOCKS + 1, N_BLOCKS + 1), similarity)
    np.fill_diagonal(cosines, 1)
    path = np.random.default_rng(epoch).standard_normal((N_BLOCKS + 2, 3))
    kinds = ("cls", "registers", "patches")
    fit = None
    if r2 is not None:
        values = {kind: np.full(N_BLOCKS, r2) for kind in kinds}
        fit = RaptorFit(blocks=("0-2", "2-4"), n_steps=1, n_images=5, r2=values, r2_one_mean=values, accuracy=0.25)
    return Measured(
        n_images=5,
        images_digest=images,
        cosines=dict.fromkeys((*kinds, "patch_mean"), cosines),
        phases=PhaseClarity(blocks="0-2,2-4", score=1.2, random_mean=1.1, random_std=0.1, within=0.9, across=0.5),
        record=record(epoch, [1.0 / (epoch + 1)] * (N_BLOCKS + 3)),
        n_vectors=dict.fromkeys(tap_names(N_BLOCKS), 100),
        singular_values=dict.fromkeys(tap_names(N_BLOCKS), 4 * np.exp(-np.arange(5.0) / (epoch + 1))),
        cls_path=path,
        plane=fit_plane(path),
        raptor=fit,
    )


def run(name: str, points: dict[int, tuple[float, float, float | None]], drop_path: float = 0.0) -> Run:
    """By epoch: loss on held-out images, cosine between layers, R2."""
    return Run(
        name=name,
        points=[
            Point(
                checkpoint=checkpoint(epoch, loss, drop_path),
                measured=measured(epoch, similarity, r2),
            )
            for epoch, (loss, similarity, r2) in points.items()
        ],
    )
