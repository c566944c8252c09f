"""The results table: known numbers in, known means out; what must not be averaged is refused with its places."""

import dataclasses
import json
import math
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.console import ExitCode, UserError, run_door
from infra.objects import open_objects
from storage_schemas.documents import seal, unseal
from tests import examples
from tests.trainer.planted_results import DATA, plant_probe, plant_run
from trainer.__main__ import main
from trainer.paper import ABLATION, PAPER, PUBLISHED, published
from trainer.probes import imagenet, nyuv2
from trainer.table import BEST, EPSILON, HEAD, LAST, MEAN_R2, R2, Row, Table, make_table
from trainer.table_csv import COLUMNS, read_csv, write_csv
from trainer.table_sources import find_results
from trainer.table_text import as_markdown, as_text, spread

VIT_B = "vit_base_patch14_reg4_dinov2.lvd142m"


def table_of(root: Path) -> Table:
    found = find_results([str(root)])
    return make_table(found.runs, found.probes)


def only(table: Table, **values: object) -> Row:
    rows = table.of(**values)
    assert len(rows) == 1, f"{len(rows)} rows have {values}"
    return rows[0]


# ---------------------------------------------------------------- means and deviations


def test_three_known_numbers(tmp_path: Path) -> None:
    """0.80, 0.83, 0.86 have mean 0.83 and, with ddof 1, deviation 0.03."""
    for seed, accuracy in enumerate((0.80, 0.83, 0.86)):
        plant_run(tmp_path / f"{seed}", seed=seed, accuracy=accuracy, teacher=0.95)
        plant_probe(tmp_path / f"p{seed}", model_seed=seed, seed=7, last=accuracy, best=accuracy + 0.01, run=None)
    plant_probe(tmp_path / "teacher", spans=(), last=0.95, best=0.96)
    table = table_of(tmp_path)
    head = only(table, task=HEAD, what="raptor")
    assert (head.n, head.seeds) == (3, "0 1 2")
    assert head.mean == pytest.approx(0.83)
    assert head.std == pytest.approx(0.03)
    assert head.of_teacher == pytest.approx(0.83 / 0.95)
    last = only(table, task="digits", what="raptor", selection=LAST)
    assert (last.mean, last.std) == (pytest.approx(0.83), pytest.approx(0.03))
    assert last.seeds == "0/7 1/7 2/7"
    assert last.of_teacher == pytest.approx(0.83 / 0.95)
    best = only(table, task="digits", what="raptor", selection=BEST)
    assert best.mean == pytest.approx(0.84)
    assert best.of_teacher == pytest.approx(0.84 / 0.96), "the best epoch is set beside the teacher's best"


def test_deviations_are_over_models_and_not_over_the_seeds_of_their_probes(tmp_path: Path) -> None:
    """Model 0 has probes 0.7 and 0.9, mean 0.8; model 1 one of 0.86: mean 0.83, deviation of (0.8, 0.86)."""
    for i, (model_seed, value) in enumerate(((0, 0.7), (0, 0.9), (1, 0.86))):
        plant_probe(tmp_path / f"{i}", model_seed=model_seed, seed=i, last=value)
    for seed, value in enumerate((0.98, 1.0)):
        plant_probe(tmp_path / f"t{seed}", spans=(), seed=seed, last=value)
    table = table_of(tmp_path)
    row = only(table, what="raptor", selection=LAST)
    assert (row.n, row.n_measured) == (2, 3)
    assert row.mean == pytest.approx(0.83)
    assert row.std == pytest.approx(statistics.stdev((0.8, 0.86)))
    assert row.of_teacher == pytest.approx(0.83 / 0.99)
    teacher = only(table, what="teacher", selection=LAST)
    assert (teacher.n, teacher.n_measured, teacher.std) == (1, 2, None), "one model has no deviation"
    assert "2 (3 probes)" in as_text(table)
    assert "1 (2 probes)" in as_text(table)


