"""DPO-Positive."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, final

import torch.nn.functional as F
from pydantic import Field

from dpo_video.loss.functional import clip_loss, with_sft
from dpo_video.strategies import Loss
from dpo_video.types import LossOutput, PairErrors


@final
class DPOP(Loss):
    """DPO-Positive: subtracts a multiple of any rise in the chosen video's error from the margin.

    `-logsigmoid(beta * (m - penalty * max(0, d(chosen))))` (Pal et al. 2024, arXiv 2402.13228).
    While the policy predicts the chosen video at least as well as the reference does, it equals the
    loss `global`.
    """

    linear_in_mean_error: ClassVar[bool] = True

    beta: float = Field(default=2500.0, gt=0)
    """Slope on the margin of mean squared errors."""
    penalty: float = Field(default=5.0, ge=0)
    """The paper's lambda: multiple of the rise in the chosen video's error that is subtracted from
    the margin; 0 is the loss `global`."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the policy's error on the chosen video, added to the loss (0.1 in LocalDPO)."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        """Loss of every pair."""
        output = clip_loss(errors, self.beta)
        decided = errors.label.abs()  # an even pair has no chosen video
        rise = decided * F.relu(output.chosen_change)
        logits = self.beta * output.margin - self.beta * self.penalty * rise
        output = replace(output, loss=-F.logsigmoid(logits))
        return with_sft(output, errors, self.sft_weight)
