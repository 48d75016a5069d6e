"""MaPO."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from pydantic import Field

from dpo_video.loss.functional import clip_loss
from dpo_video.strategies import Loss
from dpo_video.types import LossOutput, PairErrors, PerPair

_SMALL = 1e-3


@final
class MaPO(Loss):
    """MaPO: fine-tuning plus a margin between the policy's own errors, without a reference.

    `err_w - beta logsigmoid(s(err_w) - s(err_l))` with the score `s(x) = snr x / (exp(snr x) - 1)`
    of a mean squared error, as the authors train it (Hong et al. 2024, arXiv 2406.06424). Margin
    and accuracy are of the errors themselves, and the changes of error are the errors.
    """

    needs_reference: ClassVar[bool] = False
    linear_in_mean_error: ClassVar[bool] = True

    beta: float = Field(default=0.1, gt=0)
    """Weight of the margin's term."""
    snr: float = Field(default=0.5, gt=0)
    """Factor of the errors in the score: the authors' constant for the signal-to-noise ratio."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        """Loss of every pair."""
        output = clip_loss(errors, beta=1.0)
        decided = errors.label.abs()  # an even pair has no chosen video
        chosen = decided * output.chosen_change
        difference = self._score(chosen) - self._score(decided * output.rejected_change)
        return replace(output, loss=chosen - self.beta * F.logsigmoid(difference))

    def _score(self, error: PerPair) -> PerPair:
        scaled = self.snr * error
        small = scaled.abs() < _SMALL  # of the series, to second order: 0 / 0 has no gradient
        ratio = torch.where(small, 1.0, scaled)
        return torch.where(small, 1 - scaled / 2 + scaled.square() / 12, ratio / torch.expm1(ratio))
