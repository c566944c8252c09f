"""Resume, tested at every step: save before each element, replay the rest from each saved state."""

import json
from collections.abc import Callable, Hashable
from typing import Any


def check_resume_everywhere(
    make: Callable[[], Any], key: Callable[[Any], Hashable], remake: Callable[[], Any] | None = None
) -> list[Hashable]:
    """Hold a loader to its promise that any saved state gives the identical remainder.

    Args:
        make: Gives a fresh loader: an iterator with state_dict, load_state_dict and close.
        key: What must be equal about an element, taken before the next is asked for.
        remake: Gives the loader that resumes; `make` if None. Another number of threads, say.

    Returns:
        The keys of the whole pass.
    """
    loader, keys, states = make(), [], []
    states.append(json.dumps(loader.state_dict()))  # a state must survive as JSON
    for element in loader:
        keys.append(key(element))
        states.append(json.dumps(loader.state_dict()))
    loader.close()
    assert keys, "an empty pass proves nothing"
    for i, state in enumerate(states):
        resumed = (remake or make)()
        resumed.load_state_dict(json.loads(state))
        assert json.dumps(resumed.state_dict()) == state, "loading and saving changes the state"
        remainder = [key(element) for element in resumed]
        resumed.close()
        assert remainder == keys[i:], f"resumed after {i} elements"
    return keys
