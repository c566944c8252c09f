"""Side-by-side timing: every contestant runs once per round, in another order each round; medians are compared."""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Units per second of one contestant, one number per round."""

    per_s: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.per_s)

    @property
    def spread(self) -> str:
        """Slowest and fastest round."""
        return f"{_figures(min(self.per_s))} to {_figures(max(self.per_s))}"


def measure(run: Callable[[], int], least_s: float) -> float:
    """Units per second: `run` does some units and returns how many; it is repeated for at least so long."""
    n_units, begin = 0, time.perf_counter()
    while True:
        n_units += run()
        elapsed = time.perf_counter() - begin
        if elapsed >= least_s:
            return n_units / elapsed


def run_rounds(contestants: Mapping[str, Callable[[], int]], *, n_rounds: int, least_s: float) -> dict[str, Rates]:
    """Rates of all contestants, interleaved, so that a slow minute of the machine hits all of them."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(n_rounds):
        names = list(contestants)
        random.Random(round_number).shuffle(names)
        for name in names:
            rates[name].append(measure(contestants[name], least_s))
    return {name: Rates(per_s=tuple(values)) for name, values in rates.items()}


def _figures(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
