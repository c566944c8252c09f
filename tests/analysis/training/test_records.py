"""Records of a training: the authors' own file and what it shows, the schema, and what is refused."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from analysis.training.records import curves_of, read_records, record_line
from analysis.training.taps import tap_names, tap_title
from analysis.training.trends import Trend, lead, trend, trends, turned_everywhere
from infra.console import UserError
from tests.analysis.training.planted import record

GOLDEN = Path(__file__).parents[2] / "golden/geometry_observatory_epochs.jsonl.gz"
BLOCKS = [f"Layer_{i:02d}_Block{i:02d}" for i in range(1, 13)]
#: seeds 4.4: effective rank, stable rank, participation ratio and anisotropy at epochs 1, 10, 50, 100.
PUBLISHED = {
    "Layer_00_PatchEmbed": "2.08 10.1 12.5 16.6  1.27 3.96 3.63 4.75  1.55 7.07 6.77 8.88  .790 .252 .275 .211",
    "Layer_01_Block01": "3.72 14.1 23.7 31.9  1.74 4.47 4.22 5.97  2.55 8.65 10.2 14.8  .575 .224 .237 .168",
    "Layer_04_Block04": "5.79 30.2 52.3 64.4  2.25 6.98 6.64 9.44  3.61 17.3 22.5 30.7  .445 .143 .151 .106",
    "Layer_08_Block08": "8.69 49.7 70.2 78.1  2.81 9.60 7.75 7.12  5.21 28.7 27.0 28.9  .356 .104 .129 .140",
    "Layer_10_Block10": "9.68 58.3 78.2 74.2  3.02 11.5 8.22 5.47  5.78 35.0 29.1 21.7  .331 .087 .122 .183",
    "Layer_12_Block12": "11.0 66.9 104.3 97.6  3.44 14.7 10.4 6.47  6.73 41.5 41.7 29.3  .291 .068 .097 .155",
    "Layer_13_CLS_Final": "10.4 52.6 99.9 133.8  3.53 12.2 20.2 44.0  6.82 32.9 67.9 102.6  .284 .082 .050 .023",
}


@pytest.fixture(scope="module")
def published() -> list:
    return read_records(gzip.decompress(GOLDEN.read_bytes()).decode(), "the authors' file")


def test_the_authors_file_has_100_epochs_of_15_taps_and_six_scalars(published):
    assert [one.epoch for one in published] == list(range(1, 101))
    assert all(list(one.scalars) == tap_names(12) for one in published)


@pytest.mark.parametrize("tap", PUBLISHED)
def test_the_authors_file_gives_the_published_table(published, tap):
    found = [
        getattr(published[epoch - 1].scalars[tap], scalar)
        for scalar in ("effective_rank", "stable_rank", "participation_ratio", "anisotropy")
        for epoch in (1, 10, 50, 100)
    ]
    np.testing.assert_allclose(found, [float(one) for one in PUBLISHED[tap].split()], rtol=6e-3, atol=5e-4)


def test_the_sentence_is_wrong_of_blocks_9_to_12_and_right_of_cls_final_and_blocks_1_to_6(published):
    found = trends(published)
    assert turned_everywhere(found) == BLOCKS[8:]
    for scalar in ("effective_rank", "stable_rank", "participation_ratio", "anisotropy"):
        assert all(one.sign == (-1 if scalar == "anisotropy" else 1) for one in found[scalar].values())
        assert not any(found[scalar][tap].turned for tap in (*BLOCKS[:6], "Layer_13_CLS_Final"))
    last = BLOCKS[11]
    assert (found["stable_rank"][last].peak_epoch, round(found["stable_rank"][last].peak, 1)) == (10, 14.7)
    assert found["anisotropy"][last].peak_epoch == 10
    assert {found["effective_rank"][tap].peak_epoch for tap in BLOCKS[8:]} == {49, 63}
    assert {found["participation_ratio"][tap].peak_epoch for tap in BLOCKS[8:]} == {10, 49}


def test_cls_final_leads_for_good_from_the_published_epochs(published):
    assert (lead(published, "effective_rank").tap, lead(published, "effective_rank").since) == (tap_names(12)[-1], 54)
    assert (lead(published, "anisotropy", -1).tap, lead(published, "anisotropy", -1).since) == (tap_names(12)[-1], 16)
    assert lead(published[:53], "effective_rank").tap == BLOCKS[11]


def test_records_survive_a_file_and_undefined_scalars_with_them():
    before = [record(epoch, [0.5 + epoch, 1.0, 0.2, 3.0, 0.4, 1.0]) for epoch in (0, 3, 10)]
    after = read_records("\n\n".join(map(record_line, before)) + "\n", "ours")
    assert after == before
    assert set(curves_of(after, "entropy")) == set(tap_names(3))
    nothing = json.loads(record_line(before[0]))
    for scalars in nothing["layers"].values():
        scalars.update(dict.fromkeys(scalars))
    line = json.dumps(nothing)
    assert record_line(read_records(line, "ours")[0]) == line


def changed(line: str, **scalars: object) -> str:
    document = json.loads(line)
    document["layers"]["Layer_01_Block01"].update(scalars)
    return json.dumps(document)


def test_every_problem_of_a_file_is_listed():
    lines = [record_line(record(epoch, [1.0] * 6)) for epoch in range(6)]
    lines[1] = changed(lines[1], effective_rank=7.0)
    lines[2] = changed(lines[2], stable_rank=0.5)
    lines[3] = "{"
    lines[4] = changed(lines[4], spectral_entropy="high")
    with pytest.raises(UserError) as error:
        read_records("\n".join([*lines, lines[0], record_line(record(9, [1.0] * 7))]), "e.jsonl")
    said = str(error.value)
    for expected in (
        "e.jsonl cannot be read as records of a training",
        "line 2, Layer_01_Block01: exp(entropy) = effective rank does not hold",
        "line 3, Layer_01_Block01: 1 / anisotropy = stable rank does not hold",
        "line 3, Layer_01_Block01: 1 <= stable rank <= participation ratio",
        "line 4 is no record of an epoch (JSONDecodeError",
        "line 5 is no record of an epoch (ValueError: expected a finite number or null, found 'high')",
        "epoch 0 follows epoch 5: expected each once, ascending",
        "epoch 9 has other taps than epoch 0",
    ):
        assert expected in said, said
    with pytest.raises(UserError, match="there is no line in it"):
        read_records("\n", "empty")


@pytest.mark.parametrize(
    ("values", "direction", "sign", "peak", "peak_epoch", "retreat", "turned", "dip_epoch"),
    [
        ([1, 2, 3, 5], 1, 1, 5, 30, 0, False, None),
        ([1, 5, 4, 3], 1, 1, 5, 10, 0.5, True, None),
        ([5, 1, 2, 3], -1, -1, 1, 10, 0.5, True, None),
        ([2, 1, 1, 1], 1, -1, 2, 0, 1, True, None),
        ([2, 2, 2, 2], 1, 0, 2, 0, 0, False, None),
        ([0, 100, 50, 96], 1, 1, 100, 10, 0.04, False, None),
        ([2, 1.5, 1, 6], 1, 1, 6, 30, 0, False, 20),
        ([2, 3, 4, 1], -1, -1, 1, 30, 0, False, 20),
        ([2, 1.9, 4, 6], 1, 1, 6, 30, 0, False, None),
    ],
)
def test_sign_peak_turn_and_dip_of_known_curves(values, direction, sign, peak, peak_epoch, retreat, turned, dip_epoch):
    assert trend([0, 10, 20, 30], np.array(values), direction) == Trend(
        first=values[0],
        last=values[-1],
        sign=sign,
        peak=peak,
        peak_epoch=peak_epoch,
        retreat=retreat,
        turned=turned,
        dip_epoch=dip_epoch,
    )


def test_a_peak_at_the_very_end_is_noise_and_what_has_no_trend_is_refused():
    values = np.concatenate([np.arange(96.0), [95.0, 60.0, 60.0, 60.0, 60.0]])
    assert not trend(list(range(101)), values).turned
    assert trend(list(range(101)), values).retreat > 0.3
    for epochs, bad, direction in [([0], [1.0], 1), ([0, 1], [1.0, np.nan], 1), ([0, 1], [1.0, 2.0], 2)]:
        with pytest.raises(ValueError, match="two or more finite values"):
            trend(epochs, np.array(bad), direction)


def test_titles_of_taps():
    assert [tap_title(tap) for tap in tap_names(2)] == ["PatchEmbed", "PosEmbed", "block 1", "block 2", "CLS final"]
