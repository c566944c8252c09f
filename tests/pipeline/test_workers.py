"""How many workers a cluster gets, and of what shape: whatever its machines are, each worker must fit one of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import workers
from pipeline.dispatch import Wanted
from pipeline.run_config import RunConfig
from pipeline.workers import MOST_CORES, Demand, MachineRoom, wanted_workers

AUTO, CPU, CUDA = RunConfig(), RunConfig(device="cpu"), RunConfig(device="cuda")


def shape(wanted: Wanted) -> tuple[int, float, float]:
    return wanted.n, wanted.num_cpus, wanted.num_gpus


@pytest.mark.parametrize(
    ("machines", "expected"),
    [
        ([(2, 0)], (1, 2, 0)),  # a laptop
        ([(0, 0), (4, 0), (4, 0), (4, 0)], (3, 4, 0)),  # a head without cores, and one worker per machine
        ([(2, 0), (64, 0), (64, 0)], (2, 64, 0)),  # two cores are worth no worker when that would cut 64 in pieces
        ([(4, 0), (4, 0), (4, 0), (64, 0)], (19, 4, 0)),  # here they are: nobody is to leave more than a tenth idle
        ([(16, 1)], (1, 16, 1)),
        ([(256, 2)], (2, MOST_CORES, 1)),
        ([(0, 0), (8, 1), (32, 1)], (2, 8, 1)),  # fits both; the larger one's worker takes all its cores as threads
        ([(64, 0), (8, 1)], (1, 8, 1)),  # the cores of machines without GPUs are not shared out to those that have some
        ([(2, 4)], (2, 1, 1)),  # more GPUs than cores: as many workers as can be
    ],
)
def test_one_for_each_gpu_or_machine(machines: list[tuple[int, int]], expected: tuple[int, float, float]) -> None:
    wanted = wanted_workers(AUTO, [MachineRoom(*one) for one in machines])
    assert shape(wanted) == expected
    assert wanted.n_fit == wanted.n


def test_gpus_are_left_alone_where_the_cpu_was_asked_for() -> None:
    assert shape(wanted_workers(CPU, [MachineRoom(8, 2), MachineRoom(8)])) == (2, 8, 0)


def test_what_is_typed_is_what_is_asked_for() -> None:
    machines = [MachineRoom(8, 1)] * 7
    wanted = wanted_workers(RunConfig(workers=32), machines)
    assert (*shape(wanted), wanted.n_fit) == (32, 8, 1, 7)
    assert shape(wanted_workers(RunConfig(workers=3, cpus_per_worker=2), machines)) == (3, 2, 1)
    assert shape(wanted_workers(RunConfig(workers=2), [MachineRoom(2)] * 3)) == (2, 2, 0)  # not 3 cores: nobody has 3
    assert shape(wanted_workers(RunConfig(workers=2), [MachineRoom(2)])) == (2, 1, 0)
    assert shape(wanted_workers(RunConfig(workers=5), [MachineRoom(2)])) == (5, 1, 0)


def test_a_cluster_that_has_no_machine_yet_is_asked_for_one_worker() -> None:
    """Without a request an autoscaler makes nothing, and the run would wait for ever."""
    for machines in ([], [MachineRoom(0)]):
        assert shape(wanted_workers(AUTO, machines)) == (1, 1, 0)
        assert shape(wanted_workers(CUDA, machines)) == (1, 1, 1)
        assert wanted_workers(CUDA, machines).n_fit == 0
    assert shape(wanted_workers(RunConfig(device="cuda", workers=16, cpus_per_worker=14), [])) == (16, 14, 1)
    assert "2 CPUs and 0 GPUs" in wanted_workers(CUDA, [MachineRoom(2)]).have


def test_gpus_that_are_gone_are_awaited() -> None:
    """A spot market may take all of them; the machines that stay would make other bits, slowly."""
    left = [MachineRoom(64)]
    assert shape(wanted_workers(AUTO, left)) == (1, 64, 0)
    assert shape(wanted_workers(AUTO, left, on_gpus=True)) == (1, 1, 1)
    assert wanted_workers(AUTO, left, on_gpus=True).n_fit == 0


@pytest.mark.parametrize("n_typed", [None, 3])
def test_an_extraction_that_has_had_gpus_wants_gpus_in_every_store(
    monkeypatch: pytest.MonkeyPatch, n_typed: int | None
) -> None:
    there = [MachineRoom(64), MachineRoom(8, 1)]
    monkeypatch.setattr(workers, "machines_of_ray", lambda without: there)
    demand, fresh = Demand(RunConfig(workers=n_typed)), Demand(RunConfig(workers=n_typed, device="cpu"))
    assert demand().num_gpus == 1
    assert fresh().num_gpus == 0
    there = [MachineRoom(64)]
    assert (demand().num_gpus, demand().n_fit) == (1, 0)
    there = []
    assert (demand({"a"}).num_gpus, demand().n_fit) == (1, 0)
    assert fresh().num_gpus == 0


@given(
    st.lists(st.tuples(st.integers(0, 128), st.integers(0, 8)), max_size=12),
    st.sampled_from(["auto", "cpu", "cuda"]),
    st.none() | st.integers(1, 40),
)
def test_a_worker_fits_some_machine_whenever_one_could(
    machines: list[tuple[int, int]], device: str, n: int | None
) -> None:
    rooms = [MachineRoom(*one) for one in machines]
    wanted = wanted_workers(RunConfig(device=device, workers=n), rooms)
    assert wanted.n >= 1
    assert wanted.num_cpus >= 1
    could = [room for room in rooms if room.cpus and (room.gpus or not wanted.num_gpus)]
    fitting = sum(min(room.cpus // int(wanted.num_cpus), room.gpus if wanted.num_gpus else room.cpus) for room in could)
    assert wanted.n_fit == fitting
    assert bool(fitting) == bool(could)
    if n is None and could:
        assert wanted.n == fitting
