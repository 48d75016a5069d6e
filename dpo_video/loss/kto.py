"""Diffusion-KTO."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, final

import torch
from pydantic import Field

from dpo_video.loss.functional import clip_loss, with_sft
from dpo_video.strategies import Loss
from dpo_video.types import LossOutput, PairErrors


@final
class KTO(Loss):
    """Diffusion-KTO: judges each video by itself, the chosen one liked and the rejected disliked.

    With the reward `r = -d` of a video and the utility `sigmoid`, the loss is the mean of
    `chosen_weight (1 - sigmoid(beta (r_w - z)))` and `rejected_weight (1 - sigmoid(beta (z -
    r_l)))` (Li et al. 2024, arXiv 2404.04465, Eq. 8). The reference point `z`, without gradient, is
    the mean reward of the pair, or 0 if that is negative; in the paper, that of the batch. Unlike
    in DPO, a rejected video far worse than the reference is left alone even if the chosen one has
    not improved.
    """

    reference_free: ClassVar[bool] = False
    linear_in_mean_error: ClassVar[bool] = True

    beta: float = Field(default=2500.0, gt=0)
    """Slope on the change of a video's mean squared error."""
    chosen_weight: float = Field(default=1.0, gt=0)
    """Weight of the chosen video."""
    rejected_weight: float = Field(default=1.0, gt=0)
    """Weight of the rejected video."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the policy's error on the chosen video, added to the loss (0.1 in LocalDPO)."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        """Loss of every pair."""
        output = clip_loss(errors, self.beta)
        chosen, rejected = -output.chosen_change, -output.rejected_change
        decided = errors.label.abs()  # an even pair has no chosen video
        point = ((chosen + rejected) / 2).clamp(min=0).detach()
        disliked = torch.sigmoid(self.beta * decided * (point - chosen))
        liked = torch.sigmoid(self.beta * decided * (rejected - point))
        loss = (self.chosen_weight * disliked + self.rejected_weight * liked) / 2
        return with_sft(replace(output, loss=loss), errors, self.sft_weight)
