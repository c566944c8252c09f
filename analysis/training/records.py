"""Records of a training, one line an epoch: six scalars of the spectrum at each tap, in the authors' own JSON lines.

    {"epoch": 1, "layers": {"Layer_01_Block01": {"effective_rank": 3.72, "stable_rank": 1.74, ...}, ...}}

Source: results/epoch_summaries.jsonl of the Transformer Geometry Observatory (Kapil, Upla 2026).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float64

from analysis.spectra import SpectralScalars
from infra.console import UserError

#: Our names of the scalars, with those in the records.
PUBLISHED_NAMES = {
    "effective_rank": "effective_rank",
    "stable_rank": "stable_rank",
    "participation_ratio": "participation_ratio",
    "entropy": "spectral_entropy",
    "flatness": "spectral_flatness",
    "anisotropy": "spectral_anisotropy",
}
_IDENTITY_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One epoch: scalars by tap, taps in order of depth."""

    epoch: int
    scalars: Mapping[str, SpectralScalars]


def curves_of(records: Sequence[EpochRecord], scalar: str) -> dict[str, Float64[np.ndarray, " epoch"]]:
    """One scalar over the epochs, by tap."""
    return {tap: np.array([getattr(one.scalars[tap], scalar) for one in records]) for tap in records[0].scalars}


def record_line(record: EpochRecord) -> str:
    """As a line of the file, without its end; a scalar that is not defined is null."""
    layers = {
        tap: {PUBLISHED_NAMES[name]: None if math.isnan(value) else value for name, value in asdict(scalars).items()}
        for tap, scalars in record.scalars.items()
    }
    return json.dumps({"epoch": record.epoch, "layers": layers})


def read_records(text: str, where: str) -> list[EpochRecord]:
    """All records of a file, in its order.

    Args:
        text: Of the file. Empty lines, and keys that are not known, are passed over.
        where: Its name, for messages.

    Raises:
        UserError: Lines that are no such record, that break exp(entropy) = effective rank, 1 / anisotropy = stable rank
            or 1 <= stable rank <= participation ratio <= effective rank, whose epochs do not ascend or whose taps
            differ. Every problem is listed.
    """
    found: list[EpochRecord] = []
    problems: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                found.append(_record(json.loads(line)))
                problems += [f"line {number}, {problem}" for problem in _broken_identities(found[-1])]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                problems.append(f"line {number} is no record of an epoch ({type(error).__name__}: {error})")
    if not found and not problems:
        problems.append("there is no line in it")
    for before, after in pairwise(found):
        if after.epoch <= before.epoch:
            problems.append(f"epoch {after.epoch} follows epoch {before.epoch}: expected each once, ascending")
        if list(after.scalars) != list(before.scalars):
            problems.append(f"epoch {after.epoch} has other taps than epoch {before.epoch}")
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise UserError("\n  ".join([f"{where} cannot be read as records of a training:", *shown]))
    return found


def _record(document: Mapping[str, Any]) -> EpochRecord:
    scalars = {
        tap: SpectralScalars(**{ours: _number(values[theirs]) for ours, theirs in PUBLISHED_NAMES.items()})
        for tap, values in document["layers"].items()
    }
    if not scalars:
        raise ValueError("it has no taps")
    return EpochRecord(epoch=int(document["epoch"]), scalars=scalars)


def _number(value: object) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"expected a finite number or null, found {value!r}")
    return float(value)


def _broken_identities(record: EpochRecord) -> list[str]:
    problems = []
    for tap, one in record.scalars.items():
        if math.isnan(one.effective_rank):
            continue
        ordered = [1.0, one.stable_rank, one.participation_ratio, one.effective_rank]
        holds = {
            "exp(entropy) = effective rank": math.isclose(
                math.exp(one.entropy), one.effective_rank, rel_tol=_IDENTITY_TOLERANCE
            ),
            "1 / anisotropy = stable rank": math.isclose(
                one.stable_rank * one.anisotropy, 1, rel_tol=_IDENTITY_TOLERANCE
            ),
            "1 <= stable rank <= participation ratio <= effective rank": all(
                low <= high * (1 + _IDENTITY_TOLERANCE) for low, high in pairwise(ordered)
            ),
        }
        problems += [f"{tap}: {name} does not hold" for name, is_so in holds.items() if not is_so]
    return problems
