"""What follows when workers cannot start: a node is left out, or starting is suspended; both only for a while.

Knows nothing of Ray: nodes are ids, and the dispatcher says what has happened on them.
"""

import time
from collections import Counter
from collections.abc import Callable, Set

from pipeline.dispatch import NodeLeftOut, OnEvent, StartsSuspended

NODE_TRIES = 2  # workers that may fail to start on one node, in a row, before it is left out
AGAIN_S = 300.0  # until a node that was left out, or starting itself, is tried again; twice as long each further time


class Boots:
    """Failures to start, by node.

    A node where they repeat while others have workers is to blame itself, and is left out. What is left is to blame
    the job for: after `tries` of them, with no success in between, no more workers are started.

    Args:
        tries: Workers that may fail to start, in a row, before starting is suspended. Those on nodes that are left out
            or dead do not count.
        on_event: Told when a node is left out and when starting is suspended.
        clock: Seconds, monotonic.
    """

    def __init__(self, *, tries: int, on_event: OnEvent, clock: Callable[[], float] = time.monotonic) -> None:
        self._tries, self._tell, self._clock = tries, on_event, clock
        self._failed: Counter[str] = Counter()  # by node, since a worker last started anywhere; "" is an unknown node
        self._in_a_row: Counter[str] = Counter()  # by node, since a worker last started there
        self._last: dict[str, tuple[str, str]] = {}  # by node: its host, and the last cause
        self._left_out_until: dict[str, float] = {}
        self._n_times_out: Counter[str] = Counter()
        self._suspended_at: float | None = None
        self._suspended_until = 0.0
        self._n_suspended = 0
        self._last_cause = self.last_trace = ""

    @property
    def n_failed(self) -> int:
        """Workers that could not start since one last did."""
        return sum(self._failed.values())

    @property
    def left_out(self) -> frozenset[str]:
        """Ids of nodes that are to get no worker now."""
        now = self._clock()
        return frozenset(node for node, until in self._left_out_until.items() if now < until)

    def exhausted(self) -> bool:
        """Whether so many have failed that no more should be started now."""
        if self._suspended_at is not None and self._clock() >= self._suspended_until:
            self._suspended_at = None
            self._failed.clear()
        if self.n_failed < self._tries:
            self._suspended_at = None
        return self.n_failed >= self._tries

    def failed(self, node: str, host: str, cause: str, trace: str = "") -> None:
        """A worker could not start on this node; both names are empty if it had no place yet."""
        self._last_cause, self.last_trace = cause, trace or cause
        if node not in self.left_out:  # else it was on its way there already
            self._failed[node] += 1
            self._in_a_row[node] += 1
            self._last[node] = host, cause

    def started(self, node: str) -> None:
        """A worker is ready on this node: starting is no problem of the job."""
        self._failed.clear()
        self._n_suspended = 0
        self._forget(node)

    def keep(self, living: Set[str]) -> None:
        """Forget nodes that have died: what failed there says nothing of others."""
        for node in {*self._in_a_row, *self._left_out_until} - living - {""}:
            self._failed.pop(node, None)
            self._forget(node)

    def judge(self, inhabited: Set[str]) -> None:
        """Leave out nodes where workers cannot start and others can, or may yet.

        Args:
            inhabited: Ids of nodes with a worker that is ready or loads.
        """
        for node in [node for node, n in self._in_a_row.items() if node and n >= NODE_TRIES]:
            if inhabited - {node}:
                seconds = AGAIN_S * 2 ** self._n_times_out[node]
                self._n_times_out[node] += 1
                self._left_out_until[node] = self._clock() + seconds
                self._failed.pop(node, None)
                self._in_a_row[node] = NODE_TRIES - 1  # when its time is over, one more failure is enough
                host, cause = self._last[node]
                self._tell(NodeLeftOut(node=host, cause=cause, seconds=seconds))

    def suspend(self) -> float:
        """Start no more for a while, and say so once; returns for how many seconds that has been so.

        It ends when its time is over, or earlier when a worker starts, or a node takes the blame or dies.
        """
        if self._suspended_at is None:
            seconds = AGAIN_S * 2**self._n_suspended
            self._n_suspended += 1
            self._suspended_at = self._clock()
            self._suspended_until = self._suspended_at + seconds
            self._tell(StartsSuspended(n_failed=self.n_failed, cause=self._last_cause, seconds=seconds))
        return self._clock() - self._suspended_at

    def _forget(self, node: str) -> None:
        for by_node in (self._in_a_row, self._last, self._left_out_until, self._n_times_out):
            by_node.pop(node, None)
