"""A teacher that is three tied blocks is found to be just that: where it is cut, and how many blocks it takes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.distances import layer_distances
from analysis.partitions import groups_of, spans_text
from analysis.phases import contiguous_segments
from storage_schemas import Span, open_store
from tests.trainer.planted import joined, rolled_out, trained, write_states
from trainer.block import Block

DIM = 8
REPEATS = (7, 3, 2)
SCALES = (1.0, 4.0, 16.0)  # of each block's branches: later ones take longer steps


def planted_blocks() -> list[Block]:
    torch.manual_seed(2)
    blocks = [Block(DIM, 2, mlp_ratio=1, layer_scale_init=scale, depth_scaling=False) for scale in SCALES]
    for block in blocks:
        for weight in (parameter for parameter in block.parameters() if parameter.ndim == 2):
            torch.nn.init.normal_(weight, std=0.5 * weight.shape[1] ** -0.5)
        torch.nn.init.normal_(block.mlp.contract.bias)
    return blocks


def planted_states(n_samples: int, seed: int) -> np.ndarray:
    """What the blocks make of random states in 7, 3 and 2 steps, with noise of 1 % after each."""
    blocks = planted_blocks()
    random = torch.Generator().manual_seed(seed)
    states = [torch.randn(n_samples, 5, DIM, generator=random)]
    with torch.no_grad():
        for layer, block in enumerate([b for b, n in zip(blocks, REPEATS) for _ in range(n)], start=1):
            made = block(states[-1], layer)
            states.append(made + 0.01 * made.std() * torch.randn(made.shape, generator=random))
    return torch.stack(states, dim=1).numpy()


@pytest.fixture
def store(tmp_path: Path) -> str:
    write_states(tmp_path / "states" / "train", planted_states(256, 0))
    write_states(tmp_path / "states" / "val", planted_states(64, 1))
    return str(tmp_path / "states")


def loss(store: str, place: Path, spans: tuple[Span, ...], n_steps: int = 60) -> float:
    """Of the roll-out over the whole depth, after both stages."""
    sizes = {"n_steps": n_steps, "teacher_forcing_steps": n_steps // 4, "depth_scaling": False}
    alone = [trained(store, place / str(span), spans=(span,), **sizes) for span in spans]
    raptor = joined(alone, spans)
    initial = raptor if len(spans) > 1 else raptor.blocks[0]
    joint = trained(store, place / "joint", initial.state_dict(), spans=spans, **{**sizes, "teacher_forcing_steps": 0})
    return rolled_out(store, joined([joint], spans)).loss


def found_spans(store: str) -> tuple[Span, ...]:
    distance = layer_distances(open_store(f"{store}/train")).distance
    return tuple(map(Span.parse, spans_text(groups_of(contiguous_segments(distance, 3))).split(",")))


def test_phases_find_the_blocks(store: str) -> None:
    assert found_spans(store) == (Span(0, 7), Span(7, 10), Span(10, 12))


@pytest.mark.slow  # that stage 1 and stage 2 learn, and in which order they are better, test_ablation_order shows
def test_three_blocks_do_what_one_cannot(store: str, tmp_path: Path) -> None:
    spans = found_spans(store)
    assert loss(store, tmp_path / "three", spans) <= 0.1 * loss(store, tmp_path / "one", (Span(0, 12),))


@pytest.mark.slow
def test_one_block_stalls_however_long_it_is_trained(store: str, tmp_path: Path) -> None:
    three = loss(store, tmp_path / "three", found_spans(store))
    assert loss(store, tmp_path / "one", (Span(0, 12),), n_steps=600) >= 10 * three
