"""Tokens that see their own patch, or all of them: planted, and the same numbers as CKA between layers."""

import numpy as np
import pytest

from analysis.page import Origin
from analysis.similarity import minibatch_cka
from analysis.vision.localisation import Localisation, LocalisationAccumulator
from analysis.vision.measure import Localised
from analysis.vision.report import section_or_line
from analysis.vision.sections import localisation_section

N, PATCHES, VALUES, DIM = 96, 9, 6, 12


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def localised(tokens: np.ndarray, pixels: np.ndarray, batch_rows: int = N) -> Localisation:
    sums = LocalisationAccumulator(tokens.shape[1], pixels.shape[1])
    for start in range(0, len(tokens), batch_rows):
        sums.update(tokens[start : start + batch_rows], pixels[start : start + batch_rows])
    return sums.result()


def test_a_token_that_is_a_map_of_its_own_patch_is_nearest_to_it():
    pixels = normal(N, PATCHES, VALUES)
    tokens = np.einsum("rpv,pvd->rpd", pixels, normal(PATCHES, VALUES, DIM, seed=1))
    found = localised(tokens, pixels)
    np.testing.assert_array_equal(found.nearest, np.arange(PATCHES))
    assert found.own_share() == 1
    assert found.contrast() > 0.7
    assert found.n_rows == N


def test_tokens_that_mix_all_patches_alike_are_near_to_none():
    pixels = normal(400, PATCHES, VALUES)
    one = pixels.sum(axis=1) @ normal(VALUES, DIM, seed=2)
    found = localised(np.repeat(one[:, None], PATCHES, axis=1), pixels, 400)
    assert abs(found.contrast()) < 0.02
    assert found.own_share() == pytest.approx(1 / PATCHES)  # all tokens are one, so all are nearest to one patch
    assert np.ptp(found.cka) < 0.1


def test_it_is_minibatch_cka_of_each_pair():
    pixels = normal(48, 4, VALUES) + normal(48, 1, VALUES, seed=3)
    tokens = normal(48, 3, DIM) + pixels[:, :3] @ normal(VALUES, DIM, seed=4)
    found = localised(tokens, pixels, 16)
    for token in range(3):
        for patch in range(4):
            pair = minibatch_cka(tokens[:, [token]], pixels[:, [patch]], batch_rows=16)
            assert found.cka[token, patch] == pytest.approx(pair.values[0, 1], abs=1e-12)


def test_batches_may_be_dealt_to_workers():
    pixels, tokens = normal(40, 4, VALUES), normal(40, 4, DIM, seed=1)
    workers = [LocalisationAccumulator(4, 4) for _ in range(3)]
    for i, start in enumerate((20, 0, 10, 30)):
        workers[i % 3].update(tokens[start : start + 10], pixels[start : start + 10])
    for other in workers[1:]:
        workers[0].merge(other)
    np.testing.assert_allclose(workers[0].result().cka, localised(tokens, pixels, 10).cka, rtol=1e-12)


def test_a_patch_that_never_changes_has_no_cka_and_does_not_count():
    pixels = normal(N, PATCHES, VALUES)
    pixels[:, 2] = np.float32(0.1)
    tokens = np.einsum("rpv,pvd->rpd", pixels, normal(PATCHES, VALUES, DIM, seed=1))
    found = localised(tokens, pixels)
    assert np.isnan(found.cka[:, 2]).all()
    assert np.isnan(found.cka[2]).all()
    assert np.isnan(found.nearest[2])
    assert found.own_share() == 1
    assert np.isfinite(found.contrast())


def test_where_nothing_changes_there_is_no_share():
    found = localised(np.ones((8, 2, 3)), np.ones((8, 2, 3)))
    assert np.isnan(found.own_share())
    assert np.isnan(found.contrast())


def test_a_section_without_any_share_is_left_out(capsys):
    still = localised(np.ones((8, 4, 3)), np.ones((8, 4, 3)))
    found = Localised(by_layer={0: still, 1: still}, grid=(2, 2), n_seen=3, n_values=3)
    origin = Origin(data="here", n_images=8, seed=None, command="make report")
    assert section_or_line("localisation", lambda: localisation_section(found, origin, has_cls=True)) is None
    assert "no localisation: every patch has the same pixels" in capsys.readouterr().err


@pytest.mark.parametrize(("has_cls", "expected"), [(True, "This holds here."), (False, "this teacher has no CLS")])
def test_the_statement_on_teachers_with_cls_is_judged_on_such_alone(has_cls, expected):
    pixels = normal(N, PATCHES, VALUES)
    own = localised(pixels @ normal(VALUES, DIM, seed=1), pixels)
    found = Localised(by_layer={0: own, 1: own}, grid=(3, 3), n_seen=VALUES, n_values=VALUES)
    origin = Origin(data="here", n_images=N, seed=None, command="make report")
    assert expected in localisation_section(found, origin, has_cls=has_cls).text[0]


def test_bad_input_is_refused():
    sums = LocalisationAccumulator(2, 2)
    with pytest.raises(ValueError, match="localisation of no images"):
        sums.result()
    with pytest.raises(ValueError, match=r"expected the same rows, and \(2, 2\) of tokens and patches"):
        sums.update(normal(8, 3, DIM), normal(8, 2, VALUES))
    with pytest.raises(ValueError, match="3 rows, expected 4 or more"):
        sums.update(normal(3, 2, DIM), normal(3, 2, VALUES))
    bad = normal(8, 2, VALUES)
    bad[0, 1, 0] = np.nan
    with pytest.raises(ValueError, match="pixels hold NaN or infinite values: layer 1: 1 of 8 rows"):
        sums.update(normal(8, 2, DIM), bad)
