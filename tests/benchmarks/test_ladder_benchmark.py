"""The ladder runs from end to end at tiny size, goes on where it was, and says the truth about what it found."""

from pathlib import Path

import pytest

from benchmarks import ladder, ladder_runs
from benchmarks.ladder_runs import Found, Stage1
from storage_schemas import Span, StoreSpec
from storage_schemas.reader import open_store
from trainer.config import TokenWeights
from trainer.recipes import digits_stage1, digits_stage2
from trainer.trained import read_trained
from trainer.validation import Validation


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ladder")


def test_the_whole_runs_once_and_a_second_start_trains_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ladder.run(ladder.QUICK, folder)
    parts = [row["part"] for row in first.rows]
    assert parts == ["k = 1"] * 3 + ["k = 2"] * 3 + ["ladder, k = 2"] * 6 + ["partitions, k = 2"] * 3
    by_name = {(row["part"], row["configuration"]): row for row in first.rows}
    shown = [by_name["k = 2", name] for name in ("stage 1 alone", "after stage 2", "the same, by a probe")]
    rungs = [{**by_name["ladder, k = 2", rung], "part": "", "configuration": ""} for rung in ladder.RUNGS[-3:]]
    assert rungs == [{**row, "part": "", "configuration": ""} for row in shown], "trained once for both"
    assert [row["R2 of all layers"] for row in shown[1:]] == [shown[1]["R2 of all layers"]] * 2, "one Raptor"
    cuts = {row["spans"] for row in first.rows if row["part"].startswith("partitions")}
    assert len(cuts - {"-"}) == len(cuts) - (1 if "-" in cuts else 0) == 2, "phases' own and another one"

    def again(*_: object, **__: object) -> None:
        raise AssertionError("trained before")

    monkeypatch.setattr(ladder_runs, "train", again)
    monkeypatch.setattr(ladder_runs, "train_probe", again)
    assert ladder.run(ladder.QUICK, folder).rows == first.rows


def test_stage_2_begins_with_the_blocks_of_stage_1(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = ladder_runs.Runs(folder, batch_size=4, limit=64)
    begun_with: list[dict] = []
    train = ladder_runs.train

    def watched(*arguments: object, initial: dict, **rest: object) -> object:
        begun_with.append(initial)
        return train(*arguments, initial=initial, **rest)

    monkeypatch.setattr(ladder_runs, "train", watched)
    spans = (Span(0, 6), Span(6, 12))
    runs.raptor(spans, 5, (1, 1))
    alone, second, joint = begun_with
    assert (alone, second) == (None, None)
    runs_of_blocks = [
        place for place in (folder / "runs").iterdir() if place.name.startswith(("0-6-seed5", "6-12-seed5"))
    ]
    for place in runs_of_blocks:
        index = int(place.name.startswith("6-12"))
        for name, value in read_trained(str(place)).raptor.blocks[0].state_dict().items():
            assert joint[f"blocks.{index}.{name}"].equal(value)
    assert len(runs_of_blocks) == 2


def test_rungs_change_what_they_say_and_nothing_else(folder: Path) -> None:
    spec: StoreSpec = open_store(str(folder / "store" / "train")).spec
    recipe = digits_stage1(Span(7, 12), spec, 12)
    assert recipe.loss == TokenWeights(cls=0.34, registers=0.33, patches=0.33)
    assert digits_stage1(Span(3, 7), spec, 12).loss == "mse"
    assert Stage1().applied(recipe) == recipe, "the last rung of stage 1 is the recipe"
    forced, rolled, deep = (ladder._STAGE1[rung].applied(recipe) for rung in ladder.RUNGS[:3])
    assert (forced.teacher_forcing_minimum, forced.depth_scaling, forced.loss) == (1.0, False, "mse")
    assert (rolled.teacher_forcing_minimum, rolled.depth_scaling, rolled.loss) == (0.0, False, "mse")
    assert (deep.teacher_forcing_minimum, deep.depth_scaling, deep.loss) == (0.0, True, "mse")
    joint = digits_stage2((Span(0, 7), Span(7, 12)), spec, 12)
    assert (joint.teacher_forcing_steps, joint.teacher_forcing_minimum) == (0, 0.0), "rolled out from the first step"
    assert joint.loss == TokenWeights(cls=0.45, registers=0.10, patches=0.45)


def found(accuracy: float, r2: float) -> Found:
    validation = Validation(
        n_samples=359,
        loss=1.0,
        accuracy=accuracy,
        r2={kind: [r2, r2] for kind in ("cls", "registers", "patches", "all")},
        reference_r2=[r2, r2],
        epsilon=[1.0, 2.0],
        layers=[1, 2],
    )
    return Found(spans=(Span(0, 2),), seed=0, validation=validation)


def test_goals_are_shares_gains_and_ranks() -> None:
    by_k = {
        (2, ladder.CLS): [found(0.5, 0.5)],
        (2, ladder.STAGE2): [found(0.97, 0.9), found(0.99, 0.9)],
        (2, ladder.PROBE): [found(0.9, 0.9)],
    }
    share, by_probe = ladder._block_goals(by_k, {ladder.STAGE2: 0.99, ladder.PROBE: 0.95})
    assert (share.found, by_probe.found) == pytest.approx((100 * 0.98 / 0.99, 100 * 0.9 / 0.95))
    assert (share.met, by_probe.met) == (True, False)
    gains = ladder._ladder_goals(
        dict(zip(ladder.RUNGS, [[found(value, 0.5)] for value in (0.2, 0.7, 0.6, 0.8, 0.9, 0.9)]))
    )
    assert [goal.met for goal in gains] == [True, False, True, True, True]
    assert gains[0].found == pytest.approx(50)
    cuts = {(Span(0, i), Span(i, 12)): [found(0.9, r2)] for i, r2 in ((4, 0.8), (5, 0.7), (6, 0.85))}
    [rank] = ladder._partition_goals({2: cuts})
    assert rank.found == pytest.approx(0.8 - 0.775)
    assert "1 of 2 are better" in rank.what
    assert rank.met


@pytest.mark.slow
def test_on_digits_roll_out_beats_teacher_forcing_and_stage_2_beats_both(tmp_path: Path) -> None:
    """Three blocks cut by phases, one seed: the order of the published ablation, and 98 % of the teacher at its end."""
    runs = ladder_runs.Runs(tmp_path, batch_size=16)
    spans = (Span(0, 3), Span(3, 7), Span(7, 12))
    forced, rolled = (runs.blocks(spans, 0, 200, ladder._STAGE1[rung]) for rung in ladder.RUNGS[:2])
    joint = runs.raptor(spans, 0, (200, 300))
    assert forced.accuracy + 0.03 < rolled.accuracy < joint.accuracy - 0.01
    assert forced.mean_r2 + 0.01 < rolled.mean_r2 < joint.mean_r2 - 0.01
    assert joint.accuracy >= 0.98 * runs.teacher_accuracy()
