"""Plackett-Luce over a group of samples."""

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
class Group(Loss):
    """Plackett-Luce: every sample of a group against all that are ranked below it.

    The sum over the samples `k` of a prompt of `-log(e_k / (e_k + sum_j e_j))`, where `j` runs over
    the samples ranked below `k`, `e = exp(-beta d)`, and `d` is the change of a video's mean
    squared error: Diffusion-DPO for the Plackett-Luce model of a whole ranking (Diffusion-LPO, Bai
    et al. 2025, arXiv 2510.01540; for videos PhyGDPO, Cai et al. 2025, arXiv 2512.24551). Ties are
    not compared with each other. On a pair it is the loss `global`.

    Groups are pairs of kind `ranked` with `pairs.keep=all`. Margin and accuracy are those of the
    best and the worst sample.
    """

    sees_groups: ClassVar[bool] = True
    linear_in_mean_error: ClassVar[bool] = True

    beta: float = Field(default=2500.0, gt=0)
    """Slope on the change of a video's mean squared error."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the policy's error on the best sample, added to the loss (0.1 in LocalDPO)."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        """Loss of every group."""
        output, group = clip_loss(errors, self.beta), errors.between
        if group is not None:
            between = (group.policy - group.reference).mean(dim=(2, 3, 4, 5))
            ends = output.chosen_change[:, None], output.rejected_change[:, None]
            changes = torch.cat([ends[0], between, ends[1]], dim=1)
            # [b, k, j]: log(e_j / e_k), where j is ranked below k.
            below = group.ranks[:, None, :] > group.ranks[:, :, None]
            logits = self.beta * (changes[:, :, None] - changes[:, None, :])
            logits = logits.masked_fill(~below, -torch.inf)
            one = F.pad(logits, (1, 0))  # e_k / e_k; the gradient of no terms at all would be nan
            output = replace(output, loss=one.logsumexp(dim=2).sum(dim=1))
        return with_sft(output, errors, self.sft_weight)
