"""`make train`: stage 1."""

import time

import torch

from infra.console import UserError
from infra.s3_settings import use_endpoint
from trainer.commands.start import DEFAULT_STORE, default_run, make_config, open_run, shards_of, train_and_report
from trainer.data import open_training_data
from trainer.machine import Machine, torch_threads
from trainer.run_files import RunFiles


def train_command(
    *,
    block: str = "",
    store: str = DEFAULT_STORE,
    run: str = "",
    recipe: str = "",
    steps: int | None = None,
    seed: int = 0,
    head: str | None = None,
    partial: bool = False,
    device: str | None = None,
    threads: int | None = None,
    endpoint_url: str | None = None,
) -> int:
    """Train one block of a Raptor on the states of a span (stage 1). The same command again resumes.

    Args:
        block: Span a-b: the block takes state a and produces states a+1 to b. For example 0-7.
        store: A store, or a folder with the stores train and val; local or s3://bucket/prefix.
        run: Folder or s3://bucket/prefix for checkpoints, metrics and weights; empty:
            data/runs/<store>/<block>-seed<seed>.
        recipe: digits_stage1 or imagenet_stage1; empty: the one that fits the store's teacher.
        steps: Optimizer steps; warm-up and teacher forcing scale with them. None: the recipe's own number.
        seed: Of initial weights, order of samples and noise.
        head: File with a linear classifier of 2 dim values, in the place of the teacher's own, for accuracy.
        partial: Train on an unfinished store, with the shards that it has now.
        device: For example cpu or cuda:0. None: the GPU if there is one.
        threads: Of torch on a CPU; a run is repeated bit for bit with the same number. None: one for blocks of fewer
            than 256 channels, else one per core.
        endpoint_url: S3 endpoint, such as http://127.0.0.1:9000; None is AWS_ENDPOINT_URL, else Amazon's.
    """
    use_endpoint(endpoint_url)
    began = time.monotonic()
    machine = Machine.found(device)
    if threads is not None and threads < 1:
        raise UserError(f"THREADS={threads}: expected 1 or more")
    run_files = RunFiles(open_run(run or default_run(store, block, seed)))
    if run_files.read_result() is None:
        run_files.check_writable()
    data = open_training_data(
        store,
        block,
        head=head,
        partial=partial,
        frozen=shards_of(run_files) if partial else None,
        device=machine.device,
    )
    config = make_config(data, recipe, steps, seed)
    torch.set_num_threads(threads or torch_threads(data.train.spec.dim))
    typed = {
        "STORE": store if store != DEFAULT_STORE else "",
        "HEAD": head,
        "RECIPE": recipe,
        "SEED": seed or "",
        "PARTIAL": "1" if partial else "",
        "DEVICE": device,
        "ENDPOINT_URL": endpoint_url,
    }
    variables = {name: str(value) for name, value in typed.items() if value}
    return train_and_report(config, data, run_files, machine, variables, began=began)
