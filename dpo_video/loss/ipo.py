"""DPO with a target for the margin instead of a sigmoid."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, final

from pydantic import Field

from dpo_video.loss.functional import clip_loss, with_sft
from dpo_video.strategies import Loss
from dpo_video.types import LossOutput, PairErrors


@final
class IPO(Loss):
    """Draw every margin to one value and no further, so that sure labels are not overfitted.

    IPO (Azar et al. 2023, arXiv 2310.12036, Eq. 17): `(m - 1 / (2 beta))^2`, here times the
    constant `(2 beta)^2`, as margins are around 1e-4 and an optimizer's epsilon would drown their
    squares. So the loss is `(2 beta m - 1)^2`: it begins at 1, and is 0 at `beta * m = 0.5`.
    """

    linear_in_mean_error: ClassVar[bool] = True

    beta: float = Field(default=2500.0, gt=0)
    """The paper's tau: the margin is drawn to `1 / (2 beta)`, a larger beta keeps the policy nearer
    to the reference."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the policy's error on the chosen video, added to the loss (0.1 in LocalDPO)."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        """The loss of every pair."""
        output = clip_loss(errors, self.beta)
        missing = 1 - 2 * output.logits
        output = replace(output, loss=missing.square(), gradient_factor=0.5 * missing)
        return with_sft(output, errors, self.sft_weight)
