"""Judge in words, from the metrics, whether training made better videos. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum

import numpy as np

from dpo_video.evaluation.change import Change, Witness, compared
from dpo_video.support.formatting import apart, brief, counted, limit, percent
from dpo_video.support.statistics import Record

MIN_PROMPTS = 8
"""Number of prompts below which there is no verdict."""
MIN_EFFECT = 0.02
"""Relative change below which a target counts as unchanged."""
TOLERANCE = 0.03
"""Relative loss of motion or of a guard that still counts as keeping it."""
FEW = 16
"""Number of prompts below which an interval of very skewed values covers less than 93%."""
_FEW_VIDEOS, _MOST = 0.2, 0.5
"""A fifth of the videos with half of all values decide the change of the mean."""
BETTER = ("\N{CHECK MARK}", "better")
WORSE = ("\N{BALLOT X}", "worse")
UNCLEAR = ("\N{WHITE CIRCLE}", "no clear change")
KEPT = ("\N{BLACK CIRCLE}", "kept")
NOT_SHOWN = ("\N{WHITE CIRCLE}", "not shown to be kept")


class Role(StrEnum):
    """Purpose of a metric."""

    TARGET = "target"
    """What training should improve."""
    MOTION = "motion"
    """Amount of motion; it must be kept, or a still picture would be best."""
    GUARD = "guard"
    """A quality that must be kept."""


class MetricResult(Change):
    """One metric on every video of the base model and of the tuned model."""

    name: str
    unit: str
    higher_is_better: bool
    role: Role
    min_effect: float = MIN_EFFECT
    """Relative change below which a target counts as unchanged."""
    tolerance: float = TOLERANCE
    """Relative loss of motion or of a guard that still counts as keeping it."""
    witness: Witness | None = None
    """The same metric by a second method, if the metric has one."""
    no_witness: str = ""
    """Why the second measurement failed, as a sentence."""

    @classmethod
    def measured(
        cls,
        name: str,
        base: Sequence[float],
        *runs: Sequence[float],
        unit: str,
        higher_is_better: bool,
        role: Role,
        prompts: Sequence[str] | None = None,
        min_effect: float = MIN_EFFECT,
        tolerance: float = TOLERANCE,
        witness: Witness | None = None,
        no_witness: str = "",
    ) -> MetricResult:
        """Compare the base's values with those of the tuned model, video by video.

        Args:
            name: Name of the metric.
            base: One value per video.
            runs: The tuned model's values of the same videos; of each training run, if several.
            unit: Unit of the values.
            higher_is_better: Whether a higher value is better.
            role: What the metric is for.
            prompts: The prompt of each video; all different if None.
            min_effect: See the field.
            tolerance: See the field.
            witness: See the field.
            no_witness: See the field.
        """
        return cls(
            name=name,
            unit=unit,
            higher_is_better=higher_is_better,
            role=role,
            **compared(base, *runs, prompts=prompts),
            min_effect=min_effect,
            tolerance=tolerance,
            witness=witness,
            no_witness=no_witness,
        )

    @property
    def label(self) -> str:
        """The name as words."""
        return self.name.replace("_", " ")

    @property
    def conflict(self) -> str:
        """How the witness differs, in words; empty if it agrees or there is none."""
        if self.witness is None:
            return ""
        if self.role is Role.TARGET:
            return self.witness.conflict(self, min_effect=self.min_effect)
        other = self.model_copy(update={"difference": self.witness.difference})
        return "" if other.mark == self.mark else f"by it, the result is: {other.mark[1]}"

    @property
    def disagreement(self) -> str:
        """The same as a sentence."""
        if self.witness is None or not self.conflict:
            return ""
        size = f"{self.witness.change_text}, 95% interval {self.witness.interval_text}"
        return f"{self.witness.name} disagrees on {self.label} ({size}): {self.conflict}."

    @property
    def unevenness(self) -> str:
        """A sentence if few videos decide the change of the mean; empty if they do not.

        They do if a fifth of the videos have half of all values, of both models together. The
        typical change is then the geometric mean of the videos' ratios, which has no such weights.
        """
        base, tuned = np.asarray(self.base), np.asarray(self.tuned)
        if not (np.isfinite(base + tuned).all() and (base > 0).all() and (tuned > 0).all()):
            return ""
        largest = np.sort(base + tuned)[::-1]
        few = max(1, round(_FEW_VIDEOS * len(largest)))
        share = float(largest[:few].sum() / largest.sum())
        if share < _MOST:
            return ""
        typical = math.exp(np.log(tuned / base).mean()) - 1
        verbs = ("has", "decides") if few == 1 else ("have", "decide")
        return (
            f"{few} of the {len(largest)} videos {verbs[0]} {share:.0%} of the {self.label}, and "
            f"{verbs[1]} its change. The typical change, the geometric mean of the videos' ratios, "
            f"is {percent(typical)}."
        )

    @property
    def ambiguity(self) -> str:
        """A sentence if only one of the two intervals excludes zero; empty otherwise."""
        if self.relative_interval is None:
            return ""
        low, high = self.interval
        excludes = low > 0 or high < 0
        if excludes == self.clear:
            return ""
        verb, others = ("excludes", "does not") if excludes else ("includes", "excludes it")
        ends = f"{brief(low)} to {brief(high)}"
        return (
            f"The interval of the difference in {self.label} ({ends}) {verb} zero, that of the "
            f"relative change {others}: the base's values are uneven."
        )

    @property
    def improved(self) -> bool:
        """Whether the interval is on the better side of zero and the change is large enough."""
        return self._better[0] > 0 and self._large

    @property
    def worsened(self) -> bool:
        """Whether one of the intervals is on the worse side of zero and the change is large."""
        return self._falls and self._large

    @property
    def kept(self) -> bool:
        """Whether a loss larger than the tolerance is excluded (non-inferiority)."""
        if self.relative_interval is None:
            return self._better[0] >= 0
        return self._better[0] > -self.tolerance

    @property
    def lost(self) -> bool:
        """Whether it is worse by more than the tolerance, and an interval excludes zero."""
        relative = self.difference.relative
        if relative is None:
            return self._falls
        change = relative if self.higher_is_better else -relative
        return self._falls and change < -self.tolerance

    @property
    def mark(self) -> tuple[str, str]:
        """A sign and a word for the change, so that colour is never the only cue."""
        if self.role is not Role.TARGET:
            return WORSE if self.lost else KEPT if self.kept else NOT_SHOWN
        return BETTER if self.improved else WORSE if self.worsened else UNCLEAR

    @property
    def _better(self) -> tuple[float, float]:
        """The deciding interval, with better as positive."""
        return self._oriented(self.deciding)

    @property
    def _falls(self) -> bool:
        return self._better[1] < 0 or self._oriented(self.interval)[1] < 0

    def _oriented(self, interval: tuple[float, float]) -> tuple[float, float]:
        low, high = interval
        return (low, high) if self.higher_is_better else (-high, -low)

    @property
    def _large(self) -> bool:
        relative = self.difference.relative
        return relative is None or abs(relative) >= self.min_effect


class Outcome(StrEnum):
    """Effect of training on the videos."""

    IMPROVED = "improved"
    MOVES_LESS = "moves_less"
    """Better on the targets, but with less motion: no improvement."""
    LESS_FAITHFUL = "less_faithful"
    """Better on the targets, but a guard got worse."""
    UNPROVEN = "unproven"
    """Better on the targets, but motion or a guard is not shown to be kept, or not measured."""
    TOO_FEW = "too_few"
    """Too few prompts for a verdict."""
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
    metrics: Sequence[MetricResult],
    *,
    min_prompts: int = MIN_PROMPTS,
    trained_on: int = 0,
    finished: bool = False,
) -> EvaluationVerdict:
    """Judge the metrics together.

    Witnesses take no part in the outcome; the details say where one disagrees.

    The outcome is "improved" only if three conditions hold: a target's 95% interval (the relative
    one, if there is one) excludes zero on the better side, its relative change is at least
    `min_effect`, and no other target is worse; every motion metric is kept; and every guard is
    kept. Worse is what has one of the two intervals on the worse side of zero.
    "Kept" is a test of non-inferiority: the interval excludes a loss larger than `tolerance`.

    Args:
        metrics: At least one with the role of a target.
        min_prompts: Number of prompts below which there is no verdict.
        trained_on: How many of the prompts are also prompts of the training pairs.
        finished: Whether the videos come from two folders, and nothing is known of a training.

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
    stiller = [metric for metric in motions if metric.lost]
    unfaithful = [metric for metric in guards if metric.lost]
    open_ = [metric for metric in (*motions, *guards) if not metric.kept]
    gain = _gain(better)
    fewest = min(metric.difference.prompts for metric in metrics)
    if fewest < min_prompts:
        outcome = Outcome.TOO_FEW
        pairs = min(metric.difference.pairs for metric in metrics)
        headline = _too_few(pairs, fewest, min_prompts, finished=finished)
    elif better and worse:
        outcome = Outcome.MIXED
        headline = f"Mixed: {_names(better)} improved, but {_names(worse)} got worse."
    elif better and stiller:
        outcome = Outcome.MOVES_LESS
        also = f" and are less faithful ({_moves(unfaithful)})" if unfaithful else ""
        headline = f"Not improved: the videos {gain}, but move less{also}."
    elif better and unfaithful:
        outcome = Outcome.LESS_FAITHFUL
        headline = f"Not improved: the videos {gain}, but are less faithful ({_moves(unfaithful)})."
    elif better and not motions:
        outcome = Outcome.UNPROVEN
        headline = f"Unproven: the videos {gain}, but their motion was not measured."
    elif better and open_:
        outcome = Outcome.UNPROVEN
        verb = "is" if len(open_) == 1 else "are"
        headline = f"Unproven: the videos {gain}, but {_names(open_)} {verb} not shown to be kept."
    elif better:
        outcome = Outcome.IMPROVED
        more = any(
            metric.deciding[0] > 0 and (metric.difference.relative or 0) > metric.tolerance
            for metric in motions
        )
        motion = "more than" if more else "as much as"
        headline = f"Improved: the videos {gain} and move {motion} before."
    else:
        fallen = [*worse, *stiller, *unfaithful]
        outcome = Outcome.WORSE if fallen else Outcome.NO_CLEAR_CHANGE
        headline = f"Worse: {_moves(fallen)}." if fallen else "No target metric changed clearly."
    details = [_describe(metric) for metric in (*targets, *motions, *guards)]
    if all(metric.base == metric.tuned for metric in metrics):
        details.insert(0, "Every measured value of the tuned model is that of the base.")
    details += [metric.unevenness for metric in targets if metric.unevenness]
    details += [metric.ambiguity for metric in metrics if metric.ambiguity]
    details += [metric.disagreement for metric in metrics if metric.disagreement]
    for reason in dict.fromkeys(metric.no_witness for metric in metrics if metric.no_witness):
        once = [metric for metric in metrics if metric.no_witness == reason]
        verb = "was" if len(once) == 1 else "were"
        details.append(f"{_names(once).capitalize()} {verb} not measured a second time. {reason}")
    if fewest < FEW:
        details.append(
            f"With {counted(fewest, 'prompt')} the intervals are rough; evaluate more prompts."
        )
    if (runs := metrics[0].difference.runs) > 1:
        details.append(f"The intervals cover the prompts and {runs} training seeds.")
    elif finished:
        details.append(
            "The intervals cover the prompts of these two sets of videos; other sets may give "
            "another change."
        )
    else:
        details.append(
            "The intervals cover the prompts of one training run; another training seed may give "
            "another change."
        )
    if trained_on:
        details.append(
            f"{trained_on} of the {fewest} prompts are also prompts of the training pairs."
        )
    if not guards:
        details.append("No guard metric measured how faithful the videos are.")
    if not motions:
        details.append(
            "Add a motion metric (--metric dynamic_degree): a video that does not move is smooth."
        )
    return EvaluationVerdict(outcome=outcome, headline=headline, details=tuple(details))


