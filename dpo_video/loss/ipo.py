"""Identity preference optimisation."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, final

from pydantic import Field

from dpo_video.loss.functional import clip_loss, with_sft
from dpo_video.strategies import Loss
from dpo_video.types import LossOutput, PairErrors


@final
class IPO(Loss):
    """IPO: pulls every margin to one target value, so that certain labels are not overfitted.

    `(m - 1 / (2 beta))^2` (Azar et al. 2023, arXiv 2310.12036, Eq. 17), times the constant
    `(2 beta)^2`, since the squares of margins near 1e-4 vanish below an optimizer's epsilon. The
    loss is therefore `(2 beta m - 1)^2`: it starts at 1 and is 0 at `beta * m = 0.5`.
    """

    linear_in_mean_error: ClassVar[bool] = True

    beta: float = Field(default=2500.0, gt=0)
    """The paper's tau: the target margin is `1 / (2 beta)`; a larger beta keeps the policy closer
    to the reference."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the policy's error on the chosen video, added to the loss (0.1 in LocalDPO)."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        """Loss of every pair."""
        output = clip_loss(errors, self.beta)
        output = replace(output, loss=(1 - 2 * (self.beta * output.margin)).square())
        return with_sft(output, errors, self.sft_weight)
