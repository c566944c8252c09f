"""A training as its checkpoints and what was measured of each: measured one by one, kept, and not measured twice."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from json import dumps, loads

from analysis.training.measure import Measured, MeasureSettings, from_json, measure_checkpoint, to_json
from analysis.training.records import EpochRecord
from infra.console import UserError
from infra.objects import ObjectMissingError, Objects
from trainer.teacher_checkpoints import TeacherCheckpoint


@dataclass(frozen=True, kw_only=True)
class Point:
    """One checkpoint with its losses, and what was measured of it."""

    checkpoint: TeacherCheckpoint
    measured: Measured

    @property
    def epoch(self) -> int:
        return self.checkpoint.epoch


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training.

    Attributes:
        name: Such as "p = 0.3".
        points: Its checkpoints by epoch, one or more, all measured on the same images.
    """

    name: str
    points: Sequence[Point]

    @property
    def records(self) -> list[EpochRecord]:
        return [point.measured.record for point in self.points]

    @property
    def last(self) -> Point:
        return self.points[-1]

    @property
    def least_val_loss(self) -> Point:
        """Where the loss on held-out images is least: afterwards the training overfits."""
        return min(self.points, key=lambda point: point.checkpoint.val.loss)


def measured_key(checkpoint: TeacherCheckpoint) -> str:
    """Where what was measured of a checkpoint is kept."""
    return f"measured/epoch_{checkpoint.epoch:04d}.json"


def measure_run(
    name: str,
    checkpoints: Sequence[TeacherCheckpoint],
    place: Objects,
    settings: MeasureSettings,
    *,
    device: str = "cpu",
    kept: Callable[[TeacherCheckpoint], None] | None = None,
    began: Callable[[TeacherCheckpoint], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Run:
    """Measure every checkpoint, but those that `place` has of the same weights and settings.

    Args:
        name: Of the run.
        checkpoints: Of one training, by epoch.
        place: Where measurements are read and written.
        settings: What is measured.
        device: Where the teacher and the Raptor run.
        kept: Told of each checkpoint that had been measured.
        began: Told of each other one before it is measured.
        progress: Told of each step of a Raptor, and of one more for each checkpoint that is measured.

    Raises:
        UserError: What was there had been measured on other images.
    """
    points = []
    for checkpoint in checkpoints:
        measured = read_measured(checkpoint, place, settings)
        if measured is not None:
            if kept is not None:
                kept(checkpoint)
        else:
            if began is not None:
                began(checkpoint)
            measured = _measure(checkpoint, settings, device, progress)
            document = {"of": _of(checkpoint, settings), "measured": to_json(measured)}
            place.put(measured_key(checkpoint), dumps(document).encode())
            if progress is not None:
                progress(1)
        points.append(Point(checkpoint=checkpoint, measured=measured))
    check_same_images([point.measured for point in points], name)
    return Run(name=name, points=points)


def read_measured(checkpoint: TeacherCheckpoint, place: Objects, settings: MeasureSettings) -> Measured | None:
    """What was measured of a checkpoint; None where there is nothing, or it is of other weights or settings."""
    try:
        document = loads(place.get(measured_key(checkpoint)))
        if document["of"] != _of(checkpoint, settings):
            return None
        return from_json(document["measured"])
    except ObjectMissingError:
        return None
    except (ValueError, KeyError, TypeError):  # torn, or of another version: measured anew
        return None


def check_same_images(measured: Sequence[Measured], name: str) -> None:
    """Refuse to compare what was measured on different images."""
    if any(before.images_digest != after.images_digest for before, after in pairwise(measured)):
        raise UserError(
            f"{name}: its checkpoints were measured on different images; delete what is kept below measured/"
        )


def _of(checkpoint: TeacherCheckpoint, settings: MeasureSettings) -> dict[str, object]:
    return {"digest": checkpoint.digest, "epoch": checkpoint.epoch, **asdict(settings)}


def _measure(
    checkpoint: TeacherCheckpoint,
    settings: MeasureSettings,
    device: str,
    progress: Callable[[int], None] | None,
) -> Measured:
    from pipeline.teacher import load_teacher
    from trainer.digits_teacher import load_split

    teacher = load_teacher("digits_vit", weights=checkpoint.weights, head=checkpoint.head, device=device)
    train, _ = load_split("train", checkpoint.config.n_train)
    held_out, labels = load_split("val")
    return measure_checkpoint(
        teacher,
        checkpoint.epoch,
        train=train,
        held_out=held_out,
        labels=labels,
        settings=settings,
        progress=progress,
    )
