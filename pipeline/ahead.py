"""Ray on its way before the libraries of teachers are loaded: on a laptop both take as long as a small extraction."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.cluster import cluster_address
from infra.console import say
from infra.ray_ahead import RayAhead
from pipeline.config import ExtractConfig, check_inputs, split_location
from pipeline.locations import is_remote
from pipeline.run_config import RunConfig, check_run
from pipeline.sources import open_sources
from storage_schemas.keys import INDEX_KEY


@contextmanager
def ray_ahead(config: ExtractConfig, run: RunConfig) -> Iterator[RayAhead | None]:
    """A private Ray that starts now, if an extraction will want one; else nothing.

    Raises:
        UserError: What is asked for cannot be, as far as that can be seen without loading anything.
    """
    if not will_want_ray(config, run):
        yield None
        return
    with RayAhead(dashboard=run.dashboard, verbose=run.verbose, say=say) as ahead:
        ahead.wait_until_it_waits()
        yield ahead


def will_want_ray(config: ExtractConfig, run: RunConfig) -> bool:
    """Whether a private Ray will be wanted, as far as that can be seen on this machine's disk, at once.

    No where the answer is not sure: what is asked of the teacher may turn out to be wrong when it is loaded, and a
    refusal should not have to wait for Ray.

    Raises:
        UserError: What is asked for cannot be.
    """
    check_run(run, overwrite=config.overwrite)
    if is_remote(config.images) or is_remote(config.store or ""):
        return False
    check_inputs(config)
    asked_of_teacher = (config.teacher, config.weights, config.head, config.layers, config.image_size)
    if run.no_ray or cluster_address(run.ray_address) or any(value is not None for value in asked_of_teacher):
        return False
    stores = [Path(split_location(config, split)) for split in open_sources(config.images)]
    return not all((store / INDEX_KEY).exists() for store in stores)
