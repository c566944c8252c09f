"""How much of the machine an extraction uses: images/s with everything on, against forward pass and decoding alone."""

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from benchmarks.images import write_images
from benchmarks.machine import this_machine
from benchmarks.report import Cell, Goal, Result
from infra.machine import n_cores
from pipeline.config import ExtractConfig
from pipeline.extract import extract
from pipeline.job import ExtractResult
from pipeline.preprocess import decode_image, normalise
from pipeline.run_config import RunConfig
from pipeline.teacher import Teacher, load_teacher

NOTES = (
    "bound = 1 / (forward seconds + decode CPU seconds / cores) per image. Forward is the teacher with all its layer "
    "states, alone, on images that lie on the device, at the best of several batch sizes, with all cores on one batch "
    "or one batch per core. Decode is JPEG to cropped pixels from bytes in memory, one thread's CPU time.",
    "Extraction is the whole road of `make extract`: Ray, reading files, decoding, normalising, forward, reductions "
    "and statistics, rounding, checksums, writing, commits; from the moment the workers are ready to the last commit.",
    "Bound and extraction are measured one after the other in every round; ratios are medians of the rounds' ratios.",
)


@dataclass(frozen=True, kw_only=True)
class ExtractionBenchmark:
    """Sizes of this benchmark.

    Attributes:
        n_images: JPEGs.
        image_scale: 1 for ImageNet's size.
        teacher: timm name; its weights are random.
        image_size: Side of the crop, px.
        compute: Arithmetic of the teacher.
        samples_per_shard: Smaller than by default, so that a short run has shards to overlap as a long one has.
        batches: Batch sizes tried for the forward pass alone.
        n_forward: Images per timing of the forward pass, at least.
        n_rounds: Of bound and extraction.
        ray: Whether Ray does the work.
    """

    n_images: int = 256
    image_scale: float = 1.0
    teacher: str = "vit_small_patch14_reg4_dinov2"
    image_size: int = 224
    compute: str = "float32"
    samples_per_shard: int = 64
    batches: tuple[int, ...] = (8, 16, 32, 64)
    n_forward: int = 64
    n_rounds: int = 3
    ray: bool = True


QUICK = ExtractionBenchmark(
    n_images=12,
    image_scale=0.1,
    teacher="digits_vit",
    image_size=32,
    samples_per_shard=8,
    batches=(4,),
    n_forward=4,
    n_rounds=1,
    ray=False,
)


@dataclass(frozen=True, kw_only=True)
class ForwardSetting:
    """How the forward pass runs alone: batch size, and batches side by side, which share the cores."""

    batch: int
    side_by_side: int


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round's numbers.

    Attributes:
        forward_s: Per image.
        decode_s: CPU seconds per image.
        extract_per_s: Images per second.
        worker_nbytes: Peak memory of the largest worker; 0 where it could not be seen.
    """

    forward_s: float
    decode_s: float
    extract_per_s: float
    worker_nbytes: int

    def bound_per_s(self, cores: int) -> float:
        return 1 / (self.forward_s + self.decode_s / cores)


def run(config: ExtractionBenchmark, folder: Path | None = None) -> Result:
    """Make images, find the best forward setting, measure bound and extraction in turn."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with (
        tempfile.TemporaryDirectory(prefix="bench-extraction-", dir=folder, ignore_cleanup_errors=True) as place,
        _torch_threads_restored(),
    ):
        paths = write_images(Path(place) / "images", config.n_images, scale=config.image_scale)
        encoded = [path.read_bytes() for path in paths]
        teacher = load_teacher(config.teacher, "random:0", config.image_size, device=device, compute=config.compute)
        pixels = _decoded(encoded, teacher, config.n_forward)
        tried = {
            setting: forward_s(teacher, pixels, setting, config.n_forward)
            for setting in forward_settings(config.batches, device)
        }
        best = min(tried, key=lambda setting: tried[setting])
        rounds, results = [], []
        for number in range(config.n_rounds):
            forward = forward_s(teacher, pixels, best, config.n_forward)
            decode = decode_s(encoded, teacher)
            result, worker_nbytes = _extract(config, Path(place), number)
            results.append(result)
            rounds.append(
                Round(
                    forward_s=forward,
                    decode_s=decode,
                    extract_per_s=result.n_done / result.wall_s,
                    worker_nbytes=worker_nbytes,
                )
            )
    details: dict[str, Any] = {
        "rounds": [asdict(one) for one in rounds],
        "forward_images_per_s": [{**asdict(setting), "images_per_s": 1 / s} for setting, s in tried.items()],
        "mean_jpeg_nbytes": sum(map(len, encoded)) / len(encoded),
        "verdicts": [result.verdict for result in results],
        "stage_seconds": [[report.seconds for report in result.reports] for result in results],
        "stated_worker_nbytes": results[-1].plan.worker_nbytes,
    }
    return _result(config, device, rounds, best, details)


def forward_settings(batches: Sequence[int], device: str) -> list[ForwardSetting]:
    """What to try: all cores on one batch, and on a CPU also one batch per core."""
    lanes = {1, n_cores()} if device == "cpu" else {1}
    return [ForwardSetting(batch=batch, side_by_side=n) for n in sorted(lanes) for batch in batches]


