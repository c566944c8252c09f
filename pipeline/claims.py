"""Which job does which shard, so that several can share a store: log/claims/<shard>.json names the run that has it.

A claim only saves work done twice; nothing is wrong if two jobs do one shard, since both write the same bytes. Every
job makes claims, so every job can be joined. A run that has given a shard up says so in its claim: nobody waits for it.
"""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from infra.objects import ObjectMissingError, Objects, ObjectTooLargeError
from infra.status import MAX_SIGN_NBYTES
from pipeline.locations import is_remote
from storage_schemas.keys import LOG_PREFIX

CLAIMS_PREFIX = f"{LOG_PREFIX}claims/"
_N_THREADS = 16
_MAX_CAUSE = 2000  # characters


def claim_key(shard: int) -> str:
    """Key of the claim on a shard."""
    return f"{CLAIMS_PREFIX}{shard:06d}.json"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What is said of a shard.

    Attributes:
        run_id: The run that has it.
        given_up: Why that run has quarantined it; empty if it has not.
    """

    run_id: str
    given_up: str = ""


class Claims:
    """The claims of one run.

    Args:
        objects: Of the store.
        run_id: Ours.
    """

    def __init__(self, objects: Objects, run_id: str) -> None:
        self._objects, self._run_id = objects, run_id
        self._document = json.dumps({"run_id": run_id}).encode()

    def take(self, shard: int) -> tuple[str, bool]:
        """Claim a shard; returns the run that has it, ours if nobody was quicker, and whether we have it only now."""
        if self._objects.put_new(claim_key(shard), self._document):
            return self._run_id, True
        found = self.find(shard)
        if found is None:
            self.take_over(shard)
            return self._run_id, True
        return found.run_id, False

    def find(self, shard: int) -> Claim | None:
        """The claim on a shard; None if there is none, or bytes that are none."""
        try:
            found = json.loads(self._objects.get(claim_key(shard), at_most=MAX_SIGN_NBYTES))
            run_id, given_up = found.get("run_id"), found.get("given_up", "")
        except (ObjectMissingError, ObjectTooLargeError, ValueError, AttributeError, RecursionError):
            return None
        return Claim(run_id=run_id, given_up=str(given_up)) if isinstance(run_id, str) else None

    def take_over(self, shard: int) -> None:
        """Claim a shard whose job is dead."""
        self._objects.put(claim_key(shard), self._document)

    def give_up(self, shard: int, cause: str) -> None:
        """Say that we have quarantined a shard: whoever waits for it need not any longer."""
        document = {"run_id": self._run_id, "given_up": cause[:_MAX_CAUSE] or "unknown"}
        self._objects.put(claim_key(shard), json.dumps(document).encode())


def delete_claims(objects: Objects, shards: Iterable[int] | None = None) -> None:
    """Delete claims that mean nothing any more: all of them, or those of some shards."""
    wanted = None if shards is None else {claim_key(shard) for shard in shards}
    delete_all(objects, (info.key for info in objects.list(CLAIMS_PREFIX) if wanted is None or info.key in wanted))


def delete_all(objects: Objects, keys: Iterable[str]) -> None:
    """Delete many objects; several at a time where each takes a request."""
    if not is_remote(objects.location):
        for key in keys:
            objects.delete(key)
        return
    with ThreadPoolExecutor(_N_THREADS) as pool:
        for _ in pool.map(objects.delete, keys):
            pass
