"""DPO that pays for a winner that gets worse."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from pydantic import Field

from dpo_video.loss.functional import clip_loss, with_sft
from dpo_video.strategies import Loss
from dpo_video.types import LossOutput, PairErrors


@final
class DPOP(Loss):
    """What the winner's error rises by is taken off the margin, several times over.

    DPO-Positive (Pal et al. 2024, arXiv 2402.13228): `-logsigmoid(beta * (m - penalty *
    max(0, d(chosen))))`. As long as the policy predicts the chosen video at least as well as the
    reference does, it is the loss `global`.
    """

    linear_in_mean_error: ClassVar[bool] = True

    beta: float = Field(default=2500.0, gt=0)
    """Slope on the margin of mean squared errors."""
    penalty: float = Field(default=5.0, ge=0)
    """The paper's lambda: how many times the rise of the error on the chosen video is taken off the
    margin; 0 is the loss `global`."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the policy's error on the chosen video, added to the loss (0.1 in LocalDPO)."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        """The loss of every pair."""
        output = clip_loss(errors, self.beta)
        decided = errors.label.abs()  # an even pair has no winner to pay for
        rise = decided * F.relu(output.chosen_change)
        logits = output.logits - self.beta * self.penalty * rise
        output = replace(output, loss=-F.logsigmoid(logits), gradient_factor=torch.sigmoid(-logits))
        return with_sft(output, errors, self.sft_weight)
