"""One RUN for several workers: the first one holds and claims it, the others wait until it has."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from infra.console import UserError
from trainer.run_files import RunFiles, differences
from trainer.run_lock import StillOurs
from trainer.workers import Workers


@contextmanager
def claimed(run: RunFiles, identity: Mapping[str, Any], workers: Workers) -> Iterator[StillOurs]:
    """Keep others out of a RUN and make it that of `identity`; see `RunFiles.exclusive` and `claim`.

    Yields:
        To be called now and then: on the first worker it raises once the RUN is no longer ours.

    Raises:
        UserError: The RUN is another's, or another run; or the workers do not see the same data.
        JobError: The first worker could not claim it.
    """
    with ExitStack() as stack:
        checks: list[StillOurs] = []

        def claim() -> None:
            checks.append(stack.enter_context(run.exclusive()))
            run.claim(identity)

        workers.agree(error=_difference(identity, workers))
        workers.first_does(claim)
        yield checks[0] if checks else lambda: None


def _difference(identity: Mapping[str, Any], workers: Workers) -> UserError | None:
    """What this worker sees in another way than the first: a store that grew, other files at the same place."""
    mine = json.dumps(identity)
    theirs = workers.from_first(mine.encode())
    assert theirs is not None
    if theirs.decode() == mine:
        return None
    return UserError(
        "\n  ".join(
            [
                f"{workers} does not see the data that the first one sees ('the run' below):",
                *differences(json.loads(theirs), json.loads(mine)),
                "Give a place that is the same for all of them, such as S3, and for an unfinished store run it again",
            ]
        )
    )