def rules(metrics: Sequence[MetricResult], min_prompts: int) -> str:
    """The thresholds of `judge_evaluation` in words."""
    effects = _limits([(m.label, m.min_effect) for m in metrics if m.role is Role.TARGET])
    kept = _limits([(m.label, m.tolerance) for m in metrics if m.role is not Role.TARGET])
    text = (
        "A target is better if the 95% interval of its relative change excludes zero, and worse if "
        "that or the interval of its difference does, in both cases only if it changed by at least "
        f"{effects}."
    )
    if kept:
        text += f" Motion and guards are kept if the interval excludes a loss of more than {kept}."
    return f"{text} A verdict needs {min_prompts} prompts."


def _limits(values: Sequence[tuple[str, float]]) -> str:
    """One percentage, or that of each metric where they differ."""
    if len({value for _, value in values}) == 1:
        return limit(values[0][1])
    return ", ".join(f"{limit(value)} ({label})" for label, value in values)


def _too_few(videos: int, prompts: int, needed: int, *, finished: bool) -> str:
    """What an evaluation lacks for a verdict, and how to get it."""
    if finished:
        found = f"the {videos} pairs of videos have {prompts} different prompts"
        return (
            f"No verdict: {found}, and a verdict needs {needed} or more (add videos of other "
            "prompts to both folders)."
        )
    if videos < needed:
        return (
            f"No verdict: {prompts} prompts were evaluated, and a verdict needs {needed} or more "
            f"(--num-prompts {needed}, or a longer --prompts FILE)."
        )
    return (
        f"No verdict: the {videos} videos have {prompts} different prompts, and a verdict needs "
        f"{needed} or more (--prompts FILE)."
    )


