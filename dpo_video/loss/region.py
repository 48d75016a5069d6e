"""Region-level DPO."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from dpo_video.diffusion import chosen_of, sigmoid_loss
from dpo_video.errors import UserError
from dpo_video.strategies import Loss
from dpo_video.types import Latents, LossOutput, PairErrors, PerPair
from dpo_video.types import Region as RegionMask


@final
class Region(Loss):
    """A global term, and one that sees only the region in which the two videos differ.

    LocalDPO (Huang et al. 2026, arXiv 2601.04068): `w_global L_global + w_region L_region` and a
    pull towards the winner. The masked errors are means over the mask's elements of each pair, and
    the region's slope grows with the noise level that the loser was repainted from.
    """

    beta: float = Field(default=2500.0, gt=0)
    """Slope of both terms on their margin of mean squared errors (v-space in the paper)."""
    global_weight: float = Field(default=1.0, ge=0)
    """Weight of the term over all elements."""
    region_weight: float = Field(default=1.0, ge=0)
    """Weight of the term over the region."""
    anchor_weight: float = Field(default=0.1, ge=0)
    """Weight of the policy's error on the chosen video."""
    region_anchor_weight: float = Field(default=0.1, ge=0)
    """Weight of the policy's error on the chosen video, inside the region."""
    scale_by_strength: bool = True
    """Multiply the region's slope by `1 + (strength - 0.75) / 0.15`, as the authors do."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        """The loss of every pair; a UserError for pairs that carry no region."""
        if not (errors.region < 1).any() and not errors.strength.any():
            raise UserError(
                "These pairs have no regions: their two videos differ everywhere. Train them with "
                "--loss global, or build pairs that have regions (--pairs local)."
            )
        everywhere = torch.ones_like(errors.region)
        scale = 1 + (errors.strength - 0.75) / 0.15 if self.scale_by_strength else 1.0
        terms = [
            (self.global_weight, self.anchor_weight, everywhere, self.beta),
            (self.region_weight, self.region_anchor_weight, errors.region, self.beta * scale),
        ]
        chosen_error = chosen_of(errors, errors.policy_first, errors.policy_second)
        decided = errors.winner.abs()  # an even pair has no winner to be pulled towards
        outputs, total = [], torch.zeros_like(errors.strength)
        for weight, anchor, region, beta in terms:
            output = sigmoid_loss(
                masked_mean(errors.change_first, region),
                masked_mean(errors.change_second, region),
                errors.winner,
                beta,
            )
            outputs.append(output)
            pull = decided * masked_mean(chosen_error, region)
            total = total + weight * output.loss + anchor * pull
        # The figures that are shown are the region's: that is where the pair differs.
        shown = outputs[1]
        return LossOutput(
            loss=total,
            margin=shown.margin,
            logits=shown.logits,
            chosen_change=shown.chosen_change,
            rejected_change=shown.rejected_change,
        )


def masked_mean(values: Latents, region: RegionMask) -> PerPair:
    """Mean over the channels and the region's elements of each pair; 0 where it has none."""
    weight: Float[Tensor, "b c f h w"] = region.expand_as(values)
    return (values * weight).sum(dim=(1, 2, 3, 4)) / weight.sum(dim=(1, 2, 3, 4)).clamp(min=1)