def test_a_single_seed_has_no_deviation(tmp_path: Path) -> None:
    plant_run(tmp_path / "a")
    assert {row.std for row in table_of(tmp_path).rows} == {None}
    assert "±" not in as_text(table_of(tmp_path))


def test_r2_and_epsilon_of_layers(tmp_path: Path) -> None:
    """The mean over layers leaves layer 0 out, which a roll-out has for nothing."""
    plant_run(tmp_path / "a", r2=[0.9, 0.8, 0.7, 0.4], epsilon=[1.0, 2.0, 3.0, 8.0])
    table = table_of(tmp_path)
    assert only(table, quantity=MEAN_R2, tokens="all").mean == pytest.approx(0.7)
    assert [row.layer for row in table.of(quantity=R2, tokens="all")] == [1, 2, 3, 4]
    assert only(table, quantity=R2, tokens="all", layer=4).mean == 0.4
    assert only(table, quantity=R2, tokens="cls", layer=4).mean == pytest.approx(0.3)
    assert [row.mean for row in table.of(quantity=EPSILON)] == [1.0, 2.0, 3.0, 8.0]
    assert not only(table, quantity=EPSILON, layer=1).higher_is_better


def test_the_teachers_head_is_a_row(tmp_path: Path) -> None:
    plant_run(tmp_path / "a", accuracy=0.48, teacher=0.96)
    table = table_of(tmp_path)
    assert only(table, what="teacher").mean == 0.96
    assert only(table, what="raptor", task=HEAD).of_teacher == pytest.approx(0.5)


def test_without_a_head_there_is_no_accuracy(tmp_path: Path) -> None:
    plant_run(tmp_path / "a", accuracy=None)
    table = table_of(tmp_path)
    assert table.of(task=HEAD) == []
    assert "  -  " in as_text(table)


def test_blocks_are_no_raptors(tmp_path: Path) -> None:
    """A span that is less than the depth, and stage 1 of one span over the whole depth, are blocks."""
    plant_run(tmp_path / "part", "0-2")
    plant_run(tmp_path / "whole", "0-4")
    plant_run(tmp_path / "joint", "0-4", joint=True)
    names = {row.variant: row.what for row in table_of(tmp_path).rows if row.what != "teacher"}
    assert names == {"k=1": "raptor", "block 0-2": "block", "block 0-4": "block"}


def test_an_imported_run_is_a_row_of_its_own_beside_the_same_teacher(tmp_path: Path) -> None:
    """It has no baselines of its own; where it was not validated it has no numbers, and bars nothing."""
    plant_run(tmp_path / "a", accuracy=0.9, teacher=0.96)
    plant_run(tmp_path / "b", accuracy=0.48, imported=True)
    plant_run(tmp_path / "c", "0-4", imported=True, validated=False, data={"train": "unknown", "teacher": "c" * 64})
    table = table_of(tmp_path)
    assert only(table, variant="imported k=2", task=HEAD).of_teacher == pytest.approx(0.5)
    assert only(table, variant="k=2", task=HEAD).of_teacher == pytest.approx(0.9 / 0.96)
    assert {row.variant for row in table.rows} == {"teacher", "k=2", "imported k=2"}


# ---------------------------------------------------------------- variants


def test_names_hold_what_differs_and_nothing_else(tmp_path: Path) -> None:
    plant_run(tmp_path / "a", "0-2,2-4")
    plant_run(tmp_path / "b", "0-1,1-4")
    plant_run(tmp_path / "c", "0-1,1-4", n_steps=13)
    plant_run(tmp_path / "d", "0-1,1-2,2-4")
    names = {row.variant for row in table_of(tmp_path).of(what="raptor")}
    assert names == {"k=2 0-2,2-4 n_steps=12", "k=2 0-1,1-4 n_steps=12", "k=2 0-1,1-4 n_steps=13", "k=3"}


