"""How a statement of a paper ends that our numbers were set beside: with a verdict, or with why there is none."""

from collections.abc import Iterable

import numpy as np

#: Images below which a mean says too little of others to judge by it.
LEAST_IMAGES = 32
#: Share by which one number is to exceed another, where a statement compares two.
MARGIN = 0.1


def verdict(holds: bool | np.bool_, *, n_images: int | None = None, values: Iterable[float] = ()) -> str:
    """The end of a statement whose criterion was said before it.

    Args:
        holds: Whether the criterion is met.
        n_images: That its numbers come from; fewer than `LEAST_IMAGES` are not judged. None where there is no such
            number, or it is large by itself.
        values: The numbers that the criterion compares; with one that is undefined there is no verdict.
    """
    if n_images is not None and n_images < LEAST_IMAGES:
        return no_verdict(f"of {n_images} images, where a verdict takes {LEAST_IMAGES}")
    if not all(np.isfinite(value) for value in values):
        return no_verdict("a number that it compares is not defined")
    return "This holds here." if holds else "This does not hold here."


def no_verdict(why: str) -> str:
    """The end of a statement that these numbers cannot answer; the reason without a full stop."""
    return f"Not judged here: {why}."
