"""A finished RUN as a model: what probes, tables, analyses and stage 2 take."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infra.console import UserError
from infra.objects import open_objects
from storage_schemas import Span
from trainer.block import Block
from trainer.raptor import Raptor
from trainer.run_files import RAPTOR_KEY, RunFiles


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished run of stage 1 (one block), of stage 2, or an imported one.

    Attributes:
        location: Of the RUN.
        raptor: In eval mode, without gradients; a single block is a Raptor of one span.
        config: What the run was claimed with: {"train": ..., "data": ...}, JSON values.
        result: What it wrote at its end: validation, baselines, final_loss, blocks, spans, weights_sha256.
    """

    location: str
    raptor: Raptor
    config: Mapping[str, Any]
    result: Mapping[str, Any]

    @property
    def spans(self) -> tuple[Span, ...]:
        return self.raptor.spans

    @property
    def seed(self) -> int:
        return int(self.config["train"]["seed"])

    @property
    def teacher_digest(self) -> str:
        """sha256 of the weights of the teacher that it was trained on; "none" where the store held no teacher."""
        return str(self.config["data"]["teacher"])

    @property
    def weights_digest(self) -> str:
        """sha256 of the file with the weights."""
        return str(self.result["weights_sha256"])


def read_trained(location: str, *, device: torch.device | str = "cpu") -> Trained:
    """The model of a finished run.

    Args:
        location: A RUN: a folder or s3://bucket/prefix.
        device: Where to put it.

    Raises:
        UserError: There is no finished run, or its files are damaged or do not fit each other.
    """
    run = RunFiles(open_objects(location))
    weights, result, config = run.read_weights(), run.read_result(), run.read_config()
    assert result is not None, "read_weights has read it"
    if config is None:
        raise UserError(f"{location} has a result but no config.json: bring it back from a copy, or train again")
    try:
        spans = [Span.parse(text) for text in result["spans"]]
        raptor = Raptor([Block(**arguments) for arguments in result["blocks"]], spans)
        raptor.load_state_dict(_with_block_names(weights, result))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # load_state_dict raises RuntimeError
        raise UserError(
            f"{location}: result.json and the weights do not make a Raptor ({_first_line(error)}). Delete result.json "
            "and run the same command again"
        ) from error
    raptor.eval().requires_grad_(False).to(device)
    return Trained(location=location, raptor=raptor, config=config, result=result)


def _with_block_names(weights: Mapping[str, Tensor], result: Mapping[str, Any]) -> dict[str, Tensor]:
    """As a Raptor names them; a single block's file has the names of the block."""
    if result["weights_key"] == RAPTOR_KEY:
        return dict(weights)
    return {f"blocks.0.{name}": value for name, value in weights.items()}


def _first_line(error: Exception) -> str:
    return json.dumps(str(error).splitlines()[0] if str(error) else type(error).__name__)[1:-1]
