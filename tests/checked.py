"""The type checker that the test run puts on every function of the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception

# As for mypy, an int is good where a float is wanted.
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def typed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check a function's arguments and what it returns."""
    try:
        return _check(function)
    except BeartypeDecorHintPep673Exception:  # `Self` has a meaning to it in whole classes only
        return function
