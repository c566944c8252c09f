"""The tensors that a training goes on with: taken, put back, and handed from the first worker to the others."""

import json
from collections.abc import Mapping

import torch
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from trainer.run_files import Checkpoint, RunFiles
from trainer.workers import Workers


def take_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, random: torch.Generator
) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds, by file."""
    moments = {
        f"{key}.{name}": value for name, p in model.named_parameters() for key, value in optimizer.state[p].items()
    }
    return {"model": model.state_dict(), "optimizer": moments, "random": {"generator": random.get_state()}}


def put_tensors(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    random: torch.Generator,
    tensors: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Undo `take_tensors`."""
    model.load_state_dict(tensors["model"])
    index = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    places = {name: index[p] for name, p in model.named_parameters()}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, value in tensors["optimizer"].items():
        key, _, name = full_name.partition(".")
        state.setdefault(places[name], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    random.set_state(tensors["random"]["generator"])


def newest_checkpoint(run: RunFiles, workers: Workers) -> Checkpoint | None:
    """The run's newest checkpoint, read by the first worker: the others need not reach the RUN for it."""
    found: list[Checkpoint | None] = []
    workers.first_does(lambda: found.append(run.newest_checkpoint()))
    checkpoint = found[0] if found else None
    if workers.is_alone:
        return checkpoint
    about = None
    if checkpoint is not None:
        about = json.dumps([checkpoint.step, list(checkpoint.tensors), checkpoint.state]).encode()
    about = workers.from_first(about)
    if about is None:
        return None
    step, names, state = json.loads(about)
    files = {}
    for name in names:
        data = None if checkpoint is None else tensors_to_bytes(_contiguous(checkpoint.tensors[name]))
        data = workers.from_first(data)
        assert data is not None
        files[name] = tensors_from_bytes(data)
    return Checkpoint(step=step, tensors=files, state=state)


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in tensors.items()}
