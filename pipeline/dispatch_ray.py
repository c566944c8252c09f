"""The same book-keeping as `dispatch.py`, over Ray actors: workers may die, hang, never come, or be taken away.

Ray Core only, no Ray Data. We replace actors ourselves (no restarts, no task retries by Ray), because only then is it
known what a dead actor had in flight. Nothing but a shard number goes in and a small report comes out.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from types import MappingProxyType

import ray
from ray.exceptions import ActorAlreadyExistsError

from pipeline.boots import Boots
from pipeline.dispatch import DEFAULT_DEPTH, DEFAULT_TRIES, Ledger, OnEvent, Outcome, Runner, Wanted, ignore, never
from pipeline.pool_ray import Pool
from pipeline.workers_ray import ShardActor, Spares, Worker

BOOT_TIMEOUT_S = 1800.0


def run_on_ray(
    shards: Iterable[int],
    make_runner: Callable[[], Runner],
    *,
    wanted: Callable[[Set[str]], Wanted],
    depth: int = DEFAULT_DEPTH,
    tries: int = DEFAULT_TRIES,
    boot_tries: int = 5,
    shard_timeout_s: int | float | None = None,
    boot_timeout_s: int | float = BOOT_TIMEOUT_S,
    environment: Mapping[str, str] = MappingProxyType({}),
    stop: Callable[[], bool] = never,
    on_event: OnEvent = ignore,
    name: str = "extract",
    spares: Spares | None = None,
) -> Iterator[Outcome]:
    """Run all shards on a pool of Ray actors. Ray must be connected (`infra.cluster`).

    Args:
        make_runner: Picklable and small; called once in each actor.
        wanted: Which workers there should be, given the ids of nodes where none can start; asked every few seconds, as
            nodes come and go. All are asked of Ray at once: pending ones are the autoscaler's demand. Never more than
            there are shards. Fractions of a GPU share a device.
        depth: Shards in flight per actor, each in a thread of its own; they overlap reading, device and writing.
        tries: See `Ledger`.
        boot_tries: Workers that may fail to start, in a row, before no more are started for a while. Failures on a node
            where they repeat while others have workers are that node's, which is left out for a while: see `Boots`.
        shard_timeout_s: A shard that runs longer loses its worker. It counts from when it was sent, which is when it
            starts: an actor never has more shards than threads. None: no deadline.
        boot_timeout_s: The same for a worker that has its place and makes its runner, for instance downloads weights.
            Waiting for a place has no deadline: a node may have to be made first.
        environment: Variables that actors on a cluster started by others do not have of themselves.
        stop: As in `run_plain`; noticed within a second.
        name: Actors are named `<name>-<i>` on the dashboard, and their calls `<name>:shard`.
        spares: Where workers come from, and go to when they have nothing to do any more.

    Yields:
        Outcomes as they come. However the iteration ends, no actor outlives it but those in `spares`.

    Raises:
        FatalError: As raised by a runner.
        DispatchError: `boot_tries` workers in a row could not start, and none is running or on its way.
    """
    ledger = Ledger(shards, tries=tries, depth=depth, on_event=on_event)
    remote_class = ray.remote(ShardActor)
    numbers = itertools.count()

    def spawn(asked: Wanted, without: frozenset[str]) -> Worker:
        spare = spares.take(asked, without) if spares is not None else None
        if spare is not None:
            return spare
        elsewhere = {"ray.io/node-id": f"!in({','.join(sorted(without))})"} if without else None
        while True:
            worker_name = f"{name}-{next(numbers)}"
            try:
                actor = remote_class.options(
                    name=worker_name,
                    num_cpus=asked.num_cpus,
                    num_gpus=asked.num_gpus,
                    label_selector=elsewhere,
                    max_concurrency=depth,
                    max_restarts=0,
                    max_task_retries=0,
                    scheduling_strategy="SPREAD",
                    runtime_env={"env_vars": dict(environment)} if environment else None,
                ).remote(worker_name)
            except ActorAlreadyExistsError:  # one of an earlier run, just killed, whose name Ray has not yet let go
                continue
            return Worker(name=worker_name, actor=actor, asked=asked, without=without)

    pool = Pool(
        ledger=ledger, spawn=spawn, make_runner=make_runner, spares=spares, wanted=wanted,
        n_shards=ledger.n_waiting, depth=depth, boots=Boots(tries=boot_tries, on_event=on_event),
        shard_timeout_s=shard_timeout_s, boot_timeout_s=boot_timeout_s, on_event=on_event, call_name=f"{name}:shard",
    )  # fmt: skip
    try:
        while True:
            stopping = stop()
            if not stopping:
                pool.feed()
            if not ledger.n_in_flight and (stopping or not ledger.n_waiting):
                return
            yield from pool.collect()
    finally:
        pool.close()
