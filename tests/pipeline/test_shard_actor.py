"""The worker process of Ray, without Ray: what it does with a runner that it has no use for any more."""

from pipeline.workers_ray import ShardActor


class Closable:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name
        log.append(f"{name} is made")

    def run(self, shard: int) -> int:
        return shard

    def close(self) -> None:
        self.log.append(f"{self.name} is closed")


def test_the_former_runner_is_closed_before_the_next_is_made():
    log: list[str] = []
    actor = ShardActor("worker")
    for name in ("train", "val"):
        assert not actor.setup(lambda name=name: Closable(log, name)).cause
    assert log == ["train is made", "train is closed", "val is made"]
    assert actor.run(3).report == 3
