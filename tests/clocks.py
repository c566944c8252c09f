"""Clocks for tests of what waits."""

import threading
import time
from dataclasses import dataclass, field


@dataclass
class SkippingClock:
    """Stands for `time` in a module whose waits are to cost nothing: what this thread sleeps is skipped.

    Attributes:
        skipped_s: So far. Real time goes on besides, and what a busy machine takes of it is not in this number.
    """

    skipped_s: float = 0.0
    _thread: threading.Thread = field(default_factory=threading.current_thread)

    def monotonic(self) -> float:
        return time.monotonic() + self.skipped_s

    def sleep(self, seconds: float) -> None:
        if threading.current_thread() is self._thread:
            self.skipped_s += seconds
        else:
            time.sleep(seconds)