def test_what_is_only_watched_makes_no_variant(tmp_path: Path) -> None:
    plant_run(tmp_path / "a", log_every=1, validate_every=3, checkpoint_every=7)
    plant_run(tmp_path / "b", seed=1)
    assert only(table_of(tmp_path), task=HEAD, what="raptor").n == 2


def test_a_probe_is_of_the_run_that_it_read(tmp_path: Path) -> None:
    """By the digest of the weights; also where that run lies outside the places that are given."""
    elsewhere = plant_run(tmp_path / "elsewhere/a", "0-2,2-4", n_steps=13)
    here = plant_run(tmp_path / "here/b", "0-2,2-4")
    plant_probe(tmp_path / "here/pa", run=elsewhere, last=0.5)
    plant_probe(tmp_path / "here/pb", run=here, last=0.6)
    table = table_of(tmp_path / "here")
    assert only(table, variant="k=2 n_steps=12", task="digits", selection=LAST).mean == 0.6
    assert only(table, variant="k=2 n_steps=13", task="digits", selection=LAST).mean == 0.5


def test_a_probe_with_a_label_is_a_row_of_its_own(tmp_path: Path) -> None:
    run = plant_run(tmp_path / "a")
    plant_probe(tmp_path / "p", run=run, label="wider readout")
    assert only(table_of(tmp_path), task="digits", selection=LAST).variant == "wider readout"


# ---------------------------------------------------------------- what is refused


def test_duplicate_runs_are_refused_with_both_places(tmp_path: Path) -> None:
    plant_run(tmp_path / "first", seed=3)
    plant_run(tmp_path / "second", seed=3, accuracy=0.5)
    plant_run(tmp_path / "third", seed=4)
    with pytest.raises(UserError, match=r"k=2, seed 3, is there twice: \S+/first and \S+/second") as error:
        table_of(tmp_path)
    assert "third" not in str(error.value)


def test_duplicate_probes_are_refused_with_both_places(tmp_path: Path) -> None:
    run = plant_run(tmp_path / "run")
    plant_probe(tmp_path / "first", run=run, seed=5)
    plant_probe(tmp_path / "second", run=run, seed=5)
    plant_probe(tmp_path / "third", run=run, seed=6)
    with pytest.raises(UserError, match=r"probe of digits with seed 5, is there twice: \S+/first and \S+/second"):
        table_of(tmp_path)


def test_the_same_place_by_two_ways_counts_once(tmp_path: Path) -> None:
    plant_run(tmp_path / "runs/a")
    found = find_results([str(tmp_path), f"{tmp_path}/runs", f"{tmp_path}/runs/a/"])
    assert len(found.runs) == 1


def test_runs_on_other_data_are_not_averaged(tmp_path: Path) -> None:
    plant_run(tmp_path / "a", seed=0)
    plant_run(tmp_path / "b", seed=1, data={**DATA, "train": "e" * 64})
    with pytest.raises(UserError, match="different data") as error:
        table_of(tmp_path)
    message = str(error.value)
    assert f"store {'a' * 12} validated on {'b' * 12}: {tmp_path}/a" in message
    assert f"store {'e' * 12} validated on {'b' * 12}: {tmp_path}/b" in message


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"data": {"train": "f" * 64}}, "different data"),
        ({"settings": {"n_epochs": 3}}, "different settings"),
        ({"compat": True}, "different settings"),
        ({"metric": "mIoU"}, "different metrics"),
        ({"compute": "bfloat16"}, "different arithmetic"),
        ({"teacher_weights": "9" * 64}, "fake_vit have different weights"),
        ({"task_identity": {"head": "random"}}, "different tasks"),
        ({"task_identity": {"classes": 9}}, "different tasks"),
        ({"task_identity": {"pixel_size": [14, 14]}}, "different tasks"),
    ],
)
def test_probes_that_differ_are_not_averaged(tmp_path: Path, changes: dict[str, object], what: str) -> None:
    plant_probe(tmp_path / "a", model_seed=0)
    plant_probe(tmp_path / "b", model_seed=1, **changes)
    with pytest.raises(UserError, match=what) as error:
        table_of(tmp_path)
    assert f"{tmp_path}/a" in str(error.value)
    assert f"{tmp_path}/b" in str(error.value)


