"""What the commands that train do once all is open: the claim on the RUN, the loop, what is printed."""

import os
import threading
import time
from collections.abc import Callable, Mapping

import torch

from infra.cluster import connected
from infra.console import ExitCode, UserError, human_duration, say, stop_on_signals
from trainer.claim import claimed
from trainer.commands.start import Place, Training, absolute
from trainer.machine import Machine, torch_threads
from trainer.raptor_teacher import save_ends
from trainer.report import finished_report, start_report
from trainer.run_lock import StillOurs
from trainer.train import train
from trainer.workers import Workers


def train_and_report(
    training: Training,
    place: Place,
    variables: Mapping[str, str],
    *,
    began: float,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Claim the RUN, train it to the end and say what came out; of a finished run, only the latter.

    Args:
        training: What to train.
        place: Where.
        variables: What the person typed and the next command needs again.
        began: When the command did, by time.monotonic().
        stop: Asks to stop, beside signals.

    Returns:
        An ExitCode.
    """
    workers = Workers.found()
    if place.workers is not None and not workers.is_alone:
        raise UserError(f"this is {workers}, as torchrun started it: leave WORKERS and RAY_ADDRESS out")
    if not training.run.is_of(training.identity) or training.run.read_result() is None:
        machine = place.machine()
        with workers.joined(machine.device), claimed(training.run, training.identity, workers) as still_ours:
            if not _train(training, place, machine, workers, _any(stop, still_ours)):
                return ExitCode.INTERRUPTED
        done = f"This command took {human_duration(time.monotonic() - began)}."
    else:
        if not training.run.read_teacher_files():  # of a run that an earlier version finished
            save_ends(training.run, training.data.teacher)
        done = (
            f"This run is finished; there is nothing to do. For another one give RUN, or delete {training.run.location}"
        )
    if not workers.is_first:
        return ExitCode.OK
    result = training.run.read_result()
    assert result is not None
    print(finished_report(training.config, training.data, training.run, result, variables))
    print(f"\n{done}")
    return ExitCode.OK


def _train(training: Training, place: Place, machine: Machine, workers: Workers, stop: Callable[[], bool]) -> bool:
    """Train to the end; False if it was asked to stop before."""
    if workers.is_first:
        say(start_report(training.config, training.data, training.run, machine))
    if place.workers is None:
        torch.set_num_threads(place.threads or torch_threads(training.data.train.spec.dim, workers.local_world_size))
        with stop_on_signals() as signalled:
            result = train(
                training.config,
                training.data,
                training.run,
                machine=machine,
                workers=workers,
                initial=training.initial,
                stop=lambda: stop() or signalled(),
            )
        finished = result is not None
    else:
        finished = _train_on_ray(training, place, place.workers, stop)
    if not finished and workers.is_first:
        say(f"stopped; everything is saved in {training.run.location}. The same command goes on")
    return finished


def _train_on_ray(training: Training, place: Place, n_workers: int, stop: Callable[[], bool]) -> bool:
    from trainer.ray_train import train_on_ray

    with connected(place.ray_address) as connection:
        say(str(connection))
        with stop_on_signals() as signalled:
            return train_on_ray(
                training.config,
                training.open_data,
                absolute(training.run.location),
                n_workers=n_workers,
                device=place.device,
                threads=place.threads,
                micro_batch=place.micro_batch,
                initial=training.initial,
                grows=not connection.embedded,
                stop=lambda: stop() or signalled(),
            )


def _any(stop: Callable[[], bool], still_ours: StillOurs) -> Callable[[], bool]:
    def asked() -> bool:
        still_ours()
        return stop()

    return asked


def stdin_ended() -> Callable[[], bool]:
    """Tells whether standard input has ended, as it does when the program that holds its other end dies."""
    ended = threading.Event()

    def wait() -> None:
        while os.read(0, 4096):  # not sys.stdin, whose lock a thread must not hold when Python ends
            pass
        ended.set()

    threading.Thread(target=wait, name="stdin", daemon=True).start()
    return ended.is_set
