"""What `make train` and `make raptor` both take, in one place."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from infra.cluster import cluster_address
from trainer.commands.start import DEFAULT_STORE, Place, or_problem
from trainer.recipes import RECIPES

_LEAST = {"steps": 1, "seed": 0, "threads": 1, "micro_batch": 1, "workers": 1}


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What to train on, where to, with which numbers, and on what.

    Attributes:
        store: A store, or a folder with the stores train and val; local or s3://bucket/prefix.
        run: Folder or s3://bucket/prefix for checkpoints, metrics and weights. Empty: data/runs/<store>/<name>, the
            name being <block>-seed<seed> of a block, and of a Raptor raptor-<borders of its spans>-seed<seed>, such as
            raptor-0-7-10-12-seed0. With block=all the folder of the runs <block>-seed<seed>.
        recipe: digits_stage1 or imagenet_stage1 of a block, digits_stage2 or imagenet_stage2 of a Raptor; empty: the
            one that fits the store's teacher.
        steps: Optimizer steps; warm-up and teacher forcing scale with them. None: the recipe's own number.
        seed: Of a new block's weights, of the order of samples and of noise; None: 0.
        replica: 1, 2 or 3: the seeds as published, for the published spans.
        head: File with a linear classifier of 2 dim values, in the place of the teacher's own, for accuracy.
        partial: Train on an unfinished store, with the shards that it has now.
        device: For example cpu or cuda:0. None: the GPU if there is one.
        threads: Of torch on a CPU; a run is repeated bit for bit with the same number. None: one for blocks of fewer
            than 256 channels, else one per core.
        micro_batch: Most samples of one forward and backward pass; less memory, the same result but for rounding.
        workers: Processes that train it together through Ray Train; None: this one alone, without Ray, unless a
            cluster is given.
        ray_address: A Ray cluster to train on; None is RAY_ADDRESS, else none.
        endpoint_url: S3 endpoint, such as http://127.0.0.1:9000; None is AWS_ENDPOINT_URL, else Amazon's.
    """

    store: str = DEFAULT_STORE
    run: str = ""
    recipe: str = ""
    steps: int | None = None
    seed: int | None = None
    replica: int | None = None
    head: str | None = None
    partial: bool = False
    device: str | None = None
    threads: int | None = None
    micro_batch: int | None = None
    workers: int | None = None
    ray_address: str | None = None
    endpoint_url: str | None = None

    def problems(self, stage: int) -> list[str]:
        """What is wrong with them, whatever the store is: to be listed with what is wrong with that."""
        found = []
        if self.recipe and self.recipe not in RECIPES[stage]:
            found.append(f"RECIPE={self.recipe} is unknown; for stage {stage} there are {', '.join(RECIPES[stage])}")
        for name, least in _LEAST.items():
            if (value := getattr(self, name)) is not None and value < least:
                found.append(f"{name.upper()}={value}: expected {least} or more")
        return found

    def place(self, problems: list[str]) -> Place:
        """Where to train, with the cluster of RAY_ADDRESS, if there is one: then with one worker if not more.

        Args:
            problems: That of the address is added. Numbers below 1 count as not given: `problems` has listed them, and
                what else is wrong is still to be found.
        """
        address = or_problem(lambda: cluster_address(self.ray_address), problems)
        threads, micro_batch, workers = (
            number if number is None or number >= 1 else None
            for number in (self.threads, self.micro_batch, self.workers)
        )
        return Place(
            device=self.device,
            threads=threads,
            micro_batch=micro_batch,
            workers=1 if workers is None and address is not None else workers,
            ray_address=address,
        )

    def typed(self, *names: str) -> dict[str, str]:
        """Of the variables of these names those that were typed, as the next command needs them again."""
        values = {name: getattr(self, name.lower()) for name in names}
        defaults = TrainingOptions()
        return {
            name: "1" if value is True else str(value)
            for name, value in values.items()
            if value and value != getattr(defaults, name.lower())
        }


Options = Annotated[TrainingOptions, tyro.conf.arg(name="")]
"""As an argument of a command: its options are the command's own."""
