"""Validates the model of one run: on a sample now and then, on the whole set at its end."""

from storage_schemas import Store
from trainer import losses
from trainer.config import TrainConfig
from trainer.data import TrainingData, first_samples
from trainer.machine import Machine
from trainer.raptor import LayerModel
from trainer.validation import Baselines, Validation, ValidationSet, measure_baselines, validate

_VALIDATION_LANES = 8


class Judge:
    """Validates the model of one run."""

    def __init__(self, config: TrainConfig, data: TrainingData, loss: losses.Loss, machine: Machine) -> None:
        self._config, self._data, self._loss, self._machine = config, data, loss, machine

    def sample(self, model: LayerModel) -> Validation:
        """On the first samples of the set."""
        return self._validate(model, first_samples(self._data.validation, self._config.validation_samples))

    def whole(self, model: LayerModel) -> Validation:
        """On all samples."""
        return self._validate(model, self._data.validation)

    def baselines(self, untrained: LayerModel) -> Baselines | None:
        """Accuracies to compare with, on all samples; `untrained` is the model as it was before the first step."""
        return measure_baselines(
            untrained,
            self._set(self._data.validation),
            self._config.span,
            machine=self._machine,
            precision=self._config.precision,
        )

    def _validate(self, model: LayerModel, store: Store) -> Validation:
        return validate(
            model,
            self._set(store),
            self._config.span,
            self._loss,
            machine=self._machine,
            precision=self._config.precision,
        )

    def _set(self, store: Store) -> ValidationSet:
        return ValidationSet(
            store=store,
            teacher=self._data.teacher,
            batch_size=self._config.batch_size,
            lanes=validation_lanes(self._config),
        )


def validation_lanes(config: TrainConfig) -> int:
    """Few: mixing means nothing here, and the memory of a stream grows with its lanes."""
    return min(_VALIDATION_LANES, config.lanes)


def describe(validation: Validation) -> str:
    """The last layer's figures in one line."""
    last = ", ".join(f"{kind} {values[-1]:.3f}" for kind, values in validation.r2.items())
    accuracy = "" if validation.accuracy is None else f"accuracy {validation.accuracy:.2%}, "
    return f"{accuracy}R2 of layer {validation.layers[-1]}: {last}; validation loss {validation.loss:.4g}"
