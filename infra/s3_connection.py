"""Requests to one bucket: at most so many at once, each within a time, tried again until a deadline, counted."""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from obstore.store import S3Store

from infra.console import human_bytes
from infra.faults import FAULTS
from infra.object_verbs import (
    ObjectAccessError,
    ObjectError,
    ObjectMissingError,
)
from infra.retry import DeadlineError, Patience, TransientError, persist
from infra.s3_errors import Failure, failure_of
from infra.s3_settings import S3Settings, bucket_region

SLOWEST_BYTES_PER_S = 500_000  # a transfer may take the time that this needs, or the stall time if that is longer
_CONNECT_S = 10.0
#: While no request has been answered, by success or refusal, at all or since one failed until its deadline: then it is
#: more likely a wrong endpoint, or the end, than an outage.
FIRST_CONTACT_S = 60.0

Verb = Literal["get", "head", "put", "list", "delete"]
_DOING = {"get": "reading", "head": "reading", "put": "writing", "list": "listing", "delete": "deleting"}
_DONE = {"get": "read", "head": "read", "put": "written", "list": "listed", "delete": "deleted"}
Result = TypeVar("Result")


class S3Connection:
    """Sends requests to a bucket. Threads may share it.

    Args:
        location: As shown in messages.
        bucket: Its name.
        settings: How to reach the server.
        patience: How long to try.
        stall_s: A reply that brings nothing for so long is given up and asked for again.
        concurrency: Requests in flight at once, at most.
    """

    def __init__(
        self, location: str, bucket: str, settings: S3Settings, patience: Patience, *, stall_s: float, concurrency: int
    ) -> None:
        self.requests: Counter[str] = Counter()
        self._location, self._bucket, self._settings, self._patience = location, bucket, settings, patience
        self._stall_s = stall_s
        self._slots = threading.BoundedSemaphore(concurrency)
        self._lock = threading.Lock()
        self._was_reached = False

    def send(self, verb: Verb, key: str, call: Callable[[S3Store], Result], *, nbytes: int | None = 0) -> Result:
        """Make a request until it succeeds.

        Args:
            verb: What is counted and said.
            key: Of the object.
            call: Makes the request with the client that it is given.
            nbytes: To be transferred; the time allowed depends on it. None where it is unknown.

        Raises:
            ObjectMissingError: There is no such object.
            ObjectAccessError: The server refused, or failed until the deadline.
            Exception: Whatever else `call` raises.
        """
        what = f"{_DOING[verb]} {self._location}/{key}" + (f" ({human_bytes(nbytes)})" if nbytes else "")

        def attempt(left_s: float) -> Result:
            end = time.monotonic() + left_s
            with self._slots:
                left_s = end - time.monotonic()
                if left_s <= 0:
                    raise TransientError("the other requests in flight left it no time", "timeout")
                wanted_s = left_s if nbytes is None else nbytes / SLOWEST_BYTES_PER_S
                self.count(verb)
                store = self._store(wanted_s, left_s, reading=verb in ("get", "head"))
                return self._classified(verb, key, lambda: call(store))

        try:
            extra_s = (nbytes or 0) / SLOWEST_BYTES_PER_S
            return persist(what, attempt, self._patience_now(), least_s=self._stall_s, extra_s=extra_s)
        except DeadlineError as error:
            self._was_reached = False  # a job that fails of this has a log to end, too
            raise ObjectAccessError(key, self._message(verb, key, str(error))) from error

    def _patience_now(self) -> Patience:
        if self._was_reached:
            return self._patience
        return replace(self._patience, deadline_s=min(self._patience.deadline_s, FIRST_CONTACT_S))

    def count(self, name: str, amount: int = 1) -> None:
        """Add to `requests`."""
        with self._lock:
            self.requests[name] += amount

    @cached_property
    def client(self) -> Any:
        """botocore's client, for listings; at Amazon of the bucket's own region."""
        region = None if self._settings.endpoint else bucket_region(self._location, self._settings)
        return self._settings.make_client(region=region, timeout_s=self._stall_s)

    def _classified(self, verb: Verb, key: str, call: Callable[[], Result]) -> Result:
        try:
            result = call()
        except (ObjectError, TransientError):
            self._was_reached = True
            raise
        except Exception as error:
            failure = failure_of(error)
            if failure is None:
                raise
            self._was_reached = self._was_reached or failure.status > 0
            if failure.passes:
                raise TransientError(failure.cause, failure.kind) from error
            raise self._error(verb, key, failure) from error
        self._was_reached = True
        return result

    def _error(self, verb: Verb, key: str, failure: Failure) -> ObjectError:
        if failure.code == "NoSuchBucket":
            cause = f"there is no bucket {self._bucket} at {self._settings.endpoint or 'Amazon S3'}"
            return ObjectAccessError(key, self._message(verb, key, cause))
        if failure.status == 404:
            return ObjectMissingError(key, f"{self._location}/{key} is missing")
        cause = failure.cause
        if failure.status in (401, 403):
            FAULTS.note("denied")
            if self._settings.anonymous:
                cause += "; the request was anonymous: no AWS credentials were found, or they are switched off"
            elif verb in ("get", "head"):
                cause += "; where an account may not list a bucket, this can also mean that there is no such object"
        return ObjectAccessError(key, self._message(verb, key, cause))

    def _message(self, verb: Verb, key: str, cause: str) -> str:
        return f"{self._location}/{key} could not be {_DONE[verb]}: {cause}"

    def _store(self, wanted_s: float, left_s: float, *, reading: bool) -> S3Store:
        """A client whose requests end in time: the stall time, doubled as often as is wanted and there is time for."""
        wanted = math.ceil(math.log2(max(wanted_s / self._stall_s, 1)))
        possible = math.floor(math.log2(max(left_s / self._stall_s, 1)))
        timeout_s = self._stall_s * 2.0 ** min(wanted, possible)
        return _make_store(self._settings, self.client, self._bucket, timeout_s, self._stall_s if reading else None)


@lru_cache(maxsize=256)
def _make_store(
    settings: S3Settings, client: Any, bucket: str, timeout_s: float, read_timeout_s: float | None
) -> S3Store:
    """One for each kind: their connections are kept open. No read timeout for a PUT: it would count the upload too."""
    options: dict[str, Any] = {
        "allow_http": True,
        "connect_timeout": timedelta(seconds=min(_CONNECT_S, timeout_s)),
        "timeout": timedelta(seconds=timeout_s),
    }
    bundle = settings.session.get_config_variable("ca_bundle")
    if bundle and client.meta.endpoint_url.startswith("https:"):
        options["root_certificate"] = Path(bundle).read_bytes()
    if read_timeout_s is not None:
        options["read_timeout"] = timedelta(seconds=read_timeout_s)
    return S3Store(
        bucket,
        client_options=options,  # type: ignore[arg-type]
        retry_config={"max_retries": 0},
        disable_bulk_delete=True,
        **settings.store_options(client),
    )
