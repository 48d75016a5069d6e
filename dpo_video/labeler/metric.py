"""Labels from metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import final

import torch
from jaxtyping import Bool
from pydantic import Field, SerializeAsAny
from torch import Tensor

from dpo_video.errors import UserError
from dpo_video.registry.returned import checked
from dpo_video.strategies import Labeler, LabelerFactory, LabelResult, Metric, ReasonedLabeler
from dpo_video.types import PerPair, Videos

LEAST_FRAMES = 8  # frames that guards are measured on; dynamic_degree needs 5 to tell flicker


@final
class ByMetric(LabelerFactory):
    """Metrics: compares both videos by a metric or a weighted mix, with vetoes, per segment.

    A metric's lead is the difference of the two values relative to their mean size, so that metrics
    of different units mix: `(first - second) / ((|first| + |second|) / 2)`, negated where less is
    better. The sign of the leads' weighted mean is the label; a mean within `margin` is a tie.

    Smoothness alone prefers a video that is blurred, compressed or frozen, and a model trained on
    such labels freezes (reported of vanilla DPO by DenseDPO, Wu et al. 2025, arXiv 2506.03517). So
    the label is a tie if the preferred video is worse by a guard: a veto never turns a label
    around, because the other video lost by the target. Guards are measured on the segment and, if
    it is short, on frames around it, 8 in all.

    Limits: a guard cannot tell a loss within its tolerance, nor detail that is lost from
    detail that was never there, so videos of different content are often ties.
    """

    weights: dict[str, float] = Field(default={"warp_error": 1.0}, min_length=1)
    """Metrics and their weights: `--set labeler.weights.sharpness=0.5`. Setting one replaces all
    defaults."""
    margin: float = Field(default=0.05, ge=0, lt=2)
    """Largest mean lead that is a tie: 0.05 is 5% of the value."""
    guards: dict[str, float] = Field(
        default={"sharpness": 0.03, "dynamic_degree": 0.2, "new_frames": 0.2}
    )
    """Metrics that can veto a label, and by what share the preferred video may be worse than the
    other: 0.03 is 3%. Setting one replaces all defaults; `labeler.guards={}` is for no veto."""

    @property
    def metric_names(self) -> Sequence[str]:
        """The weighted metrics and the guards."""
        return list(dict.fromkeys([*self.weights, *self.guards]))

    def with_metrics(self, metrics: Mapping[str, Metric]) -> Labeler:
        """The labeler with its metrics, after a check of the weights and of the guards."""
        if min(self.weights.values()) < 0 or not any(self.weights.values()):
            raise UserError(
                "labeler.weights must not be negative, nor all 0: the metrics define which "
                "direction is better. Correct them."
            )
        if any(not 0 <= tolerance <= 1 for tolerance in self.guards.values()):
            raise UserError(
                "labeler.guards must be shares between 0 and 1, such as 0.03 for 3%. Correct them."
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
        columns = []
        notes: list[list[str]] = [[] for _ in prompts]
        for number, segment in enumerate(segments, start=1):
            around = widened(segment, first.shape[2], LEAST_FRAMES)
            pair = [video[:, :, segment] for video in (first, second)]
            wider = pair if around == segment else [v[:, :, around] for v in (first, second)]
            targets = self._values(self.rule.weights, prompts, *pair)
            shared = targets if around == segment else {}
            rest = [name for name in self.rule.guards if name not in shared]
            guards = {**shared, **self._values(rest, prompts, *wider)}
            labels, vetoes = self.decide(targets, guards)
            columns.append(labels)
            for i, note in enumerate(notes):
                measured = ", ".join(
                    f"{name} {one[i]:.4g} : {other[i]:.4g}"
                    for name, (one, other) in {**guards, **targets}.items()
                )
                lost = " and ".join(name for name, veto in vetoes.items() if veto[i])
                held = f" (a tie: the preferred one is worse by {lost})" if lost else ""
                note.append(f"{number}: {measured}{held}")
        return LabelResult(
            labels=torch.stack(columns, dim=1),
            notes=["; ".join(note) for note in notes],
            figures={},
        )

    def _values(
        self, names: Iterable[str], prompts: Sequence[str], first: Videos, second: Videos
    ) -> dict[str, tuple[PerPair, PerPair]]:
        def measured(name: str, videos: Videos) -> PerPair:
            metric = self.metrics[name]
            return checked(metric, "values", metric(videos, prompts), (len(videos),)).float().cpu()

        return {name: (measured(name, first), measured(name, second)) for name in names}

    def decide(
        self,
        targets: Mapping[str, tuple[PerPair, PerPair]],
        guards: Mapping[str, tuple[PerPair, PerPair]],
    ) -> tuple[PerPair, dict[str, Bool[Tensor, " b"]]]:
        """The labels by the values of both videos, and which guards turned them into ties."""
        signs = {
            name: 1 if metric.higher_is_better else -1 for name, metric in self.metrics.items()
        }
        leads = [
            weight * signs[name] * relative_lead(*targets[name])
            for name, weight in self.rule.weights.items()
        ]
        score = torch.stack(leads).sum(0) / sum(self.rule.weights.values())
        labels = torch.where(score.abs() > self.rule.margin, score.sign(), 0.0)
        vetoes = {
            name: loses(labels, *guards[name], tolerance, signs[name])
            for name, tolerance in self.rule.guards.items()
        }
        kept = labels
        for veto in vetoes.values():
            kept = torch.where(veto, 0.0, kept)
        return kept, vetoes


def relative_lead(first: PerPair, second: PerPair) -> PerPair:
    """Difference relative to the mean size, in [-2, 2]; 0 where both are 0."""
    size = (first.abs() + second.abs()) / 2
    return torch.where(size > 0, (first - second) / size.clamp(min=1e-30), 0.0)


def loses(
    labels: PerPair, first: PerPair, second: PerPair, tolerance: float, sign: int
) -> Bool[Tensor, " b"]:
    """Whether the preferred video is worse by more than the share `tolerance`.

    `sign` is 1 for a metric of which more is better, else -1.
    """
    chosen = torch.where(labels > 0, first, second)
    rejected = torch.where(labels > 0, second, first)
    return (labels != 0) & (sign * (rejected - chosen) > tolerance * rejected.abs())


def widened(segment: slice, frames: int, least: int) -> slice:
    """The segment with as many frames around it as make `least`, if the video has them."""
    length = segment.stop - segment.start
    wanted = max(length, min(least, frames))
    start = segment.start - (wanted - length) // 2
    start = max(0, min(start, frames - wanted))
    return slice(start, start + wanted)