def test_a_run_and_a_probe_name_one_teacher_by_the_same_digest(tmp_path: Path) -> None:
    """Teachers of one name with other weights are refused, also where only the run has the other one."""
    plant_run(tmp_path / "run", teacher_weights="9" * 64)
    plant_probe(tmp_path / "probe", spans=())
    with pytest.raises(UserError, match="results of fake_vit have different weights") as error:
        table_of(tmp_path)
    for line in (f"teacher {'9' * 37}...: {tmp_path}/run", f"teacher {'c' * 37}...: {tmp_path}/probe"):
        assert line in str(error.value)
    plant_run(tmp_path / "elsewhere/run")
    plant_probe(tmp_path / "elsewhere/probe", spans=())
    assert {row.what for row in table_of(tmp_path / "elsewhere").rows} == {"teacher", "raptor"}


def test_nothing_found_says_where_was_looked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"no finished run and no probe in or below {tmp_path}, {tmp_path}/x"):
        find_results([str(tmp_path), f"{tmp_path}/x"])


def test_foreign_and_changed_documents_are_all_named(tmp_path: Path) -> None:
    for name, data in {
        "foreign": b'{"accuracy": 1.0}',
        "no-json": b"\xff",
        "ours-by-digest-only": seal({"a": 1}),
    }.items():
        open_objects(tmp_path / name).put("result.json", data)
    run = plant_run(tmp_path / "changed")
    path = Path(run, "result.json")
    path.write_text(path.read_text().replace('"accuracy":0.9', '"accuracy":1.0'))
    with pytest.raises(UserError) as error:
        find_results([str(tmp_path)])
    for name in ("foreign", "no-json", "ours-by-digest-only", "changed"):
        assert f"{tmp_path}/{name}" in str(error.value), name


def test_a_run_of_another_version_is_named(tmp_path: Path) -> None:
    run = plant_run(tmp_path / "old")
    objects = open_objects(run)
    document = unseal("result.json", objects.get("result.json"))
    del document["last_layer"]
    objects.put("result.json", seal(document))
    with pytest.raises(UserError, match="last_layer"):
        find_results([run])


def test_teachers_of_one_name_with_other_weights_are_no_average(tmp_path: Path) -> None:
    """Random weights go by the name of the real ones; also where the probes are of different tasks."""
    plant_probe(tmp_path / "real", spans=(), last=0.84, seed=0)
    plant_probe(tmp_path / "random", spans=(), last=0.80, seed=1, teacher_weights="9" * 64, task="imagenet")
    with pytest.raises(UserError, match=f"teacher {'9' * 12}") as error:
        table_of(tmp_path)
    assert f"{tmp_path}/real" in str(error.value)
    assert f"{tmp_path}/random" in str(error.value)


def test_two_teachers_may_begin_with_a_head_each(tmp_path: Path) -> None:
    for name in ("small", "large"):
        identity = {"head": name, "classes": 5}
        plant_probe(tmp_path / name, spans=(), teacher_name=name, teacher_weights=name, task_identity=identity)
    assert {row.variant for row in table_of(tmp_path).rows} == {"teacher small", "teacher large"}
    plant_probe(tmp_path / "other", spans=(), teacher_name="other", task_identity={"head": "random", "classes": 5})
    with pytest.raises(UserError, match="begins with a head"):
        table_of(tmp_path)


