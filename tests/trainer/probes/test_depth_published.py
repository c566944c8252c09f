"""compat is what the published code does, in numbers that it gave (tests/golden/depth_probe.json)."""

import json
from pathlib import Path

import pytest
import torch

from tests.trainer.probes.depth_formula import DIM, GRID, N_PREFIX, bias, depths, tokens, weight
from trainer.probes.dense_padding import Padding
from trainer.probes.depth_bins import DepthBins
from trainer.probes.depth_head import DepthHead
from trainer.probes.depth_metrics import NYU_SIZE, counted_pixels
from trainer.probes.nyuv2 import DepthMetric, DepthProtocol

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/depth_probe.json").read_text())
BINS, PADDING = DepthBins(), Padding(size=NYU_SIZE, multiple=14)


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    """Scores from [patch; CLS], made on the patches and then enlarged; there it is the other way round."""
    head = DepthHead(DIM, BINS.n_bins)
    head.load_state_dict({"conv.weight": weight(), "conv.bias": bias()})
    every = tokens()
    patches = every[:, N_PREFIX:]
    features = torch.cat([patches, every[:, :1].expand_as(patches)], dim=-1).transpose(1, 2).unflatten(2, GRID)
    with torch.no_grad():
        return head(features)


def test_depth_loss_and_error_are_the_published_ones(logits: torch.Tensor):
    protocol, depth = DepthProtocol(bins=BINS, padding=PADDING, compat=True), depths()
    found = protocol.depth(logits)[0, [0, 0, 0, 240, 240, 240, 479, 479, 479], [0, 320, 639] * 3]
    torch.testing.assert_close(found, torch.tensor(GOLDEN["depth_m"]), atol=1e-4, rtol=0)
    assert float(protocol.loss(logits, depth)) == pytest.approx(GOLDEN["loss"], rel=1e-5)
    metric = DepthMetric(protocol)
    metric.add(logits, depth)
    assert metric.values()["RMSE (m)"] == pytest.approx(GOLDEN["rmse_m"], rel=1e-5)
    assert int(counted_pixels(depth, BINS).sum()) == GOLDEN["n_valid"]


def test_ours_differ_by_what_was_mended(logits: torch.Tensor):
    """The plane rises along the rows: stretched, its depths are off at the rim; and the corner taught the last bin."""
    protocol, depth = DepthProtocol(bins=BINS, padding=PADDING), depths()
    assert float(protocol.loss(logits, depth)) < 0.95 * GOLDEN["loss"]
    stretched = DepthProtocol(bins=BINS, padding=PADDING, compat=True).depth(logits)
    assert float((protocol.depth(logits) - stretched)[0].abs().max()) > 0.02
