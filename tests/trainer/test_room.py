"""How many trainings a machine has room for, and that one takes no more memory than is stated for it."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

import trainer.room
from infra.objects import FolderObjects
from tests.stores import make_spec, write_planted
from tests.trainer.tiny import write_tiny_pair
from trainer.block import Block
from trainer.room import find_room

# Trains in a process of its own; prints the kernel's count of its greatest memory before and after, and what is stated.
TRAIN = """
import sys
from pathlib import Path
import torch
from infra.objects import MemoryObjects
from tests.trainer.tiny import CPU, tiny_config
from trainer.data import open_training_data
from trainer.room import training_memory_nbytes
from trainer.run_files import RunFiles
from trainer.train import train

def peak_nbytes():  # not getrusage: a process begins with the peak of the one that started it
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024

import torch._dynamo  # as workers that share a training do
torch.set_num_threads(1)
store, batch_size, n_heads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
data = open_training_data(store, "0-2")
config = tiny_config(batch_size=batch_size, n_heads=n_heads, lanes=4, n_steps=2, validation_samples=batch_size,
                     teacher_forcing_steps=2, warmup_steps=0)
before = peak_nbytes()
train(config, data, RunFiles(MemoryObjects()), machine=CPU)
peak = peak_nbytes()
print(before, peak, training_memory_nbytes(config, data.train, data.validation))
"""


def measured(store: Path | str, batch_size: int, n_heads: int) -> tuple[int, int, int]:
    """Greatest memory before and after the training, and what is stated, in bytes."""
    command = [sys.executable, "-c", TRAIN, str(store), str(batch_size), str(n_heads)]
    before, peak, stated = map(int, subprocess.check_output(command, text=True).split())
    return before, peak, stated


@pytest.fixture(scope="module")
def vit_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """States of ViT-B/14's width and tokens, without a teacher."""
    size = {"layers": (0, 1, 2), "dim": 768, "n_registers": 4, "grid": (16, 16), "n_samples": 24}
    place = tmp_path_factory.mktemp("vit_b")
    write_planted(FolderObjects(place), make_spec(**size, samples_per_shard=8, samples_per_chunk=4))
    return place


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_small_training_takes_no_more_than_stated(tmp_path: Path) -> None:
    """Nearly all of it is Python and torch."""
    before, peak, stated = measured(write_tiny_pair(tmp_path), 16, 2)
    assert 0.5 * stated < before < peak <= stated


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_wide_training_takes_no_more_than_stated(vit_b: Path) -> None:
    """With ViT-B's block the growth is what is kept for gradients, weights and moments: neither half nor twice."""
    before, peak, stated = measured(vit_b, 2, 12)
    assert peak <= stated
    assert 0.5 < (peak - before) / (stated - trainer.room._PROCESS_NBYTES) < 1.25


def test_what_a_block_keeps_for_its_gradient_is_within_what_is_stated() -> None:
    """Counted by autograd itself: every storage that the forward pass keeps, but for the weights."""
    block, x = Block(768, 12, depth_scaling=True), torch.randn(1, 64, 768, requires_grad=True)
    weights = {weight.untyped_storage().data_ptr() for weight in block.parameters()}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(x, 3)
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    channels = sum(nbytes for place, nbytes in sizes.items() if place not in weights) / 4 / x.numel()
    assert 0.5 * trainer.room._KEPT_CHANNELS < channels < trainer.room._KEPT_CHANNELS


def test_room_follows_memory_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("trainer.room.n_cores", lambda: 8)
    free = psutil.virtual_memory()._replace(available=10_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert find_room([100] * 20, 64, device="cpu", threads=2, at_once=None).at_once == 4, "8 cores, 2 for each"
    room = find_room([100, 5_000], 64, device="cpu", threads=1, at_once=None)
    assert (room.at_once, room.devices, room.threads) == (2, ("cpu", "cpu"), 1)
    tight = find_room([100, 6_000, 100], 64, device="cpu", threads=1, at_once=None)
    assert tight.at_once == 1, "the largest of them must fit as often"
    assert "memory" in tight.why
    assert find_room([100] * 3, 64, device="cpu", threads=1, at_once=2).at_once == 2
    assert find_room([20_000], 64, device="cpu", threads=1, at_once=None).at_once == 1, "one is always tried"


def test_each_training_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    room = find_room([1] * 5, 768, device=None, threads=None, at_once=None)
    assert (room.at_once, room.devices, room.threads) == (2, ("cuda:0", "cuda:1"), None)
    assert find_room([1] * 5, 768, device=None, threads=None, at_once=3).devices == ("cuda:0", "cuda:1", "cuda:0")


def test_trainings_of_several_processes_share_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 5)
    room = find_room([1] * 5, 768, device=None, threads=None, at_once=None, workers=2)
    assert (room.at_once, room.gpus, room.devices) == (2, ("0,1", "2,3"), ("cuda", "cuda"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,3,GPU-a,1,0")
    room = find_room([1] * 5, 768, device=None, threads=None, at_once=3, workers=2)
    assert room.gpus == ("7,3", "GPU-a,1", "7,3"), "AT_ONCE asked for more than there is room for"
    assert find_room([1] * 5, 768, device=None, threads=None, at_once=None, workers=8).gpus == ("7,3,GPU-a,1,0",)


def test_processes_of_a_training_take_their_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("trainer.room.n_cores", lambda: 8)
    free = psutil.virtual_memory()._replace(available=10_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert find_room([100] * 20, 64, device="cpu", threads=1, at_once=None, workers=4).at_once == 2
    assert find_room([2_000] * 20, 64, device="cpu", threads=1, at_once=None, workers=4).at_once == 1