def _gain(better: Sequence[MetricResult]) -> str:
    # The metrics' names affect these words only, never the outcome.
    names = {metric.name for metric in better}
    if names == {"frame_difference"}:
        return "change less from frame to frame"
    return "are smoother" if names <= {"warp_error", "frame_difference"} else "are better"


def _names(metrics: Sequence[MetricResult]) -> str:
    names = [metric.label for metric in metrics]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _moves(metrics: Sequence[MetricResult]) -> str:
    """A text such as "warp error rose, caption match and sharpness fell"."""
    rose = [metric for metric in metrics if metric.difference.difference > 0]
    fell = [metric for metric in metrics if metric not in rose]
    parts = [f"{_names(part)} {verb}" for part, verb in ((rose, "rose"), (fell, "fell")) if part]
    return ", ".join(parts)


def _describe(metric: MetricResult) -> str:
    change = metric.difference
    relative = "" if change.relative is None else f"{percent(change.relative)}, "
    size = f"{relative}95% interval {metric.interval_text}"
    before, after = apart(change.base_mean, change.tuned_mean)
    direction = "rose" if change.difference > 0 else "fell"
    moved = f"{direction} from {before} to {after}" if before != after else f"stayed at {after}"
    text = f"{metric.label.capitalize()} {moved} ({size})"
    if metric.role is Role.TARGET:
        return f"{text}: {_target_word(metric)}."
    if metric.lost:
        what = "less motion" if metric.role is Role.MOTION else "worse"
        return f"{text}: {what}; the tolerance is {limit(metric.tolerance)}."
    if metric.kept:
        return f"{text}: kept."
    return (
        f"{text}: not shown to be kept, because {change.prompts} prompts do not exclude a loss of "
        f"more than {limit(metric.tolerance)}."
    )


def _target_word(metric: MetricResult) -> str:
    if metric.improved or metric.worsened:
        return metric.mark[1]
    ends = metric.relative_interval
    if ends is not None and max(map(abs, ends)) < metric.min_effect:
        return f"no effect of at least {limit(metric.min_effect)}"
    if metric.clear:
        return f"smaller than the least effect of {limit(metric.min_effect)}"
    return metric.mark[1]
