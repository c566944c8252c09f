"""The codec benchmark measures what it says, on chunks that come back bit for bit."""

import numpy as np
import pytest

from benchmarks import codecs


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return list(codecs.run(codecs.QUICK).rows)


def row(rows: list[dict], precision: str, codec: str, shuffle: str) -> dict:
    [found] = [r for r in rows if (r["precision"], r["codec"], r["shuffle"]) == (precision, codec, shuffle)]
    return found


def test_every_precision_meets_every_codec(rows):
    assert len(rows) == 4 * 8
    assert all(r["encode GB/s"] > 0 and r["decode GB/s"] > 0 for r in rows)


@pytest.mark.parametrize(
    ("precision", "nbytes"), [("float32", 4), ("float16", 2), ("bfloat16", 2), ("int8", 1 + 4 / 64)]
)
def test_bytes_without_a_codec_are_those_of_the_precision_and_its_scale(rows, precision, nbytes):
    assert row(rows, precision, "none", "none")["bytes/value"] == nbytes


def test_a_chunk_that_changes_on_the_way_is_noticed():
    states = np.random.default_rng(0).standard_normal((2, 1, 4, 3)).astype(np.float32)
    case = next(codecs.make_cases("planted", states))
    payload = bytearray(codecs.encode_all(case)[0])
    codecs.check_lossless(case, [bytes(payload)])
    payload[5] ^= 1
    with pytest.raises(AssertionError, match="other bytes came back"):
        codecs.check_lossless(case, [bytes(payload)])


def test_states_that_repeat_are_compressed():
    cases = codecs.make_cases("constant", np.ones((8, 1, 64, 64), np.float32))
    for case in cases:
        nbytes = len(codecs.encode_all(case)[0])
        assert nbytes < 0.2 * case.raw_nbytes or case.spec.codec in ("none", "gzip")
