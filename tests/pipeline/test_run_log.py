"""Who holds a store, and what a run leaves under log/."""

import json

import pytest

from infra.console import UserError
from infra.objects import MemoryObjects
from infra.status import Heartbeat, my_heartbeat
from pipeline.presence import Presence, read_heartbeat
from pipeline.run_log import at_work
from storage_schemas.keys import HEARTBEAT_KEY


def silent(message: str) -> None:
    raise AssertionError(f"nobody should have to wait: {message}")


def status_of(objects: MemoryObjects) -> dict:
    (key,) = [info.key for info in objects.list("log/") if info.key.endswith("status.json")]
    return json.loads(objects.get(key))


def test_a_claim_is_shown_and_ends_with_the_body() -> None:
    objects = MemoryObjects()
    with at_work(objects, silent) as working:
        found = read_heartbeat(objects)
        assert found is not None
        assert found.run_id == working.log.run_id
        working.log.status(state="complete", images_done=7)
    assert read_heartbeat(objects) is None
    status = status_of(objects)
    assert (status["state"], status["images_done"], status["run_id"]) == ("complete", 7, working.log.run_id)


def test_a_claim_ends_with_an_error_too_and_the_cause_is_kept() -> None:
    objects = MemoryObjects()

    def fail() -> None:
        with at_work(objects, silent):
            raise RuntimeError("the lamp went out")

    with pytest.raises(RuntimeError):
        fail()
    assert read_heartbeat(objects) is None
    assert (status_of(objects)["state"], status_of(objects)["cause"]) == ("stopped", "the lamp went out")
    with at_work(objects, silent):
        pass


def test_a_living_claim_is_respected_and_left_alone() -> None:
    objects = MemoryObjects()
    with at_work(objects, silent) as working:
        with (
            pytest.raises(UserError, match=rf"written by another job \(run {working.log.run_id}, process \d+ on "),
            at_work(objects, silent),
        ):
            pass
        found = read_heartbeat(objects)
        assert found is not None
        assert found.run_id == working.log.run_id


class Crowded(MemoryObjects):
    """Somebody else claims the store right after each heartbeat of ours."""

    theirs = b""

    def put_new(self, key, data):  # type: ignore[no-untyped-def]
        was_new = super().put_new(key, data)
        if key == HEARTBEAT_KEY and self.theirs:
            super().put(key, self.theirs)
        return was_new


def test_of_two_that_begin_at_one_moment_the_later_has_it() -> None:
    objects = Crowded()
    objects.theirs = my_heartbeat("theirs", 0.0).to_bytes()
    with pytest.raises(UserError, match="by another job"), at_work(objects, silent):
        pass
    assert read_heartbeat(objects) == Heartbeat.from_bytes(objects.theirs)
    assert [info.key for info in objects.list()] == [HEARTBEAT_KEY]


def test_a_run_that_was_given_up_for_dead_notices_when_it_wakes() -> None:
    objects = MemoryObjects()
    presence = Presence(objects, "ours")
    presence.enter(silent)
    presence.renew()
    objects.put(HEARTBEAT_KEY, my_heartbeat("theirs", 0.0).to_bytes())
    with pytest.raises(UserError, match=r"another job \(run theirs, .*Run the same command again, with JOIN=1"):
        presence.renew()
    presence.release()
    found = read_heartbeat(objects)
    assert found is not None
    assert found.run_id == "theirs"


def test_a_heartbeat_that_is_none_stops_nobody() -> None:
    objects = MemoryObjects()
    objects.put(HEARTBEAT_KEY, b'{"torn')
    with at_work(objects, silent):
        pass
    assert read_heartbeat(objects) is None
