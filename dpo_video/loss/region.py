"""LocalDPO."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, final

import torch
from pydantic import Field

from dpo_video.loss.functional import chosen_error, clip_loss, masked_mean, sigmoid_loss, with_sft
from dpo_video.strategies import Loss
from dpo_video.types import LossOutput, PairErrors, PerPair


@final
class Region(Loss):
    """LocalDPO: adds to the global loss one over the region in which the two videos differ.

    `w_global L_global + w_region L_region` plus the chosen video's error (Huang et al. 2026, arXiv
    2601.04068). Masked errors are means over the elements of each pair's mask, and the region's
    slope grows with the strength at which the rejected video was repainted.

    Margin and changes of error are those of the region. Pairs must have regions: pairs of kind
    `local` do, and so do your own files if they come with masks.
    """

    needs_region: ClassVar[bool] = True

    beta: float = Field(default=2500.0, gt=0)
    """Slope of both terms on their margin of mean squared errors (v-space in the paper)."""
    global_weight: float = Field(default=1.0, ge=0)
    """Weight of the term over all elements."""
    region_weight: float = Field(default=1.0, ge=0)
    """Weight of the term over the region."""
    sft_weight: float = Field(default=0.1, ge=0)
    """Weight of the policy's error on the chosen video."""
    region_sft_weight: float = Field(default=0.1, ge=0)
    """Weight of the policy's error on the chosen video, inside the region."""
    scale_by_strength: bool = True
    """Multiply the region's slope and `region_sft_weight` by `1 + (strength - 0.75) / 0.15`, as the
    authors do for strengths of 0.75 and more; below that by 1 (the formula turns negative at
    0.6)."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        """Loss of every pair."""
        everywhere = clip_loss(errors, self.beta)
        scale = self._scale(errors.strength)
        inside = sigmoid_loss(
            masked_mean(errors.change_first, errors.region),
            masked_mean(errors.change_second, errors.region),
            errors.label,
            self.beta * scale,
        )
        pull = scale * chosen_error(errors, errors.majority, errors.region)
        loss = (
            self.global_weight * everywhere.loss
            + self.region_weight * inside.loss
            + self.region_sft_weight * pull
        )
        return with_sft(replace(inside, loss=loss), errors, self.sft_weight)

    def _scale(self, strength: PerPair) -> PerPair:
        scale = 1 + (strength - 0.75) / 0.15
        return scale.clamp(min=1.0) if self.scale_by_strength else torch.ones_like(strength)
