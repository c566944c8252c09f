"""What of this machine a process may use."""

import os


def n_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux: containers and taskset count
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
