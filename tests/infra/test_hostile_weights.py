"""Weights files that harm: code, lies about sizes, archives that unpack to far more, tensors without values."""

import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from infra.weights import SUFFIXES, WeightsError, read_weights
from pipeline.checkpoints import read_linear_head, read_state_dict
from trainer.checkpoint import load_weights_file


def saved(value: object, **options: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


LIES: dict[str, bytes] = {
    "a header of 10 GB": struct.pack("<Q", 10**10) + b"{}",
    "a header of 2**64 bytes": struct.pack("<Q", 2**64 - 1) + b"{}",
    "a tensor of 4 TB": safetensors({"w": tensor([10**12], 0, 4 * 10**12)}),
    "tensors that overlap": safetensors({"v": tensor([2], 0, 8), "w": tensor([2], 4, 12)}, bytes(12)),
    "a gap": safetensors({"v": tensor([1], 0, 4), "w": tensor([1], 8, 12)}, bytes(12)),
    "offsets before the file": safetensors({"w": tensor([2], -8, 0)}, bytes(8)),
    "fewer values than the shape": safetensors({"w": tensor([3], 0, 8)}, bytes(8)),
    "a shape that overflows": safetensors({"w": tensor([2**63, 2], 0, 8)}, bytes(8)),
    "a negative shape": safetensors({"w": tensor([-2], 0, 8)}, bytes(8)),
    "an unknown dtype": safetensors({"w": tensor([2], 0, 8, "X9")}, bytes(8)),
    "bytes behind the last": safetensors({"w": tensor([2], 0, 8)}, bytes(80)),
    "a deep header": safetensors(b'{"w":' + b"[" * 100_000),
    "a header that is no text": safetensors(b"\xff" * 100),
    "a list": safetensors(["w"]),
    "a pickle": pickle.dumps({"w": 1}),
    "nothing": b"",
}


@pytest.mark.parametrize("kind", LIES)
def test_safetensors_that_lie_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(LIES[kind])
    for read in (read_weights, read_state_dict, load_weights_file):
        with pytest.raises(WeightsError, match=r"w\.safetensors is no whole .safetensors file"):
            read(str(path))


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("how", ["zip", "legacy", "plain pickle", "within a state dict"])
def test_pickled_code_is_never_run(how: str, suffix: str, tmp_path: Path) -> None:
    trap, path = tmp_path / "trap", tmp_path / f"w{suffix}"
    data = {
        "zip": lambda: saved(Touch(trap)),
        "legacy": lambda: saved(Touch(trap), _use_new_zipfile_serialization=False),
        "plain pickle": lambda: pickle.dumps(Touch(trap)),
        "within a state dict": lambda: saved({"weight": torch.ones(2, 4), "more": [Touch(trap)]}),
    }[how]()
    path.write_bytes(data)
    for read in (read_weights, read_state_dict, load_weights_file, lambda p: read_linear_head(p, 4)):
        with pytest.raises(WeightsError):
            read(str(path))
    assert not trap.exists()
    if how == "plain pickle":
        pickle.loads(data)  # noqa: S301 - the trap works where nobody looks
        assert trap.exists()


def deflated(value: object) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(value))) as source, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return out.getvalue()


def lying_directory(value: object) -> bytes:
    """A record whose directory entry says 10 GB."""
    data = bytearray(saved(value))
    place = data.index(b"PK\x01\x02")
    data[place + 20 : place + 28] = struct.pack("<II", 3 * 10**9, 3 * 10**9)
    return bytes(data)


ARCHIVES: dict[str, Callable[[], bytes]] = {
    "compressed, 40 MB in 40 kB": lambda: deflated({"weight": torch.zeros(10**7)}),
    "compressed, and harmless": lambda: deflated({"weight": torch.ones(4)}),
    "a record of 3 GB": lambda: lying_directory({"weight": torch.ones(4)}),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_archives_that_would_unpack_to_more_are_refused_unread(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("it was unpacked")

    path = tmp_path / "w.pth"
    path.write_bytes(ARCHIVES[kind]())
    monkeypatch.setattr(torch, "load", never)
    with pytest.raises(WeightsError, match=r"is an archive of [\d,]+ bytes that would unpack to [\d,]+"):
        read_weights(path)


STRANGE: dict[str, Callable[[], torch.Tensor]] = {
    "few numbers that claim to be 40 TB": lambda: torch.zeros(1, 1).expand(10**12, 4),
    "no values": lambda: torch.zeros(3, 4, device="meta"),
    "sparse": lambda: torch.eye(3, 4).to_sparse(),
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("wrapped", [False, True])
def test_tensors_without_their_values_are_named(kind: str, wrapped: bool, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    state = {"weight": STRANGE[kind]()}
    path.write_bytes(saved({"model": state, "epoch": 3} if wrapped else state))
    for read in (read_weights, load_weights_file, lambda p: read_linear_head(p, 4)):
        with pytest.raises(WeightsError, match=r"weight' is (of shape \[1000000000000, 4\] over only|no plain tensor)"):
            read(str(path))


def test_what_torch_saves_is_read(tmp_path: Path) -> None:
    """Views, shared memory, empty tensors, every kind of number."""
    base = torch.arange(12.0).reshape(3, 4)
    state = {"a": base, "view": base[1:, ::2], "turned": base.T, "none": torch.zeros(0, 4), "half": base.bfloat16()}
    state |= {"n": torch.tensor(3), "mask": base > 2}
    for name, options in (("a.pth", {}), ("b.pt", {"_use_new_zipfile_serialization": False})):
        (tmp_path / name).write_bytes(saved({"model": state, "step": 7}, **options))
        found = read_weights(tmp_path / name)
        assert found["step"] == 7
        assert all(torch.equal(found["model"][key], value) for key, value in state.items())


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True])
def test_random_damage_is_refused_or_read(legacy: bool, tmp_path: Path) -> None:
    sound = saved({"weight": torch.ones(3, 4)}, _use_new_zipfile_serialization=not legacy)
    rng, path, n_refused = random.Random(0), tmp_path / "w.pth", 0
    for _ in range(150):
        data = bytearray(sound)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            assert isinstance(read_state_dict(str(path)), dict)
        except WeightsError:
            n_refused += 1
    assert 20 < n_refused <= 150
