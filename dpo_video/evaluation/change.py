"""The change of one measured quantity from the base model to the tuned one. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, TypedDict

import numpy as np

from dpo_video.support.formatting import brief, percent
from dpo_video.support.statistics import PairedDifference, Record, paired_difference


class Change(Record):
    """Values of every video of the base model and of the tuned model, and their difference."""

    base: tuple[float, ...]
    """One value per video, in the order of the prompts."""
    tuned: tuple[float, ...]
    """The mean over the training runs, if there are several."""
    difference: PairedDifference

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the mean difference, tuned minus base, in the metric's unit."""
        return self.difference.low, self.difference.high

    @property
    def relative_interval(self) -> tuple[float, float] | None:
        """The same relative to the base's mean; None if that is 0."""
        low, high = self.difference.relative_low, self.difference.relative_high
        return None if low is None or high is None else (low, high)

    @property
    def deciding(self) -> tuple[float, float]:
        """The interval that is shown and that verdicts use: relative, or absolute without a base.

        The two can differ in whether they include zero, where the base's values are very uneven.
        """
        return self.relative_interval or self.interval

    @property
    def change_text(self) -> str:
        """The relative change as text, or the absolute one if there is none."""
        relative = self.difference.relative
        return brief(self.difference.difference) if relative is None else percent(relative)

    @property
    def interval_text(self) -> str:
        """The relative interval as text, or the absolute one if there is none."""
        text = brief if self.relative_interval is None else percent
        low, high = self.deciding
        return f"{text(low)} to {text(high)}"

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        low, high = self.deciding
        return low > 0 or high < 0


class _Compared(TypedDict):
    base: tuple[float, ...]
    tuned: tuple[float, ...]
    difference: PairedDifference


def compared(
    base: Sequence[float], *runs: Sequence[float], prompts: Sequence[str] | None = None
) -> _Compared:
    """The fields of a `Change`; see `MetricResult.measured` for the arguments."""
    return {
        "base": tuple(base),
        "tuned": tuple(np.mean(runs, axis=0).tolist()),
        "difference": paired_difference(base, runs, prompts=prompts),
    }


class Witness(Change):
    """A second measurement of a metric, by another method. It takes no part in the verdict."""

    name: str
    """Name of the method, for example DIS."""

    @classmethod
    def measured(
        cls,
        name: str,
        base: Sequence[float],
        *runs: Sequence[float],
        prompts: Sequence[str] | None = None,
    ) -> Self:
        """Compare the base's values with those of the tuned model (see `MetricResult.measured`)."""
        return cls(name=name, **compared(base, *runs, prompts=prompts))

    @property
    def text(self) -> str:
        """The change and its interval on one line."""
        return f"by {self.name}: {self.change_text} ({self.interval_text})"

    def conflict(self, first: Change, *, min_effect: float = 0.0) -> str:
        """How it differs from the first measurement, in words; empty if the two agree.

        A change is clear if its interval excludes zero and it is at least `min_effect`. The two
        disagree if one is clear and the other's interval includes zero, if one is clear and they
        have different signs, or if the intervals do not overlap. Two changes of which neither is
        clear do not disagree.
        """
        ours, others = self.relative_interval, first.relative_interval
        if ours is None or others is None:
            ours, others = self.interval, first.interval
        excludes, first_excludes = (low > 0 or high < 0 for low, high in (ours, others))
        large, first_large = (
            change.difference.relative is None or abs(change.difference.relative) >= min_effect
            for change in (self, first)
        )
        if not ((excludes and large) or (first_excludes and first_large)):
            return ""
        reasons = []
        if self.difference.difference * first.difference.difference < 0:
            rose = self.difference.difference > 0
            reasons.append("it rose instead of falling" if rose else "it fell instead of rising")
        if excludes != first_excludes:
            reasons.append(f"its interval {'excludes' if excludes else 'includes'} zero")
        if ours[0] > others[1] or ours[1] < others[0]:
            reasons.append("the intervals do not overlap")
        return " and ".join(reasons)
