"""What `python -m storage_schemas` prints, and its exit codes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from infra.console import ExitCode
from infra.objects import FolderObjects, MemoryObjects
from storage_schemas import open_store
from storage_schemas.__main__ import main
from storage_schemas.create import create_store
from storage_schemas.digest import content_digest
from storage_schemas.errors import SchemaError
from storage_schemas.from_arrays import write_store
from storage_schemas.inspect import (
    accuracy_line,
    describe_store,
    next_command,
    stored_nbytes,
    table,
    teacher_accuracy,
    token_norms,
)
from storage_schemas.keys import INDEX_KEY, commit_key
from tests.stores import make_samples, make_spec, write_planted

REPOSITORY = Path(__file__).parents[2]
BAD = {5: "truncated", 20: "empty"}


def head_file(weight: np.ndarray, bias: np.ndarray) -> dict[str, bytes]:
    return {"head.safetensors": save({"weight": weight.astype(np.float32), "bias": bias.astype(np.float32)})}


def write_with_head(objects, n_wrong: int, teacher_files: dict[str, bytes]) -> None:
    """Head inputs are one-hot in the label (labels are 0, 1, 2 in turn), except in the first n_wrong rows."""
    spec = make_spec()

    def head_inputs(rows: range) -> np.ndarray:
        made = np.zeros((len(rows), 16), np.float32)
        for i, row in enumerate(rows):
            made[i, (row + (row < n_wrong)) % 3] = 1
        return made

    def ones(rows: range) -> np.ndarray:
        return np.ones((len(rows), 3, 9, 8), np.float32)

    write_store(
        objects,
        spec,
        make_samples(21),
        ones,
        head_inputs_of=head_inputs,
        bad_images=BAD,
        teacher_files=teacher_files,
    )


IDENTITY_HEAD = head_file(np.eye(3, 16), np.zeros(3))


def test_accuracy_is_that_of_the_head_on_valid_samples():
    objects = MemoryObjects()
    write_with_head(objects, 7, IDENTITY_HEAD)  # rows 0 to 6 are wrong, row 5 is bad: 6 of 19 valid ones are wrong
    store = open_store(objects)
    assert teacher_accuracy(store) == pytest.approx(13 / 19)
    assert "the teacher's head gets 68.42% of these images right" in describe_store(store)


def test_a_bias_counts():
    objects = MemoryObjects()
    write_with_head(objects, 0, head_file(np.eye(3, 16), np.array([0, 0, 5.0])))
    labels = [i % 3 for i in range(21) if i not in BAD]
    assert teacher_accuracy(open_store(objects)) == pytest.approx(labels.count(2) / 19)


def test_a_head_of_other_classes_is_doubted():
    few, many = MemoryObjects(), MemoryObjects()
    write_with_head(few, 0, head_file(np.eye(2, 16), np.zeros(2)))
    assert accuracy_line(open_store(few)) == (
        "the teacher's head knows 2 classes, but labels go to 2: it is of other classes"
    )
    write_with_head(many, 0, head_file(np.eye(10, 16), np.zeros(10)))
    assert accuracy_line(open_store(many)) == (
        "the teacher's head gets 100.00% of these images right "
        "(it knows 10 classes, here are 3: are they numbered alike?)"
    )


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (head_file(np.eye(3, 8), np.zeros(3)), r"maps \(3, 8\), expected \(classes, 16\)"),
        ({"head.safetensors": b"x"}, "is not a linear head"),
        ({"head.safetensors": save({"weight": np.eye(3, dtype=np.float32)})}, "is not a linear head"),
    ],
)
def test_a_head_that_does_not_fit_is_said(files, message):
    objects = MemoryObjects()
    write_with_head(objects, 0, files)
    with pytest.raises(SchemaError, match=message):
        teacher_accuracy(open_store(objects))
    assert "teacher      cannot be shown:" in describe_store(open_store(objects))


def test_without_a_head_there_is_no_accuracy():
    objects = MemoryObjects()
    write_planted(objects, make_spec())
    assert teacher_accuracy(open_store(objects)) is None
    assert "head gets" not in describe_store(open_store(objects))


def test_norms_in_closed_form():
    """Every channel 1 in all tokens: norm sqrt(8); channels +3 and -3 by turns: 3 sqrt(8), though their mean is 0."""
    objects, spec = MemoryObjects(), make_spec(n_samples=4)

    def states(rows: range) -> np.ndarray:
        made = np.ones((4, 3, 9, 8), np.float32)
        made[:, 1] = 3 * (-1.0) ** np.arange(4)[:, None, None]
        return made

    write_store(objects, spec, make_samples(4), states)
    norms = token_norms(open_store(objects))
    np.testing.assert_allclose(norms[0], np.sqrt(8), rtol=1e-12)
    np.testing.assert_allclose(norms[1], 3 * np.sqrt(8), rtol=1e-12)


def test_bytes_by_kind_are_those_of_the_objects():
    objects = MemoryObjects()
    write_planted(objects, make_spec(codec="zstd-3", shuffle="byte"))
    store = open_store(objects)
    # 6 chunks of 4 samples, in 3 layers, but for head_input
    expected = {
        "cls": 6 * 3 * 4 * 8 * 4,
        "registers": 6 * 3 * 4 * 2 * 8 * 4,
        "patches": 6 * 3 * 4 * 6 * 8 * 2,
        "patch_mean": 6 * 3 * 4 * 8 * 4,
        "head_input": 6 * 4 * 16 * 4,
    }
    assert {kind: stored_nbytes(store, kind)[0] for kind in expected} == expected
    total = sum(stored_nbytes(store, kind)[1] for kind in expected)
    payloads = [nbytes for array in store.table.chunks.values() for nbytes in array[:, 1].tolist()]
    behind = sum(4 + (-(nbytes + 4)) % 64 for nbytes in payloads)  # each one's CRC32C and zeros
    overhead = behind + 13 * 3 * 36 + 3 * (3 * 4 * 5 * 8 * 8 + 4)  # and sharding indexes, statistics
    assert total + overhead == store.table.stored_nbytes


def test_the_whole_text_of_a_small_store():
    objects = MemoryObjects("memory://digits")
    write_with_head(objects, 0, IDENTITY_HEAD)
    text = describe_store(open_store(objects))
    for line in [
        "memory://digits",
        "  teacher      fake, weights 0000000000000000, computed in float32",
        "  samples      21 planned, 21 committed (3 of 3 shards), 19 valid",
        "  layers       0 to 2; 9 tokens of 8 channels: CLS + 2 registers + 2 x 3 patches",
        "  stored as    zarr, patches in float16, codec none, 8 samples a shard, 4 a chunk",
        "  bad images   2; their rows are invalid",
        "               class2/0005.png: truncated",
        "               class2/0020.png: empty",
        "  kind        shape of one sample    dtype  arrays  stored  ratio",
        "  patches                   6 x 8  float16       3  6.9 kB   1.00",
        "  layer    cls  registers  patches  patch_mean",
        "  0      2.828      2.828    2.828       2.828",
        "  stored in float16 against float32, over all shards; the other arrays are exact",
        "  layer_00/patches      0.00e+00  1.00000000              0",
        "  worst: patches of layer 0, relative MSE 0.00e+00",
        "  the teacher's head gets 100.00% of these images right",
    ]:
        assert line in text.splitlines(), f"{line!r} is not in\n{text}"


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "int8"])
def test_errors_are_pooled_over_shards_by_their_squares(precision):
    """Shards a thousand times apart in size: the large one says nearly all, where a mean of ratios would say half."""
    spec, objects = make_spec(precision=precision, n_samples=24), MemoryObjects()
    sizes = np.repeat([1.0, 1000.0, 30.0], 8)[:, None, None, None] * np.array([1.0, 2.0, 3.0])[:, None, None]
    states = (np.random.default_rng(0).standard_normal((24, 3, 9, 8)) * sizes).astype(np.float32)
    states[8:16, 1, 3:, 0] += 5e4 * (precision != "float16")  # one channel away from the others: int8 does not mind
    write_store(objects, spec, make_samples(24), lambda rows: states[rows.start : rows.stop], bad_images={3: "empty"})
    store, valid = open_store(objects), np.arange(24) != 3
    truth = states[valid][:, :, 3:].astype(np.float64)
    error = store.read(tokens="patches").astype(np.float64) - truth
    assert list(store.fidelity) == [f"layer_0{i}/patches" for i in range(3)]
    for i, found in enumerate(store.fidelity.values()):
        squared = (error[:, i] ** 2).sum()
        assert found.relative_mse == pytest.approx(squared / (truth[:, i] ** 2).sum(), rel=1e-9)
        deviations = ((truth[:, i] - truth[:, i].mean(axis=(0, 1))) ** 2).sum()
        assert 1 - found.r2 == pytest.approx(squared / deviations, rel=1e-6)
        assert found.worst == np.abs(error[:, i]).max()
        shards = store.table.shard_fidelity[f"layer_0{i}/patches"]
        assert shards.shape == (3, 3)
        assert store.table.fidelity[f"layer_0{i}/patches"].relative_mse == shards[:, 0].max()
    worst = max(range(3), key=lambda i: list(store.fidelity.values())[i].relative_mse)
    assert f"  worst: patches of layer {worst}, relative MSE " in describe_store(store)
    assert f"patches in {precision}" in describe_store(store)


def test_exact_stores_have_no_error_to_show():
    objects = MemoryObjects()
    write_planted(objects, make_spec(precision="float32"))
    assert open_store(objects).fidelity == {}
    assert "against float32" not in describe_store(open_store(objects))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"backend": "webdataset", "codec": "gzip"}, "stored as    webdataset, patches in float16, codec gzip, 8"),
        ({"codec": "lz4", "shuffle": "bit"}, "stored as    zarr, patches in float16, codec lz4 with bit shuffle, 8"),
        ({"precision": "int8"}, "  patches_scale                  8  float32       3"),
        ({"precision": "bfloat16"}, "  patches                    6 x 8  bfloat16       3"),
    ],
)
def test_every_form_is_shown(changes, line):
    objects = MemoryObjects()
    write_planted(objects, make_spec(**changes))
    shown = " ".join(describe_store(open_store(objects)).split())
    assert " ".join(line.split()) in shown


def test_tables_are_aligned():
    assert table([["a", "bb"], ["ccc", "d"]]) == ["a    bb", "ccc   d"]


class TestNextCommand:
    def stores(self, change=lambda objects: None, **spec):
        objects = MemoryObjects()
        write_planted(objects, make_spec(**spec))
        change(objects)
        return [open_store(objects)]

    def test_finished(self):
        assert next_command(self.stores(), "s") == "Next: make train BLOCK=0-2 STORE=s"
        assert next_command(self.stores(layers=tuple(range(3, 13))), "s") == "Next: make train BLOCK=3-10 STORE=s"
        assert next_command(self.stores(layers=(0, 3, 4, 12)), "s") == "Next: make train BLOCK=3-4 STORE=s"
        assert next_command(self.stores(layers=(0, 2)), "s") == "Next: make verify STORE=s"
        assert next_command(self.stores(layers=(3,)), "s") == "Next: make verify STORE=s"

    def test_unfinished(self):
        def cut(objects):
            objects.delete(commit_key(1))
            objects.delete(INDEX_KEY)

        assert next_command(self.stores(cut), "s") == "Next: the same make extract again, to finish it"

    def test_damaged(self):
        stores = self.stores(lambda objects: objects.delete(commit_key(1)))
        assert next_command(stores, "s") == "Next: make verify STORE=s IMAGES=<as extracted> REPAIR=1"


class TestDoor:
    @pytest.fixture
    def root(self, tmp_path):
        write_planted(FolderObjects(tmp_path / "digits/train"), make_spec(), BAD)
        write_planted(FolderObjects(tmp_path / "digits/val"), make_spec(n_samples=4))
        return tmp_path / "digits"

    def test_inspect_shows_both_splits(self, root, capsys):
        assert main(["inspect", str(root)]) == ExitCode.OK
        out = capsys.readouterr().out
        assert out.index(f"{root}/train") < out.index(f"{root}/val") < out.index("Next: make train BLOCK=0-2")
        assert main(["inspect", str(root / "val")]) == ExitCode.OK
        assert "4 planned, 4 committed" in capsys.readouterr().out

    def test_digest(self, root, capsys):
        assert main(["digest", str(root)]) == ExitCode.OK
        digests = [content_digest(FolderObjects(root / split)) for split in ("train", "val")]
        expected = [f"{digest}  {root}/{split}" for digest, split in zip(digests, ("train", "val"))]
        assert capsys.readouterr().out.splitlines() == expected

    @pytest.mark.parametrize("command", ["inspect", "digest"])
    def test_wrong_input_is_one_message(self, tmp_path, command, capsys):
        for place, message in [
            (tmp_path, "is not a store: neither it nor"),
            (tmp_path / "nowhere", "or make one: make extract"),
            ("gs://bucket", "give a local path without '://', or s3://bucket/prefix"),
        ]:
            assert main([command, str(place)]) == ExitCode.BAD_INPUT
            error = capsys.readouterr().err
            assert error.startswith("error: ")
            assert message in error
            assert error.count("\n") == 1

    def test_a_damaged_identity_is_one_message(self, root, capsys):
        (root / "val/store.json").write_bytes(b"{}")
        assert main(["inspect", str(root)]) == ExitCode.BAD_INPUT
        assert "val/store.json:\n  expected a JSON object with a 'digest'" in capsys.readouterr().err

    def test_a_damaged_store_is_shown_as_far_as_it_goes(self, root, capsys):
        (root / "val" / commit_key(0)).unlink()
        assert main(["inspect", str(root)]) == ExitCode.PROBLEMS
        out = capsys.readouterr().out
        assert "damaged      commits/000000.json: it is missing" in out
        assert "REPAIR=1" in out.splitlines()[-1]

    def test_damaged_statistics_do_not_hide_the_rest(self, root, capsys):
        (root / "val/statistics/c/0/0/0/0/0").unlink()
        assert main(["inspect", str(root / "val")]) == ExitCode.OK
        out = capsys.readouterr().out
        assert "norms        cannot be shown:" in out
        assert "0 to 2; 9 tokens" in out

    def test_an_empty_store_can_be_inspected(self, tmp_path, capsys):
        create_store(FolderObjects(tmp_path), make_spec(), make_samples(21), {})
        assert main(["inspect", str(tmp_path)]) == ExitCode.OK
        out = capsys.readouterr().out
        assert "0 committed (0 of 3 shards), 0 valid" in out
        assert "Next: the same make extract again" in out

    def test_as_a_process(self, root):
        """The way the Makefile calls it."""
        done = subprocess.run(
            [sys.executable, "-m", "storage_schemas", "inspect", root],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            check=False,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert "19 valid" in done.stdout
