"""What losses are made of: pure functions of the errors, one value per pair."""

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
    """`-logsigmoid(beta * m)` of the changes of error `d(first)`, `d(second)`, one per pair.

    `m = d(rejected) - d(chosen)`. An even pair (`label` 0) has margin 0 and no gradient.
    """
    margin = label * (second - first)
    logits = beta * margin
    return LossOutput(
        loss=-F.logsigmoid(logits),
        margin=margin,
        logits=logits,
        gradient_factor=torch.sigmoid(-logits),
        chosen_change=torch.where(label >= 0, first, second),
        rejected_change=torch.where(label >= 0, second, first),
    )


def clip_loss(errors: PairErrors, beta: float) -> LossOutput:
    """`sigmoid_loss` of whole videos: the errors' mean over all elements, the majority's winner.

    What other losses of one margin per video share with it: they replace `loss`, and
    `gradient_factor` where theirs differs.
    """
    first, second = (
        change.mean(dim=(1, 2, 3, 4)) for change in (errors.change_first, errors.change_second)
    )
    return sigmoid_loss(first, second, errors.label, beta)


def with_sft(
    output: LossOutput, errors: PairErrors, weight: float, labels: Preference | None = None
) -> LossOutput:
    """Add `weight` times the policy's error on the chosen video (LocalDPO's pull to the winner).

    Args:
        output: What the loss is without it.
        errors: Of the same pairs.
        weight: 0 adds nothing.
        labels: Who is chosen, per frame; the majority of each pair's frames if left out.
    """
    if weight == 0:
        return output
    pull = chosen_error(errors, errors.majority if labels is None else labels)
    return replace(output, loss=output.loss + weight * pull)


def chosen_error(errors: PairErrors, labels: Preference, region: Region | None = None) -> PerPair:
    """Mean of the policy's error on the video that `labels` choose, frame by frame.

    Over the region's elements, or all; ties are left out, and a pair of ties alone has 0.
    """
    labels = labels[:, None, :, None, None]
    chosen = torch.where(labels > 0, errors.policy_first, errors.policy_second)
    weight = labels.abs() * (torch.ones_like(errors.region) if region is None else region)
    return masked_mean(chosen, weight)


def masked_mean(values: Latents, weight: Region) -> PerPair:
    """Mean over the channels and the elements of each pair that have a weight; 0 without any."""
    total = values.shape[1] * weight.sum(dim=(1, 2, 3, 4))
    # Divided by 1 where all is 0, so that nothing turns into nan.
    return (values * weight).sum(dim=(1, 2, 3, 4)) / torch.where(total > 0, total, 1.0)
