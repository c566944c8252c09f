"""The pass in shares: whoever measures them, in whatever order, the findings are those of one pass."""

import dataclasses

import numpy as np
import pytest

from analysis.measure import StoreAnalyses, class_numbers, measure_shares, measure_store
from analysis.sums import Findings
from infra.console import UserError
from tests.analysis.test_distances import planted

LIMIT, WIDE_LIMIT, BATCH = 17, 11, 8


def assert_same(one: object, other: object, where: str = "findings") -> None:
    """Every number of two results, to 1e-9 of the largest of its array; what is rounding of nothing aside."""
    if dataclasses.is_dataclass(one):
        for field in dataclasses.fields(one):
            assert_same(getattr(one, field.name), getattr(other, field.name), f"{where}.{field.name}")
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_same(one[key], other[key], f"{where}[{key}]")
    elif isinstance(one, np.ndarray):
        scale = np.abs(one[np.isfinite(one)]).max(initial=0)
        np.testing.assert_allclose(other, one, rtol=1e-9, atol=1e-9 * scale + 1e-13, err_msg=where)
    else:
        assert one == other, where


def in_shares(store, order=None, cut: int = 1, **limits: int) -> Findings:
    """A plain loop in the place of a cluster: shares in any order, merged in any groups."""
    limits = {"limit": LIMIT, "wide_limit": WIDE_LIMIT} | limits
    asked = StoreAnalyses(store, **limits)

    def run(shares, directions):
        places = np.arange(len(shares)) if order is None else np.argsort(np.array(order[: len(shares)]), kind="stable")
        for group in np.array_split(places, min(cut, len(places))):
            sums = None
            for place in group:
                worker = StoreAnalyses(store, **limits)
                found = worker.measure_share(shares[place], directions, batch_rows=BATCH)
                if sums is None or set(sums.cosines) != set(found.cosines):
                    if sums is not None:
                        yield sums
                    sums = found
                else:
                    sums.merge(found)
            yield sums

    return measure_shares(asked, run, BATCH)


@pytest.mark.parametrize("changes", [{}, {"samples_per_chunk": 1, "samples_per_shard": 1}, {"backend": "webdataset"}])
def test_shares_are_one_pass(changes) -> None:
    store = planted(**changes)
    assert_same(measure_store(store, limit=LIMIT, wide_limit=WIDE_LIMIT, batch_rows=BATCH), in_shares(store))


@pytest.mark.parametrize("seed", range(8))
def test_any_order_and_any_groups_of_shares_are_one_pass(seed: int) -> None:
    random = np.random.default_rng(seed)
    store = planted(samples_per_chunk=2, samples_per_shard=4)
    limits = {"limit": int(random.choice([4, 5, 6, 13, 30])), "wide_limit": int(random.integers(4, 30))}
    expected = measure_store(store, batch_rows=BATCH, **limits)
    found = in_shares(store, random.permutation(60).tolist(), int(random.integers(1, 8)), **limits)
    assert_same(expected, found)


def test_a_store_without_cls_or_classes_is_shared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    store = planted(has_cls=False, n_registers=0)
    assert_same(measure_store(store, limit=LIMIT, wide_limit=WIDE_LIMIT, batch_rows=BATCH), found := in_shares(store))
    assert found.basins is not None
    monkeypatch.setattr("analysis.measure.class_numbers", lambda store: (class_numbers(store)[0] * 0, 1))
    assert in_shares(store).basins is None


def test_every_row_and_kind_is_in_one_share_and_no_chunk_in_two() -> None:
    store = planted(samples_per_chunk=4, samples_per_shard=8)
    shares = StoreAnalyses(store, limit=17, wide_limit=11).shares(BATCH)
    good = np.flatnonzero(store.valid)
    for kinds, n in ((("cls", "patch_mean"), 17), (("registers",), 11), (("patches",), 11)):
        rows = [share.rows for share in shares if share.kinds == kinds]
        np.testing.assert_array_equal(np.concatenate(rows), good[:n])
        chunks = [chunk for some in rows for chunk in set((some // 4).tolist())]
        assert len(chunks) == len(set(chunks))
    assert [share.rows.tolist() for share in shares if share.kinds == ("patches",)] == [
        [0, 1, 2, 3, 4, 6, 7], [8, 9, 10, 11]
    ]  # fmt: skip


def test_a_bad_state_in_a_share_is_named() -> None:
    store = planted()
    asked = StoreAnalyses(store, limit=LIMIT, wide_limit=WIDE_LIMIT)
    share = asked.shares(BATCH)[-1]
    read = type(store).read

    def zeros(self, *arguments, **named):
        return read(self, *arguments, **named) * 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(store), "read", zeros)
        with pytest.raises(UserError, match="no direction: layer 0"):
            asked.measure_share(share, None)
