"""How fast the teacher runs on this machine: a few micro-batches, really run."""

import time
from concurrent.futures import ThreadPoolExecutor

import torch

from pipeline.preprocess import normalise
from pipeline.preprocessing import Preprocessing
from pipeline.shard import resolve_device
from pipeline.states import reduce_micro_batch
from pipeline.teacher import Teacher, teacher_from_files
from storage_schemas.spec import StoreSpec


def images_per_s(
    spec: StoreSpec,
    teacher: Teacher,
    files: dict[str, bytes],
    *,
    device: str,
    n_threads: int,
    seconds: int | float,
) -> float:
    """Images that one worker here passes through the teacher and rounds, without reading or writing any.

    One micro-batch to warm up, then as many as begin within `seconds`, at least one; threads as in an extraction.

    Args:
        spec: Of the store.
        teacher: On the CPU.
        files: The teacher as the store keeps it, to load it on another device.
        device: cpu, cuda or auto.
        n_threads: Micro-batches at once on a CPU; a GPU takes them in turn.
        seconds: To measure for, warm-up aside.
    """
    device = resolve_device(device)
    on_gpu = device.startswith("cuda")
    if on_gpu:
        teacher = teacher_from_files(files, device=device, compute=spec.compute)
    preprocessing = Preprocessing.from_dict(dict(spec.preprocessing))
    side = preprocessing.image_size
    pixels = torch.randint(0, 256, (spec.micro_batch, 3, side, side), dtype=torch.uint8)

    def micro_batch() -> None:
        with torch.inference_mode():
            states = teacher.layer_states_list(normalise(pixels.to(teacher.device), preprocessing))
            reduce_micro_batch(spec, [states[layer] for layer in spec.layers], None)  # ends on the host

    def until(end: float) -> int:
        n = 0
        while n == 0 or time.monotonic() < end:
            micro_batch()
            n += 1
        return n

    n_threads = 1 if on_gpu else n_threads
    n_torch_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(n_torch_threads if on_gpu else 1)
        with ThreadPoolExecutor(n_threads) as pool:
            list(pool.map(lambda _: micro_batch(), range(n_threads)))
            began = time.monotonic()
            n = sum(pool.map(until, [began + seconds] * n_threads))
            return n * spec.micro_batch / (time.monotonic() - began)
    finally:
        torch.set_num_threads(n_torch_threads)
