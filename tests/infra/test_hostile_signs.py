"""Documents under log/ that harm: no heartbeat, no claim, no run, and never another error than ours."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infra.console import UserError
from infra.objects import MemoryObjects
from infra.status import MAX_SIGN_NBYTES, Heartbeat, find_living, kernel_id, my_heartbeat
from pipeline.claims import Claims, claim_key
from pipeline.presence import Presence, read_heartbeat
from storage_schemas.documents import seal, sha256, unseal
from storage_schemas.keys import HEARTBEAT_KEY
from tests.strategies import json_values
from trainer.run_files import CONFIG_KEY, METRICS_KEY, RESULT_KEY, Checkpoint, RunFiles

SOUND = {"host": "a", "kernel": "k", "pid": 5, "started": 1.5, "time": 2.5, "run_id": "r", "ready": True}


def with_text(name: str, text: str) -> bytes:
    """The heartbeat with JSON text in the place of one value."""
    return json.dumps({**SOUND, name: "@@"}).replace('"@@"', text).encode()


HOSTILE: dict[str, bytes] = {
    "deep": b"[" * 100_000,
    "deep and closed": b'{"pid":' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    "too large": json.dumps(SOUND).encode() + b" " * MAX_SIGN_NBYTES,
    "no utf-8": b'{"host": "\xff"}',
    "a list": b"[1]",
    "null": b"null",
    "empty": b"",
    "a huge integer": with_text("pid", "1" + "0" * 5000),
    "a process of no number": with_text("pid", "NaN"),
    "an infinite process": with_text("pid", "1e999"),
    "no process": with_text("pid", "0"),
    "a negative process": with_text("pid", "-1"),
    "a process too large": with_text("pid", "1" + "0" * 30),
    "a time too large": with_text("time", "1" + "0" * 400),
    "a time that is no number": with_text("time", "NaN"),
    "an infinite time": with_text("time", "-Infinity"),
    "an endless start": with_text("started", "1e999"),
    "a host that clears the screen": with_text("host", '"\\u001b[2J"'),
    "half a character": with_text("run_id", '"\\ud800"'),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_heartbeat_says_nothing(kind: str) -> None:
    objects = MemoryObjects()
    objects.put(HEARTBEAT_KEY, HOSTILE[kind])
    assert Heartbeat.from_bytes(HOSTILE[kind]) is None
    assert read_heartbeat(objects) is None
    presence = Presence(objects)
    presence.enter(lambda message: None)
    assert presence.leads


@pytest.mark.parametrize("data", [b"", b"null", b"[" * 100_000, b'{"run_id": 5}', b"\xff", b" " * 2**17, b"9" * 5000])
def test_what_is_no_claim_keeps_nobody_out(data: bytes) -> None:
    objects = MemoryObjects()
    objects.put(claim_key(0), data)
    claims = Claims(objects, "ours")
    assert claims.find(0) is None
    assert claims.take(0) == ("ours", True)


def test_the_sound_one_is_one() -> None:
    assert Heartbeat.from_bytes(json.dumps(SOUND).encode()) == Heartbeat(**SOUND)


@given(
    name=st.sampled_from(list(SOUND)), value=json_values | st.sampled_from([-1, 2**31, 2**63, 10**30, 1e300, -1e300])
)
def test_any_value_in_a_heartbeat_is_judged(name: str, value: Any) -> None:
    """And whoever is judged alive or dead by it, it is judged without an error."""
    found = Heartbeat.from_bytes(json.dumps({**SOUND, "kernel": kernel_id(), name: value}).encode())
    if found is None:
        return
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    living = find_living(lambda: found, say=lambda message: None, clock=lambda: now[0], sleep=sleep)
    assert living is None, "no process began when this one says"
    assert now[0] <= 62
    assert Heartbeat.from_bytes(found.to_bytes()) == found


def test_a_real_heartbeat_passes() -> None:
    mine = my_heartbeat("20261120T000000-1-abc", 1.0)
    assert Heartbeat.from_bytes(mine.to_bytes()) == mine


class TestRuns:
    """A RUN in a shared place: everyone can seal a document."""

    def run_of(self, objects: MemoryObjects, key: str, document: dict[str, Any]) -> RunFiles:
        objects.put(key, seal(document))
        return RunFiles(objects)

    @pytest.mark.parametrize("data", [HOSTILE["deep"], HOSTILE["a huge integer"], HOSTILE["no utf-8"], bytes(2**24)])
    def test_documents(self, data: bytes) -> None:
        objects = MemoryObjects()
        objects.put(CONFIG_KEY, data)
        objects.put(RESULT_KEY, data)
        for read in (RunFiles(objects).read_config, RunFiles(objects).read_result, RunFiles(objects).read_weights):
            with pytest.raises(UserError, match="RUN="):
                read()

    @pytest.mark.parametrize("document", [{}, {"run": None}, {"run": []}, {"weights_sha256": 5}])
    def test_sealed_documents_of_others(self, document: dict[str, Any]) -> None:
        with pytest.raises(UserError, match="is not ours"):
            self.run_of(MemoryObjects(), CONFIG_KEY, document).claim({"a": 1})
        with pytest.raises(UserError, match="is not ours"):
            self.run_of(MemoryObjects(), RESULT_KEY, document).read_weights()

    @pytest.mark.parametrize(
        "changes",
        [
            {"step": 10**30},
            {"step": "8"},
            {"state": []},
            {"format_version": 2},
            {"sha256": []},
            {"sha256": {}},
            {"sha256": {"model": 5}},
            {"sha256": {"../../secret": "0" * 64}},
            {"sha256": {"/etc/passwd": "0" * 64}},
            {"sha256": {"model": "0" * 64}},
        ],
        ids=str,
    )
    def test_a_forged_checkpoint_is_passed_over(self, changes: dict[str, Any]) -> None:
        objects, said = MemoryObjects(), []
        run = RunFiles(objects)
        for step in (7, 8):
            run.save_checkpoint(Checkpoint(step=step, tensors={"model": {"w": torch.ones(2)}}, state={"place": step}))
        key = "checkpoints/000000008.json"
        objects.put(key, seal({**unseal(key, objects.get(key)), **changes}))
        found = run.newest_checkpoint(said.append)
        assert found is not None
        assert found.step == 7
        assert len(said) == 1
        assert "the checkpoint of step 8 is damaged" in said[0]

    def test_tensors_that_lie(self) -> None:
        objects, said = MemoryObjects(), []
        run = RunFiles(objects)
        run.save_checkpoint(Checkpoint(step=7, tensors={"model": {"w": torch.ones(2)}}, state={}))
        header = json.dumps({"w": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}).encode()
        for data in (len(header).to_bytes(8, "little") + header, (10**13).to_bytes(8, "little"), b""):
            objects.put("checkpoints/000000007/model.safetensors", data)
            key = "checkpoints/000000007.json"
            objects.put(key, seal({**unseal(key, objects.get(key)), "sha256": {"model": sha256(data)}}))
            with pytest.raises(UserError, match="all 1 checkpoints are damaged"):
                run.newest_checkpoint(said.append)

    def test_metrics_that_could_not_be_written_again(self) -> None:
        objects, said = MemoryObjects(), []
        lines = [
            b'{"step": 1}',
            b'{"step": 2, "loss": NaN}',
            b"[" * 10_000,
            b'{"step": 1' + b"0" * 5000 + b"}",
            b"\xff",
        ]
        objects.put(METRICS_KEY, b"\n".join([*lines, b'{"step": 3}']))
        run = RunFiles(objects)
        found = run.read_metrics(said.append)
        assert found == [{"step": 1}, {"step": 3}]
        assert "4 of 6 lines are damaged and left out" in said[0]
        run.write_metrics(found)
