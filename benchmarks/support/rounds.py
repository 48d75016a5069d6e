"""The type of the timed suites' `measure` fixture, and candidates that may be missing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import pytest

MISSING: dict[str, dict[str, str]] = defaultdict(dict)
"""Candidates that did not run: "suite/group" to candidate to reason."""


class Measure(Protocol):
    """Times one round of the test's candidate."""

    def __call__(
        self,
        group: str,
        call: Callable[[], Any],
        *,
        unit: str,
        baseline: str,
        work: float = 1,
        flops: float | None = None,
        figures: Mapping[str, float | str] | None = None,
        calls: int = 1,
    ) -> None:
        """Time `call`, after an untimed warm-up call in the candidate's first round.

        Args:
            group: Name of the group.
            call: The function to time.
            unit: Unit of work.
            baseline: Name of the candidate that the others are compared with.
            work: Units of work per call.
            flops: Operations per unit of work.
            figures: Further findings about the candidate.
            calls: Calls per round, where one call is too short to time.
        """


def needs(group: str, candidate: str, module: str, suite: str) -> None:
    """Skip a candidate whose library is not installed, and record that in the results."""
    try:
        __import__(module)
    except ImportError:
        reason = f"{module} is not installed"
        MISSING[f"{suite}/{group}"][candidate] = reason
        pytest.skip(reason)
