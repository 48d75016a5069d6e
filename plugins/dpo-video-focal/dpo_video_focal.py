"""FocalPO as a plugin of dpo-video."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, final

from dpo_video.plugin import Field, Loss, LossOutput, PairErrors, clip_loss


@final
class Focal(Loss):
    """FocalPO: learns most from pairs already ranked right, least from those ranked wrong.

    `-p^gamma log p` (Liu et al. 2025, arXiv 2501.06645), where `p = sigmoid(beta m)` is the
    probability that the policy gives to the label. It suits labels that are often wrong, such as
    those of a vision-language model: DPO pulls hardest on the pairs that contradict all others.
    """

    # A function of a video's mean error: memory.backward=linear can train it.
    linear_in_mean_error: ClassVar[bool] = True

    beta: float = Field(default=2500.0, gt=0)
    """Slope on the margin of mean squared errors."""
    gamma: float = Field(default=0.05, ge=0, le=1)
    """How much less a pair that is ranked wrong counts; 0 is the loss `global`. From 1 / ln 2 on,
    the loss would lower the margin at the start of a run."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        """Loss of every pair."""
        output = clip_loss(errors, self.beta)
        # p^gamma as exp(-gamma * -log p), since log p does not underflow.
        return replace(output, loss=(-self.gamma * output.loss).exp() * output.loss)
