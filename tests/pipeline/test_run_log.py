"""Who holds a store, and what a run leaves under log/."""

import json

import pytest

from infra.console import UserError
from infra.objects import MemoryObjects
from infra.status import Heartbeat, my_heartbeat
from pipeline.run_log import HEARTBEAT_KEY, RunLog, claimed, read_heartbeat


def silent(message: str) -> None:
    raise AssertionError(f"nobody should have to wait: {message}")


def status_of(objects: MemoryObjects) -> dict:
    (key,) = [info.key for info in objects.list("log/") if info.key.endswith("status.json")]
    return json.loads(objects.get(key))


def test_a_claim_is_shown_and_ends_with_the_body() -> None:
    objects = MemoryObjects()
    with claimed(objects, silent) as (log, _):
        found = read_heartbeat(objects)
        assert found is not None
        assert found.run_id == log.run_id
        log.status(state="complete", images_done=7)
    assert read_heartbeat(objects) is None
    status = status_of(objects)
    assert (status["state"], status["images_done"], status["run_id"]) == ("complete", 7, log.run_id)


def test_a_claim_ends_with_an_error_too_and_the_cause_is_kept() -> None:
    objects = MemoryObjects()

    def fail() -> None:
        with claimed(objects, silent):
            raise RuntimeError("the lamp went out")

    with pytest.raises(RuntimeError):
        fail()
    assert read_heartbeat(objects) is None
    assert (status_of(objects)["state"], status_of(objects)["cause"]) == ("stopped", "the lamp went out")
    with claimed(objects, silent):
        pass


def test_a_living_claim_is_respected_and_left_alone() -> None:
    objects = MemoryObjects()
    with claimed(objects, silent) as (log, _):
        with (
            pytest.raises(UserError, match=rf"written by another job \(run {log.run_id}, process \d+ on "),
            claimed(objects, silent),
        ):
            pass
        found = read_heartbeat(objects)
        assert found is not None
        assert found.run_id == log.run_id


class Crowded(MemoryObjects):
    """Somebody else claims the store right after each heartbeat of ours."""

    theirs = b""

    def put(self, key, data):  # type: ignore[no-untyped-def]
        super().put(key, data)
        if key == HEARTBEAT_KEY and self.theirs:
            super().put(key, self.theirs)


def test_of_two_that_begin_at_one_moment_the_later_has_it() -> None:
    objects = Crowded()
    objects.theirs = my_heartbeat("theirs", 0.0).to_bytes()
    with pytest.raises(UserError, match="by another job"), claimed(objects, silent):
        pass
    assert read_heartbeat(objects) == Heartbeat.from_bytes(objects.theirs)
    assert [info.key for info in objects.list()] == [HEARTBEAT_KEY]


def test_a_run_that_was_given_up_for_dead_notices_when_it_wakes() -> None:
    objects = MemoryObjects()
    log = RunLog(objects, "ours")
    log.claim()
    log.write()
    objects.put(HEARTBEAT_KEY, my_heartbeat("theirs", 0.0).to_bytes())
    with pytest.raises(UserError, match="by another job"):
        log.write()
    log.release()
    found = read_heartbeat(objects)
    assert found is not None
    assert found.run_id == "theirs"


def test_a_heartbeat_that_is_none_stops_nobody() -> None:
    objects = MemoryObjects()
    objects.put(HEARTBEAT_KEY, b'{"torn')
    with claimed(objects, silent):
        pass
    assert read_heartbeat(objects) is None
