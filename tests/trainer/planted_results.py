"""Finished runs and probes with planted numbers, in the documents that training and probing write."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from infra.objects import open_objects
from storage_schemas import Span
from tests.trainer.tiny import tiny_config
from trainer.probes.results import ProbeResult, write_result
from trainer.run_files import RunFiles

LAST_LAYER = 4
DATA = {"train": "a" * 64, "validation": "b" * 64, "shards": "all", "validation_shards": "all", "teacher": "c" * 64}


def plant_run(
    place: object,
    spans: str = "0-2,2-4",
    *,
    seed: int = 0,
    accuracy: float | None = 0.9,
    teacher: float = 0.96,
    r2: Sequence[float] | None = None,
    epsilon: Sequence[float] | None = None,
    data: dict[str, Any] | None = None,
    teacher_name: str = "fake_vit",
    last_layer: int = LAST_LAYER,
    joint: bool = False,
    imported: bool = False,
    validated: bool = True,
    n_samples: int = 18,
    teacher_weights: str = "c" * 64,
    **settings: object,
) -> str:
    """A finished run whose validation says what is given; a joint one of several spans, or where that is asked for."""
    parsed = tuple(Span.parse(text) for text in spans.split(","))
    config = tiny_config(**{"spans": parsed, "seed": seed, **settings})
    layers = list(range(parsed[0].start + 1, parsed[-1].stop + 1))
    r2 = list(r2 or [1 - 0.01 * layer for layer in layers])
    validation = {
        "n_samples": n_samples,
        "loss": 0.25,
        "accuracy": accuracy,
        "r2": {"cls": [value - 0.1 for value in r2], "patches": r2, "all": r2},
        "reference_r2": [value - 0.2 for value in r2],
        "epsilon": list(epsilon or [2.0 * layer for layer in layers]),
        "layers": layers,
    }
    baselines = {"teacher": teacher, "untrained": 0.3, "skipping": 0.2}
    run = RunFiles(open_objects(str(place)))
    began_with = {"blocks": [{"span": str(span)} for span in parsed]} if joint or len(parsed) > 1 else {}
    run.claim({"train": config.to_json(), "data": data or DATA, **began_with})
    lines = [
        {"step": step, "loss": math.exp(-step / 10), "samples_per_s": 1.0, "loader_wait": 0.0} for step in (5, 10, 12)
    ]
    run.write_metrics([{"step": 0, "validation": validation}, *lines, {"step": 12, "validation": validation}])
    weights = {"blocks.0.x": torch.tensor([float(seed), float(config.n_steps), *map(float, range(len(parsed)))])}
    about = {"blocks": [{}] * len(parsed), "spans": [str(span) for span in parsed]}
    result = {
        "validation": validation if validated else None,
        "baselines": None if accuracy is None or imported else baselines,
        "final_loss": 0.2,
        **({"imported": {"file": "final.pt"}} if imported else {}),
    }
    about |= {"teacher": teacher_name, "teacher_weights": teacher_weights, "last_layer": last_layer}
    run.finish(weights, {**result, **about})
    return str(place)


def plant_probe(
    place: object,
    *,
    task: str = "digits",
    metric: str = "top-1",
    spans: Sequence[str] = ("0-2", "2-4"),
    run: str | None = None,
    last: float = 0.9,
    best: float = 0.92,
    seed: int = 0,
    model_seed: int | None = 0,
    teacher_name: str = "fake_vit",
    **changes: object,
) -> str:
    """A finished probe that found what is given; of a teacher where there are no spans."""
    of_teacher = not spans
    weights = None
    if run is not None:
        result = RunFiles(open_objects(run)).read_result()
        assert result is not None
        weights = result["weights_sha256"]
    values: dict[str, Any] = {
        "task": task,
        "metric": metric,
        "higher_is_better": metric != "RMSE (m)",
        "what": "teacher" if of_teacher else "raptor",
        "label": teacher_name if of_teacher else f"Raptor k={len(spans)}",
        "spans": list(spans),
        "run": run,
        "run_weights": weights,
        "teacher": teacher_name,
        "teacher_weights": "c" * 64,
        "seed": seed,
        "model_seed": None if of_teacher else model_seed,
        "raptor_settings": {} if of_teacher else {"n_steps": 12},
        "compute": "float32",
        "initial": 0.1,
        "last": last,
        "best": best,
        "best_epoch": 3,
        "best_chosen_on_reported_samples": True,
        "history": [{metric: 0.1}, {metric: best}, {metric: last}],
        "teacher_head": None,
        "n_train": 41,
        "n_evaluation": 18,
        "compat": False,
        "settings": {"n_epochs": 2},
        "data": {"train": "d" * 64},
        "task_identity": {},
    }
    write_result(open_objects(str(place)), ProbeResult(**(values | changes)))
    return str(place)
