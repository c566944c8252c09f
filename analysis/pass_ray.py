"""The pass of a report as tasks of a Ray cluster: one for each share of it, whose sums the driver merges.

A task may run twice: it reads, and returns what it has counted. What comes back is merged one by one, so that the
driver holds the sums of all and of one share, however many shares there are.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from analysis.measure import Share, StoreAnalyses, check_images, measure_shares
from analysis.pass_over import BATCH_ROWS
from analysis.sums import Findings, Sums
from infra.cluster import connected
from infra.console import JobError, Progress, say
from pipeline.locations import full_location
from storage_schemas import Store, open_store

TRIES = 3  # of a share whose worker or machine is lost


def measure_on_ray(
    store: Store, address: str, *, limit: int, wide_limit: int, batch_rows: int = BATCH_ROWS
) -> Findings:
    """As `analysis.measure.measure_store`, on a cluster whose machines reach the store and have this project installed.

    Args:
        store: On S3 or in a folder that all machines see.
        address: Of the cluster, host:port.
        limit: Images of the one-token kinds.
        wide_limit: Images of registers and patches.
        batch_rows: Of minibatch CKA.

    Raises:
        UserError: As there; or there is no cluster.
        JobError: A share was lost `TRIES` times.
    """
    from pipeline.rounds import worker_environment  # torch comes with it, which no worker needs

    check_images(store)
    asked = StoreAnalyses(store, limit=limit, wide_limit=wide_limit)
    location = full_location(store.location)
    variables = worker_environment(location)
    total = len(asked.shares(batch_rows)) + len(asked.angle_shares(batch_rows))
    with connected(address, say=say) as connection:
        say(str(connection))
        task: Any = ray.remote(_measure_share).options(
            name="report", max_retries=TRIES - 1, runtime_env={"env_vars": variables} if variables else None
        )
        with Progress(total=total, unit="shares", label="analyses") as progress:

            def run(shares: Sequence[Share], directions: np.ndarray | None) -> Iterator[Sums]:
                given = ray.put(directions)
                for sums in _results(
                    lambda share: task.remote(location, limit, wide_limit, batch_rows, share, given), shares
                ):
                    yield sums
                    progress.advance()

            return measure_shares(asked, run, batch_rows)


def _measure_share(
    location: str, limit: int, wide_limit: int, batch_rows: int, share: Share, directions: np.ndarray | None
) -> Sums:
    asked = StoreAnalyses(open_store(location), limit=limit, wide_limit=wide_limit)
    return asked.measure_share(share, directions, batch_rows=batch_rows)


def _results(start: Callable[[Share], ray.ObjectRef], shares: Sequence[Share]) -> Iterator[Sums]:
    """What tasks return, as they end; as many are under way as the cluster has cores now.

    Not all at once: what has come back and is not merged yet lies in the memory of the cluster.
    """
    waiting, running = list(reversed(shares)), list[ray.ObjectRef]()
    try:
        while waiting or running:
            room = max(1, int(ray.cluster_resources().get("CPU", 1)))
            while waiting and len(running) < room:
                running.append(start(waiting.pop()))
            done, running = ray.wait(running)
            yield _get(done.pop())
    finally:
        for one in running:
            ray.cancel(one, force=True)


def _get(done: ray.ObjectRef) -> Sums:
    try:
        return ray.get(done)
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise JobError(f"a share of the store was lost {TRIES} times: {first}") from error