def forward_s(teacher: Teacher, pixels: torch.Tensor, setting: ForwardSetting, n_images: int) -> float:
    """Seconds per image of the teacher's forward pass with all layer states, after one batch that warms up."""
    inputs = pixels[torch.arange(setting.batch) % len(pixels)]
    on_gpu = inputs.device.type == "cuda"
    if not on_gpu:
        torch.set_num_threads(max(1, n_cores() // setting.side_by_side))
    n_batches = max(setting.side_by_side, -(-n_images // setting.batch))
    n_batches = -(-n_batches // setting.side_by_side) * setting.side_by_side  # no core is left alone at the end

    def one(_: int) -> None:
        teacher.layer_states_list(inputs)

    with ThreadPoolExecutor(setting.side_by_side) as pool:
        list(pool.map(one, range(setting.side_by_side)))
        if on_gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        list(pool.map(one, range(n_batches)))
        if on_gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / (n_batches * setting.batch)


def decode_s(encoded: Sequence[bytes], teacher: Teacher) -> float:
    """CPU seconds per image of one thread that decodes, resizes and crops."""
    begin = time.thread_time()
    for data in encoded:
        decode_image(data, teacher.preprocessing)
    return (time.thread_time() - begin) / len(encoded)


def _decoded(encoded: Sequence[bytes], teacher: Teacher, n: int) -> torch.Tensor:
    pixels = [torch.from_numpy(decode_image(data, teacher.preprocessing)) for data in encoded[:n]]
    return normalise(torch.stack(pixels).to(teacher.device), teacher.preprocessing)


def _extract(config: ExtractionBenchmark, place: Path, number: int) -> tuple[ExtractResult, int]:
    """One extraction into a new store, deleted afterwards; its result and its largest worker's peak memory."""
    store = place / f"store-{number}"
    asked = ExtractConfig(
        images=str(place / "images"),
        store=str(store),
        teacher=config.teacher,
        weights="random:0",
        image_size=config.image_size,
        compute=config.compute,
        samples_per_shard=config.samples_per_shard,
        samples_per_chunk=min(16, config.samples_per_shard),
    )
    with _largest_worker() as largest:
        (result,) = extract(asked, RunConfig(no_ray=not config.ray, dashboard=False))
    if not result.complete or result.bad_images:
        raise RuntimeError(f"{result.n_done} of {config.n_images} images were extracted: the benchmark is void")
    shutil.rmtree(store)
    return result, largest()


@contextmanager
def _largest_worker(every_s: float = 0.25) -> Iterator[Callable[[], int]]:
    """Watches Ray's workers below this process; gives the highest peak of resident memory among them, in bytes."""
    peak, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(every_s):
            for process in psutil.Process().children(recursive=True):
                try:
                    if process.name().startswith("ray::"):
                        peak = max(peak, _high_water_nbytes(process.pid))
                except (psutil.Error, OSError):
                    continue  # it has just ended

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: peak
    finally:
        ended.set()
        thread.join()


def _high_water_nbytes(pid: int) -> int:
    with open(f"/proc/{pid}/status") as file:
        return next((int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:")), 0)


@contextmanager
def _torch_threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _result(
    config: ExtractionBenchmark, device: str, rounds: Sequence[Round], best: ForwardSetting, details: dict[str, Any]
) -> Result:
    cores = n_cores()
    of_bound = median(one.extract_per_s / one.bound_per_s(cores) for one in rounds)
    of_forward = median(one.extract_per_s * one.forward_s for one in rounds)
    bound = median(one.bound_per_s(cores) for one in rounds)
    forward = median(1 / one.forward_s for one in rounds)
    decode = median(cores / one.decode_s for one in rounds)
    rows: list[dict[str, Cell]] = [
        {
            "what": f"forward alone, batch {best.batch}, {best.side_by_side} side by side",
            "images/s": forward,
            "of the bound": forward / bound,
        },
        {"what": f"decode alone, {cores} cores", "images/s": decode, "of the bound": decode / bound},
        {"what": "bound: both, no overlap lost", "images/s": bound, "of the bound": 1.0},
        {
            "what": "extraction, everything on",
            "images/s": median(one.extract_per_s for one in rounds),
            "of the bound": of_bound,
        },
    ]
    goals = []
    if config.image_scale == 1.0:
        goals.append(Goal(what="extraction / bound", found=of_bound, at_least=0.9))
        peak = max(one.worker_nbytes for one in rounds)
        if peak:
            stated = details["stated_worker_nbytes"]
            goals.append(Goal(what="peak memory of a worker / the plan's statement", found=peak / stated, at_most=1.0))
    notes = [*NOTES]
    if device == "cuda":
        notes.append(f"Extraction reaches {of_forward:.2f} of the forward pass alone on the GPU.")
    return Result(
        name="extraction",
        title=f"Extraction of {config.n_images} JPEGs, {config.teacher} at {config.image_size} px, {config.compute}, "
        f"on {'the GPU' if device == 'cuda' else 'the CPU'}",
        machine=this_machine(),
        settings=asdict(config),
        rows=rows,
        goals=goals,
        notes=notes,
        details={**details, "of_forward": of_forward},
    )
