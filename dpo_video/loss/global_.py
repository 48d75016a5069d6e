"""Diffusion-DPO on whole videos."""

from __future__ import annotations

from typing import ClassVar, final

from pydantic import Field

from dpo_video.loss.functional import clip_loss, with_sft
from dpo_video.strategies import Loss
from dpo_video.types import LossOutput, PairErrors


@final
class Global(Loss):
    """Diffusion-DPO: compares the mean errors of whole videos by one sigmoid per pair.

    `-logsigmoid(beta * m)` (Wallace et al. 2023, arXiv 2311.12908, Eq. 14), where `m` is the mean
    change of squared error of the rejected video less that of the chosen one. The majority of a
    pair's frames decides which video is chosen; an even pair has no gradient.
    """

    linear_in_mean_error: ClassVar[bool] = True

    beta: float = Field(default=2500.0, gt=0)
    """Slope on the margin of mean squared errors. Published code multiplies by a hidden 0.5: their
    beta of 5000 is 2500 here."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the policy's error on the chosen video, added to the loss (0.1 in LocalDPO)."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        """Loss of every pair."""
        return with_sft(clip_loss(errors, self.beta), errors, self.sft_weight)
