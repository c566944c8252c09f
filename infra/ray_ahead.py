"""A private Ray that starts while its caller loads libraries and lays its work out: both take many seconds."""

import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from infra.cluster import Connection, connect, disconnect


class RayAhead:
    """Ray, on its way from the moment this is made. Whoever makes it closes it; used as a context it closes itself.

    The thread that starts Ray's processes lives until then: the kernel ends them with the thread they were started by.

    Args:
        settings: As for `connect`, without an address.
    """

    def __init__(self, **settings: Any) -> None:
        self._connection: Future[Connection] = Future()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._hold, kwargs=settings, name="ray-ahead", daemon=True)
        self._thread.start()

    def __enter__(self) -> "RayAhead":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def wait_until_it_waits(self, *, at_most_s: float = 5.0, idle_s: float = 0.1) -> None:
        """Until Ray's own processes start and this one has nothing to do for it.

        Before that, whatever else this process does takes turns with the thread that starts Ray, and all that depends
        on it comes later.
        """
        if self._thread.ident is None or not hasattr(time, "pthread_getcpuclockid"):  # macOS
            return
        clock = time.pthread_getcpuclockid(self._thread.ident)
        end = time.monotonic() + at_most_s
        busy_s = idle_s
        while busy_s > idle_s / 10 and not self._connection.done() and time.monotonic() < end:
            began_s = time.clock_gettime(clock)
            time.sleep(idle_s)
            busy_s = time.clock_gettime(clock) - began_s

    def connection(self) -> Connection:
        """Wait until Ray is there.

        Raises:
            UserError: It does not start.
        """
        return self._connection.result()

    def close(self) -> None:
        """End Ray, waiting first until it has started if it is only half there."""
        with suppress(Exception):  # why it did not start is what `connection` says, to whoever wanted it
            disconnect(self._connection.result())
        self._over.set()
        self._thread.join()

    def _hold(self, **settings: Any) -> None:
        try:
            self._connection.set_result(connect("local", **settings))
        except BaseException as error:  # noqa: BLE001 - raised where the connection is asked for
            self._connection.set_exception(error)
        self._over.wait()
