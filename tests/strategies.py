"""Hypothesis strategies for what a store is made of."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import strategies as st

from storage_schemas.commit import BAD_IMAGE_CODES
from storage_schemas.spec import BLOSC_CODECS, COMPUTE_PRECISIONS, PRECISIONS, StoreSpec

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
_ZARR = [("zarr", "none", "none"), *(("zarr", codec, s) for codec in BLOSC_CODECS for s in ("byte", "bit"))]
#: Backend, codec and shuffle; WebDataset as often as Zarr.
forms = st.sampled_from(_ZARR) | st.sampled_from([("webdataset", "none", "none"), ("webdataset", "gzip", "none")])


@st.composite
def specs(draw: st.DrawFn, **fixed: Any) -> StoreSpec:
    """Small stores of every form: both back ends, every codec and precision, short last shards and chunks, no CLS."""
    backend, codec, shuffle = draw(forms.filter(lambda form: form[0] == fixed.get("backend", form[0])))
    samples_per_chunk = draw(st.integers(1, 4))
    values = {
        "backend": backend,
        "layers": tuple(sorted(draw(st.sets(st.integers(0, 12), min_size=1, max_size=3)))),
        "dim": draw(st.integers(1, 9)),
        "has_cls": draw(st.booleans()),
        "n_registers": draw(st.integers(0, 2)),
        "grid": (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        "precision": draw(st.sampled_from(PRECISIONS)),
        "codec": codec,
        "shuffle": shuffle,
        "n_samples": draw(st.integers(1, 13)),
        "samples_per_shard": samples_per_chunk * draw(st.integers(1, 3)),
        "samples_per_chunk": samples_per_chunk,
        "order_seed": draw(st.integers(-5, 2**40)),
        "teacher": draw(names.filter(str.isprintable)),
        "teacher_weights_digest": "0" * 64,
        "preprocessing": draw(st.dictionaries(st.text(max_size=5), json_values, max_size=3)),
        "compute": draw(st.sampled_from(COMPUTE_PRECISIONS)),
        "micro_batch": draw(st.integers(1, 64)),
        "source_digest": "1" * 64,
    }
    with same_random_state():
        return StoreSpec(**(values | fixed))


@contextmanager
def same_random_state() -> Iterator[None]:
    """beartype looks at a random element of each container, and hypothesis refuses `random` in a strategy."""
    state = random.getstate()
    yield
    random.setstate(state)


@st.composite
def bad_images(draw: st.DrawFn, n_samples: int) -> dict[int, str]:
    """Some samples, perhaps all, whose images are bad."""
    return draw(st.dictionaries(st.integers(0, n_samples - 1), st.sampled_from(BAD_IMAGE_CODES), max_size=n_samples))
