"""Region-level DPO."""

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
    """A global term, and one that sees only the region in which the two videos differ.

    LocalDPO (Huang et al. 2026, arXiv 2601.04068): `w_global L_global + w_region L_region` and a
    pull towards the winner. The masked errors are means over the mask's elements of each pair, and
    the region's slope grows with the noise level that the loser was repainted from.

    The figures shown while it trains are the region's. Pairs must have regions: those of --pairs
    local have, and your own files' if they come with masks.
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
    """Multiply the region's slope by `1 + (strength - 0.75) / 0.15`, as the authors do for their
    strengths, 0.75 and more; below that it stays `beta` (the line would turn negative at 0.6)."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        """The loss of every pair."""
        everywhere = clip_loss(errors, self.beta)
        inside = sigmoid_loss(
            masked_mean(errors.change_first, errors.region),
            masked_mean(errors.change_second, errors.region),
            errors.label,
            self.beta * self._scale(errors.strength),
        )
        pull = chosen_error(errors, errors.majority, errors.region)
        loss = (
            self.global_weight * everywhere.loss
            + self.region_weight * inside.loss
            + self.region_sft_weight * pull
        )
        return with_sft(replace(inside, loss=loss), errors, self.sft_weight)

    def _scale(self, strength: PerPair) -> PerPair:
        scale = 1 + (strength - 0.75) / 0.15
        return scale.clamp(min=1.0) if self.scale_by_strength else torch.ones_like(strength)
