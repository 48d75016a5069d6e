"""Did training make better videos? A judgement in words, from what the metrics measured.

No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from dpo_video.support.formatting import brief, percent
from dpo_video.support.statistics import PairedDifference, Record, paired_difference

FEW = 10
"""Videos under which a bootstrap interval of skewed values covers less than 90%."""


class Role(StrEnum):
    """What a metric is measured for."""

    TARGET = "target"
    """What the training was to improve."""
    MOTION = "motion"
    """How much moves: must not fall, or a still picture would win."""
    GUARD = "guard"
    """What must not be lost on the way."""


class MetricResult(Record):
    """One metric on every video of the base model and of the tuned one."""

    name: str
    unit: str
    higher_is_better: bool
    role: Role
    base: tuple[float, ...]
    """One value a video, in the order of the prompts."""
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
    def improved(self) -> bool:
        """The whole interval is on the good side of zero."""
        return self.difference.low > 0 if self.higher_is_better else self.difference.high < 0

    @property
    def worsened(self) -> bool:
        """The whole interval is on the bad side of zero."""
        return self.difference.high < 0 if self.higher_is_better else self.difference.low > 0


class Outcome(StrEnum):
    """What training did to the videos."""

    IMPROVED = "improved"
    MOVES_LESS = "moves_less"
    """Better on its targets, but it moves less: no improvement."""
    LESS_FAITHFUL = "less_faithful"
    """Better on its targets, but a guard got worse."""
    UNPROVEN = "unproven"
    """Better on its targets, and nothing measured the motion."""
    MIXED = "mixed"
    """Better on one target, worse on another."""
    NO_CLEAR_CHANGE = "no_clear_change"
    WORSE = "worse"


class EvaluationVerdict(Record):
    """What happened to the videos, for a person."""

    outcome: Outcome
    headline: str
    """One short sentence."""
    details: tuple[str, ...]
    """One sentence for every metric, and what to keep in mind."""


def judge_evaluation(
    metrics: Sequence[MetricResult], *, tolerance: float = 0.03
) -> EvaluationVerdict:
    """Say what happened, and "improved" only where three things hold.

    A target's 95% interval excludes zero in the good direction and no other target's excludes it
    in the bad one; no motion metric's mean fell by more than `tolerance` (relative); no guard's
    interval excludes zero in the bad direction. The motion is judged by its mean, not by its
    interval: "no significant fall" would be easy to reach with few videos.

    Args:
        metrics: at least one of role target.
        tolerance: largest relative fall of the motion that counts as keeping it.

    Raises:
        ValueError: there is no target.
    """
    targets, motions, guards = (
        [metric for metric in metrics if metric.role is role] for role in Role
    )
    if not targets:
        raise ValueError("nothing to judge: no metric has the role of a target")
    better = [metric for metric in targets if metric.improved]
    worse = [metric for metric in targets if metric.worsened]
    stiller = [metric for metric in motions if _fell(metric, tolerance)]
    lost = [metric for metric in guards if metric.worsened]
    gain = _gain(better)
    if better and worse:
        outcome = Outcome.MIXED
        headline = f"Mixed: {_names(better)} got better, {_names(worse)} got worse."
    elif better and stiller:
        outcome = Outcome.MOVES_LESS
        also = f", and less faithful: {_moves(lost)}" if lost else ""
        headline = f"{gain} because it moves less{also}."
    elif better and lost:
        outcome = Outcome.LESS_FAITHFUL
        headline = f"{gain} but less faithful: {_moves(lost)}."
    elif better and not motions:
        outcome = Outcome.UNPROVEN
        headline = f"{gain}, but nothing measured whether it still moves."
    elif better:
        outcome = Outcome.IMPROVED
        risen = [m for m in motions if (m.difference.relative or 0) > tolerance]
        clearly = any(metric.improved for metric in risen)
        how = "more than" if clearly else "no less than" if risen else "as much as"
        headline = f"Improved: {gain.lower()}, and it moves {how} before."
    else:
        # Nothing was gained. For a loss of motion, too, ask for more than chance here.
        fallen = [*worse, *lost, *(metric for metric in stiller if metric.worsened)]
        outcome = Outcome.WORSE if fallen else Outcome.NO_CLEAR_CHANGE
        headline = f"Worse: {_moves(fallen)}." if fallen else "No clear change."
    details = [_describe(metric, tolerance) for metric in (*targets, *motions, *guards)]
    fewest = min(metric.difference.pairs for metric in metrics)
    if fewest < FEW:
        details.append(f"With {fewest} videos the intervals are rough.")
    if not guards:
        details.append("No metric guarded how faithful the videos are.")
    if not motions:
        details.append(
            "Add a metric of motion (--metric dynamic_degree): a frozen video is smooth."
        )
    return EvaluationVerdict(outcome=outcome, headline=headline, details=tuple(details))


def _fell(metric: MetricResult, tolerance: float) -> bool:
    relative = metric.difference.relative
    return relative is not None and relative < -tolerance


def _gain(better: Sequence[MetricResult]) -> str:
    # The names choose a word here, never the judgement.
    smooth = all(metric.name in ("warp_error", "frame_difference") for metric in better)
    return "Smoother" if smooth else "Better"


def _names(metrics: Sequence[MetricResult]) -> str:
    names = [metric.label for metric in metrics]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _moves(metrics: Sequence[MetricResult]) -> str:
    """Such as "caption match fell and warp error rose"."""
    parts = [
        f"{metric.label} {'rose' if metric.difference.difference > 0 else 'fell'}"
        for metric in metrics
    ]
    return " and ".join(parts)


def _describe(metric: MetricResult, tolerance: float) -> str:
    change = metric.difference
    size = (
        f"{percent(change.relative)}, 95% interval {percent(change.relative_low)} to "
        f"{percent(change.relative_high)}"
        if change.relative is not None
        else f"95% interval {brief(change.low)} to {brief(change.high)}"
    )
    direction = "rose" if change.difference > 0 else "fell"
    values = f"from {brief(change.base_mean)} to {brief(change.tuned_mean)} ({size})"
    text = f"{metric.label.capitalize()} {direction} {values}"
    if metric.role is Role.MOTION:
        if _fell(metric, tolerance):
            return f"{text}, more than the {tolerance:.0%} that count as keeping the motion."
        if (change.relative_low or 0) < -tolerance:
            return (
                f"{text}: within the {tolerance:.0%} tolerance, though {change.pairs} videos "
                "cannot rule out a larger fall."
            )
        return f"{text}: the motion is kept."
    if metric.improved or metric.worsened:
        return f"{text}: {'better' if metric.improved else 'worse'}."
    return f"{text}: no clear change."
