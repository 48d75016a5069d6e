"""Labels from metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from jaxtyping import Bool
from pydantic import Field, SerializeAsAny
from torch import Tensor

from dpo_video.errors import UserError
from dpo_video.strategies import Labeler, LabelerFactory, LabelResult, Metric, ReasonedLabeler
from dpo_video.types import PerPair, Videos


@final
class ByMetric(LabelerFactory):
    """Metrics: compares both videos by a metric or a weighted mix of metrics, per segment.

    A metric's lead is the difference of the two values relative to their mean size, so that metrics
    of different units mix: `(first - second) / ((|first| + |second|) / 2)`, negated where less is
    better. The label is the sign of the leads' weighted mean; a mean within `margin` is a tie.

    Smoothness alone prefers a video that stands still, and a model trained on such labels freezes
    (reported of vanilla DPO by DenseDPO, Wu et al. 2025, arXiv 2506.03517). So the label is a tie
    if the preferred segment's `motion` is lower than the other's by more than `tolerance`.
    """

    weights: dict[str, float] = Field(default={"warp_error": 1.0}, min_length=1)
    """Metrics and their weights: `--set labeler.weights.sharpness=0.5`. Setting one replaces all
    defaults."""
    margin: float = Field(default=0.05, ge=0, lt=2)
    """Largest mean lead that is a tie: 0.05 is 5% of the value."""
    motion: str = "dynamic_degree"
    """Metric of the motion that a preferred video must keep; an empty text for no condition."""
    tolerance: float = Field(default=0.2, ge=0, le=1)
    """Share by which the preferred video may move less than the other."""

    @property
    def metric_names(self) -> Sequence[str]:
        """The weighted metrics and the metric of motion."""
        return list(dict.fromkeys([*self.weights, *([self.motion] if self.motion else [])]))

    def with_metrics(self, metrics: Mapping[str, Metric]) -> Labeler:
        """The labeler with its metrics, after a check of the weights and of the motion's metric."""
        if min(self.weights.values()) < 0 or not any(self.weights.values()):
            raise UserError(
                "labeler.weights must not be negative, nor all 0: the metrics define which "
                "direction is better. Correct them."
            )
        if self.motion and metrics[self.motion].role != "motion":
            raise UserError(
                f"labeler.motion = '{self.motion}' does not measure motion. Name a metric of that "
                'role, such as dynamic_degree, or "" for no condition.'
            )
        return Measuring(rule=self, metrics=metrics)


@final
class Measuring(ReasonedLabeler):
    """`ByMetric` with its metrics."""

    rule: ByMetric
    """The options."""
    metrics: Mapping[str, SerializeAsAny[Metric]]
    """By name."""

    def judge(
        self, prompts: Sequence[str], first: Videos, second: Videos, segments: Sequence[slice]
    ) -> LabelResult:
        """Measure both videos of every segment; the notes hold the measured values."""
        rule, columns = self.rule, []
        notes: list[list[str]] = [[] for _ in prompts]
        for number, segment in enumerate(segments, start=1):
            values = {
                name: (
                    metric(first[:, :, segment], prompts).float().cpu(),
                    metric(second[:, :, segment], prompts).float().cpu(),
                )
                for name, metric in self.metrics.items()
            }
            score = torch.zeros(len(prompts))
            for name, weight in rule.weights.items():
                sign = 1 if self.metrics[name].higher_is_better else -1
                score = score + sign * weight * relative_lead(*values[name])
            score = score / sum(rule.weights.values())
            labels = torch.where(score.abs() > rule.margin, score.sign(), 0.0)
            frozen = torch.zeros(len(prompts), dtype=torch.bool)
            if rule.motion:
                frozen = loses_motion(labels, *values[rule.motion], rule.tolerance)
            columns.append(torch.where(frozen, 0.0, labels))
            for i, note in enumerate(notes):
                measured = ", ".join(
                    f"{name} {one[i]:.4g} : {other[i]:.4g}" for name, (one, other) in values.items()
                )
                held = " (a tie: the preferred one moves less)" if frozen[i] else ""
                note.append(f"{number}: {measured}{held}")
        return LabelResult(
            labels=torch.stack(columns, dim=1),
            notes=["; ".join(note) for note in notes],
            figures={},
        )


def relative_lead(first: PerPair, second: PerPair) -> PerPair:
    """Difference relative to the mean size, in [-2, 2]; 0 where both are 0."""
    size = (first.abs() + second.abs()) / 2
    return torch.where(size > 0, (first - second) / size.clamp(min=1e-30), 0.0)


def loses_motion(
    labels: PerPair, first: PerPair, second: PerPair, tolerance: float
) -> Bool[Tensor, " b"]:
    """Whether the preferred video moves less than the other by more than the tolerance."""
    chosen = torch.where(labels > 0, first, second)
    rejected = torch.where(labels > 0, second, first)
    return (labels != 0) & (chosen < (1 - tolerance) * rejected)
