"""How many examples a property is tried on: some by `make test`, eighty times as many by `make test-long`."""

from __future__ import annotations

import os
from collections.abc import Callable

from hypothesis import settings

LONG = "DAVINCI_TESTS_LONG"
"""Set by `conftest.py` before it collects tests, since decorators run when a test file is imported."""

TIMES_AS_MANY = 20


def cases(count: int) -> Callable:
    """A decorator for a test under `@given`: a quarter of `count` examples, twenty times `count` under `--long`."""
    return settings(max_examples=count * TIMES_AS_MANY if is_long() else -(-count // 4), deadline=None)


def is_long() -> bool:
    """Whether this is `make test-long`."""
    return os.environ.get(LONG) == "1"
