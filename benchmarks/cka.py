"""Minibatch CKA between all layers of ViT-B/14, beside the straightforward loop over pairs of layers.

Both read the same float32 states, CLS and patch mean joined (1,536 values), compute in float64 on the same threads, and
give the same matrix. The loop makes two kernels and three HSICs for each pair of layers and batch, as the formula is
written; it runs over the pairs i <= j only.
"""

import time
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Float, Float64

from analysis.similarity import CkaAccumulator
from benchmarks.machine import this_machine
from benchmarks.report import Goal, Result

_FASTER, _SAME = 5.0, 1e-8


@dataclass(frozen=True, kw_only=True)
class CkaBenchmark:
    """Sizes; the defaults are those of Raghu et al. 2021 on the blocks of ViT-B/14.

    Attributes:
        n_layers: Layers that are compared.
        n_rows: Images.
        batch_rows: Images of a batch.
        dim: Values of an image at a layer.
        seed: Of the states.
        repeats: Of the fast one, of which the median counts; the loop runs once.
    """

    n_layers: int = 12
    n_rows: int = 10_240
    batch_rows: int = 1_024
    dim: int = 1_536
    seed: int = 0
    repeats: int = 3


QUICK = CkaBenchmark(n_layers=3, n_rows=96, batch_rows=32, dim=24, repeats=1)


def make_states(config: CkaBenchmark, batch: int) -> Float[np.ndarray, "row layer dim"]:
    """Correlated layers, (batch_rows, n_layers, dim) float32: each is the one before it, turned and disturbed."""
    random = np.random.default_rng((config.seed, batch))
    states = np.empty((config.batch_rows, config.n_layers, config.dim), np.float32)
    states[:, 0] = random.standard_normal((config.batch_rows, config.dim), np.float32)
    for layer in range(1, config.n_layers):
        noise = random.standard_normal((config.batch_rows, config.dim), np.float32)
        states[:, layer] = np.roll(states[:, layer - 1], 1, axis=1) + np.float32(0.5) * noise
    return states


def cka_by_pairs(config: CkaBenchmark, batches: list[np.ndarray]) -> Float64[np.ndarray, "layer layer"]:
    """The peer: for each pair of layers the sums of three HSICs over batches, their ratio last."""
    out = np.empty((config.n_layers, config.n_layers))
    for i in range(config.n_layers):
        for j in range(i, config.n_layers):
            sums = np.zeros(3)
            for states in batches:
                k, l = _kernel(states[:, i]), _kernel(states[:, j])  # noqa: E741
                sums += [_hsic(k, l), _hsic(k, k), _hsic(l, l)]
            out[i, j] = out[j, i] = sums[0] / np.sqrt(sums[1] * sums[2])
    return out


def _kernel(x: Float[np.ndarray, "row dim"]) -> Float64[np.ndarray, "row row"]:
    wide = x.astype(np.float64)
    kernel = wide @ wide.T
    np.fill_diagonal(kernel, 0)
    return kernel


def _hsic(k: Float64[np.ndarray, "row row"], l: Float64[np.ndarray, "row row"]) -> float:  # noqa: E741
    n = len(k)
    # tr(KL) as a sum of products, and 1'KL1 through row sums: a product of matrices would be slower still.
    products = (k * l).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(axis=0) @ l.sum(axis=1))
    return float(products / (n * (n - 3)))


def cka_fast(config: CkaBenchmark, batches: list[np.ndarray]) -> Float64[np.ndarray, "layer layer"]:
    """Ours, batch by batch."""
    sums = CkaAccumulator(config.n_layers)
    for states in batches:
        sums.update(states)
    return sums.result().values


def run(config: CkaBenchmark) -> Result:
    """Time both on the same states, which lie in memory: 755 MB at the default sizes."""
    machine = this_machine()
    batches = [make_states(config, batch) for batch in range(config.n_rows // config.batch_rows)]
    fast = []
    for _ in range(config.repeats):
        began = time.perf_counter()
        ours = cka_fast(config, batches)
        fast.append(time.perf_counter() - began)
    began = time.perf_counter()
    peer = cka_by_pairs(config, batches)
    slow, quick = time.perf_counter() - began, float(np.median(fast))
    apart = float(np.abs(ours - peer).max())
    return Result(
        name="cka",
        title=f"Minibatch CKA, {config.n_layers} layers, {config.n_rows:,} images, batch {config.batch_rows:,}",
        machine=machine,
        settings=asdict(config),
        rows=[
            {"what": "loop over pairs", "seconds": slow, "times as fast": 1.0},
            {"what": "each kernel once, all pairs in one product", "seconds": quick, "times as fast": slow / quick},
        ],
        goals=[
            Goal(what="times as fast as the loop", found=slow / quick, at_least=_FASTER),
            Goal(what="largest difference of the two matrices", found=apart, at_most=_SAME),
        ],
        notes=[
            "The loop takes traces of products and row sums without a product of kernels, so most of its time is the "
            "kernels that it makes once for every pair of layers."
        ],
        details={"fast_s": fast, "slow_s": slow, "matrix": ours.tolist()},
    )
