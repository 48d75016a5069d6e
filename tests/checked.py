"""The type checker that the test run puts on every function of the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception

CALLS = 5  # of a function in one test: the inner loop of an optical flow has many thousands

# As for mypy, an int is good where a float is wanted.
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_test = 0


def start_test() -> None:
    """Check the first calls again."""
    global _test
    _test += 1


def typed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check a function's arguments and what it returns, in its first calls of every test."""
    check: Callable[..., Any] | None = None
    test, left = -1, 0

    def first_calls(*arguments: Any, **named: Any) -> Any:
        nonlocal check, test, left
        if test != _test:
            test, left = _test, CALLS
        if not left:
            return function(*arguments, **named)
        left -= 1
        if check is None:  # at the first call, since most functions are not called in most runs
            try:
                check = _check(function)
            except BeartypeDecorHintPep673Exception:  # it knows `Self` in whole classes only
                check = function
        return check(*arguments, **named)

    return first_calls
