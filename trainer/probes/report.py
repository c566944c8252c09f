"""What a person reads before and after a probe."""

from trainer.probes.probe_files import BEST_HEAD_KEY, HEAD_KEY
from trainer.probes.results import RESULT_KEY, ProbeResult
from trainer.probes.train_probe import Probe, n_samples


def start_report(probe: Probe, location: str) -> str:
    """What is about to happen."""
    settings, task = probe.task.settings, probe.task
    n_parameters = sum(p.numel() for p in task.make_head().parameters())
    lines = [
        f"probe {task.name}: {n_parameters:,} parameters on the frozen {probe.backbone.name}, seed {probe.seed}"
        f"{', with the published defects' if probe.compat else ''}",
        f"{settings.n_epochs} epochs of {n_samples(task.train):,} samples in batches of {settings.batch_size}, "
        f"{task.metric} on {n_samples(task.evaluation):,}; {settings.precision} on {probe.backbone.teacher.device}",
        f"result: {location}",
    ]
    return "\n".join(lines)


def finished_report(result: ProbeResult, location: str) -> str:
    """What came out, where it is, and what to type next."""
    rows = [
        ("last epoch", result.last, ""),
        (f"best, epoch {result.best_epoch}", result.best, "chosen on these same samples, so it flatters"),
        ("before training", result.initial, ""),
    ]
    if result.teacher_head is not None:
        rows.append(("teacher's own head", result.teacher_head, ""))
    width = max(len(name) for name, _, _ in rows)
    of = "" if result.what == "teacher" else f" of {result.teacher}"
    lines = [
        f"{result.label}{of}: {result.metric} of {result.task} on {result.n_evaluation:,} samples, "
        f"trained on {result.n_train:,}, seed {result.seed}",
        "",
        *(
            f"{name:<{width}}  {shown(result.metric, value)}{f'  ({note})' if note else ''}"
            for name, value, note in rows
        ),
        "",
        f"result      {location}/{RESULT_KEY}",
        f"readout     {location}/{HEAD_KEY}, {location}/{BEST_HEAD_KEY}",
        "next        make table",
    ]
    return "\n".join(lines)


def shown(metric: str, value: float) -> str:
    """A share as per cent, a length in metres."""
    return f"{value:7.4f}" if "(m)" in metric else f"{value:7.2%}"
