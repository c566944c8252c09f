"""Training over several workers of a Ray cluster: the same loop, placed by Ray Train. Ray is imported lazily."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from trainer.config import TrainConfig
from trainer.data import TrainingData


def train_on_ray(
    config: TrainConfig,
    open_data: Callable[[torch.device], TrainingData],
    run: str,
    *,
    n_workers: int,
    device: str | None = None,
    threads: int | None = None,
    micro_batch: int | None = None,
    initial: Mapping[str, Tensor] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train over `n_workers` processes of Ray Train, to the end. Call it where `train` would be called.

    The caller holds the RUN (`RunFiles.exclusive`) and has claimed it. A worker that dies, or its machine, makes all
    of them begin again from the RUN's last checkpoint, without a word from anybody.

    Args:
        config: What to do.
        open_data: Opens the data on a worker's device. It is pickled: functools.partial(open_training_data, STORE,
            BLOCKS, ...), with absolute places and, of an unfinished store, the frozen shards.
        run: The RUN, as `open_objects` takes it; every worker's machine must reach it: S3, or a shared folder.
        n_workers: Processes, each with a GPU of its own where there are any.
        device: "cpu" keeps off the GPUs; None takes one for each worker if the cluster has any.
        threads: Of torch in each worker on a CPU; None shares out the cores of its machine.
        micro_batch: Most samples of a forward pass of one worker; None: all of its share at once.
        initial: Weights to begin with, as those of stage 1.
        stop: Asked about once a second; once it says yes, everything is saved and the function returns.

    Returns:
        Whether it trained to the end; False if it was stopped. The result is in the RUN.

    Raises:
        UserError: The cluster cannot hold so many workers.
        JobError: A worker's error, which trying again would not mend; or workers died too often.
    """
    raise NotImplementedError
