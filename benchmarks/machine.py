"""What a benchmark ran on: enough to judge its numbers, nothing that names a host, a person or a path."""

import ctypes
import gc
import platform
import re
from dataclasses import dataclass
from importlib.metadata import version

import psutil
import torch

from infra.machine import n_cores

_LIBRARIES = ("torch", "timm", "numpy", "zarr", "zarrs", "numcodecs", "tensorstore", "webdataset", "ray", "crc32c")


@dataclass(frozen=True, kw_only=True)
class MachineFacts:
    """The machine as results show it.

    Attributes:
        cpu: Model name of the processor.
        n_cores: Cores that this process may use.
        memory_gib: Main memory.
        gpu: Name of the GPU, or None.
        system: Kernel and architecture.
        versions: Of Python and the libraries that are measured.
    """

    cpu: str
    n_cores: int
    memory_gib: int
    gpu: str | None
    system: str
    versions: dict[str, str]

    @property
    def slug(self) -> str:
        """For file names: `amd-epyc-2-cores`, `nvidia-h200-16-cores`."""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.gpu or self.cpu} {self.n_cores} cores".lower()).strip("-")

    def __str__(self) -> str:
        gpu = f", {self.gpu}" if self.gpu else ", no GPU"
        return f"{self.cpu}, {self.n_cores} cores, {self.memory_gib} GiB{gpu}, {self.system}"


def this_machine() -> MachineFacts:
    """Look around."""
    return MachineFacts(
        cpu=_cpu_model(),
        n_cores=n_cores(),
        memory_gib=round(psutil.virtual_memory().total / 2**30),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        system=f"{platform.system()} {platform.machine()}",
        versions={"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES},
    )


def _cpu_model() -> str:
    if platform.system() == "Linux":
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or "unknown CPU"


def bfloat16_instructions() -> tuple[str, ...]:
    """Those of this processor that multiply bfloat16 numbers; without any, bfloat16 is slower than float32 here."""
    if platform.system() != "Linux":
        return ()
    with open("/proc/cpuinfo") as file:
        flags = next((line.split(":", 1)[1].split() for line in file if line.startswith(("flags", "Features"))), [])
    return tuple(flag for flag in ("amx_bf16", "avx512_bf16", "avx10_1", "bf16") if flag in flags)


class PeakMemory:
    """Peak resident memory of this process above what it held at the beginning, in bytes; 0 where Linux is not.

    Example:
        with PeakMemory() as peak:
            work()
        print(peak.nbytes)
    """

    def __init__(self) -> None:
        self.nbytes = 0

    def __enter__(self) -> "PeakMemory":
        if platform.system() == "Linux":
            give_back_memory()
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # sets the high-water mark back to the present
        self._before = _status_nbytes("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.nbytes = max(0, _status_nbytes("VmHWM") - self._before)


def give_back_memory() -> None:
    """Have the C library return what was freed, so that a measurement does not find it held already."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
    if trim is not None:
        trim(0)


def _status_nbytes(field: str) -> int:
    if platform.system() != "Linux":
        return 0
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0
