"""A loss for dpo-video that comes from outside it."""

from __future__ import annotations

from dataclasses import replace
from typing import final

from pydantic import Field

from dpo_video.loss.functional import sigmoid_loss
from dpo_video.strategies import Loss
from dpo_video.types import LossOutput, PairErrors


@final
class Focal(Loss):
    """Learn most from pairs that are already ranked right, least from those ranked wrong.

    FocalPO (Liu et al. 2025, arXiv 2501.06645): `-p^gamma log p`, where `p = sigmoid(beta m)` is
    the probability that the policy gives to the label. For labels that are often wrong, such as a
    vision-language model's: clip-level DPO pulls hardest on the pairs that contradict all others.
    """

    beta: float = Field(default=2500.0, gt=0)
    """Slope on the margin of mean squared errors."""
    gamma: float = Field(default=0.05, ge=0, le=1)
    """How much a pair that is ranked wrong is turned down; 0 is clip-level DPO. From 1 / ln 2 on,
    the pull at the start of a run would even turn round."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        """The loss of every pair."""
        first = errors.change_first.mean(dim=(1, 2, 3, 4))
        second = errors.change_second.mean(dim=(1, 2, 3, 4))
        output = sigmoid_loss(first, second, errors.label, self.beta)
        # p^gamma as exp(-gamma * -log p): log p is the number that does not underflow.
        return replace(output, loss=(-self.gamma * output.loss).exp() * output.loss)
