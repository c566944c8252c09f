"""Files of weights at addresses: the same tensors and errors as of files here, and nothing in them is run."""

import io
import os
import pickle
import secrets
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from infra.objects import open_objects
from infra.weights import WeightsError, read_weights

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([float("inf"), -0.0])}


def saved(value: object, **options: object) -> bytes:
    sink = io.BytesIO()
    torch.save(value, sink, **options)
    return sink.getvalue()


def put_in_memory(name: str, data: bytes) -> str:
    import fsspec

    url = f"memory://{secrets.token_hex(4)}/{name}"
    fsspec.filesystem("memory").pipe_file(url, data)
    return url


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".PT", ".bin"])
def test_tensors_come_whole_from_an_address(suffix: str, tmp_path: Path) -> None:
    data = save(STATE) if suffix == ".safetensors" else saved(STATE)
    (tmp_path / f"w{suffix}").write_bytes(data)
    for place in (tmp_path / f"w{suffix}", str(tmp_path / f"w{suffix}"), put_in_memory(f"w{suffix}", data)):
        found = read_weights(place)
        assert found.keys() == STATE.keys()
        assert all(torch.equal(found[name], STATE[name]) for name in STATE)


@pytest.mark.s3
def test_tensors_come_from_s3_and_errors_name_the_object(s3_location: str) -> None:
    objects = open_objects(s3_location)
    objects.put("some where/w.pth", saved(STATE))
    objects.put("w.safetensors", save(STATE))
    for key in ("some where/w.pth", "w.safetensors"):
        assert torch.equal(read_weights(f"{s3_location}/{key}")["a.weight"], STATE["a.weight"])
    with pytest.raises(WeightsError, match=f"there is no weights file {s3_location}/none.pth"):
        read_weights(f"{s3_location}/none.pth")
    with pytest.raises(
        WeightsError, match=r"the weights s3://no-such-bucket/w\.pth cannot be fetched: .*there is no buc"
    ):
        read_weights("s3://no-such-bucket/w.pth")


class Trap:
    """Pickled, it would leave a mark wherever it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def test_nothing_is_run_and_damage_is_told(tmp_path: Path) -> None:
    for name, data, expected in (
        (
            "trap.pth",
            saved({"w": Trap(tmp_path / "mark")}),
            "holds a pickled .*mkdir: pickled code, which is never run",
        ),
        (
            "old.pt",
            saved(torch.nn.Linear(2, 2), _use_new_zipfile_serialization=False),
            "m.state_dict.., 'old.state.pt'",
        ),
        ("cut.pth", saved(STATE)[:900], r"is no whole \.pth file of weights.*PytorchStreamReader.*copy it again"),
        ("cut.safetensors", save(STATE)[:-1], r"is no whole \.safetensors file of weights.*copy it again"),
        ("junk.bin", b"junk", r"is no whole \.bin file of weights"),
        (
            "odd.pt",
            b"\x80\x02" + bytes([247]) * 9,
            r"odd\.pt is no whole \.pt file.*: Unsupported operand 247\): copy it",
        ),
        ("plain.pt", pickle.dumps({"w": 1}, protocol=4), r"plain\.pt holds a pickle of protocol 4"),
        ("empty.pth", b"", r"is no whole \.pth file of weights"),
        ("w.onnx", b"", r"ends in \.onnx; weights are read from \.safetensors, \.pth"),
    ):
        (tmp_path / name).write_bytes(data)
        for place in (str(tmp_path / name), put_in_memory(name, data)):
            with pytest.raises(WeightsError, match=f"(?s){expected}") as caught:
                read_weights(place)
            assert place in str(caught.value)
    assert not (tmp_path / "mark").exists()
