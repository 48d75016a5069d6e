"""Poly-DPO."""

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
class Poly(Loss):
    """Poly-DPO: one more polynomial term, for labels that contradict each other.

    `-log p + alpha (1 - p)` with `p = sigmoid(beta * m)` (Li et al. 2026, arXiv 2604.24953). A
    positive `alpha` lets pairs count most whose `p` is near 1/2, as noisy labels need it; a
    negative one learns less from pairs that are too easy.
    """

    linear_in_mean_error: ClassVar[bool] = True

    beta: float = Field(default=2500.0, gt=0)
    """Slope on the margin of mean squared errors."""
    alpha: float = Field(default=1.0, gt=-2)
    """Weight of the term; 0 is the loss `global`, and at -2 nothing would move it from margin 0.
    The paper chooses it for each set of pairs, near 0 for reliable labels."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the policy's error on the chosen video, added to the loss (0.1 in LocalDPO)."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        """Loss of every pair."""
        output = clip_loss(errors, self.beta)
        logits = self.beta * output.margin
        loss = -F.logsigmoid(logits) + self.alpha * torch.sigmoid(-logits)
        return with_sft(replace(output, loss=loss), errors, self.sft_weight)
