"""The stores kept under tests/golden. `python -m tests.storage_schemas.golden_store NAME FOLDER` writes one anew."""

import sys
from typing import Any

import numpy as np

from infra.objects import FolderObjects, Objects
from storage_schemas.from_arrays import write_store
from storage_schemas.samples import Sample
from storage_schemas.spec import StoreSpec

BAD_IMAGES = {1: "truncated"}
TEACHER_FILES = {"config.json": b'{"name": "golden"}\n'}


KEPT: dict[str, dict[str, str]] = {
    "store_v1": {},
    "store_v1_int8": {"precision": "int8", "codec": "lz4"},
    "store_v1_webdataset": {
        "backend": "webdataset",
        "precision": "bfloat16",
        "codec": "gzip",
        "shuffle": "none",
    },
}


def golden_spec(**changes: str) -> StoreSpec:
    values: dict[str, Any] = {
        "layers": (0, 2),
        "dim": 4,
        "has_cls": True,
        "n_registers": 1,
        "grid": (1, 2),
        "precision": "float16",
        "codec": "zstd-1",
        "shuffle": "byte",
        "n_samples": 5,
        "samples_per_shard": 4,
        "samples_per_chunk": 2,
        "order_seed": 42,
        "teacher": "golden",
        "teacher_weights_digest": "ab" * 32,
        "preprocessing": {"image_size": 28, "mean": [0.5, 0.25, 1e-8]},
        "micro_batch": 2,
        "source_digest": "cd" * 32,
    }
    return StoreSpec(**(values | changes))


def golden_states(rows: range) -> np.ndarray:
    """(sample, layer, token, dim): plain arithmetic, so that no library's random numbers are needed to know them."""
    sample, layer, token, channel = np.ogrid[rows.start : rows.stop, 0:2, 0:4, 0:4]
    return ((sample * 31 + layer * 17 + token * 7 + channel * 3) % 257 / 16 - 4).astype(np.float32)


def golden_head_inputs(rows: range) -> np.ndarray:
    sample, channel = np.ogrid[rows.start : rows.stop, 0:8]
    return (sample * 8 + channel).astype(np.float32)


def write_golden(objects: Objects, spec: StoreSpec) -> None:
    samples = [
        Sample(sample_id=f"classe {i % 2}/é{i}.png", label=i % 2, class_name=f"classe {i % 2}", nbytes=10 + i)
        for i in range(spec.n_samples)
    ]
    write_store(
        objects,
        spec,
        samples,
        golden_states,
        head_inputs_of=golden_head_inputs,
        bad_images=BAD_IMAGES,
        teacher_files=TEACHER_FILES,
    )


if __name__ == "__main__":
    write_golden(FolderObjects(sys.argv[2]), golden_spec(**KEPT[sys.argv[1]]))
