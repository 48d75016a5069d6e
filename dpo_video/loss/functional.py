"""Parts of losses: pure functions of the errors, one value per pair."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from dpo_video.types import (
    Latents,
    LossOutput,
    PairErrors,
    PerPair,
    Preference,
    Region,
)


def sigmoid_loss(
    first: PerPair, second: PerPair, label: PerPair, beta: float | PerPair
) -> LossOutput:
    """`-logsigmoid(beta * m)` of the changes of error `d(first)` and `d(second)`, one per pair.

    `m = d(rejected) - d(chosen)`. An even pair (`label` 0) has margin 0 and no gradient.
    """
    margin = label * (second - first)
    return LossOutput(
        loss=-F.logsigmoid(beta * margin),
        margin=margin,
        chosen_change=torch.where(label >= 0, first, second),
        rejected_change=torch.where(label >= 0, second, first),
    )


def clip_loss(errors: PairErrors, beta: float) -> LossOutput:
    """`sigmoid_loss` of whole videos: mean error over all elements, majority label.

    Other losses of one margin per video replace its `loss` by a function of `margin`.
    """
    first, second = (
        change.mean(dim=(1, 2, 3, 4)) for change in (errors.change_first, errors.change_second)
    )
    return sigmoid_loss(first, second, errors.label, beta)


def with_sft(
    output: LossOutput, errors: PairErrors, weight: float, labels: Preference | None = None
) -> LossOutput:
    """Add `weight` times the policy's error on the chosen video (LocalDPO's SFT term).

    Args:
        output: Output of the loss without the term.
        errors: Errors of the same pairs.
        weight: Weight of the term; 0 adds nothing.
        labels: Preference per frame; the majority of each pair's frames if None.
    """
    if weight == 0:
        return output
    pull = chosen_error(errors, errors.majority if labels is None else labels)
    return replace(output, loss=output.loss + weight * pull)


def chosen_error(errors: PairErrors, labels: Preference, region: Region | None = None) -> PerPair:
    """Mean of the policy's error on the video that `labels` prefer in each frame.

    The mean is over the region, or over all elements. Tied frames are left out; a pair whose
    frames are all ties has 0.
    """
    labels = labels[:, None, :, None, None]
    chosen = torch.where(labels > 0, errors.policy_first, errors.policy_second)
    weight = labels.abs() * (torch.ones_like(errors.region) if region is None else region)
    return masked_mean(chosen, weight)


def masked_mean(values: Latents, weight: Region) -> PerPair:
    """Weighted mean over all channels and elements of each pair; 0 where all weights are 0."""
    total = values.shape[1] * weight.sum(dim=(1, 2, 3, 4))
    # A denominator of 1 where all weights are 0 prevents nan.
    return (values * weight).sum(dim=(1, 2, 3, 4)) / torch.where(total > 0, total, 1.0)
