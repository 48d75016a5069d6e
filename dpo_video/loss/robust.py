"""Robust and conservative DPO."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal, final

import torch.nn.functional as F
from pydantic import Field

from dpo_video.loss.functional import clip_loss, with_sft
from dpo_video.strategies import Loss
from dpo_video.types import LossOutput, PairErrors


@final
class Robust(Loss):
    """rDPO or cDPO: label smoothing for labels of which a known fraction is wrong.

    With `z = beta * m` and `e` the fraction of wrong labels, "robust" is rDPO (Chowdhury et al.
    2024, arXiv 2403.00409), `((1 - e) L(z) - e L(-z)) / (1 - 2 e)` with `L = -logsigmoid`: its
    mean over flipped labels is DPO's loss on the true ones. "conservative" is cDPO (Mitchell 2023,
    "A note on DPO with noisy preferences"), `(1 - e) L(z) + e L(-z)`: its minimum is at the margin
    that matches the labels' reliability, `z = ln((1 - e) / e)`. rDPO has no minimum, so watch the
    chosen video's error.
    """

    linear_in_mean_error: ClassVar[bool] = True

    beta: float = Field(default=2500.0, gt=0)
    """Slope on the margin of mean squared errors."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=0.5)
    """Assumed fraction of wrong labels: 0.3 for a labeler that is right 70% of the time; 0 is the
    loss `global`."""
    variant: Literal["robust", "conservative"] = "robust"
    """rDPO ("robust") or cDPO ("conservative")."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the policy's error on the chosen video, added to the loss (0.1 in LocalDPO)."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        """Loss of every pair."""
        output = clip_loss(errors, self.beta)
        wrong, logits = self.label_smoothing, self.beta * output.margin
        right, flipped = -F.logsigmoid(logits), -F.logsigmoid(-logits)
        if self.variant == "robust":
            loss = ((1 - wrong) * right - wrong * flipped) / (1 - 2 * wrong)
        else:
            loss = (1 - wrong) * right + wrong * flipped
        return with_sft(replace(output, loss=loss), errors, self.sft_weight)