def test_probes_of_lost_runs_are_one_variant_only_if_trained_alike(tmp_path: Path) -> None:
    """By what the probe says of the training; where it says nothing, each set of weights stands alone."""
    for name, n_steps, label in (("a", 5, {}), ("b", 6, {}), ("c", 5, {"label": "mine"}), ("d", 6, {"label": "mine"})):
        for seed in (0, 1):
            about = {"run": None, "model_seed": seed, "raptor_settings": {"n_steps": n_steps}, **label}
            plant_probe(tmp_path / f"{name}{seed}", **about)
    for name in ("e", "f"):
        plant_probe(tmp_path / name, run_weights=name * 64, raptor_settings={}, model_seed=ord(name), label="unknown")
    rows = {row.variant: row.n for row in table_of(tmp_path).of(task="digits", selection=LAST)}
    assert rows == {
        **{"k=2 n_steps=5": 2, "k=2 n_steps=6": 2, "mine n_steps=5": 2, "mine n_steps=6": 2},
        **{f"unknown weights={name * 12}": 1 for name in "ef"},
    }


def test_a_run_trained_anew_does_not_take_over_the_probe_of_old_weights(tmp_path: Path) -> None:
    run = plant_run(tmp_path / "elsewhere/run", n_steps=13)
    plant_probe(tmp_path / "here/a", run=run, run_weights="0" * 64, raptor_settings={"n_steps": 5})
    plant_probe(tmp_path / "here/b", run=run, model_seed=1, raptor_settings={"n_steps": 5})
    rows = {row.variant: row.n for row in table_of(tmp_path / "here").of(selection=LAST)}
    assert rows == {"k=2 recipe=unknown": 1, "k=2 recipe=test": 1}


# ---------------------------------------------------------------- published numbers


def test_published_numbers_are_those_of_the_paper() -> None:
    """Ratios to ViT-B as the abstract and the main table have them: 96.1, 98.2 and 98.5 %."""
    teacher = published(VIT_B, 0, "imagenet")
    assert teacher is not None
    ratios = []
    for k in (2, 3, 4):
        raptor = published(VIT_B, k, "imagenet")
        assert raptor is not None
        assert raptor.source == PAPER
        ratios.append(round(100 * raptor.mean / teacher.mean, 1))
    assert ratios == [96.1, 98.2, 98.5]
    assert published(VIT_B, 3, "nyuv2") in PUBLISHED
    assert published("digits_vit", 3, "imagenet") is None
    assert published(VIT_B, 1, "imagenet") is None


IMAGENET = {
    "task": "imagenet",
    "teacher_name": VIT_B,
    "n_evaluation": 50_000,
    "settings": asdict(imagenet.SETTINGS),
    "task_identity": {"head": "f" * 64, "classes": 1000},
}
NYUV2 = {
    "task": "nyuv2",
    "metric": "RMSE (m)",
    "teacher_name": VIT_B,
    "n_evaluation": 654,
    "settings": asdict(nyuv2.settings_on(torch.device("cpu"))),
}
K3 = ("0-7", "7-10", "10-12")


def test_published_numbers_stand_beside_the_best_epoch(tmp_path: Path) -> None:
    plant_probe(tmp_path / "k3", spans=K3, best=0.83, **IMAGENET)
    plant_probe(tmp_path / "k1", spans=("0-12",), best=0.78, **IMAGENET)
    table = table_of(tmp_path)
    assert only(table, n_blocks=3, selection=BEST).published == 0.83
    assert only(table, n_blocks=3, selection=BEST).published_std == 0.001
    assert only(table, n_blocks=3, selection=BEST).published_in == PAPER
    assert only(table, n_blocks=3, selection=LAST).published is None, "they report the best epoch"
    assert only(table, n_blocks=1, selection=BEST).published is None
    assert "83.0 ± 0.1" in as_text(table)


@pytest.mark.parametrize(
    "changes",
    [
        {"spans": ("0-6", "6-10", "10-12")},
        {"settings": {**asdict(imagenet.SETTINGS), "n_epochs": 1}},
        {"task_identity": {"head": "f" * 64, "classes": 10}},
        {"n_evaluation": 500},
        {"teacher_name": "digits_vit"},
    ],
)
def test_published_numbers_do_not_stand_beside_anything_else(tmp_path: Path, changes: dict[str, Any]) -> None:
    plant_probe(tmp_path / "a", **{"spans": K3, **IMAGENET, **changes})
    assert {row.published for row in table_of(tmp_path).rows} == {None}


