"""One store, wherever it lies and in whichever form: the same values, the same bytes, the same digest."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from infra.objects import MemoryObjects, Objects
from storage_schemas import open_store
from storage_schemas.digest import content_digest
from storage_schemas.keys import shard_object_key
from storage_schemas.spec import StoreSpec
from tests.contract.backends import BACKENDS
from tests.stores import as_stored, make_spec, planted_head_inputs, planted_states, write_planted_anew

FORMS = {
    "zarr": {"precision": "bfloat16", "codec": "zstd-1", "shuffle": "byte"},
    "zarr-int8": {"precision": "int8"},
    "webdataset": {"backend": "webdataset", "precision": "int8"},
    "webdataset-gzip": {"backend": "webdataset", "codec": "gzip"},
}
BAD = {5: "truncated"}
VALID = [i for i in range(13) if i not in BAD]


def spec_of(form: str) -> StoreSpec:
    return make_spec(n_samples=13, layers=(0, 1), **FORMS[form])


@cache
def digest_in_memory(form: str) -> str:
    objects = MemoryObjects()
    write_planted_anew(objects, spec_of(form), BAD)
    return content_digest(objects)


@pytest.fixture(params=BACKENDS)
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    return BACKENDS[request.param](tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_a_store_is_the_same_everywhere(objects, form):
    spec = spec_of(form)
    write_planted_anew(objects, spec, BAD)
    store, states = open_store(objects), as_stored(spec, planted_states(spec, range(13)))
    assert store.verify() == []
    np.testing.assert_array_equal(store.read(), states[VALID])
    np.testing.assert_array_equal(store.read([1], [12, 0], "patches"), states[[12, 0]][:, [1], 3:])
    np.testing.assert_array_equal(store.read_head_input(), planted_head_inputs(spec, range(13))[VALID])
    assert content_digest(objects) == digest_in_memory(form)

    key = shard_object_key(spec, "layer_01/registers", 1)
    objects.put(key, objects.get(key)[:-1])
    assert [problem.key for problem in open_store(objects).verify()] == [key]
