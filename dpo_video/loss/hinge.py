"""SLiC-HF's hinge."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, final

import torch.nn.functional as F
from pydantic import Field

from dpo_video.loss.functional import clip_loss, with_sft
from dpo_video.strategies import Loss
from dpo_video.types import LossOutput, PairErrors


@final
class Hinge(Loss):
    """Hinge loss of SLiC-HF: pushes at a constant rate until a target margin is reached.

    `relu(1 - beta * m)` (Zhao et al. 2023, arXiv 2305.10425) on the implicit reward of DPO. It
    starts at 1 and is 0 from `beta * m = 1` on.
    """

    linear_in_mean_error: ClassVar[bool] = True

    beta: float = Field(default=2500.0, gt=0)
    """Slope on the margin of mean squared errors; the target margin is `1 / beta`."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the policy's error on the chosen video, added to the loss (0.1 in LocalDPO)."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        """Loss of every pair."""
        output = clip_loss(errors, self.beta)
        output = replace(output, loss=F.relu(1 - self.beta * output.margin))
        return with_sft(output, errors, self.sft_weight)