def test_what_is_not_quite_as_published_is_remarked(tmp_path: Path) -> None:
    plant_probe(tmp_path / "head", spans=K3, **{**IMAGENET, "task_identity": {"head": "random", "classes": 1000}})
    plant_probe(tmp_path / "depth", spans=K3, **NYUV2)
    text = as_text(table_of(tmp_path))
    for part in ("theirs began with Meta's head", "theirs with the defects", "k=2 0.605, k=3 0.567", "0.618 ± 0.006"):
        assert part in text, part
    plant_probe(tmp_path / "compat/depth", spans=K3, compat=True, **NYUV2)
    assert "with the defects of the published code, ours" not in as_text(table_of(tmp_path / "compat"))


def test_published_accuracy_of_a_raptor_with_the_teachers_head(tmp_path: Path) -> None:
    for name, n_samples in (("whole", 50_000), ("part", 2048)):
        about = {"teacher_name": VIT_B, "last_layer": 12, "n_samples": n_samples}
        plant_run(tmp_path / name, "0-7,7-10,10-12", **about)
    row = only(table_of(tmp_path / "whole"), what="raptor", task=HEAD)
    assert (row.published, row.published_in) == (0.824, ABLATION)
    assert only(table_of(tmp_path / "whole"), what="teacher", task=HEAD).published == 0.846
    assert {row.published for row in table_of(tmp_path / "part").rows} == {None}


# ---------------------------------------------------------------- text, Markdown, CSV


def test_text_and_markdown_have_the_same_cells(tmp_path: Path) -> None:
    for seed in (0, 1):
        run = plant_run(tmp_path / f"{seed}", seed=seed, accuracy=0.9 + 0.02 * seed)
        plant_probe(tmp_path / f"p{seed}", run=run, model_seed=seed, last=0.8 + 0.1 * seed)
    plant_probe(tmp_path / "t", spans=(), last=1.0)
    table = table_of(tmp_path)
    text, markdown = as_text(table), as_markdown(table)
    for cell in ("85.00 ± 7.07", "85.0 %", "91.00 ± 1.41", "0.9600 ± 0.0000", "best epoch*", "not chosen"):
        assert cell in text, cell
        assert cell.replace("*", "\\*") in markdown, cell
    widths = {len(line.split("|")) for line in markdown.splitlines() if line.startswith("| k=2")}
    heads = {len(line.split("|")) for line in markdown.splitlines() if line.startswith("| variant")}
    assert widths == heads


def test_names_cannot_break_a_table_of_markdown(tmp_path: Path) -> None:
    plant_probe(tmp_path / "p", label="a|b")
    assert "| a\\|b | 1 |" in as_markdown(table_of(tmp_path))


def test_notes_speak_of_what_was_validated(tmp_path: Path) -> None:
    """Imported weights without a store come first by place, and know of no store."""
    plant_run(tmp_path / "a", imported=True, validated=False, data={"train": "unknown", "teacher": "c" * 64})
    plant_run(tmp_path / "b")
    assert table_of(tmp_path).notes == [
        f"Roll-out of 1 run against fake_vit, trained on store {'a' * 12}, on 18 samples."
    ]


def test_spread_is_mean_and_deviation_in_the_units_of_the_quantity() -> None:
    assert spread(0.83, 0.001, "top-1") == "83.00 ± 0.10"
    assert spread(0.618, 0.006, "RMSE (m)") == "0.6180 ± 0.0060"
    assert spread(0.618, None, "RMSE (m)") == "0.6180"
    assert spread(12.345, 0.12345, EPSILON) == "12.35 ± 0.12"


