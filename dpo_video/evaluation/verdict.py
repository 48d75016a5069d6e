"""Judge in words, from the metrics, whether training made better videos. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from dpo_video.support.formatting import brief, percent
from dpo_video.support.statistics import PairedDifference, Record, paired_difference

FEW = 10
"""Number of videos below which a bootstrap interval of skewed values covers less than 90%."""


class Role(StrEnum):
    """Purpose of a metric."""

    TARGET = "target"
    """What training should improve."""
    MOTION = "motion"
    """Amount of motion; it must not fall, or a still picture would be best."""
    GUARD = "guard"
    """A quality that must not get worse."""


class MetricResult(Record):
    """One metric on every video of the base model and of the tuned model."""

    name: str
    unit: str
    higher_is_better: bool
    role: Role
    base: tuple[float, ...]
    """One value per video, in the order of the prompts."""
    tuned: tuple[float, ...]
    difference: PairedDifference

    @classmethod
    def measured(
        cls,
        name: str,
        base: Sequence[float],
        tuned: Sequence[float],
        *,
        unit: str,
        higher_is_better: bool,
        role: Role,
        seed: int = 0,
    ) -> MetricResult:
        """Compare two sets of values, video by video."""
        return cls(
            name=name,
            unit=unit,
            higher_is_better=higher_is_better,
            role=role,
            base=tuple(base),
            tuned=tuple(tuned),
            difference=paired_difference(base, tuned, seed=seed),
        )

    @property
    def label(self) -> str:
        """The name as words."""
        return self.name.replace("_", " ")

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
    def interval_text(self) -> str:
        """The relative interval as text, or the absolute one if there is none."""
        text = brief if self.relative_interval is None else percent
        low, high = self.relative_interval or self.interval
        return f"{text(low)} to {text(high)}"

    @property
    def improved(self) -> bool:
        """Whether the whole interval is on the better side of zero."""
        return self.difference.low > 0 if self.higher_is_better else self.difference.high < 0

    @property
    def worsened(self) -> bool:
        """Whether the whole interval is on the worse side of zero."""
        return self.difference.high < 0 if self.higher_is_better else self.difference.low > 0

    @property
    def mark(self) -> tuple[str, str]:
        """A sign and a word for the change, so that colour is never the only cue."""
        if self.improved:
            return "\N{BLACK UP-POINTING TRIANGLE}", "better"
        if self.worsened:
            return "\N{BLACK DOWN-POINTING TRIANGLE}", "worse"
        return "\N{WHITE CIRCLE}", "no clear change"


class Outcome(StrEnum):
    """Effect of training on the videos."""

    IMPROVED = "improved"
    MOVES_LESS = "moves_less"
    """Better on the targets, but with less motion: no improvement."""
    LESS_FAITHFUL = "less_faithful"
    """Better on the targets, but a guard got worse."""
    UNPROVEN = "unproven"
    """Better on the targets, but the motion was not measured."""
    MIXED = "mixed"
    """Better on one target, worse on another."""
    NO_CLEAR_CHANGE = "no_clear_change"
    WORSE = "worse"


class EvaluationVerdict(Record):
    """The effect of training on the videos, in words."""

    outcome: Outcome
    headline: str
    """One short sentence."""
    details: tuple[str, ...]
    """One sentence per metric, and caveats."""


def judge_evaluation(
    metrics: Sequence[MetricResult], *, tolerance: float = 0.03
) -> EvaluationVerdict:
    """Judge the metrics together.

    The outcome is "improved" only if three conditions hold: the 95% interval of a target excludes
    zero on the better side, and no other target's on the worse side; the mean of no motion metric
    fell by more than `tolerance` (relative); and no guard's interval excludes zero on the worse
    side. Motion is judged by its mean, since "no significant fall" is easy to reach with few
    videos.

    Args:
        metrics: At least one with the role of a target.
        tolerance: Largest relative fall of the motion that counts as keeping it.

    Raises:
        ValueError: if there is no target.
    """
    targets, motions, guards = (
        [metric for metric in metrics if metric.role is role] for role in Role
    )
    if not targets:
        raise ValueError("no metric has the role of a target")
    better = [metric for metric in targets if metric.improved]
    worse = [metric for metric in targets if metric.worsened]
    stiller = [metric for metric in motions if _fell(metric, tolerance)]
    lost = [metric for metric in guards if metric.worsened]
    gain = _gain(better)
    if better and worse:
        outcome = Outcome.MIXED
        headline = f"Mixed: {_names(better)} improved, but {_names(worse)} got worse."
    elif better and stiller:
        outcome = Outcome.MOVES_LESS
        also = f" and are less faithful ({_moves(lost)})" if lost else ""
        headline = f"Not improved: the videos are {gain}, but move less{also}."
    elif better and lost:
        outcome = Outcome.LESS_FAITHFUL
        headline = f"Not improved: the videos are {gain}, but less faithful ({_moves(lost)})."
    elif better and not motions:
        outcome = Outcome.UNPROVEN
        headline = f"Unproven: the videos are {gain}, but their motion was not measured."
    elif better:
        outcome = Outcome.IMPROVED
        risen = [m for m in motions if (m.difference.relative or 0) > tolerance]
        clearly = any(metric.improved for metric in risen)
        motion = "more than" if clearly else "no less than" if risen else "as much as"
        headline = f"Improved: the videos are {gain} and move {motion} before."
    else:
        # No gain; then a loss of motion counts only if its interval excludes zero.
        fallen = [*worse, *lost, *(metric for metric in stiller if metric.worsened)]
        outcome = Outcome.WORSE if fallen else Outcome.NO_CLEAR_CHANGE
        headline = f"Worse: {_moves(fallen)}." if fallen else "No target metric changed clearly."
    details = [_describe(metric, tolerance) for metric in (*targets, *motions, *guards)]
    fewest = min(metric.difference.pairs for metric in metrics)
    if fewest < FEW:
        details.append(f"With {fewest} videos the intervals are rough; evaluate more (--seeds).")
    if not guards:
        details.append("No guard metric measured how faithful the videos are.")
    if not motions:
        details.append(
            "Add a motion metric (--metric dynamic_degree): a video that does not move is smooth."
        )
    return EvaluationVerdict(outcome=outcome, headline=headline, details=tuple(details))


def _fell(metric: MetricResult, tolerance: float) -> bool:
    relative = metric.difference.relative
    return relative is not None and relative < -tolerance


def _gain(better: Sequence[MetricResult]) -> str:
    # The metrics' names affect this word only, never the outcome.
    smooth = all(metric.name in ("warp_error", "frame_difference") for metric in better)
    return "smoother" if smooth else "better"


def _names(metrics: Sequence[MetricResult]) -> str:
    names = [metric.label for metric in metrics]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _moves(metrics: Sequence[MetricResult]) -> str:
    """A text such as "warp error rose, caption match and sharpness fell"."""
    rose = [metric for metric in metrics if metric.difference.difference > 0]
    fell = [metric for metric in metrics if metric not in rose]
    parts = [f"{_names(part)} {verb}" for part, verb in ((rose, "rose"), (fell, "fell")) if part]
    return ", ".join(parts)


def _describe(metric: MetricResult, tolerance: float) -> str:
    change = metric.difference
    relative = "" if change.relative is None else f"{percent(change.relative)}, "
    size = f"{relative}95% interval {metric.interval_text}"
    direction = "rose" if change.difference > 0 else "fell"
    values = f"from {brief(change.base_mean)} to {brief(change.tuned_mean)} ({size})"
    text = f"{metric.label.capitalize()} {direction} {values}"
    if metric.role is Role.MOTION:
        if _fell(metric, tolerance):
            return f"{text}: less motion; the tolerance is {tolerance:.0%}."
        if (change.relative_low or 0) < -tolerance:
            return (
                f"{text}: within the tolerance of {tolerance:.0%}, but {change.pairs} videos "
                "cannot rule out a larger fall."
            )
        return f"{text}: the motion is kept."
    if metric.improved or metric.worsened:
        return f"{text}: {'better' if metric.improved else 'worse'}."
    return f"{text}: no clear change."
