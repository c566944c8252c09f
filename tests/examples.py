"""How many examples hypothesis tries: some by default, all of them when the slow tests run (`make test-slow`)."""

from hypothesis import settings

EVERY = 100
SOME = 25


def of(n: int) -> int:
    """`n` examples where all are tried, else as large a part of them as other tests try; never fewer than 10."""
    return max(10, n * min(settings.default.max_examples, EVERY) // EVERY)
