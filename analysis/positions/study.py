"""Which experiments `make positions` does, and in which order its page shows them."""

from collections.abc import Mapping

from analysis.page import Origin, Section
from analysis.positions.experiments import (
    Experiment,
    Numbers,
    gaussian_experiment,
    pixels_experiment,
    planted_experiment,
    transfer_experiment,
    vit_experiment,
)
from analysis.positions.images import LabelledImages
from analysis.positions.sections import (
    gaussian_section,
    planted_section,
    transfer_section,
)
from analysis.positions.vit_sections import permuted_section, vit_section
from analysis.positions.vit_training import VitTraining

#: Samples of the new data, in transfer.
FEW = (16, 64, 256, 1_024)
#: Attention, and whether patches are permuted.
_VITS = (("ordinary", False), ("positional", False), ("ordinary", True))


def study_experiments(data: LabelledImages, *, seeds: int, epochs: int, steps: int, samples: int) -> list[Experiment]:
    """All of them, the quick ones first; settings as of the door."""
    found = []
    for seed in range(seeds):
        found += [planted_experiment(samples, steps, seed), gaussian_experiment(samples, steps, seed)]
        found.append(transfer_experiment(samples, max(1, steps * 2 // 5), FEW, seed))
    found.append(pixels_experiment(data))
    for seed in range(seeds):
        for attention, permuted in _VITS:
            training = VitTraining(attention=attention, permuted=permuted, n_epochs=epochs, seed=seed)
            found.append(vit_experiment(data, training))
    return found


def study_sections(
    data: LabelledImages, found: Mapping[str, Numbers], *, seeds: int, samples: int, command: str
) -> list[Section]:
    """The page, from what the experiments found, by name."""

    def of(name: str) -> list[Numbers]:
        return [found[f"{name}-seed{seed}"] for seed in range(seeds)]

    def origin(text: str, n: int) -> Origin:
        return Origin(data=text, n_images=n, seed="0" if seeds == 1 else f"0 to {seeds - 1}", command=command)

    planted = origin(f"{samples:,} planted samples (Assumption 1)", 0)
    pictures = origin(data.name, len(data.train))
    ordinary = of("vit-ordinary-in-order")
    return [
        planted_section(of("planted"), planted),
        gaussian_section(of("gaussian"), origin(f"{samples:,} Gaussian samples", 0)),
        transfer_section(of("transfer"), planted),
        permuted_section(
            {"in order": ordinary, "permuted": of("vit-ordinary-permuted")},
            data.grid,
            pictures,
            "pixels" if data.patch_side == 1 else "patches",
        ),
        vit_section(
            data.name,
            {"ordinary": ordinary, "positional": of("vit-positional-in-order")},
            found["pixels"],
            data.grid,
            len(data.test),
            pictures,
        ),
    ]
