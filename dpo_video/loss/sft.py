"""Supervised fine-tuning."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, final

from pydantic import Field

from dpo_video.loss.functional import chosen_error, clip_loss
from dpo_video.strategies import Loss
from dpo_video.types import LossOutput, PairErrors


@final
class SFT(Loss):
    """Supervised fine-tuning on the chosen videos: the baseline of preference losses.

    `sft_weight` times the policy's mean squared error on the chosen video, the loss of DDPM (Ho et
    al. 2020, arXiv 2006.11239, Eq. 14). The majority of a pair's frames decides which video is
    chosen; an even pair has no gradient.

    Neither the rejected video nor the reference is predicted, so that a step costs about a third of
    one of the loss `global`, and no margin and no accuracy are reported.
    """

    compares: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    linear_in_mean_error: ClassVar[bool] = True

    sft_weight: float = Field(default=1.0, gt=0)
    """Weight of the policy's error on the chosen video. It is the `sft_weight` of the other losses:
    `global` or `region` with `loss.sft_weight=W` adds this loss at the same W to its preference
    terms (`region` also adds `region_sft_weight` times the error inside the region). AdamW's steps
    hardly depend on it; `train.max_grad_norm` applies to the weighted gradient."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        """Loss of every pair."""
        loss = self.sft_weight * chosen_error(errors, errors.majority)
        return replace(clip_loss(errors, beta=1.0), loss=loss)
