"""Reading while an extraction ends: its last commit, then its index, appear between any two steps of a reader."""

from collections.abc import Iterator

import pytest

from infra.objects import MemoryObjects, ObjectInfo
from storage_schemas import open_store
from storage_schemas.keys import INDEX_KEY, commit_key
from storage_schemas.verify import verify_store
from tests.stores import make_spec, write_planted

LAST = commit_key(2)


class EndingObjects(MemoryObjects):
    """A store whose last commit appears before the `commit_step`-th listing or get, its index before the next one."""

    def __init__(self, whole: MemoryObjects, commit_step: int, index_step: int) -> None:
        super().__init__()
        self.step = 0
        self.late = {LAST: (commit_step, whole.get(LAST)), INDEX_KEY: (index_step, whole.get(INDEX_KEY))}
        for info in whole.list():
            if info.key not in self.late:
                self.put(info.key, whole.get(info.key))

    def take_step(self) -> None:
        self.step += 1
        for key, (step, data) in self.late.items():
            if self.step == step:
                self.put(key, data)

    def get(self, key: str, **options) -> bytes:
        self.take_step()
        return super().get(key, **options)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        self.take_step()
        return super().list(prefix)


@pytest.fixture(scope="module")
def whole() -> MemoryObjects:
    made = MemoryObjects()
    write_planted(made, make_spec(layers=(0,)))
    return made


def steps(whole: MemoryObjects, act) -> int:
    objects = EndingObjects(whole, 1, 1)
    act(objects)
    return objects.step


def moments(n_steps: int) -> list[tuple[int, int]]:
    """Steps of the commit and of the index: at once, one later, or as late as may be."""
    return sorted({(i, min(j, n_steps)) for i in range(1, n_steps + 1) for j in (i, i + 1, n_steps)})


def test_a_reader_never_takes_it_for_damage(whole):
    n_steps = steps(whole, open_store)
    assert n_steps >= 4
    seen = set()
    for moment in moments(n_steps + 2):
        store = open_store(EndingObjects(whole, *moment))
        assert store.damaged_commits == {}, moment
        assert store.read([0]).shape[0] == store.n_committed
        seen.add(store.is_complete)
    assert seen == {True, False}


def test_verify_never_takes_it_for_damage(whole):
    """The index has to be there at the end of verify if all commits were at its beginning; it looks for it last."""
    n_steps = steps(whole, verify_store)
    for commit, index in moments(n_steps):
        assert [str(p) for p in verify_store(EndingObjects(whole, commit, index))] == [], (commit, index)


def test_a_commit_that_is_lost_is_still_reported(whole):
    objects = EndingObjects(whole, 1, 1)
    objects.take_step()
    objects.delete(LAST)
    assert list(open_store(objects).damaged_commits) == [LAST]
    assert [p.key for p in verify_store(objects)] == [LAST]