finite = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=8)
rows = st.builds(
    Row,
    variant=text,
    what=text,
    n_blocks=st.integers(0, 9),
    spans=text,
    task=text,
    quantity=text,
    higher_is_better=st.booleans(),
    tokens=text,
    layer=st.none() | st.integers(0, 99),
    selection=text,
    n=st.integers(1, 9),
    n_measured=st.integers(1, 9),
    mean=finite,
    std=st.none() | finite,
    seeds=text,
    of_teacher=st.none() | finite,
    published=st.none() | finite,
    published_std=st.none() | finite,
    published_in=text,
)


@settings(max_examples=examples.of(40))
@given(st.lists(rows, max_size=3))
def test_csv_reads_back_as_it_was_written(written: list[Row]) -> None:
    assert read_csv(write_csv(written)) == written


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text.replace("variant", "name", 1), "its columns are name"),
        (lambda text: text + "a,b\n", "line 3"),
        (lambda text: text.replace(",True,", ",perhaps,"), "line 2"),
    ],
)
def test_other_csv_is_refused(tmp_path: Path, change, says: str) -> None:
    plant_run(tmp_path / "a")
    with pytest.raises(UserError, match=says):
        read_csv(change(write_csv(table_of(tmp_path).rows[:1])))


def test_columns_are_the_fields() -> None:
    assert tuple(field.name for field in dataclasses.fields(Row)) == COLUMNS


# ---------------------------------------------------------------- the door


def test_door_prints_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accuracies = (0.91, 0.93, 0.92)
    for seed, accuracy in enumerate(accuracies):
        run = plant_run(tmp_path / f"runs/{seed}", seed=seed, accuracy=accuracy)
        plant_probe(tmp_path / f"probes/{seed}", run=run, model_seed=seed)
    for unfinished in ("begun", "begun/teacher", "0/teacher"):
        open_objects(tmp_path / "runs" / unfinished).put("config.json", b"{}")
    arguments = ["table", "--runs", f"{tmp_path}/runs", "--probes", f"{tmp_path}/probes", "--out", f"{tmp_path}/out"]
    assert run_door(lambda: main(arguments)) == ExitCode.OK
    printed = capsys.readouterr()
    mean, std = statistics.mean(accuracies), statistics.stdev(accuracies)
    assert f"{100 * mean:.2f} ± {100 * std:.2f}" in printed.out
    assert f"left out: {tmp_path}/runs/begun\n" in printed.err
    saved = {path.name for path in (tmp_path / "out").iterdir()}
    assert saved == {
        *("table.md", "table.csv", "accuracy_and_r2.png"),
        *("r2_by_layer.png", "epsilon_by_layer.png", "training.png"),
    }
    written = read_csv((tmp_path / "out/table.csv").read_text())
    assert math.isclose(only(Table(rows=written, notes=()), task=HEAD, what="raptor").mean, mean)


def test_door_lists_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for arguments, says in {
        ("--runs", f"{tmp_path}/none", "--probes", "", "--out", f"{tmp_path}/out"): "no finished run and no probe",
        ("--runs", "", "--probes", " , "): "RUNS and PROBES are empty",
        ("--runs", "s3://", "--out", f"{tmp_path}/out"): "no whole address",
        ("--out", f"{tmp_path}/file/x"): "OUT=",
    }.items():
        assert run_door(lambda typed=arguments: main(["table", *typed])) != ExitCode.OK
        assert says in capsys.readouterr().err
    assert not (tmp_path / "out/table.md").exists()


@pytest.mark.s3
def test_table_from_s3_to_s3(s3_location: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = plant_run(f"{s3_location}/runs/a")
    plant_probe(f"{s3_location}/probes/a", run=run)
    places = [f"--{name}={s3_location}/{name}" for name in ("runs", "probes", "out")]
    assert run_door(lambda: main(["table", *places])) == ExitCode.OK, capsys.readouterr().err
    saved = open_objects(f"{s3_location}/out")
    assert read_csv(saved.get("table.csv").decode())
    assert saved.get("training.png").startswith(b"\x89PNG")
    assert json.loads(open_objects(run).get("result.json"))["last_layer"] == 4
